"""Evaluate: prediction sets -> accuracy, calibration, selective prediction and failure detection, by slice and with intervals.

A value that the data leave undefined (failure detection without a failure) is None, and a note says why; never NaN.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ops.bootstrap import joint_bootstrap_intervals
from ops.calibration import confidence_calibration_error
from ops.checks import UndefinedMetricError
from ops.selective import (
    DetectionMetrics,
    accuracy_rejection_curve,
    augrc,
    aurc,
    detection_metrics,
    excess_aurc,
    risk_at_coverage,
    separability,
)
from pipelines.evaluation.outcomes import (
    BINS,
    Calibrator,
    Outcomes,
    PredictionSet,
    class_probabilities,
    load_outcomes,
)
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order
from pipelines.training.groups import GroupRule

EVALUATION = "evaluation"
REJECTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95)
DIFFICULTY_BINS = 10
TASKS = 4  # that the bootstrap is split into
Confidences = tuple[np.ndarray, np.ndarray]  # confidence and correctness of each sample

# The metrics of confidence and correctness alone; each with an interval.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda confidence, correct: float(correct.mean()),
    "ece": lambda confidence, correct: confidence_calibration_error(confidence, correct, BINS, "width"),
    "ece_mass": lambda confidence, correct: confidence_calibration_error(confidence, correct, BINS, "mass"),
    "aurc": lambda confidence, correct: aurc(confidence, ~correct),
    "e_aurc": lambda confidence, correct: excess_aurc(confidence, ~correct),
    "augrc": lambda confidence, correct: augrc(confidence, ~correct),
    **{
        name: (lambda confidence, correct, name=name: getattr(detection_metrics(confidence, correct), name))
        for name in DetectionMetrics._fields
    },
}
RANKING = ("aurc", "e_aurc", "augrc", *DetectionMetrics._fields)


@dataclasses.dataclass(frozen=True)
class Slicing:
    """Groups by a column of the run: by a rule of edges or quantiles, or, without one, by its values."""

    column: str
    rule: GroupRule | None = None

    @classmethod
    def parse(cls, text: str) -> "Slicing":
        """From 'GROUP.COLUMN', or with edges as `GroupRule.parse` takes them; ValueError otherwise."""
        try:
            rule = GroupRule.parse(text) if ":" in text else None
            column = text if rule is None else rule.column
            columns.split_name(column)
        except UserError as error:
            raise UserError(f"{text}: {error.message.removeprefix(f'{text}: ')}", "groups") from None
        return cls(column, rule)

    def resolve(self, run: Run) -> "Slicing":
        """With edges in the place of quantiles."""
        return self if self.rule is None else Slicing(self.column, self.rule.resolve(run))

    def parts(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Name and rows (bool) of each group; samples without a value are in none."""
        there = ~np.isnan(values)
        if self.rule is not None:
            group = self.rule.assign(values, np.zeros(len(values), np.int64))
            return {name: there & (group == number) for number, name in enumerate(self.rule.names())}
        found = np.unique(values[there])
        if len(found) > 1000:
            raise UserError(
                f"{self.column}: {len(found)} different values; give edges, {self.column}:EDGE,EDGE",
                "groups",
            )
        name = columns.split_name(self.column)[1]
        return {f"{name} = {value:g}": values == value for value in found}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is known of one prediction set (or of one calibrated, or of one trust set); JSON-able but for `figures`."""

    name: str
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    selective: dict[str, dict[str, Any]]
    slices: list[dict[str, Any]]
    notes: list[str]
    figures: dict[str, Any] = dataclasses.field(repr=False, default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What is stored and printed as JSON: metrics at the top, the rest below."""
        return {
            **self.metrics,
            "intervals": self.intervals,
            "selective": self.selective,
            "slices": self.slices,
            "notes": self.notes,
        }


def evaluate(
    run: Run,
    predictions: PredictionSet,
    calibrator: Calibrator | None = None,
    name: str | None = None,
    slicing: Slicing | None = None,
    replicates: int = 200,
    seed: int = 0,
) -> Evaluation:
    """Every metric of one prediction set.

    Parameters
    ----------
    run : Run
        Whose labels, and whose difficulty.rmd if it is scored, are compared with.
    predictions : PredictionSet
    calibrator : optional
        Applied to the logits first.
    name : str, optional
        How the result is called; by default as the predictions.
    slicing : Slicing, optional
        Groups for the worst-group accuracy.
    replicates, seed : int
        Of the bootstrap; 0 leaves the intervals out.

    Raises
    ------
    ValueError
        What `load_outcomes` and `columns.join` refuse.
    """
    extras = [slicing.column] if slicing else []
    by_difficulty = _has_difficulty(run)
    outcomes = load_outcomes(predictions, calibrator, [*extras, "difficulty.rmd"] if by_difficulty else extras)
    metrics, notes = _overall(outcomes), []
    metrics |= _class_wise(predictions, calibrator, outcomes)
    groups = slicing.resolve(run).parts(outcomes.extras[slicing.column]) if slicing else {}
    slices = _slices(outcomes, run.classes, outcomes.extras.get("difficulty.rmd"), groups)
    metrics |= _worst(slices)
    selective = {kind: _selective(values, outcomes.correct) for kind, values in outcomes.confidences.items()}
    if outcomes.unlabelled:
        notes.append(f"{outcomes.unlabelled} samples without a label are left out")
    notes += undefined_notes(outcomes.correct)
    pair = (outcomes.confidences["msp"], outcomes.correct)
    intervals = bootstrap_intervals(pair, {"nll": outcomes.nll, "brier": outcomes.brier}, replicates, seed)
    return Evaluation(name or predictions.name, metrics, intervals, selective, slices, notes, _figure_data(outcomes))


