"""A classifier's logits over the samples of a run, as a column group.

hardset predict --checkpoint DIR --run RUN --name NAME
"""

import dataclasses
import sys
from typing import Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions, WorkerOptions
from jobs.session import ray_session, tracked
from pipelines.runs.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The classifier and what its predictions are called."""

    checkpoint: str
    """folder that hardset train wrote (its best), or one checkpoint in it"""
    name: str
    """folder under predictions/"""
    raw: bool = False
    """leave out the calibration that the checkpoint holds"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one; cuda without a GPU is an error"""
    batch_size: int = 256
    """images per forward pass"""


def predict(options: RunOptions, asked: PredictOptions) -> dict[str, Any]:
    """Predict the shards whose predictions are missing or out of date."""
    from jobs import stages
    from pipelines.evaluation import predict as prediction
    from pipelines.runs import storage
    from pipelines.runs.progress import duration
    from pipelines.runs.record import Run
    from pipelines.training.checkpoints import read_classifier

    run, model = Run.open(options.run), read_classifier(asked.checkpoint)
    if asked.batch_size < 1:
        raise UserError(f"{asked.batch_size}: at least 1", "batch_size")
    with (
        run.lease(f"{prediction.PREDICTIONS}/{asked.name}"),
        tracked("predict", options, asked) as tracker,
        ray_session(options),
    ):
        device = stages.resources(WorkerOptions(device=asked.device)).device
        forward = prediction.Forward(device, asked.batch_size, run.config.max_pixels)
        counts = prediction.predict(run, model, asked.name, forward, storage.absolute(asked.checkpoint), asked.raw)
        tracker.metrics(counts)
    calibration = f", calibrated by {counts['calibration']}" if counts["calibration"] else ""
    say(
        f"predict {asked.name}: {counts['rows']:,} rows, {counts['shards_done']} shards done, "
        f"{counts['shards_skipped']} skipped, {duration(counts['seconds'])}{calibration}"
    )
    return {"run": run.uri, "name": asked.name, **counts}


COMMAND = Command("predict", __doc__, (RunOptions, PredictOptions), predict)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
