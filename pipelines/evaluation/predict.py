"""Predict: a classifier over the samples of a run -> its logits as the column group `predictions/NAME`.

The samples are the rows of `embeddings/`, so that quarantined ones never appear; each shard is one idempotent task.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

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
from pipelines.runs.executor import Output, Stage, Task, execute
from pipelines.runs.labels import label_sources, labels_of
from pipelines.runs.record import Run, Shard, fingerprint
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
        rows, shards_done, shards_skipped, seconds, checkpoint, calibration (its name or None), checkpoint_digest.

    Raises
    ------
    ValueError
        For a name that is none, or embeddings that the model was not made for.
    StageFailed
        If a shard no longer holds the samples that were embedded.
    """
    columns.check_name("name", name)
    check_fits(run, model)
    forward = forward or Forward(max_pixels=run.config.max_pixels)
    method, calibrator = (None, None) if raw else calibrator_of(model.extra)
    digest = classifier_digest(model)
    facts = {"checkpoint": checkpoint, "checkpoint_digest": digest, "calibration": method}
    embedded = run.embedding_facts()
    state = None if calibrator is None else calibrator.to_dict()
    stage = Stage(
        f"predict/{name}",
        f"{PREDICTIONS}/{name}",
        [fingerprint(PREDICTIONS, source, digest, state) for source in label_sources(run, embedded)],
        PredictShards,
        (run.uri, model, calibrator, forward, facts),
        rows=[f["rows"] for f in embedded],
        num_gpus=1 if forward.device == "cuda" else 0,
    )
    return execute(run, stage, **facts)


class PredictShards:
    """The predictions of a shard: `pipelines.runs.executor`'s worker."""

    def __init__(
        self, run_uri: str, model: Classifier, calibrator: Calibrator | None, forward: Forward, facts: dict[str, Any]
    ):
        self.run_uri, self.model, self.calibrator = run_uri, model, calibrator
        self.forward, self.facts = forward, facts

    def run(self, task: Task) -> Output:
        names = [field.name for field in columns.KEYS]
        base = column_groups.read(self.run_uri, columns.EMBEDDINGS, task.shard, names)
        labels = labels_of(self.run_uri, task.shard).labels
        base = base.append_column(columns.LABEL, pa.array(labels, mask=labels < 0))
        logits = shard_forward(task.shard, task.entry, self.run_uri, base["row"].to_numpy(), self.model, self.forward)
        return Output(prediction_table(base, calibrated(logits, self.calibrator).astype(np.float32)), self.facts)


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
    model = model.to(forward.device).eval()
    batches = input_batches(shard, entry, run_uri, rows, model, forward)
    return shard_outputs(entry, rows, batches, model, forward.device, (model.num_classes,))


def shard_outputs(
    entry: Shard,
    rows: np.ndarray,
    batches: Iterable[tuple[np.ndarray, torch.Tensor]],
    compute: Callable[[torch.Tensor], torch.Tensor],
    device: str,
    shape: tuple[int, ...] = (),
) -> np.ndarray:
    """What `compute` makes of the samples `rows` (n,) of a shard, (n, *shape) float32; `batches` as of `input_batches`.

    Raises
    ------
    StageFailed
        If the shard no longer holds one of them.
    """
    torch.set_num_threads(1)
    seen, parts = [np.zeros(0, np.int64)], [np.zeros((0, *shape), np.float32)]
    with torch.inference_mode():
        for at, batch in batches:
            parts.append(compute(batch.to(device)).float().cpu().numpy())
            seen.append(at)
    if not np.array_equal(np.concatenate(seen), rows):
        lost = np.setdiff1d(rows, np.concatenate(seen))
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
