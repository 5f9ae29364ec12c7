"""Prediction sets side by side: accuracy, calibration, selective prediction, failure and OOD detection.

hardset evaluate --run RUN --predictions NAME [NAME …] [--trust NAME …] [--ood RUN2]
"""

import dataclasses
import sys
import time
from typing import Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions, at_least
from jobs.session import ray_session, tracked
from pipelines.runs.errors import UserError

Method = Literal["temperature", "meta_misclassification", "meta_accuracy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is compared with the labels."""

    predictions: list[str] = dataclasses.field(default_factory=list)
    """prediction sets of the run, side by side (folders under predictions/)"""
    trust: list[str] = dataclasses.field(default_factory=list)
    """trust sets of the run (folders under trust/)"""
    ood: str | None = None
    """another run, all of whose samples count as out of distribution; it needs predictions of the same names"""
    groups: str | None = None
    """groups for the worst-group accuracy: GROUP.COLUMN (its values), GROUP.COLUMN:EDGE,EDGE or GROUP.COLUMN:qN"""
    bootstrap: int = 200
    """resamples behind each 95 % interval; 0: no intervals"""
    seed: int = 0
    """seed of the resamples and of the choice of calibration shards"""
    figures: bool = False
    """also write reliability diagrams, risk-coverage curves and histograms as PNG beside the results"""

    def __post_init__(self) -> None:
        at_least(self, 0, ("bootstrap", "seed"))
        if reserved := {"run", "seconds"} & {*self.predictions, *self.trust}:
            raise UserError(f"{' '.join(sorted(reserved))}: the result has that name for something else", "predictions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Post-hoc calibration, fitted on held-out samples; before and after are then shown side by side."""

    calibrate: list[Method] = dataclasses.field(default_factory=list)
    """one or several; a single one is also saved in the checkpoint that made the predictions, and predict applies it"""
    calibration_shards: float = 0.2
    """fraction of the run's shards to fit on, in (0, 1); all metrics are then those of the other shards"""
    calibration_run: str | None = None
    """fit on the predictions of the same name of this run instead, and evaluate on all shards"""
    meta_alpha: float = 0.05
    """meta_misclassification: share of correct predictions to give up, in [0, 1]"""
    meta_accuracy: float = 0.9
    """meta_accuracy: accuracy wanted of the samples that are kept, in [0, 1]"""

    def __post_init__(self) -> None:
        for name in ("meta_alpha", "meta_accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{getattr(self, name)}: expected a fraction in [0, 1]", name)


def evaluate(options: RunOptions, asked: EvaluateOptions, calibration: CalibrateOptions) -> dict[str, Any]:
    """Evaluate every set, store each, print them side by side."""
    from pipelines.evaluation import sidebyside
    from pipelines.evaluation.calibrate import MetaTargets
    from pipelines.runs.record import Run

    started = time.monotonic()
    run = Run.open(options.run)
    other = None if asked.ood is None else Run.open(asked.ood, "ood")
    elsewhere = calibration.calibration_run
    fitted = None if elsewhere is None else Run.open(elsewhere, "calibration_run")
    question = sidebyside.Question(
        predictions=tuple(asked.predictions),
        trust=tuple(asked.trust),
        groups=asked.groups,
        calibrate=tuple(calibration.calibrate),
        calibration_shards=calibration.calibration_shards,
        targets=MetaTargets(calibration.meta_alpha, calibration.meta_accuracy),
        bootstrap=asked.bootstrap,
        seed=asked.seed,
    )
    with run.lease("evaluation"), tracked("evaluate", options, asked, calibration) as tracker, ray_session(options):
        answer = sidebyside.side_by_side(run, question, other, fitted)
        sidebyside.show(answer, say)
        drawn = sidebyside.draw(answer) if asked.figures or tracker.active else {}
        if asked.figures:
            paths = sidebyside.store_figures(run, drawn)
            say(f"figures: {len(paths)} PNG in {run.path('evaluation')}")
        for name, figure in drawn.items():
            tracker.figure(figure, f"figures/{name}.png")
        tracker.metrics({name: evaluation.metrics for name, evaluation in answer.trusts.items()})
        tracker.metrics({evaluation.name: evaluation.metrics for evaluation in answer.found})
    return {"run": run.uri, "seconds": time.monotonic() - started} | answer.record


COMMAND = Command("evaluate", __doc__, (RunOptions, EvaluateOptions, CalibrateOptions), evaluate)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
