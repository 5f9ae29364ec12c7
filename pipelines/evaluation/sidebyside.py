"""Several prediction sets and trust sets of a run side by side: evaluated, calibrated on held-out samples, stored, drawn."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.evaluation import detection
from pipelines.evaluation.calibrate import (
    MetaTargets,
    applied_calibration,
    fit_calibrator,
    save_calibration,
    split_shards,
)
from pipelines.evaluation.evaluate import EVALUATION, Evaluation, Slicing, evaluate, store
from pipelines.evaluation.outcomes import Calibrator, PredictionSet, open_predictions
from pipelines.runs import column_groups, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of the prediction sets of a run."""

    predictions: tuple[str, ...]
    trust: tuple[str, ...] = ()
    groups: str | None = None
    calibrate: tuple[str, ...] = ()
    calibration_shards: float = 0.2
    targets: MetaTargets = dataclasses.field(default_factory=MetaTargets)
    bootstrap: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.predictions:
            raise UserError("which? name at least one prediction set of the run", "predictions")
        if self.bootstrap < 0:
            raise UserError(f"{self.bootstrap}: a number of resamples, 0 or more", "bootstrap")


@dataclasses.dataclass(frozen=True)
class Answer:
    """Evaluations of predictions and of trust sets; `record` is all of it by name, JSON-able."""

    found: list[Evaluation]
    trusts: dict[str, Evaluation]
    record: dict[str, dict[str, Any]]
    notes: list[str]


def side_by_side(run: Run, question: Question, other: Run | None = None, calibration_run: Run | None = None) -> Answer:
    """Evaluate every set and store each under RUN/evaluation/.

    Parameters
    ----------
    run : Run
    question : Question
    other : Run, optional
        Whose samples count as out of distribution; it needs predictions of the same names.
    calibration_run : Run, optional
        Where calibrators are fitted, on predictions of the same names; without it on some of `run`'s shards, which are
        then not evaluated.

    Raises
    ------
    ValueError
        For a set that is missing or broken, and a calibration that cannot be fitted; the message names it.
    """
    started = time.monotonic()
    slicing = Slicing.parse(question.groups).resolve(run) if question.groups else None
    sets = {name: open_predictions(run, name) for name in dict.fromkeys(question.predictions)}
    watched = {name: _watched(run, name, sets) for name in dict.fromkeys(question.trust)}
    outside = {name: open_predictions(other, name) for name in sets} if other is not None else {}
    found, used, notes = [], {}, []
    for name, predictions in sets.items():
        for label, over, calibrator, note in _variants(run, predictions, question, calibration_run):
            found.append(evaluate(run, over, calibrator, label, slicing, question.bootstrap, question.seed))
            used[name] = over
            notes += [note] if note else []
    record = {evaluation.name: evaluation.record() for evaluation in found}
    for name, predictions in outside.items():
        metrics, reasons = detection.out_of_distribution(
            run, used[name], other, predictions, question.bootstrap, question.seed
        )
        record[name]["ood"] = {"run": other.uri, "notes": reasons, **metrics}
        notes += reasons
    trusts = {
        name: detection.evaluate_trust(run, name, used[owner], question.bootstrap, question.seed)
        for name, owner in watched.items()
    }
    for evaluation in found:
        store(run, evaluation, started, **{key: v for key, v in record[evaluation.name].items() if key == "ood"})
    for name, evaluation in trusts.items():
        label = f"{name}.trust" if name in record else name
        store(run, dataclasses.replace(evaluation, name=label), started, trust_in=watched[name])
    _add_trust(record, trusts, watched)
    return Answer(found, trusts, record, list(dict.fromkeys(notes)))


def _watched(run: Run, trust: str, sets: dict[str, PredictionSet]) -> str:
    """The prediction set whose classifier a trust set is about."""
    facts = detection.trust_facts(run, trust)
    if len(sets) == 1:
        return next(iter(sets))
    for name, predictions in sets.items():
        theirs = column_groups.facts(run.uri, predictions.group, 0) or {}
        if facts.get("checkpoint_digest") and theirs.get("checkpoint_digest") == facts["checkpoint_digest"]:
            return name
    raise UserError(
        f"{trust}: none of the predictions {', '.join(sets)} is known to be its classifier's; give that one alone",
        "trust",
    )


def _variants(
    run: Run, predictions: PredictionSet, question: Question, calibration_run: Run | None
) -> Iterator[tuple[str, PredictionSet, Calibrator | None, str | None]]:
    """(name, predictions, calibrator, what to say of it): as they are, and once per method of calibration."""
    if not question.calibrate:
        yield predictions.name, predictions, None, None
        return
    before = applied_calibration(run, predictions)
    if before:
        raise UserError(
            f"predictions {predictions.name} are calibrated already ({before}); make them again with "
            "hardset predict `raw`",
            "calibrate",
        )
    if calibration_run is not None:
        fit_on, rest = open_predictions(calibration_run, predictions.name), predictions
    else:
        fit_on, rest = split_shards(predictions, question.calibration_shards, question.seed)
    yield predictions.name, rest, None, None
    for method in dict.fromkeys(question.calibrate):
        calibrator = fit_calibrator(method, fit_on, question.targets, question.seed)
        note = f"{predictions.name}: {method} fitted on {len(fit_on.shards)} shards of {fit_on.run_uri}: {calibrator}"
        if len(question.calibrate) == 1:
            folder = save_calibration(run, predictions, calibrator, method, fit_on)
            note += f"; saved in {folder}" if folder else "; not saved, as no checkpoint is known to have made these"
        yield f"{predictions.name}.{method}", rest, calibrator, note


