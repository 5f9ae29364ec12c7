"""An oracle that learns when a frozen classifier may be trusted.

hardset trust --checkpoint DIR --run RUN --loss steep_slope --name NAME --eval-run RUN2
"""

import contextlib
import dataclasses
import sys
from typing import Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions, WorkerOptions, at_least
from jobs.session import ray_session, tracked

MOSTLY_RIGHT = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustOptions:
    """The oracle."""

    checkpoint: str
    """folder of the classifier, which stays as it is"""
    name: str
    """folder under trust/"""
    loss: Literal["steep_slope", "cross_entropy", "ce", "focal", "tcp"] = "steep_slope"
    """what the oracle minimises (Luo et al. 2021, eq. 8, 4, 5, 6)"""
    alpha_pos: float = 1.0
    """steep_slope: slope for right predictions, above 0"""
    alpha_neg: float = 3.0
    """steep_slope: slope for wrong predictions, above 0"""
    search_alpha: bool = False
    """choose both alphas on a held-out fifth of the run, alpha_neg first"""
    gamma: float = 2.0
    """focal: its exponent, at least 0"""
    raw: bool = False
    """z is the linear output, not the signed distance to its hyperplane"""
    backbone: str = "mlp:256"
    """linear or mlp:512 (new, on the run's embeddings), classifier (a copy of it, trained on), or a checkpoint folder"""
    target_predictions: str | None = None
    """take right and wrong from these stored predictions of the run (out-of-fold ones, say), not from the checkpoint"""
    eval_run: list[str] = dataclasses.field(default_factory=list)
    """further runs to write trust/NAME into, of any domain"""
    epochs: int = 20
    """passes over the run"""
    lr: float = 1e-3
    """peak learning rate of AdamW, falling along a cosine"""
    weight_decay: float = 1e-4
    """of AdamW"""
    batch_size: int = 128
    """samples per step"""
    seed: int = 0
    """of weights, order and held-out samples"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one; cuda without a GPU is an error"""

    def __post_init__(self) -> None:
        at_least(self, 0, ("seed",))


def trust(options: RunOptions, asked: TrustOptions) -> dict[str, Any]:
    """Train the oracle on the run and write the trust columns."""
    from jobs import stages
    from pipelines.evaluation import trust as oracles
    from pipelines.evaluation.predict import Forward
    from pipelines.runs.lease import lease
    from pipelines.runs.record import Run
    from pipelines.training.checkpoints import read_classifier

    run, model = Run.open(options.run), read_classifier(asked.checkpoint)
    others = [Run.open(uri, "eval_run") for uri in dict.fromkeys(asked.eval_run)]
    names = {field.name for field in dataclasses.fields(oracles.OracleTraining)} - {"signed"}
    training = oracles.OracleTraining(**{name: getattr(asked, name) for name in names}, signed=not asked.raw)
    with contextlib.ExitStack() as held, tracked("trust", options, asked) as tracker, ray_session(options):
        for uri in dict.fromkeys([run.uri, *(other.uri for other in others)]):
            held.enter_context(lease(uri, f"trust/{asked.name}"))
        device = stages.resources(WorkerOptions(device=asked.device)).device
        forward = Forward(device, max_pixels=run.config.max_pixels)
        entry = oracles.trust(
            run, model, asked.name, training, others, forward, asked.target_predictions, asked.search_alpha
        )
        for epoch, loss in enumerate(entry["losses"]):
            tracker.metrics({"loss": loss}, step=epoch)
        tracker.metrics(entry)
    _show(asked.name, entry)
    return {"run": run.uri, "name": asked.name, "eval_runs": [other.uri for other in others], **entry}


def _show(name: str, entry: dict[str, Any]) -> None:
    from pipelines.runs.progress import duration

    for tried in entry["search"]:
        rates = ", ".join(f"{key} {100 * tried[key]:.1f} %" for key in ("tpr", "tnr", "balanced"))
        say(f"  alpha_pos {tried['alpha_pos']:g}, alpha_neg {tried['alpha_neg']:g}: {rates} (held out)")
    done = "already there" if entry["skipped"] else duration(entry["seconds"])
    say(
        f"trust {name}: {entry['loss']}, alpha_pos {entry['alpha_pos']:g}, alpha_neg {entry['alpha_neg']:g}, trained on "
        f"{entry['errors']:,} errors among {entry['samples']:,} samples, {done}"
    )
    if entry["accuracy_on_training_run"] > MOSTLY_RIGHT:
        say(
            f"trust {name}: the classifier is right on {100 * entry['accuracy_on_training_run']:.1f} % of this run, perhaps as it "
            "was trained on it: errors on new data look different. Better: shards that it has not seen, or "
            "out-of-fold --target-predictions"
        )


COMMAND = Command("trust", __doc__, (RunOptions, TrustOptions), trust)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
