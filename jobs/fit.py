"""Embeddings -> Gaussians.

hardset fit --run RUN
"""

import sys
from typing import Any

from jobs.options import CorpusOptions, GaussianOptions, WeightOptions, WorkerOptions
from jobs.stage_command import stage_command


def fit(
    run: Any, corpus: CorpusOptions, workers: WorkerOptions, gaussians: GaussianOptions, weights: WeightOptions
) -> dict[str, Any]:
    """Fit the class-conditional and class-agnostic Gaussians, unless they are up to date."""
    from jobs import stages

    return stages.fit(run, gaussians, workers)


COMMAND = stage_command("fit", __doc__, fit, product="gaussians.npz")
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
