"""An ensemble of small models -> the confusion score, bits of disagreement about each sample; needs no label of what it scores.

hardset confusion --run RUN --seeds 3 --epochs 20 --score-run RUN2
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jobs import stages
from jobs.command import Command, say
from jobs.options import RunOptions, WorkerOptions
from jobs.session import ray_session, tracked
from pipelines import confusion as scoring
from pipelines import confusion_heads as heads
from pipelines.members import Member, report
from pipelines.progress import duration
from pipelines.run import Run


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
    batch_size: int = 128
    """samples per training step"""
    lr: float | None = None
    """learning rate, constant on embeddings (default 1e-3, AdamW); on images the peak of a schedule"""
    weight_decay: float | None = None
    """weight decay of the optimiser (embeddings: 0.01)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one"""
    workers: int | None = None
    """training tasks and scoring actors (default: one per GPU, or one per CPU core)"""
    score_batch: int | None = None
    """samples per product when scoring (default: what keeps logits within 32 MiB); does not change a score"""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        for name in ("workers", "score_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: at least 0")


def confusion(options: RunOptions, ensemble: ConfusionOptions) -> dict[str, Any]:
    """Train what is not trained yet, then score the run, and the other one where one is given."""
    run = Run.open(options.run)
    other = None if ensemble.score_run is None else Run.open(ensemble.score_run)
    if ensemble.input == "images":
        raise ValueError("--input images: not there yet")
    if other is not None:
        scoring.check_same_encoder(run, other)
        other.embedding_facts()
    training = _head_training(ensemble)
    members = scoring.plan_members(run, training, range(ensemble.seed, ensemble.seed + ensemble.seeds))
    with tracked("confusion", options, ensemble) as tracker, ray_session(options):
        plan = _plan(ensemble)
        corpus = heads.measure(run)
        members, trained = _train(run, members, corpus, training, ensemble.epochs, plan)
        kept, diverged = scoring.usable(members, ensemble.epochs, corpus.commonest, ensemble.drop_diverged)
        _warn(diverged, ensemble.drop_diverged)
        result = {"run": run.uri, "confusion": _score(run, run, kept, ensemble.epochs, plan)}
        if other is not None:
            result |= {"score_run": other.uri, "scored": _score(other, run, kept, ensemble.epochs, plan)}
        result |= {"epochs_trained": trained, "members": report(members, ensemble.epochs), "diverged": diverged}
        tracker.metrics(result)
    return result


def _head_training(ensemble: ConfusionOptions) -> heads.HeadTraining:
    defaults = heads.HeadTraining()
    return heads.HeadTraining(
        model=ensemble.model or defaults.model,
        batch_size=ensemble.batch_size,
        learning_rate=defaults.learning_rate if ensemble.lr is None else ensemble.lr,
        weight_decay=defaults.weight_decay if ensemble.weight_decay is None else ensemble.weight_decay,
        bootstrap=ensemble.bootstrap,
    )


def _plan(ensemble: ConfusionOptions) -> scoring.ScoringPlan:
    found = stages.resources(WorkerOptions(device=ensemble.device, workers=ensemble.workers))
    return scoring.ScoringPlan(found.device, found.workers, found.cpus_per_worker, ensemble.score_batch)


def _train(
    run: Run,
    members: list[Member],
    corpus: heads.Corpus,
    training: heads.HeadTraining,
    epochs: int,
    plan: scoring.ScoringPlan,
) -> tuple[list[Member], int]:
    before = sum(min(m.epochs, epochs) for m in members)
    needed = len(members) * epochs - before
    say(
        f"confusion: {len(members)} members × {epochs} epochs of {training.form} on {corpus.rows:,} labelled samples, "
        f"{before} epochs already trained, {plan.workers} workers on {plan.device}"
    )
    return heads.train(run, members, corpus, training, epochs, plan.device, plan.workers), needed


def _warn(diverged: dict[int, str], dropped: bool) -> None:
    for seed, why in diverged.items():
        say(f"confusion: member of seed {seed} diverged, {'left out' if dropped else 'kept'}: {why}")


def _score(run: Run, trained: Run, members: list[Member], epochs: int, plan: scoring.ScoringPlan) -> dict[str, Any]:
    counts = scoring.score(run, trained, members, epochs, scoring.HeadScorer, plan)
    say(
        f"confusion: {counts['rows']:,} rows of {run.uri}, {counts['shards_done']} shards done, "
        f"{counts['shards_skipped']} skipped, {duration(counts['seconds'])}"
    )
    return counts


COMMAND = Command("confusion", __doc__, (RunOptions, ConfusionOptions), confusion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