def _add_trust(record: dict[str, Any], trusts: dict[str, Evaluation], watched: dict[str, str]) -> None:
    """Each trust set under its own name, and under its classifier's; tpr and tnr beside the classifier's own metrics."""
    for name, evaluation in trusts.items():
        owner = record[watched[name]]
        owner.setdefault("trust", {})[name] = evaluation.record()
        owner.setdefault("tpr", evaluation.metrics["tpr"])
        owner.setdefault("tnr", evaluation.metrics["tnr"])
    for name, evaluation in trusts.items():
        record.setdefault(name, evaluation.record())


def draw(answer: Answer) -> dict[str, "Figure"]:
    """Reliability diagram and histogram of each set, histogram of each trust set, risk–coverage curves of all."""
    from pipelines.evaluation import figures  # matplotlib

    drawn, curves = {}, {}
    for e in answer.found:
        msp, correct = e.figures["confidences"]["msp"], e.figures["correct"]
        drawn[f"{e.name}-reliability"] = figures.reliability_diagram(e.figures["curve"], e.name, e.metrics["ece"])
        drawn[f"{e.name}-histogram"] = figures.confidence_histogram(msp, correct, e.name, "largest probability")
        curves[e.name] = (msp, correct)
    for name, e in answer.trusts.items():
        sure, correct = e.figures["confidences"]["trust"], e.figures["correct"]
        drawn[f"{name}-trust-histogram"] = figures.confidence_histogram(sure, correct, name, "trust, sigmoid(z)")
        curves[f"{name} (trust)"] = (sure, correct)
    drawn["risk-coverage"] = figures.risk_coverage(curves)
    return drawn


def store_figures(run: Run, drawn: dict[str, "Figure"]) -> Sequence[str]:
    """Write figures as PNG under RUN/evaluation/; their paths."""
    from pipelines.evaluation import figures

    paths = []
    for name, figure in drawn.items():
        paths.append(run.path(EVALUATION, f"{name}.png"))
        with storage.write_atomic(paths[-1]) as stream:
            stream.write(figures.png(figure))
    return paths


def show(answer: Answer, say: Callable[[str], Any]) -> None:
    """The tables, a line at a time."""
    say("in percent, but for nll (nats) and brier")
    _table([(e.name, e.metrics) for e in answer.found], CALIBRATION, say)
    say("\nfailure detection by confidence (largest probability) and by trust, in percent")
    rows = [(e.name, e.metrics) for e in answer.found]
    rows += [(f"{name} (trust)", e.metrics) for name, e in answer.trusts.items()]
    _table(rows, (*DETECTION, "aurc", *(("tpr", "tnr") if answer.trusts else ())), say)
    for name, record in answer.record.items():
        if "ood" in record:
            say(f"\nagainst {record['ood']['run']}, in percent: {name}")
            scores = [(score, v) for score, v in record["ood"].items() if isinstance(v, dict)]
            _table(scores, detection.OUTSIDE, say)
    groups = [s for e in answer.found for s in e.slices if s["slice"] == "group"]
    if groups:
        say("\nby group, in percent")
        rows = [
            (f"{e.name}: {s['part']} ({s['count']:,})", s)
            for e in answer.found
            for s in e.slices
            if s["slice"] == "group"
        ]
        _table(rows, ("accuracy", "confidence", "ece"), say)
    for e in [*answer.found, *answer.trusts.values()]:
        if shown := [
            f"{m} {_cell(m, e.intervals[m][0])} to {_cell(m, e.intervals[m][1])}" for m in BETWEEN if m in e.intervals
        ]:
            say(f"95 % of resamples, {e.name}: {', '.join(shown)}")
    for line in answer.notes + [f"{e.name}: {n}" for e in [*answer.found, *answer.trusts.values()] for n in e.notes]:
        say(line)


CALIBRATION = ("accuracy", "ece", "ece_mass", "cwece", "cwece_mass", "mce", "nll", "brier", "aurc", "e_aurc")
BETWEEN = ("accuracy", "ece", "nll", "auroc", "tpr", "tnr")  # whose intervals are shown; the record has all
DETECTION = ("fpr95", "auroc", "aupr_success", "aupr_error")


def _table(rows: list[tuple[str, dict[str, Any]]], metrics: Sequence[str], say: Callable[[str], Any]) -> None:
    width = max(len(name) for name, _ in rows)
    say(" " * width + "".join(f"{metric:>13}" for metric in metrics))
    for name, values in rows:
        say(f"{name:<{width}}" + "".join(f"{_cell(metric, values.get(metric)):>13}" for metric in metrics))


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if metric in ("nll", "brier") else f"{100 * value:.2f}"