def _has_difficulty(run: Run) -> bool:
    return run.stage("score") is not None and all(column_groups.all_facts(run.uri, columns.DIFFICULTY, len(run.shards)))


def _overall(outcomes: Outcomes) -> dict[str, float | None]:
    """The metrics of all samples, but for the class-wise ones."""
    count, correct, confidence = outcomes.curve.T
    filled = count > 0
    pair = (outcomes.confidences["msp"], outcomes.correct)
    return {
        "samples": len(outcomes),
        "errors": int((~outcomes.correct).sum()),
        **{name: defined(metric, *pair) for name, metric in METRICS.items()},
        "mce": float(np.abs((correct - confidence)[filled] / count[filled]).max()),
        "nll": float(outcomes.nll.mean()),
        "brier": float(outcomes.brier.mean()),
        "mean_confidence": float(outcomes.confidences["msp"].mean()),
    }


def defined(metric: Callable[..., float], *arrays: np.ndarray) -> float | None:
    """The metric, or None where the data leave it undefined."""
    try:
        return metric(*arrays)
    except UndefinedMetricError:
        return None


def undefined_notes(correct: np.ndarray) -> list[str]:
    """Why values are None."""
    if correct.all() or not correct.any():
        outcome = "right: no error to detect" if correct.all() else "wrong: no success to tell from errors"
        return [
            f"all {len(correct)} predictions are {outcome}; {', '.join(DetectionMetrics._fields)} are undefined (null)"
        ]
    return []


def _class_wise(predictions: PredictionSet, calibrator: Calibrator | None, outcomes: Outcomes) -> dict[str, float]:
    """Class-wise ECE in both binnings: the mean over classes of the error of each class's own probability."""
    sums = {"cwece": 0.0, "cwece_mass": 0.0}
    for label, probs in class_probabilities(predictions, calibrator, len(outcomes)):
        hit = outcomes.label == label
        some = probs > 0  # a probability of exactly 0 falls in no bin of equal width
        if some.any():
            share = some.mean()
            sums["cwece"] += share * confidence_calibration_error(probs[some], hit[some], BINS, "width")
        sums["cwece_mass"] += confidence_calibration_error(probs, hit, BINS, "mass")
    return {name: value / predictions.num_classes for name, value in sums.items()}


