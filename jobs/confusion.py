"""An ensemble of small models -> the confusion score, bits of disagreement about each sample; needs no label of what it scores.

hardset confusion --run RUN --seeds 3 --epochs 20 --score-run RUN2
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions, WorkerOptions
from jobs.session import ray_session, tracked
from pipelines.runs.errors import UserError

if TYPE_CHECKING:
    from pipelines.confusion.heads import HeadTraining
    from pipelines.confusion.images import ImageTraining
    from pipelines.confusion.members import Member, Placement
    from pipelines.runs.record import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfusionOptions:
    """The ensemble, and what it scores."""

    input: Literal["embeddings", "images"] = "embeddings"
    """what the members see: embeddings (heads, seconds) or images (small networks, the paper's way)"""
    model: str | None = None
    """on embeddings linear (default) or mlp:UNITS; on images a small network (default cifar_resnet20)"""
    seeds: int = 3
    """members M of the ensemble, at least 1"""
    epochs: int = 20
    """epochs T that the score is a mean over, at least 1; more than before goes on from there"""
    seed: int = 0
    """seed of the first member; the others follow"""
    score_run: str | None = None
    """also score this other run, labelled or not; on embeddings it must have the same encoder"""
    drop_diverged: bool = False
    """leave out members whose loss is not finite or that are right no more often than the commonest class"""
    bootstrap: bool = False
    """embeddings: each member learns from its own resampling of the corpus"""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "one_cycle"
    """images: the learning rate's course; only with constant can a longer training go on from a shorter one"""
    batch_size: int = 128
    """samples per training step"""
    lr: float | None = None
    """learning rate (default: embeddings 1e-3, constant, AdamW; images 0.1, the peak of the schedule, SGD)"""
    weight_decay: float | None = None
    """weight decay of the optimiser (default: embeddings 0.01, images 5e-4)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one"""
    workers: int | None = None
    """training tasks and scoring actors (default: one per GPU, or one per CPU core)"""
    score_batch: int | None = None
    """samples per product when scoring (default: what keeps logits within 32 MiB; images 256); does not change a score"""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)}: at least 1", name)
        for name in ("workers", "score_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{value}: at least 1", name)
        if self.seed < 0:
            raise UserError(f"{self.seed}: at least 0", "seed")
        if self.bootstrap and self.input == "images":
            raise UserError("only with `input` embeddings", "bootstrap")


def confusion(options: RunOptions, ensemble: ConfusionOptions) -> dict[str, Any]:
    """Train what is not trained yet, then score the run, and the other one where one is given."""
    from pipelines.confusion import heads, images
    from pipelines.confusion import score as scoring
    from pipelines.confusion.members import plan_members, report
    from pipelines.runs.record import Run
    from pipelines.training.source import Source
    from pipelines.training.survey import survey

    run = Run.open(options.run)
    other = None if ensemble.score_run is None else Run.open(ensemble.score_run, "score_run")
    if other is not None:
        if ensemble.input == "embeddings":
            scoring.check_same_encoder(run, other)
        other.embedding_facts()
    training = _training(ensemble)
    seeds = range(ensemble.seed, ensemble.seed + ensemble.seeds)
    members = plan_members(run, training.form, training.identity(ensemble.epochs), seeds)
    with tracked("confusion", options, ensemble) as tracker, ray_session(options):
        place = _place(ensemble)
        before = sum(min(m.epochs, ensemble.epochs) for m in members)
        say(
            f"confusion: {len(members)} members × {ensemble.epochs} epochs of {training.form}, {before} epochs already "
            f"trained, {place.workers} workers on {place.device}"
        )
        train = heads.train if ensemble.input == "embeddings" else images.train
        with run.lease("models/confusion"):
            members = train(run, members, training, ensemble.epochs, place)
        # What one that has learnt nothing is right about.
        commonest = survey(Source.of(run, input=ensemble.input), len(run.classes)).commonest
        kept, diverged = scoring.usable(members, ensemble.epochs, commonest, ensemble.drop_diverged)
        _warn(diverged, ensemble.drop_diverged)
        result = {"run": run.uri, "confusion": _score(run, run, kept, ensemble, place)}
        if other is not None:
            result |= {"score_run": other.uri, "scored": _score(other, run, kept, ensemble, place)}
        result |= {
            "epochs_trained": len(members) * ensemble.epochs - before,
            "members": report(members, ensemble.epochs),
            "diverged": diverged,
        }
        tracker.metrics(result)
    return result


def _training(ensemble: ConfusionOptions) -> "HeadTraining | ImageTraining":
    """How the members are trained: the options that were given, over the defaults of the input."""
    from pipelines.confusion import heads, images

    chosen = {"model": ensemble.model, "learning_rate": ensemble.lr, "weight_decay": ensemble.weight_decay}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if ensemble.input == "embeddings":
        return heads.HeadTraining(batch_size=ensemble.batch_size, bootstrap=ensemble.bootstrap, **chosen)
    training = images.ImageTraining(batch_size=ensemble.batch_size, schedule=ensemble.schedule, **chosen)
    training.recipe(ensemble.seed, ensemble.epochs)  # its own ValueError for a value that cannot be
    return training


def _place(ensemble: ConfusionOptions) -> "Placement":
    from jobs import stages
    from pipelines.confusion.members import Placement

    found = stages.resources(WorkerOptions(device=ensemble.device, workers=ensemble.workers))
    return Placement(found.device, found.workers, found.cpus_per_worker, ensemble.score_batch)


def _warn(diverged: dict[int, str], dropped: bool) -> None:
    for seed, why in diverged.items():
        say(f"confusion: member of seed {seed} diverged, {'left out' if dropped else 'kept'}: {why}")


def _score(
    run: "Run", trained: "Run", members: "list[Member]", ensemble: ConfusionOptions, place: "Placement"
) -> dict[str, Any]:
    from pipelines.confusion import heads, images
    from pipelines.confusion import score as scoring
    from pipelines.runs.progress import duration

    scorer = heads.HeadScorer if ensemble.input == "embeddings" else images.NetworkScorer
    with run.lease(scoring.CONFUSION):
        counts = scoring.score(run, trained, members, ensemble.epochs, scorer, place)
    say(
        f"confusion: {counts['rows']:,} rows of {run.uri}, {counts['shards_done']} shards done, "
        f"{counts['shards_skipped']} skipped, {duration(counts['seconds'])}"
    )
    return counts


COMMAND = Command("confusion", __doc__, (RunOptions, ConfusionOptions), confusion)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
