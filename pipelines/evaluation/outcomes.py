"""A prediction set's logits -> what its metrics need of each sample, read shard by shard.

Predictions are a column group `predictions/NAME`; the truth is the label in `embeddings/`. Softmax and all that follows is
taken in float64: in float32 confident predictions become ties at 1. Held at a time: 64 MB per million samples.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from scipy.special import log_softmax, softmax

from ops.calibration import MetaCalibration, TemperatureScaling, reliability_curve
from ops.selective import CONFIDENCES, confidence
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.errors import UserError
from pipelines.runs.labels import labels_of
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order

PREDICTIONS = "predictions"
BINS = 15
CLASS_COLUMN_BYTES = 256 << 20  # of probabilities of single classes held at a time
Calibrator = TemperatureScaling | MetaCalibration


def predictions_schema(num_classes: int) -> pa.Schema:
    """Schema of `predictions/NAME`; softmax(logits) are the probabilities, calibrated ones too."""
    fields = [*columns.KEYS, columns.LABEL, pa.field("logits", pa.list_(pa.float32(), num_classes))]
    fields.append(pa.field("prediction", pa.int64()))
    return pa.schema([*fields, columns.score_field("predictions.confidence")])


@dataclasses.dataclass(frozen=True)
class PredictionSet:
    """One prediction set of a run, over all of its shards or some of them."""

    run_uri: str
    name: str
    num_classes: int
    shards: tuple[int, ...]

    @property
    def group(self) -> str:
        return f"{PREDICTIONS}/{self.name}"

    def over(self, shards: Sequence[int]) -> "PredictionSet":
        """The same predictions, over these shards only."""
        return dataclasses.replace(self, shards=tuple(shards))


def open_predictions(run: Run, name: str) -> PredictionSet:
    """A prediction set by name, looked at from the outside: all shards there, one class count, logits at all.

    Raises
    ------
    ValueError
        With what is missing, or the class counts that differ.
    """
    columns.check_name("predictions", name)
    shards = range(len(run.shards))
    missing = column_groups.missing(run.uri, f"{PREDICTIONS}/{name}", len(shards))
    if missing:
        have = sorted({path.split("/")[-2] for path in storage.list_files(run.path(PREDICTIONS), ".parquet")})
        raise UserError(
            f"{name}: {run.uri} has no predictions/{name} for {len(missing)} of its {len(shards)} shards "
            f"(first: {missing[0]}); run hardset predict `name` {name}{', or take one of ' + ', '.join(have) if have else ''}",
            "predictions",
        )
    column_groups.check_group_fresh(f"{PREDICTIONS}/{name}", run.embedding_facts(), run.uri)
    with ThreadPoolExecutor(column_groups.FOOTER_THREADS) as pool:
        found = pool.map(lambda shard: _width(run, name, shard), shards)
        widths = {width: shard for shard, width in zip(shards, found) if width is not None}
    if not widths:
        raise UserError(f"{name}: it has no rows", "predictions")
    if len(widths) > 1:
        found = ", ".join(f"{width} (shard {shard})" for width, shard in widths.items())
        raise UserError(f"{name}: logits of different class counts: {found}; predict again", "predictions")
    num_classes = next(iter(widths))
    named = run.config.class_names
    if named is not None and num_classes != len(named):
        raise UserError(f"{name}: logits of {num_classes} classes, the run names {len(named)}", "predictions")
    return PredictionSet(run.uri, name, num_classes, tuple(shards))


def _width(run: Run, name: str, shard: int) -> int | None:
    """Classes of one shard's logits; None for a shard without rows whose lists do not say."""
    group = f"{PREDICTIONS}/{name}"
    schema = column_groups.schema(run.uri, group, shard)
    for needed in ("row", "logits"):
        if needed not in schema.names:
            raise UserError(f"{name}: shard {shard} has no column {needed!r}, it has {schema.names}", "predictions")
    kind = schema.field("logits").type
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise UserError(
            f"{name}: logits of shard {shard} are {kind}, expected fixed_size_list<float>[K]",
            "predictions",
        )
    # As pandas writes them: lists of one length.
    first = column_groups.read(run.uri, group, shard, ["logits"])["logits"].drop_null().slice(0, 1)
    return len(first[0]) if len(first) else None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of each labelled sample, arrays of shape (n,) in shard order; confidences: higher = safer."""

    label: np.ndarray  # int32
    prediction: np.ndarray  # int32
    nll: np.ndarray  # float64, nats
    brier: np.ndarray  # float64, in [0, 2]
    confidences: dict[str, np.ndarray]  # msp, entropy, margin: float64 in [0, 1]
    extras: dict[str, np.ndarray]  # further columns, float64, NaN where there is none
    curve: np.ndarray  # (BINS, 3): count, correct, summed confidence of equal-width bins of msp
    unlabelled: int  # samples without a label, which are in none of the arrays

    @property
    def correct(self) -> np.ndarray:
        return self.prediction == self.label

    def __len__(self) -> int:
        return len(self.label)


def load_outcomes(
    predictions: PredictionSet, calibrator: Calibrator | None = None, extras: Sequence[str] = ()
) -> Outcomes:
    """The outcomes of a prediction set, of calibrated probabilities if a calibrator is given.

    `extras` are columns of the run ('difficulty.rmd') to carry along. ValueError for logits that are not finite, rows
    without a prediction or of no sample, labels beyond the classes, or no label at all.
    """
    items = [(shard,) for shard in predictions.shards]
    parts = list(in_order(shard_outcomes, items, predictions, calibrator, tuple(dict.fromkeys(extras))))
    if not sum(len(part) for part in parts):
        raise UserError(
            f"{predictions.name}: no sample of {predictions.run_uri} has a label to compare with",
            "predictions",
        )
    return merged(parts)


def merged(parts: Sequence[Outcomes]) -> Outcomes:
    """Outcomes of several shards, one after the other."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def joined_dict(name: str) -> dict[str, np.ndarray]:
        return {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    return Outcomes(
        *(joined(name) for name in ("label", "prediction", "nll", "brier")),
        joined_dict("confidences"),
        joined_dict("extras"),
        sum(part.curve for part in parts),
        sum(part.unlabelled for part in parts),
    )


def shard_outcomes(
    shard: int, predictions: PredictionSet, calibrator: Calibrator | None, extras: tuple[str, ...]
) -> Outcomes:
    """Ray task: the outcomes of one shard."""
    logits, labels = labelled_logits(predictions, shard, calibrator)
    known = labels >= 0
    table = joins.join(predictions.run_uri, shard, extras) if extras else None
    values = {name: _floats(table[name])[known] for name in extras}
    return outcomes(logits[known], labels[known], values, int((~known).sum()))


def outcomes(
    logits: np.ndarray, labels: np.ndarray, extras: dict[str, np.ndarray] | None = None, unlabelled: int = 0
) -> Outcomes:
    """The outcomes of logits (n, K) and labels (n,) in [0, K); n may be 0."""
    if not len(logits):
        none = np.zeros(0)
        confidences = dict.fromkeys(CONFIDENCES, none)
        return Outcomes(
            *[none.astype(np.int32)] * 2, none, none, confidences, extras or {}, np.zeros((BINS, 3)), unlabelled
        )
    # Not ops.losses: that would have every worker import torch, which takes longer than the work.
    log_probs = log_softmax(logits.astype(np.float64), axis=1)
    probs, own = np.exp(log_probs), log_probs[np.arange(len(labels)), labels]
    count, accuracy, mean = reliability_curve(probs, labels, BINS)
    return Outcomes(
        label=labels.astype(np.int32),
        prediction=probs.argmax(axis=1).astype(np.int32),
        nll=-own,
        brier=1 - 2 * np.exp(own) + np.einsum("ij,ij->i", probs, probs),
        confidences={kind: confidence(probs, kind) for kind in CONFIDENCES},
        extras=extras or {},
        curve=np.stack([count, count * accuracy, count * mean], axis=1),
        unlabelled=unlabelled,
    )


def labelled_logits(
    predictions: PredictionSet, shard: int, calibrator: Calibrator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, K) of a shard's samples, calibrated if a calibrator is given, and their labels, -1 where none."""
    logits, labels = shard_logits(predictions, shard)
    if len(labels) and labels.max() >= predictions.num_classes:
        raise UserError(
            f"{predictions.name}: logits of {predictions.num_classes} classes, but shard {shard} has the "
            f"label {labels.max()}; predict with a classifier of this run's classes",
            "predictions",
        )
    return calibrated(logits, calibrator), labels


def shard_logits(predictions: PredictionSet, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Finite logits (n, K) of every sample of a shard, and their labels, which may be beyond the classes."""
    truth = column_groups.read(predictions.run_uri, columns.EMBEDDINGS, shard, ["row"])
    found = _read_logits(predictions, shard)
    rows = truth["row"].to_numpy()
    check_rows("predictions", predictions.name, shard, rows, found["row"].to_numpy())
    logits = columns.vectors(found["logits"])
    _check_finite(predictions, shard, rows, logits)
    return logits, labels_of(predictions.run_uri, shard).kept


def _read_logits(predictions: PredictionSet, shard: int) -> pa.Table:
    try:
        found = column_groups.read(predictions.run_uri, predictions.group, shard, ["row", "logits"])
    except OSError as error:  # what reading a null of a fixed-size list ends in, too
        raise UserError(
            f"{predictions.name}: shard {shard}: cannot be read, its logits are null somewhere or the "
            f"file is damaged ({error})",
            "predictions",
        ) from None
    return found.set_column(1, "logits", _fixed(predictions, shard, found["logits"]))


def _fixed(predictions: PredictionSet, shard: int, lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of K values as a fixed-size list, checked."""
    lengths = pa.compute.list_value_length(lists)
    bad = pa.compute.not_equal(lengths, predictions.num_classes).fill_null(True)
    if pa.compute.any(bad).as_py():
        row = pa.compute.index(bad, True).as_py()
        raise UserError(
            f"{predictions.name}: shard {shard}: sample {row} has {lengths[row].as_py() or 'no'} logits, others "
            f"{predictions.num_classes}; predict again",
            "predictions",
        )
    return lists.cast(pa.list_(pa.float32(), predictions.num_classes))


def check_rows(field: str, name: str, shard: int, expected: np.ndarray, found: np.ndarray) -> None:
    """A column group must hold exactly the run's rows of a shard, in order; ValueError says what differs."""
    if np.array_equal(expected, found):
        return
    missing, foreign = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    if len(missing):
        what = f"{len(missing)} of {len(expected)} samples are missing (first: row {missing[0]})"
    elif len(foreign):
        what = f"{len(foreign)} rows are of no sample of the run (first: row {foreign[0]})"
    else:
        what = f"{len(found)} rows for {len(expected)} samples, repeated or not in shard order"
    raise UserError(f"{name}: shard {shard}: {what}; make it again", field)


def _check_finite(predictions: PredictionSet, shard: int, rows: np.ndarray, logits: np.ndarray) -> None:
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        kind = "NaN" if np.isnan(logits[bad]).any() else "infinite"
        raise UserError(
            f"{predictions.name}: shard {shard}: {int(bad.sum())} of {len(bad)} rows have {kind} logits "
            f"(first: row {rows[bad][0]}); the classifier diverged there, train or predict again",
            "predictions",
        )


def calibrated(logits: np.ndarray, calibrator: Calibrator | None) -> np.ndarray:
    """Logits (n, K) whose softmax is the calibrator's `transform`: logits / T, and zeros where Meta-Cal gives 1/K."""
    if calibrator is None or not len(logits):
        return logits
    scaled = logits.astype(np.float64) / calibrator.temperature
    return scaled * calibrator.keeps(logits)[:, None] if isinstance(calibrator, MetaCalibration) else scaled


def held_out_logits(predictions: PredictionSet) -> tuple[np.ndarray, np.ndarray]:
    """All labelled logits (n, K) float32 of a prediction set and their labels, to fit a calibrator on: 4 K bytes a row."""
    parts = list(in_order(_labelled_only, [(shard,) for shard in predictions.shards], predictions))
    logits, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    if not len(labels):
        raise UserError(f"{predictions.name}: no label among the samples held out for calibration", "predictions")
    return logits, labels


def _labelled_only(shard: int, predictions: PredictionSet) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = labelled_logits(predictions, shard)
    return logits[labels >= 0], labels[labels >= 0]


def class_probabilities(
    predictions: PredictionSet, calibrator: Calibrator | None, rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(class, its probabilities (n,) float64) class by class; as many classes per pass over the logits as fit in 256 MiB."""
    step = max(1, CLASS_COLUMN_BYTES // (8 * max(1, rows)))
    for first in range(0, predictions.num_classes, step):
        last = min(first + step, predictions.num_classes)
        items = [(shard,) for shard in predictions.shards]
        block = np.concatenate(list(in_order(_class_columns, items, predictions, calibrator, first, last)), axis=1)
        yield from enumerate(block, start=first)


def _class_columns(
    shard: int, predictions: PredictionSet, calibrator: Calibrator | None, first: int, last: int
) -> np.ndarray:
    logits, labels = labelled_logits(predictions, shard, calibrator)
    probs = softmax(logits[labels >= 0].astype(np.float64), axis=1)
    return np.ascontiguousarray(probs[:, first:last].T)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(np.nan).to_numpy()