def _selective(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Selective prediction and failure detection by one confidence score."""
    errors = ~correct
    rejection = accuracy_rejection_curve(confidence, errors, np.array(REJECTIONS))
    return {
        **{name: defined(METRICS[name], confidence, correct) for name in RANKING},
        "accuracy_at_rejection": {f"{rate:g}": float(value) for rate, value in zip(REJECTIONS, rejection.accuracy)},
        "risk_at_coverage": {f"{c:g}": risk_at_coverage(confidence, errors, c) for c in COVERAGES},
        **separation(confidence, correct),
    }


def separation(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    """Separability of the confidences of right and wrong predictions, None where either has no spread."""
    try:
        kl, bhattacharyya = separability(confidence[correct], confidence[~correct])
    except ValueError:  # none or one of a kind
        return {"kl": None, "bhattacharyya": None}
    return {"kl": kl, "bhattacharyya": bhattacharyya}


def _slices(
    outcomes: Outcomes, classes: Sequence[str], rmd: np.ndarray | None, groups: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Count, accuracy, confidence, ECE and NLL of each class, tenth of difficulty and group."""
    slices = []
    for label in range(max(len(classes), int(outcomes.label.max()) + 1)):
        name = classes[label] if label < len(classes) else str(label)
        slices.append(_slice(outcomes, "class", name, outcomes.label == label))
    if rmd is not None:
        slices += _difficulty_slices(outcomes, rmd)
    return slices + [_slice(outcomes, "group", name, rows) for name, rows in groups.items()]


def _difficulty_slices(outcomes: Outcomes, rmd: np.ndarray) -> list[dict[str, Any]]:
    """Tenths of the samples in rising difficulty.rmd, with the lowest and highest of each."""
    order = np.argsort(rmd, kind="stable")
    order = order[~np.isnan(rmd[order])]
    found = []
    for number, rows in enumerate(np.array_split(order, DIFFICULTY_BINS)):
        entry = _slice(outcomes, "difficulty", f"tenth {number + 1}", rows)
        if len(rows):
            entry |= {"low": float(rmd[rows].min()), "high": float(rmd[rows].max())}
        found.append(entry)
    return found


def _slice(outcomes: Outcomes, kind: str, part: str, rows: np.ndarray) -> dict[str, Any]:
    confidence, correct = outcomes.confidences["msp"][rows], outcomes.correct[rows]
    entry = {"slice": kind, "part": part, "count": len(correct)}
    if not len(correct):
        return entry | dict.fromkeys(("accuracy", "confidence", "ece", "nll"))
    return entry | {
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": confidence_calibration_error(confidence, correct, BINS),
        "nll": float(outcomes.nll[rows].mean()),
    }


def _worst(slices: list[dict[str, Any]]) -> dict[str, float | None]:
    worst = {}
    for kind in ("class", "group"):
        accuracies = [entry["accuracy"] for entry in slices if entry["slice"] == kind and entry["count"]]
        if accuracies or kind == "class":
            worst[f"worst_{kind}_accuracy"] = min(accuracies, default=None)
    return worst


def bootstrap_intervals(
    pair: Confidences,
    means: dict[str, np.ndarray],
    replicates: int,
    seed: int,
    names: Sequence[str] = tuple(METRICS),
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of METRICS by `names` and of the means given; those undefined are left out."""
    if not replicates:
        return {}
    # Those of failure detection come out of one pass over the samples.
    units = [(name,) for name in (*names, *means) if name not in DetectionMetrics._fields]
    units += [DetectionMetrics._fields] if set(DetectionMetrics._fields) <= set(names) else []
    # A few tasks, not one per metric: starting a worker costs more than some thousand small sorts.
    batches = [(units[start::TASKS],) for start in range(TASKS)]
    found: dict[str, tuple[float, float]] = {}
    for part in in_order(_bootstrap, batches, pair, means, replicates, seed):
        found |= part
    return {name: found[name] for name in (*names, *means) if name in found}


def _bootstrap(
    units: list[tuple[str, ...]], pair: Confidences, means: dict[str, np.ndarray], replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    found = {}
    for unit in units:
        arrays = (means[unit[0]],) if unit[0] in means else pair
        try:
            intervals = joint_bootstrap_intervals(_metrics_of(unit), *arrays, replicates=replicates, seed=seed)
        except UndefinedMetricError:
            continue
        found |= dict(zip(unit, map(tuple, intervals)))
    return found


def _metrics_of(unit: tuple[str, ...]) -> Callable[..., Sequence[float]]:
    if unit == DetectionMetrics._fields:
        return detection_metrics
    metric = METRICS.get(unit[0], lambda values: float(values.mean()))
    return lambda *arrays: [metric(*arrays)]


def _figure_data(outcomes: Outcomes) -> dict[str, Any]:
    return {"curve": outcomes.curve, "confidences": outcomes.confidences, "correct": outcomes.correct}


def store(run: Run, evaluation: Evaluation, started: float, **facts: Any) -> str:
    """Write RUN/evaluation/NAME.json and, a row per slice and metric, NAME.parquet; returns the first's path."""
    record = {"name": evaluation.name, "run": run.uri, **facts, **evaluation.record()}
    record["seconds"] = time.monotonic() - started
    path = run.path(EVALUATION, f"{evaluation.name}.json")
    storage.write_text_atomic(path, json.dumps(record, indent=1, ensure_ascii=False, default=float) + "\n")
    storage.write_parquet_atomic(as_table(evaluation), run.path(EVALUATION, f"{evaluation.name}.parquet"))
    return path


def as_table(evaluation: Evaluation) -> pa.Table:
    """One row per metric: name, slice, part, count, metric, value, and the interval's low and high."""
    rows = [
        (evaluation.name, "all", "", evaluation.metrics.get("samples"), metric, value, *evaluation.intervals.get(metric, (None, None)))
        for metric, value in evaluation.metrics.items()
    ]  # fmt: skip
    for kind, values in evaluation.selective.items():
        flat = [(name, value) for name, value in values.items() if not isinstance(value, dict)]
        flat += [
            (f"{name}@{at}", v) for name, value in values.items() if isinstance(value, dict) for at, v in value.items()
        ]
        rows += [(evaluation.name, "confidence", kind, None, name, value, None, None) for name, value in flat]
    for entry in evaluation.slices:
        rows += [
            (evaluation.name, entry["slice"], entry["part"], entry["count"], name, entry[name], None, None)
            for name in ("accuracy", "confidence", "ece", "nll")
        ]
    arrays = [pa.array(values, field.type) for values, field in zip(zip(*rows), EVALUATION_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=EVALUATION_SCHEMA)


EVALUATION_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("slice", pa.string()),
        ("part", pa.string()),
        ("count", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
