"""The main job: embed, fit, score, select, report; with --neighbors duplicates and votes too.

hardset curate --shards 'DIR/train-{000000..000049}.tar' --run RUN --encoder open_clip:ViT-B-32/laion2b_s34b_b79k
"""

import dataclasses
import sys

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, SubsetOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked

K = 30  # nearest, as hardset neighbors has it by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlsoOptions:
    """What else is made."""

    neighbors: bool = False
    """also hardset neighbors: the votes enter label_error, and the subset holds one of each group of duplicates"""


def curate(
    options: RunOptions,
    corpus: CorpusOptions,
    workers: WorkerOptions,
    gaussians: GaussianOptions,
    weights: WeightOptions,
    selection: SubsetOptions,
    also: AlsoOptions,
) -> dict:
    """All stages, one after the other; each does only what is missing."""
    from jobs import stages

    groups = (corpus, workers, gaussians, weights, selection, also)
    stages.check_selection(selection, weights.seed)
    run = stages.open_run(options, corpus, gaussians)
    stages.check_selected_groups(run, selection, also.neighbors)
    with tracked("curate", options, *groups) as tracker, ray_session(options):
        result = {
            "run": run.uri,
            "embed": stages.embed(run, workers, corpus),
            "fit": stages.fit(run, gaussians, workers),
            **({"neighbors": stages.neighbors(run, K)} if also.neighbors else {}),
            "score": stages.score(run, gaussians, weights, workers),
            "select": stages.select_hard(run, selection, weights.seed, once=also.neighbors),
            "report": stages.report(run, tracker),
        }
        tracker.metrics(result)
    return result


COMMAND = Command(
    "curate",
    __doc__,
    (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions, SubsetOptions, AlsoOptions),
    curate,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
