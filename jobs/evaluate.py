"""Prediction sets side by side: accuracy, calibration, selective prediction, failure and OOD detection.

hardset evaluate --run RUN --predictions NAME [NAME …] [--trust NAME …] [--ood RUN2]
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions
from jobs.session import Tracker, ray_session, tracked
from pipelines import calibrate, columns, detection, figures, storage
from pipelines.evaluate import Evaluation, Grouping, evaluate, store
from pipelines.outcomes import Calibrator, PredictionSet, open_predictions
from pipelines.run import Run

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
    """groups for the worst-group accuracy: GROUP.COLUMN (its values) or GROUP.COLUMN:EDGE,EDGE, as confusion.confusion:5"""
    bootstrap: int = 200
    """resamples behind each 95 % interval; 0: no intervals"""
    seed: int = 0
    """seed of the resamples and of the choice of calibration shards"""
    figures: bool = False
    """also write reliability diagrams, risk-coverage curves and histograms as PNG beside the results"""


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


def run_evaluate(options: RunOptions, asked: EvaluateOptions, calibration: CalibrateOptions) -> dict[str, Any]:
    """Evaluate every set, store each, print them side by side."""
    started = time.monotonic()
    run, others = Run.open(options.run), Run.open(asked.ood) if asked.ood else None
    names = list(dict.fromkeys(asked.predictions))
    if not names:
        raise ValueError("--predictions: which? name at least one prediction set of the run")
    if asked.bootstrap < 0:
        raise ValueError(f"--bootstrap {asked.bootstrap}: a number of resamples, 0 or more")
    grouping = Grouping.parse(asked.groups) if asked.groups else None
    sets = {name: open_predictions(run, name) for name in names}
    watched = {name: _watched(run, name, sets) for name in dict.fromkeys(asked.trust)}
    with tracked("evaluate", options, asked, calibration) as tracker, ray_session(options):
        found, used = [], {}
        for name, predictions in sets.items():
            for label, over, calibrator in _variants(run, predictions, calibration, asked.seed):
                found.append(evaluate(run, over, calibrator, label, grouping, asked.bootstrap, asked.seed))
                used[name] = over
        result = {evaluation.name: evaluation.record() for evaluation in found}
        if others is not None:
            for name in names:
                result[name]["ood"] = _ood(run, used[name], others)
        trusts = {
            name: detection.evaluate_trust(run, name, used[owner], asked.bootstrap, asked.seed)
            for name, owner in watched.items()
        }
        for evaluation in found:
            store(run, evaluation, started, **{k: v for k, v in result[evaluation.name].items() if k == "ood"})
        for name, evaluation in trusts.items():
            store(run, dataclasses.replace(evaluation, name=_trust_label(name, result)), started, trust=name)
        _add_trust(result, trusts, watched)
        _show(found, trusts, result)
        if asked.figures or tracker.run_id:
            _draw(run, found, trusts, tracker, asked.figures)
        tracker.metrics(result)
    return {"run": run.uri, "seconds": time.monotonic() - started} | result


def _watched(run: Run, trust: str, sets: dict[str, PredictionSet]) -> str:
    """The prediction set whose classifier a trust set is about."""
    facts = detection.trust_facts(run, trust)
    if len(sets) == 1:
        return next(iter(sets))
    for name, predictions in sets.items():
        theirs = columns.facts(run.uri, predictions.group, 0) or {}
        if facts.get("checkpoint_digest") and theirs.get("checkpoint_digest") == facts["checkpoint_digest"]:
            return name
    raise ValueError(
        f"--trust {trust}: none of the predictions {', '.join(sets)} is known to be its classifier's; give the one alone"
    )


def _variants(
    run: Run, predictions: PredictionSet, options: CalibrateOptions, seed: int
) -> Iterator[tuple[str, PredictionSet, Calibrator | None]]:
    """(name, predictions, calibrator): as they are, and once per method."""
    if not options.calibrate:
        yield predictions.name, predictions, None
        return
    before = calibrate.applied_calibration(run, predictions)
    if before:
        raise ValueError(
            f"--calibrate: predictions {predictions.name} are calibrated already ({before}); make them again with "
            "hardset predict --raw"
        )
    if options.calibration_run is not None:
        fit_on, rest = open_predictions(Run.open(options.calibration_run), predictions.name), predictions
    else:
        fit_on, rest = calibrate.split_shards(predictions, options.calibration_shards, seed)
    yield predictions.name, rest, None
    targets = calibrate.MetaTargets(options.meta_alpha, options.meta_accuracy)
    for method in dict.fromkeys(options.calibrate):
        calibrator = calibrate.fit_calibrator(method, fit_on, targets, seed)
        say(f"{predictions.name}: {method} fitted on {len(fit_on.shards)} shards of {fit_on.run_uri}: {calibrator}")
        yield f"{predictions.name}+{method}", rest, calibrator
        if len(options.calibrate) == 1:
            folder = calibrate.save_calibration(run, predictions, calibrator, method)
            say(
                f"{method} saved in {folder}"
                if folder
                else f"{method}: not saved, no checkpoint is known to have made {predictions.name}"
            )


def _ood(run: Run, predictions: PredictionSet, other: Run) -> dict[str, Any]:
    metrics, notes = detection.out_of_distribution(run, predictions, other, open_predictions(other, predictions.name))
    for note in notes:
        say(f"ood: {note}")
    return {"run": other.uri, "notes": notes, **metrics}


def _trust_label(name: str, result: dict[str, Any]) -> str:
    """A trust set's name in evaluation/, apart from a prediction set's of the same name."""
    return f"{name}+trust" if name in result else name


def _add_trust(result: dict[str, Any], trusts: dict[str, Evaluation], watched: dict[str, str]) -> None:
    """Each trust set under its own name, and under its classifier's; tpr and tnr beside the classifier's own metrics."""
    for name, evaluation in trusts.items():
        owner = result[watched[name]]
        owner.setdefault("trust", {})[name] = evaluation.record()
        owner.setdefault("tpr", evaluation.metrics["tpr"])
        owner.setdefault("tnr", evaluation.metrics["tnr"])
        result.setdefault(name, evaluation.record())


TABLE = ("accuracy", "ece", "ece_mass", "cwece", "cwece_mass", "mce", "nll", "brier", "aurc", "e_aurc")
DETECTION = ("fpr95", "auroc", "aupr_success", "aupr_error")


def _show(found: list[Evaluation], trusts: dict[str, Evaluation], result: dict[str, Any]) -> None:
    say("in percent, but for nll (nats) and brier")
    _table([(e.name, e.metrics) for e in found], TABLE)
    say("\nfailure detection by confidence (largest probability) and by trust, in percent")
    rows = [(e.name, e.metrics) for e in found] + [(f"{name} (trust)", e.metrics) for name, e in trusts.items()]
    _table(rows, (*DETECTION, *(("aurc", "tpr", "tnr") if trusts else ())))
    for name, record in result.items():
        if "ood" in record:
            say(f"\nagainst {record['ood']['run']}, in percent: {name}")
            scores = [(score, v) for score, v in record["ood"].items() if isinstance(v, dict)]
            _table(scores, ("fpr95", "auroc", "aupr_in", "aupr_out"))
    for evaluation in [*found, *trusts.values()]:
        for note in evaluation.notes:
            say(f"{evaluation.name}: {note}")


def _table(rows: list[tuple[str, dict[str, Any]]], metrics: Sequence[str]) -> None:
    width = max(len(name) for name, _ in rows)
    say(" " * width + "".join(f"{metric:>13}" for metric in metrics))
    for name, values in rows:
        say(f"{name:<{width}}" + "".join(f"{_cell(metric, values.get(metric)):>13}" for metric in metrics))


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if metric in ("nll", "brier") else f"{100 * value:.2f}"


def _draw(run: Run, found: list[Evaluation], trusts: dict[str, Evaluation], tracker: Tracker, keep: bool) -> None:
    drawn = {}
    for e in found:
        msp, correct = e.figures["confidences"]["msp"], e.figures["correct"]
        drawn[f"{e.name}-reliability"] = figures.reliability_diagram(e.figures["curve"], e.name, e.metrics["ece"])
        drawn[f"{e.name}-histogram"] = figures.confidence_histogram(msp, correct, e.name, "largest probability")
    curves = {e.name: (e.figures["confidences"]["msp"], e.figures["correct"]) for e in found}
    for name, e in trusts.items():
        sure, correct = e.figures["confidences"]["trust"], e.figures["correct"]
        drawn[f"{name}-trust-histogram"] = figures.confidence_histogram(sure, correct, name, "trust, sigmoid(z)")
        curves[f"{name} (trust)"] = (sure, correct)
    drawn["risk-coverage"] = figures.risk_coverage(curves)
    for name, figure in drawn.items():
        picture = figures.png(figure)
        if keep:
            with storage.write_atomic(run.path("evaluation", f"{name}.png")) as stream:
                stream.write(picture)
        if tracker.run_id:
            import mlflow

            mlflow.log_figure(figure, f"figures/{name}.png")
    if keep:
        say(f"figures: {len(drawn)} PNG in {run.path('evaluation')}")


COMMAND = Command("evaluate", __doc__, (RunOptions, EvaluateOptions, CalibrateOptions), run_evaluate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
