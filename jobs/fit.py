"""Embeddings -> Gaussians.

hardset fit --run RUN
"""

import dataclasses
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked


def fit(
    options: RunOptions,
    corpus: CorpusOptions,
    workers: WorkerOptions,
    gaussians: GaussianOptions,
    weights: WeightOptions,
) -> dict:
    """Fit the class-conditional and class-agnostic Gaussians, unless they are up to date."""
    from jobs import stages

    run = stages.open_run(options, dataclasses.replace(corpus, overwrite=False))
    if corpus.overwrite:
        run.forget("fit", "gaussians.npz")
    with tracked("fit", options, gaussians) as tracker, ray_session(options):
        result = {"run": run.uri, "fit": stages.fit(run, gaussians, workers)}
        tracker.metrics(result)
    return result


# The stages take the same options, so that one YAML file serves curate and each of them.
COMMAND = Command("fit", __doc__, (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions), fit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
