"""Shards -> embeddings, and what had to be left out.

hardset embed --run RUN --shards SHARDS --encoder ENCODER
"""

import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked


def embed(
    options: RunOptions,
    corpus: CorpusOptions,
    workers: WorkerOptions,
    gaussians: GaussianOptions,
    weights: WeightOptions,
) -> dict:
    """Embed the shards that are not embedded yet."""
    from jobs import stages

    run = stages.open_run(options, corpus)
    with tracked("embed", options, corpus, workers) as tracker, ray_session(options):
        result = {"run": run.uri, "embed": stages.embed(run, workers)}
        tracker.metrics(result)
    return result


# The stages take the same options, so that one YAML file serves curate and each of them.
COMMAND = Command("embed", __doc__, (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions), embed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
