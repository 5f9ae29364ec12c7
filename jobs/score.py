"""Embeddings and Gaussians -> difficulty columns.

hardset score --run RUN
"""

import dataclasses
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked


def score(
    options: RunOptions,
    corpus: CorpusOptions,
    workers: WorkerOptions,
    gaussians: GaussianOptions,
    weights: WeightOptions,
) -> dict:
    """Write the difficulty columns of the shards whose inputs changed."""
    from jobs import stages

    run = stages.open_run(options, dataclasses.replace(corpus, overwrite=False))
    if corpus.overwrite:
        run.forget("score", "difficulty")
    with tracked("score", options, gaussians, weights) as tracker, ray_session(options):
        if gaussians.gaussians is not None:
            stages.fit(run, gaussians, workers)
        result = {"run": run.uri, "score": stages.score(run, weights, workers)}
        tracker.metrics(result)
    return result


# The stages take the same options, so that one YAML file serves curate and each of them.
COMMAND = Command("score", __doc__, (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions), score)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
