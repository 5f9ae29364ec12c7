"""The training loop: a plain function of one process, alone or as one rank of a `torch.distributed` world.

It knows neither Ray nor MLflow: it is told where it runs (`Workplace`), calls `after_epoch` after each epoch, and keeps
what it needs to go on in its output folder. Called again with the same plan it goes on from there.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ops.models import Classifier, ClassifierSpec, Head, build_classifier
from pipelines.runs import storage
from pipelines.runs.errors import StageFailed, UserError
from pipelines.training.assess import EvaluationSet, assess
from pipelines.training.checkpoints import read_state, write_classifier, write_state
from pipelines.training.decode import Augmentation
from pipelines.training.documents import write_json
from pipelines.training.groups import Resampling
from pipelines.training.ingest import CACHE_BYTES, WINDOW, Batch, Loader
from pipelines.training.objective import Grouping, LossChoice, Objective, sum_over_ranks
from pipelines.training.source import Source

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "step", "cosine", "one_cycle")
CRITERIA = ("accuracy", "nll", "ece", "worst_group_accuracy")
PRECISIONS = ("auto", "float32", "bfloat16")
SAVE_S = 10.0  # of training that a kill may cost at most, beside the epoch that it is in
AfterEpoch = Callable[[dict[str, Any], int], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. `batch_size` is that of the whole world; `clip` 0 and `ema` 0 are off.

    Attributes
    ----------
    schedule : {"constant", "step", "cosine", "one_cycle"}
        Factor of the learning rate per step: 1; × 0.1 at half and at three quarters; half a cosine to 0; cosine up from
        1/25 over the first 30 %, then down to 0 (the rate only, momentum stays).
    warmup : float
        Fraction of the steps with a linear rise before the schedule (which starts at its own beginning).
    accumulate : int
        Each rank's part of a batch is computed in so many pieces; losses that look across a batch see a piece.
    ema : float
        Decay per step of the averaged weights, which then are what is evaluated and saved.
    precision : {"auto", "float32", "bfloat16"}
        Of the model's products; weights, loss and optimizer stay float32. auto: bfloat16 on a GPU, float32 on a CPU.
    patience : int
        Epochs without a better `criterion` after which training stops; 0: never.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0
    accumulate: int = 1
    clip: float = 0.0
    ema: float = 0.0
    augment: str = "none"
    compile: bool = False
    precision: str = "auto"
    criterion: str = "accuracy"
    patience: int = 0
    seed: int = 0
    window: int = WINDOW
    cache_bytes: int = CACHE_BYTES
    threads: int = 2

    def __post_init__(self) -> None:
        whole = {
            "epochs": 1,
            "batch_size": 1,
            "accumulate": 1,
            "patience": 0,
            "seed": 0,
            "window": 1,
            "cache_bytes": 0,
            "threads": 1,
        }
        for name, low in whole.items():
            if getattr(self, name) < low:
                raise UserError(f"{getattr(self, name)}: at least {low}", name)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"{self.lr}: expected a number above 0", "lr")
        for name in ("weight_decay", "clip"):
            if not (getattr(self, name) >= 0):
                raise UserError(f"{getattr(self, name)}: at least 0", name)
        for name in ("momentum", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)}: expected a number in [0, 1)", name)
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("criterion", CRITERIA),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{getattr(self, name)}: expected one of {', '.join(choices)}", name)
        Augmentation.named(self.augment, 32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training, ready to start: everything checked, counted and resolved. Picklable; holds no sample.

    `evaluations[0]` decides which epoch is best, `evaluations[-1]` is what is reported.
    """

    out: str
    spec: ClassifierSpec
    recipe: Recipe
    loss: LossChoice
    source: Source
    counts: tuple[int, ...]
    evaluations: tuple[EvaluationSet, ...]
    weights: str | None = None
    weight_mean: float = 1.0
    grouping: Grouping | None = None
    resampling: Resampling | None = None
    expanded: tuple[int, ...] | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    lineage: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def state_path(self) -> str:
        return storage.join(self.out, "state.pt")


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where a rank works."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def bf16(self, precision: str) -> bool:
        """Whether the model computes in bfloat16 (autocast). UserError where this CPU has no such instructions."""
        on_gpu = self.device.startswith("cuda")
        if precision == "bfloat16" and not on_gpu and not torch.cpu._is_avx512_bf16_supported():
            raise UserError(
                "bfloat16: this CPU has no instructions for it and would be slower; take float32", "precision"
            )
        return precision == "bfloat16" or (precision == "auto" and on_gpu)


