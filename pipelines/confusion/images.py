"""Members of a confusion ensemble as small networks on images: the paper's way.

Each member is a training of `pipelines.training.loop` in a Ray task of its own, side by side on what is there; its weights are kept
after every epoch. Scoring reads each shard's images once for all members and epochs that fit in memory together.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ops.confusion import epoch_entropies
from ops.models import Classifier, build_classifier
from pipelines.confusion.members import Member, Placement, commit_epoch, load_epoch, train_members
from pipelines.evaluation.predict import Forward, input_batches, shard_outputs
from pipelines.runs import cluster, column_groups, columns, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.record import Run
from pipelines.training.checkpoints import read_classifier
from pipelines.training.loop import Plan, Recipe, Training, Workplace
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices, plan_training

HOLDOUT = 0.02  # the training pipeline needs samples to evaluate on; too few to tell a diverged member by
RESIDENT_BYTES = 2 << 30  # networks that an actor holds at once


@dataclasses.dataclass(frozen=True)
class ImageTraining:
    """How small networks are trained: SGD with momentum, random crop and flip."""

    model: str = "cifar_resnet20"
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    augment: str = "crop_flip"
    image_size: int | None = None

    @property
    def form(self) -> str:
        """The folder's name of such members."""
        return "images-" + "".join(c if c.isalnum() or c in "_-" else "-" for c in self.model)

    def identity(self, epochs: int) -> list[Any]:
        """What of it a member is made from: its length too, unless the learning rate is constant."""
        return [dataclasses.asdict(self), None if self.schedule == "constant" else epochs]

    def recipe(self, seed: int, epochs: int) -> Recipe:
        """What the training pipeline makes of it; its own ValueError for a value that cannot be."""
        return Recipe(
            epochs=epochs, batch_size=self.batch_size, optimizer="sgd", lr=self.learning_rate, seed=seed,
            weight_decay=self.weight_decay, schedule=self.schedule, augment=self.augment,
        )  # fmt: skip


class MemberTraining(Training):
    """A training of which no epoch is better than another: all of them are kept."""

    def _better(self, new: dict[str, Any], old: dict[str, Any]) -> bool:
        return False


def plan_network(run: Run, member: Member, training: ImageTraining, epochs: int) -> Plan:
    """A member's training, checked: ValueError for one class only, shards that changed, a model that does not exist."""
    choices = Choices(input="images", model=training.model, holdout=HOLDOUT, image_size=training.image_size)
    out = run.path(member.folder, "training")
    return plan_training(run, out, LossChoice("cross_entropy"), training.recipe(member.seed, epochs), choices)


def train_network(member: Member, plan: Plan, run_uri: str, device: str) -> Iterator[list[Member]]:
    """Ray task: train one member; yields it after each epoch, when that is kept."""
    torch.set_num_threads(1)
    training = MemberTraining(plan, Workplace(device=device))
    # The weights are kept before the state to go on from: after a kill between the two, the epoch is done again.
    member = dataclasses.replace(member, history=member.history[: training.epoch])
    while not training.done:
        try:
            metrics = training.run_epoch()
        except StageFailed:  # the loss is not finite: nothing is left to train, the ensemble reports it
            yield [_lost(run_uri, member, training, plan.recipe.epochs)]
            return
        entry = {"loss": metrics["train_loss"], "accuracy": metrics["train_accuracy"]}
        member = commit_epoch(run_uri, member, entry, training.model.state_dict(), {})
        training.save()
        yield [member]


def _lost(run_uri: str, member: Member, training: Training, epochs: int) -> Member:
    """A member whose loss is no number: its remaining epochs count as such, so that it is not tried again."""
    entry = {"loss": float("nan"), "accuracy": 0.0}
    while member.epochs < epochs:
        member = commit_epoch(run_uri, member, entry, training.model.state_dict(), {})
    return member


def train(run: Run, members: list[Member], training: ImageTraining, epochs: int, place: Placement) -> list[Member]:
    """Train what of `members` is not trained up to `epochs`, each in its own Ray task; as `train_members` says.

    Raises
    ------
    ValueError
        For a run that cannot be trained on, or a model that does not exist.
    """

    def start(pending: list[Member]) -> list[Any]:
        task = (
            cluster.connect()
            .remote(train_network)
            .options(num_cpus=1, num_gpus=1 if place.device == "cuda" else 0, max_retries=0, num_returns="streaming")
        )
        plans = [plan_network(run, member, training, epochs) for member in pending]
        return [task.remote(member, plan, run.uri, place.device) for member, plan in zip(pending, plans)]

    return train_members(run, members, epochs, start)


class NetworkScorer:
    """The entropies of networks that see a shard's images, as many epochs at a time as fit in memory."""

    def __init__(self, run_uri: str, members: Sequence[Member], epochs: int, place: Placement):
        self.run_uri, self.members, self.epochs, self.device = run_uri, members, epochs, place.device
        self.template: Classifier = read_classifier(storage.join(run_uri, members[0].folder, "training/last"))
        size = sum(t.numel() * t.element_size() for t in self.template.state_dict().values())
        step = max(1, RESIDENT_BYTES // (size * len(members)))
        self.chunks = [range(first, min(first + step, epochs)) for first in range(0, epochs, step)]
        self.batch_rows = place.batch_rows or 256
        self.resident = self._load(self.chunks[0]) if len(self.chunks) == 1 else None

    def shard(self, run_uri: str, shard: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(keys, entropies) of a shard: one float per sample and epoch is all that stays in memory."""
        run = Run.open(run_uri)
        keys = column_groups.read(run_uri, columns.EMBEDDINGS, shard, [field.name for field in columns.KEYS])
        rows = keys["row"].to_numpy()
        entropies = np.full((len(rows), self.epochs), np.nan, np.float32)
        forward = Forward(self.device, self.batch_rows, run.config.max_pixels)
        for chunk in self.chunks:
            networks = self.resident or self._load(chunk)
            batches = input_batches(shard, run.shards[shard], run_uri, rows, self.template, forward)
            found = shard_outputs(
                run.shards[shard],
                rows,
                batches,
                functools.partial(self._entropies, networks),
                self.device,
                (len(chunk),),
            )
            entropies[:, chunk.start : chunk.stop] = found
        yield keys, entropies

    def _entropies(self, networks: list[list[Classifier]], batch: torch.Tensor) -> torch.Tensor:
        parts = []
        for members in networks:  # one epoch at a time: (n, 1, M, K) logits
            logits = torch.stack([network(batch).float() for network in members], dim=1)
            parts.append(epoch_entropies(logits[:, None]))
        return torch.cat(parts, dim=1)

    def _load(self, chunk: range) -> list[list[Classifier]]:
        with ThreadPoolExecutor(16) as pool:
            loads = [[pool.submit(load_epoch, self.run_uri, m, epoch + 1) for m in self.members] for epoch in chunk]
            return [[self._network(load.result()) for load in epoch] for epoch in loads]

    def _network(self, state: dict[str, torch.Tensor]) -> Classifier:
        network = build_classifier(self.template.spec)
        network.load_state_dict(state)
        return network.to(self.device).eval()
