"""How good a classifier is on a source: accuracy and calibration, over all, per group and per bin of difficulty."""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ops.calibration import confidence_calibration_error
from ops.models import Classifier
from pipelines.training.groups import GroupRule
from pipelines.training.ingest import Loader
from pipelines.training.source import Source

MATRIX_CLASSES = 100  # a confusion matrix of more classes is left out


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A source to evaluate on, with its samples per shard, and how they are divided (None: not at all)."""

    name: str
    source: Source
    counts: tuple[int, ...]
    groups: GroupRule | None = None
    bins: GroupRule | None = None


@torch.inference_mode()
def assess(model: Classifier, evaluation: EvaluationSet, loader: Loader, device: str, autocast: bool) -> dict[str, Any]:
    """Metrics over all ranks' samples, the same on every rank.

    Returns
    -------
    metrics : dict
        accuracy, ece, ece_mass (fractions in [0, 1]), nll (nats), samples; with groups worst_group_accuracy and
        `groups`: one dict per group that has samples (name, samples, accuracy, ece, confusion[K][K] for K <= 100); with
        bins `bins`, the same without the matrix.
    """
    was_training = model.training
    model.eval()
    parts = [_of_batch(model, batch, evaluation, device, autocast) for batch in loader.epoch()]
    model.train(was_training)
    columns = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]} if parts else None
    everything = [part for part in _all_ranks(columns) if part is not None]
    found = {k: np.concatenate([part[k] for part in everything]) for k in everything[0]}
    metrics = _metrics(found)
    if evaluation.groups is not None:
        metrics["groups"] = _divided(found, "group", evaluation.groups, model.num_classes)
        metrics["worst_group_accuracy"] = min(group["accuracy"] for group in metrics["groups"])
    if evaluation.bins is not None:
        metrics["bins"] = _divided(found, "bin", evaluation.bins, None)
    return metrics


def _of_batch(
    model: Classifier, batch: Any, evaluation: EvaluationSet, device: str, autocast: bool
) -> dict[str, np.ndarray]:
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        logits = model(batch.inputs.to(device, non_blocking=True))
    log_probs = logits.float().log_softmax(dim=1).cpu()
    confidence, predicted = log_probs.max(dim=1)
    labels = batch.labels.numpy()
    found = {
        "label": labels,
        "predicted": predicted.numpy(),
        "confidence": confidence.exp().clamp(max=1).numpy(),
        "nll": -log_probs.gather(1, batch.labels[:, None])[:, 0].numpy(),
    }
    for name, rule in (("group", evaluation.groups), ("bin", evaluation.bins)):
        if rule is not None:
            found[name] = rule.assign(batch.values[rule.column].numpy(), labels)
    return found


def _all_ranks(mine: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def _metrics(found: dict[str, np.ndarray]) -> dict[str, Any]:
    correct = found["label"] == found["predicted"]
    return {
        "accuracy": float(correct.mean()),
        "ece": confidence_calibration_error(found["confidence"], correct),
        "ece_mass": confidence_calibration_error(found["confidence"], correct, binning="mass"),
        "nll": float(found["nll"].mean(dtype=np.float64)),
        "samples": len(correct),
    }


def _divided(found: dict[str, np.ndarray], by: str, rule: GroupRule, num_classes: int | None) -> list[dict[str, Any]]:
    parts = []
    for number, name in enumerate(rule.names()):
        mine = found[by] == number
        if not mine.any():
            continue
        part = {"name": name} | _metrics({k: v[mine] for k, v in found.items()})
        del part["ece_mass"]
        if num_classes is not None and num_classes <= MATRIX_CLASSES:
            pairs = found["label"][mine] * num_classes + found["predicted"][mine]
            part["confusion"] = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1).tolist()
        parts.append(part)
    return parts