def train_classifier(
    plan: Plan, place: Workplace | None = None, after_epoch: AfterEpoch | None = None
) -> dict[str, Any]:
    """Train to the end of the plan, from its last saved epoch if there is one.

    It is saved at the end, and after an epoch that ends SAVE_S or more after the last save.

    Parameters
    ----------
    plan : Plan
    place : Workplace
        With `world` > 1 a `torch.distributed` process group must be there.
    after_epoch : callable
        Called on every rank with the epoch's entry of the curve and the number of epochs done.

    Returns
    -------
    summary : dict
        `curve`: per epoch its metrics; `best`: number of the best epoch, from 0; `epochs` done; `history`: how often
        each training sample was right, and seen (int32 tensors).
    """
    training = Training(plan, place or Workplace())
    saved = time.monotonic()
    while not training.done:
        metrics = training.run_epoch()
        if training.place.rank == 0:
            if training.done or time.monotonic() - saved >= SAVE_S:
                training.save()
                saved = time.monotonic()
            else:
                training.keep_best()
        if after_epoch is not None:
            after_epoch(metrics, training.epoch)
    return training.summary()


class Training:
    """The state of a training in one process, and one epoch of it."""

    def __init__(self, plan: Plan, place: Workplace):
        self.plan, self.place, recipe = plan, place, plan.recipe
        self.bf16 = place.bf16(recipe.precision)
        self._best: Classifier | None = None  # of an epoch that is not saved yet
        if recipe.batch_size % place.world:
            raise UserError(f"{recipe.batch_size}: not a multiple of the {place.world} workers", "batch_size")
        torch.manual_seed(recipe.seed)
        self.model = build_classifier(plan.spec).to(place.device)
        if isinstance(self.model, Head) and plan.mean is not None:
            self.model.standardize(torch.from_numpy(plan.mean), torch.from_numpy(plan.std))
        if plan.spec.input == "images" and place.device.startswith("cuda"):
            self.model = self.model.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval() if recipe.ema else None
        self.optimizer = _optimizer(self.model, recipe)
        self.objective = Objective(plan.loss, plan.weights, plan.weight_mean, plan.grouping, place.world, place.device)
        self.loader = self._training_loader()
        self.eval_loaders = [self._evaluation_loader(evaluation) for evaluation in plan.evaluations]
        self.epoch, self.curve, self.best = 0, [], -1
        # Per training sample: epochs in which it was right, and in which it was seen.
        self.history = torch.zeros(2, sum(plan.counts), dtype=torch.int32)
        self._resume()
        self.stepped = self._wrapped()

    @property
    def evaluated(self) -> Classifier:
        """The weights that count: the averaged ones, where there are such."""
        return self.model if self.average is None else self.average

    @property
    def done(self) -> bool:
        """All epochs, or no better one for `patience` of them."""
        return is_done(self.plan.recipe, self.epoch, self.best)

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, evaluate, note; the epoch's metrics."""
        started = time.perf_counter()
        # Dropout differs by rank, and is the same again when an epoch is done again.
        torch.manual_seed(
            int(np.random.SeedSequence([self.plan.recipe.seed, self.epoch, self.place.rank]).generate_state(1)[0])
        )
        loss, accuracy, seconds_to_first = self._train_epoch()
        trained = time.perf_counter() - started
        self.objective.check_ranks_agree()
        metrics: dict[str, Any] = {"train_loss": loss, "train_accuracy": accuracy}
        for evaluation, loader in zip(self.plan.evaluations, self.eval_loaders):
            metrics[evaluation.name] = assess(self.evaluated, evaluation, loader, self.place.device, self.bf16)
        if self.objective.dro is not None:
            metrics["group_weights"] = self.objective.dro.weights.tolist()
        metrics |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "seconds_to_first_step": seconds_to_first,
            "samples_per_second": self.loader.num_samples / trained,
        }
        self.curve.append(metrics)
        if self.best < 0 or self._better(metrics, self.curve[self.best]):
            self.best = self.epoch
        self.epoch += 1
        return metrics

    def save(self) -> None:
        """Write the last classifier and, unless it is there, the best; then the state, whole or not at all."""
        out, lineage = self.plan.out, self.plan.lineage
        best = self.evaluated if self.best == self.epoch - 1 else self._best
        if best is not None:
            write_classifier(best, storage.join(out, "best"), epoch=self.best, lineage=lineage)
        self._best = None
        write_classifier(self.evaluated, storage.join(out, "last"), epoch=self.epoch - 1, lineage=lineage)
        write_json(storage.join(out, "curve.json"), self.curve)
        write_state(self.plan.state_path, self._state())

    def keep_best(self) -> None:
        """Instead of `save`: a copy of the classifier in memory, if this epoch was the best one."""
        if self.best == self.epoch - 1:
            self._best = copy.deepcopy(self.evaluated)

    def summary(self) -> dict[str, Any]:
        """What the training came to."""
        return {"curve": self.curve, "best": self.best, "epochs": self.epoch, "history": self.history}

    def _train_epoch(self) -> tuple[float, float, float]:
        recipe, started, first = self.plan.recipe, time.perf_counter(), 0.0
        self.model.train()
        seen_now = torch.zeros_like(self.history)
        sums = torch.zeros(3, dtype=torch.float64)
        steps = self.loader.steps
        for number, batch in enumerate(self.loader.epoch(self.epoch)):
            factor = lr_factor(recipe, (self.epoch * steps + number) / (recipe.epochs * steps))
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            loss, right = self._step(batch)
            seen_now[0].index_add_(0, batch.index, right.to(torch.int32))
            seen_now[1].index_add_(0, batch.index, torch.ones_like(batch.index, dtype=torch.int32))
            sums += torch.tensor([loss * len(right), float(right.sum()), len(right)], dtype=torch.float64)
            first = first or time.perf_counter() - started
        assert number + 1 == steps, f"{number + 1} batches instead of {steps}"
        if self.place.world > 1:
            seen_now, sums = (sum_over_ranks(tensor, self.place.device) for tensor in (seen_now, sums))
        # A repeated sample counts once per epoch: right if it was right each time.
        self.history[0] += ((seen_now[0] == seen_now[1]) & (seen_now[1] > 0)).int()
        self.history[1] += (seen_now[1] > 0).int()
        return float(sums[0] / sums[2]), float(sums[1] / sums[2]), first

    def _step(self, batch: Batch) -> tuple[float, Tensor]:
        """One optimizer step; the batch's mean loss on this rank, and which samples were right (B,)."""
        pieces = self.plan.recipe.accumulate
        size = -(-len(batch.labels) // pieces)
        starts = range(0, len(batch.labels), size)
        total, right = 0.0, []
        self.optimizer.zero_grad(set_to_none=True)
        for start in starts:
            piece = slice(start, start + size)
            synced = start == starts[-1]
            with contextlib.nullcontext() if synced or self.place.world == 1 else self.stepped.no_sync():
                loss, logits = self._loss(batch, piece)
                share = len(logits) / len(batch.labels)
                (loss * share).backward()
            total += float(loss.detach()) * share
            right.append(logits.detach().argmax(dim=1).cpu() == batch.labels[piece])
        if not math.isfinite(total):
            self._diverged()
        if self.plan.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.recipe.clip)
        self.optimizer.step()
        if self.average is not None:
            self._average_weights()
        return total, torch.cat(right)

    def _loss(self, batch: Batch, piece: slice) -> tuple[Tensor, Tensor]:
        device = self.place.device
        inputs = batch.inputs[piece].to(device, non_blocking=True)
        if inputs.dim() == 4 and device.startswith("cuda"):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.bf16):
            logits = self.stepped(inputs)
        logits = logits.float()
        labels = batch.labels[piece].to(device)
        values = {name: value[piece].to(device) for name, value in batch.values.items()}
        correctness = (
            self._correctness(batch.index[piece]).to(device) if self.plan.loss.argument == "correctness" else None
        )
        try:
            return self.objective(logits, labels, values, correctness), logits
        except ValueError:
            if not bool(torch.isfinite(logits).all()):
                self._diverged()
            raise

    def _correctness(self, index: Tensor) -> Tensor:
        """Past correctness in [0, 1]: counts, less the least of the data set, over the largest (Moon et al. 2020)."""
        right = self.history[0].float()
        low, high = right.min(), float(self.epoch)
        return ((right[index] - low) / max(high - low, 1.0)).clamp(0, 1)

    def _diverged(self) -> None:
        raise StageFailed(
            f"train: the loss is not finite in epoch {self.epoch}; try a smaller `lr`, or `clip` 1. "
            f"Checkpoints of earlier epochs are kept in {self.plan.out}"
        )

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = self.plan.recipe.ema
        pairs = zip(self.average.state_dict().values(), self.model.state_dict().values())
        for averaged, current in pairs:
            if averaged.dtype.is_floating_point:
                averaged.lerp_(current, 1 - decay)
            else:
                averaged.copy_(current)

    def _better(self, new: dict[str, Any], old: dict[str, Any]) -> bool:
        name, criterion = self.plan.evaluations[0].name, self.plan.recipe.criterion
        new_value, old_value = new[name][criterion], old[name][criterion]
        return new_value > old_value if criterion.endswith("accuracy") else new_value < old_value

    def _state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "curve": self.curve,
            "history": self.history,
        }
        if self.objective.dro is not None:
            state["groups"] = self.objective.dro.state_dict()
        return state

    def _resume(self) -> None:
        state = read_state(self.plan.state_path)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best, self.curve = state["epoch"], state["best"], state["curve"]
        self.history = state["history"]
        if self.objective.dro is not None:
            self.objective.dro.load_state_dict(state["groups"])

    def _wrapped(self) -> nn.Module:
        wrapped: nn.Module = self.model
        if self.place.world > 1:
            devices = [torch.device(self.place.device)] if self.place.device.startswith("cuda") else None
            wrapped = nn.parallel.DistributedDataParallel(wrapped, device_ids=devices)
        return torch.compile(wrapped) if self.plan.recipe.compile else wrapped

    def _training_loader(self) -> Loader:
        plan, recipe = self.plan, self.plan.recipe
        images = plan.spec.input == "images"
        return Loader(
            plan.source,
            plan.counts,
            recipe.batch_size // self.place.world,
            rank=self.place.rank,
            world=self.place.world,
            seed=recipe.seed,
            resampling=plan.resampling,
            expanded=plan.expanded,
            augmentation=Augmentation.named(recipe.augment, plan.spec.image_size) if images else None,
            window=recipe.window,
            cache_bytes=recipe.cache_bytes,
            width=plan.spec.width or 0,
            threads=recipe.threads,
        )

    def _evaluation_loader(self, evaluation: EvaluationSet) -> Loader:
        recipe = self.plan.recipe
        return Loader(
            evaluation.source,
            evaluation.counts,
            max(256, recipe.batch_size),
            rank=self.place.rank,
            world=self.place.world,
            training=False,
            cache_bytes=recipe.cache_bytes,
            width=self.plan.spec.width or 0,
            threads=recipe.threads,
        )


def is_done(recipe: Recipe, epoch: int, best: int) -> bool:
    """Whether training ends after `epoch` epochs of which number `best`, from 0, was the best."""
    return epoch >= recipe.epochs or bool(recipe.patience and epoch - 1 - best >= recipe.patience)


def lr_factor(recipe: Recipe, progress: float) -> float:
    """The learning rate over its peak, at `progress` in [0, 1) of all steps."""
    if progress < recipe.warmup:
        return max(progress / recipe.warmup, 1e-3)
    progress = (progress - recipe.warmup) / (1 - recipe.warmup)
    if recipe.schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "one_cycle":
        if progress < 0.3:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * progress / 0.3))
        return 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))
    return 1.0


def numbers_of(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among an epoch's metrics under flat names: `eval.accuracy`, `eval.groups.0.accuracy`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, list) and name != "confusion":
            flat |= numbers_of({str(i): entry for i, entry in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def _optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only: not on biases, nor on normalisation's scales."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    return torch.optim.AdamW(groups, lr=recipe.lr)
