"""A training's folder, local or on an object store: its best and last classifier, and the state to go on from.

OUT/best/, OUT/last/   checkpoints of ops.models (safetensors + JSON)
OUT/state.pt           weights, optimizer, history …: one file, so that it is whole or not there; torch's weights_only
OUT/curve.json         metrics of every epoch so far
"""

import io
import tempfile
from pathlib import Path
from typing import Any

import torch

from ops.models import RECORD, WEIGHTS, Classifier, load_classifier, save_classifier, update_extra
from pipelines.runs import storage
from pipelines.runs.errors import UserError, concerning


def write_classifier(model: Classifier, uri: str, **extra: Any) -> None:
    """Save a checkpoint at a local path or a URI."""
    local = storage.local_path(uri)
    if local is not None:
        save_classifier(model, local, **extra)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(model, folder, **extra)
        for name in (WEIGHTS, RECORD):  # the record last: a folder with one is a checkpoint
            _upload(Path(folder, name), uri)


def read_classifier(uri: str, field: str = "checkpoint") -> Classifier:
    """Load a checkpoint, or a training's best, from a local path or a URI. UserError about `field` where there is none."""
    local = storage.local_path(uri)
    if local is not None:
        with concerning(field):
            return load_classifier(local)
    place = _place(uri, field)
    with tempfile.TemporaryDirectory() as folder:
        for name in (WEIGHTS, RECORD):
            Path(folder, name).write_bytes(storage.read_bytes(storage.join(place, name)))
        with concerning(field):
            return load_classifier(folder)


def annotate_classifier(uri: str, **extra: Any) -> None:
    """Add values to a checkpoint (a calibration, say), local or not; the weights stay untouched."""
    local = storage.local_path(uri)
    if local is not None:
        update_extra(local, **extra)
        return
    place = _place(uri)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, RECORD).write_bytes(storage.read_bytes(storage.join(place, RECORD)))
        update_extra(folder, **extra)
        _upload(Path(folder, RECORD), place)


def _place(uri: str, field: str = "checkpoint") -> str:
    """The folder on an object store that holds the checkpoint meant by `uri`: that one, or a training's best."""
    for place in (uri, storage.join(uri, "best")):
        if storage.exists(storage.join(place, RECORD)):
            return place
    raise UserError(f"{uri}: no {RECORD} there; hardset train makes one", field)


def _upload(file: Path, uri: str) -> None:
    with storage.write_atomic(storage.join(uri, file.name)) as stream:
        stream.write(file.read_bytes())


def write_state(uri: str, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values, whole or not at all."""
    with storage.write_atomic(uri) as file:
        torch.save(state, file)


def read_state(uri: str) -> dict[str, Any] | None:
    """What `write_state` wrote, tensors on the CPU; None if there is nothing. Runs no code that a file brings along."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
