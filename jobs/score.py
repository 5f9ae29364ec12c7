"""Embeddings and Gaussians -> difficulty columns.

hardset score --run RUN
"""

import sys
from typing import Any

from jobs.options import CorpusOptions, GaussianOptions, WeightOptions, WorkerOptions
from jobs.stage_command import stage_command


def score(
    run: Any, corpus: CorpusOptions, workers: WorkerOptions, gaussians: GaussianOptions, weights: WeightOptions
) -> dict[str, Any]:
    """Write the difficulty columns of the shards whose inputs changed."""
    from jobs import stages

    if gaussians.gaussians is not None:
        stages.fit(run, gaussians, workers)
    return stages.score(run, gaussians, weights, workers)


COMMAND = stage_command("score", __doc__, score, product="difficulty")
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
