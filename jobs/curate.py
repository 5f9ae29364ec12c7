"""The main job: embed, fit, score, select, report.

hardset curate --shards 'DIR/train-{000000..000049}.tar' --run RUN --encoder open_clip:ViT-B-32/laion2b_s34b_b79k
"""

import sys

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, SelectOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked


def curate(
    options: RunOptions,
    corpus: CorpusOptions,
    workers: WorkerOptions,
    gaussians: GaussianOptions,
    weights: WeightOptions,
    selection: SelectOptions,
) -> dict:
    """All stages, one after the other; each does only what is missing."""
    from jobs import stages
    from pipelines.runs import column_groups, columns

    groups = (corpus, workers, gaussians, weights, selection)
    stages.check_selection(selection)
    run = stages.open_run(options, corpus, gaussians)
    if not selection.by.startswith(columns.DIFFICULTY + "."):  # which curate makes, and no other
        column_groups.check_score(run.uri, len(run.shards), selection.by, "--by")
    with tracked("curate", options, *groups) as tracker, ray_session(options):
        result = {
            "run": run.uri,
            "embed": stages.embed(run, workers),
            "fit": stages.fit(run, gaussians, workers),
            "score": stages.score(run, weights, workers),
            "select": stages.select(run, stages.ranked_by_what_is_there(run, selection)),
            "report": stages.report(run, tracker),
        }
        tracker.metrics(result)
    return result


COMMAND = Command(
    "curate",
    __doc__,
    (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions, SelectOptions),
    curate,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
