"""Predict: a classifier over the samples of a run -> its logits as the column group `predictions/NAME`.

The samples are the rows of `embeddings/`, so that quarantined ones never appear; each shard is one idempotent task.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from scipy.special import softmax

from ops.models import Classifier
from pipelines.corpus.shards import iter_images
from pipelines.evaluation.calibrate import calibrator_of, classifier_digest
from pipelines.evaluation.outcomes import PREDICTIONS, Calibrator, calibrated, predictions_schema
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.record import Run, Shard, fingerprint
from pipelines.runs.tasks import write_shards
from pipelines.training.decode import PictureDecoder


@dataclasses.dataclass(frozen=True)
class Forward:
    """How batches go through a classifier; none of it changes a result by more than rounding."""

    device: str = "cpu"
    batch_size: int = 256
    max_pixels: int = 100_000_000


class Inputs(NamedTuple):
    """Some samples of a shard: `inputs` an array (n, d), or a list of n encoded images; `rows` (n,) as in the shard."""

    inputs: np.ndarray | list[bytes]
    rows: np.ndarray


def check_fits(run: Run, model: Classifier, field: str = "checkpoint") -> None:
    """A classifier on embeddings needs those of its own encoder; ValueError otherwise."""
    spec = model.spec
    if spec.input != "embeddings":
        return
    if spec.width != run.config.width:
        raise UserError(
            f"takes embeddings of width {spec.width} ({spec.encoder}), {run.uri} has {run.config.width} "
            f"({run.config.encoder})",
            field,
        )
    if spec.encoder_fingerprint not in (None, run.config.encoder_fingerprint):
        raise UserError(
            f"trained on embeddings of {spec.encoder}, {run.uri} was made with {run.config.encoder} "
            "(other weights); embed the shards with the first",
            field,
        )


def predict(
    run: Run, model: Classifier, name: str, forward: Forward | None = None, checkpoint: str = "", raw: bool = False
) -> dict:
    """Write `predictions/NAME` for the shards where it is missing or was made from something else.

    Parameters
    ----------
    run : Run
    model : Classifier
        Its `extra["calibration"]`, if any, is applied to the logits, unless `raw`.
    name : str
    forward : Forward
    checkpoint : str
        Where the model lies; noted in the files, so that a calibration fitted on them finds the way back.
    raw : bool
        Leave a calibration out.

    Returns
    -------
    counts : dict
        rows, shards_done, shards_skipped, seconds, calibration (its name or None), checkpoint_digest.

    Raises
    ------
    ValueError
        For a name that is none, or embeddings that the model was not made for.
    StageFailed
        If a shard no longer holds the samples that were embedded.
    """
    columns.check_name("name", name)
    check_fits(run, model)
    started = time.monotonic()
    forward = forward or Forward(max_pixels=run.config.max_pixels)
    method, calibrator = (None, None) if raw else calibrator_of(model.extra)
    digest = classifier_digest(model)
    facts = {"checkpoint": checkpoint, "checkpoint_digest": digest, "calibration": method}
    embedded = run.embedding_facts()
    state = None if calibrator is None else calibrator.to_dict()
    sources = [fingerprint(PREDICTIONS, f["source"], digest, state) for f in embedded]
    group = f"{PREDICTIONS}/{name}"
    items = [(shard, sources[shard], run.shards[shard]) for shard in column_groups.pending(run.uri, group, sources)]
    shared = (run.uri, group, model, calibrator, forward, facts)
    gpus = 1 if forward.device == "cuda" else 0
    counts = write_shards(f"predict {name}", predict_shard, items, *shared, embedded=embedded, num_gpus=gpus)
    counts |= {"seconds": time.monotonic() - started, "calibration": method, "checkpoint_digest": digest}
    if items or run.stage(f"predict/{name}") is None:
        run.finish_stage(f"predict/{name}", **counts, checkpoint=checkpoint)
    return counts


def predict_shard(
    shard: int,
    source: str,
    entry: Shard,
    run_uri: str,
    group: str,
    model: Classifier,
    calibrator: Calibrator | None,
    forward: Forward,
    facts: dict,
) -> int:
    """Ray task: write one shard's predictions; returns its rows."""
    base = column_groups.read(run_uri, columns.EMBEDDINGS, shard, [f.name for f in columns.KEYS] + ["label"])
    logits = shard_forward(shard, entry, run_uri, base["row"].to_numpy(), model, forward)
    logits = calibrated(logits, calibrator).astype(np.float32)
    table = prediction_table(base, logits)
    column_groups.write(run_uri, group, shard, table, source, **facts)
    return table.num_rows


def prediction_table(base: pa.Table, logits: np.ndarray) -> pa.Table:
    """Keys and label beside logits (n, K), the predicted class and its probability."""
    probs = softmax(logits.astype(np.float64), axis=1) if len(logits) else logits
    arrays = {name: base[name] for name in base.schema.names}
    arrays["logits"] = columns.vector_array(logits, pa.float32())
    arrays["prediction"] = pa.array(probs.argmax(axis=1) if len(logits) else [], pa.int64())
    arrays["confidence"] = pa.array(probs.max(axis=1) if len(logits) else [], pa.float32())
    schema = predictions_schema(logits.shape[1])
    return pa.table({name: arrays[name] for name in schema.names}).cast(schema)


def shard_forward(
    shard: int, entry: Shard, run_uri: str, rows: np.ndarray, model: Classifier, forward: Forward
) -> np.ndarray:
    """Logits (n, K) float32 of the samples `rows` of a shard, in that order."""
    torch.set_num_threads(1)
    model = model.to(forward.device).eval()
    found, parts = [], [np.zeros((0, model.num_classes), np.float32)]
    for at, batch in input_batches(shard, entry, run_uri, rows, model, forward):
        with torch.inference_mode():
            parts.append(model(batch.to(forward.device)).float().cpu().numpy())
        found.append(at)
    seen = np.concatenate(found) if found else np.zeros(0, np.int64)
    if not np.array_equal(seen, rows):
        lost = np.setdiff1d(rows, seen)
        raise StageFailed(
            f"shard {entry.url} no longer holds the image of row {lost[0] if len(lost) else '?'}; embed it again. "
            "Finished shards are kept"
        )
    return np.concatenate(parts)


def input_batches(
    shard: int, entry: Shard, run_uri: str, rows: np.ndarray, model: Classifier, forward: Forward
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """(rows, batch as the classifier takes it) of a shard's samples, in shard order."""
    if model.input == "embeddings":
        for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, ["row", "embedding"], 8192):
            vectors = columns.vectors(batch["embedding"]).astype(np.float32)
            yield batch["row"].to_numpy(), torch.from_numpy(vectors)
        return
    decoder = PictureDecoder(model.spec.image_size, forward.max_pixels, exif=entry.exif)
    for batch, pictures in decoder.decode_all(_encoded(entry, rows, forward.batch_size)):
        yield batch.rows, pictures


def _encoded(entry: Shard, rows: np.ndarray, batch_size: int) -> Iterator[Inputs]:
    for at, images in iter_images(entry, rows):
        for start in range(0, len(at), batch_size):
            yield Inputs(images[start : start + batch_size], at[start : start + batch_size])
