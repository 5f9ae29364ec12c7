"""Post-hoc calibration of a prediction set, fitted on samples that the evaluation does not use."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from ops.calibration import MetaCalibration, TemperatureScaling, calibrator_from_dict
from ops.models import Classifier
from pipelines.evaluation.outcomes import Calibrator, PredictionSet, held_out_logits
from pipelines.runs import column_groups, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

METHODS = ("temperature", "meta_misclassification", "meta_accuracy")


@dataclasses.dataclass(frozen=True)
class MetaTargets:
    """What Meta-Cal is to keep: the share of correct predictions given up, or the accuracy of those kept."""

    alpha: float = 0.05
    accuracy: float = 0.9


def split_shards(predictions: PredictionSet, fraction: float, seed: int) -> tuple[PredictionSet, PredictionSet]:
    """A random part of the shards to fit on (at least one), and the rest to evaluate on (at least one)."""
    if not 0 < fraction < 1:
        raise UserError(f"{fraction}: expected a fraction of the shards, in (0, 1)", "calibration_shards")
    count = len(predictions.shards)
    if count < 2:
        raise UserError(
            f"{predictions.run_uri} has one shard, which cannot be split; fit on another run's "
            "predictions of the same name with `calibration_run`, or write smaller shards",
            "calibration_shards",
        )
    taken = min(count - 1, max(1, round(fraction * count)))
    chosen = set(np.random.default_rng(seed).permutation(count)[:taken].tolist())
    return (
        predictions.over([shard for shard in predictions.shards if shard in chosen]),
        predictions.over([shard for shard in predictions.shards if shard not in chosen]),
    )


def fit_calibrator(method: str, predictions: PredictionSet, targets: MetaTargets, seed: int = 0) -> Calibrator:
    """Fit a calibrator on a prediction set; ValueError names the method where its data do not allow it."""
    logits, labels = held_out_logits(predictions)
    calibrator = _new(method, targets, seed)
    try:
        return calibrator.fit(logits, labels)
    except ValueError as error:
        raise UserError(f"{method}: {predictions.name}: {error}", "calibrate") from None


def _new(method: str, targets: MetaTargets, seed: int) -> Calibrator:
    if method == "temperature":
        return TemperatureScaling()
    if method == "meta_misclassification":
        return MetaCalibration("misclassification", alpha=targets.alpha, seed=seed)
    if method == "meta_accuracy":
        return MetaCalibration("accuracy", accuracy=targets.accuracy, seed=seed)
    raise UserError(f"{method}: expected one of {', '.join(METHODS)}", "calibrate")


def applied_calibration(run: Run, predictions: PredictionSet) -> str | None:
    """The calibration that these predictions were made with, None where there is none (or nothing is said of it)."""
    facts = column_groups.facts(run.uri, predictions.group, predictions.shards[0]) or {}
    return facts.get("calibration")


def save_calibration(
    run: Run, predictions: PredictionSet, calibrator: Calibrator, method: str, fitted: PredictionSet
) -> str | None:
    """Put a calibrator, fitted on `fitted`, into the checkpoint that made the predictions; returns its folder.

    None where the predictions do not say which checkpoint made them, or it is not there any more, or holds other weights.
    """
    facts = column_groups.facts(run.uri, predictions.group, predictions.shards[0]) or {}
    folder = facts.get("checkpoint")
    if not folder or not storage.exists(folder):
        return None
    if checkpoint_digest(folder) != facts.get("checkpoint_digest"):
        return None
    fitted_on = {"run": fitted.run_uri, "predictions": fitted.name, "shards": list(fitted.shards)}
    from pipelines.training.checkpoints import annotate_classifier  # torch

    annotate_classifier(folder, calibration={"name": method, **calibrator.to_dict(), "fitted_on": fitted_on})
    return folder


def calibrator_of(extra: dict[str, Any]) -> tuple[str | None, Calibrator | None]:
    """Name and calibrator that a checkpoint holds, (None, None) where it holds none."""
    state = dict(extra.get("calibration") or {})
    if not state:
        return None, None
    name = state.pop("name", state.get("method"))
    state.pop("fitted_on", None)
    return name, calibrator_from_dict(state)


def checkpoint_digest(folder: str) -> str:
    """sha256 of a checkpoint's weights and of what they are built into; a calibration added later does not change it."""
    from pipelines.training.checkpoints import read_classifier

    return classifier_digest(read_classifier(folder))


def classifier_digest(model: Classifier) -> str:
    """The same of a classifier in memory."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.spec), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()
