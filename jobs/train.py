"""A classifier from a run's embeddings or images, by any loss, weighted by difficulty, robust over groups.

hardset train --run RUN --loss difficulty_entropy --weights difficulty.weight --eval-run RUN2
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jobs.command import Command, say
from jobs.options import RunOptions, WorkerOptions, at_least, named
from jobs.session import ray_session, tracked
from jobs.tracking import Tracker
from pipelines.runs.errors import UserError

if TYPE_CHECKING:
    from pipelines.training.loop import Plan, Recipe
    from pipelines.training.plan import Choices

# What differs between a head that is trained in seconds and a network.
DEFAULTS = {
    "embeddings": {
        "epochs": 20, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "augment": "none",
    },
    "images": {
        "epochs": 30, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "one_cycle", "augment": "crop_flip",
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """What is learned from."""

    loss: str = "cross_entropy"
    """cross_entropy, label_smoothing, focal, difficulty_entropy, aurc, correctness_ranking … (a wrong name lists them)"""
    loss_params: list[str] = dataclasses.field(default_factory=list)
    """the loss's parameters, such as alpha=0.3 gamma=2"""
    weights: str | None = None
    """GROUP.COLUMN of weights per sample: difficulty_entropy takes them as they are (default difficulty.weight), any other
    loss is multiplied by them, scaled to mean 1"""
    groups: str | None = None
    """COLUMN:EDGES such as confusion.confusion:5, or COLUMN:qN for N equally full groups: trained on by --group-method"""
    groups_by_class: bool = False
    """divide each group by class too"""
    group_method: Literal["dro", "reweight", "erm"] = "dro"
    """dro: GroupDRO; reweight: groups count equally; erm: groups are only evaluated"""
    group_step_size: float = 0.01
    """GroupDRO: step size of the adversarial weights, above or at 0"""
    group_adjustment: float = 0.0
    """GroupDRO: C of the adjustment C / sqrt(samples of the group)"""
    sampler: Literal["uniform", "upsample", "balanced"] = "uniform"
    """upsample: hard samples more often; balanced: each of --groups equally often"""
    upsample: str | None = None
    """COLUMN:EDGE or COLUMN:qN: samples of the highest interval are those that --sampler upsample repeats (default: --groups,
    else difficulty.rmd:q2)"""
    upsample_factor: int = 2
    """how often an upsampled sample comes in an epoch"""
    eval_run: str | None = None
    """run over other shards to evaluate on (with embeddings: by the same encoder)"""
    subset: str | None = None
    """train on the samples of this subset of the run alone, made with hardset select"""
    labels: Literal["decided", "original"] = "decided"
    """decided: the labels after hardset decide, without dropped samples; original: those of the corpus"""
    holdout: float | None = None
    """fraction of the samples, in [0, 1), held out; they decide the best epoch (default: 0.1 without --eval-run, else 0)"""
    bins: str = "difficulty.rmd:q5"
    """COLUMN:EDGES or COLUMN:qN whose intervals are evaluated one by one, where a run has the column"""
    correctness: str = "correctness"
    """column group for how often each sample was right, or none"""
    input: Literal["embeddings", "images"] = "embeddings"
    """what the classifier sees"""

    def __post_init__(self) -> None:
        at_least(self, 0, ("group_step_size", "group_adjustment"))
        at_least(self, 1, ("upsample_factor",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The classifier."""

    model: str | None = None
    """embeddings: linear, mlp:512, mlp:512x256; images: cifar_resnet20|32|56|110, cifar_preact_resnet56, cifar_wrn28_10 or a
    name of timm's (default: linear; cifar_resnet20 up to 64 px, else resnet18)"""
    image_size: int | None = None
    """pixels (default: the first image's shorter side, at most 224)"""
    small_images: bool = False
    """timm: 3 x 3 stem without pooling, for 32 to 64 px (ResNets have it there anyway)"""
    dropout: float = 0.0
    """before the last layer, in [0, 1)"""
    no_standardize: bool = False
    """embeddings: take them as they are, not with mean 0 and variance 1"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How it is trained."""

    epochs: int | None = None
    """passes over the data (default: 20 on embeddings, 30 on images)"""
    batch_size: int = 128
    """samples per step, over all workers together"""
    optimizer: Literal["sgd", "adamw"] | None = None
    """default: adamw on embeddings, sgd with momentum on images"""
    lr: float | None = None
    """peak learning rate (default: 0.001 on embeddings, 0.1 on images)"""
    momentum: float = 0.9
    """of sgd (Nesterov), in [0, 1)"""
    weight_decay: float | None = None
    """on matrices and kernels only (default: 0 on embeddings, 0.0005 on images)"""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] | None = None
    """default: constant on embeddings, one_cycle on images"""
    warmup: float = 0.0
    """fraction of the steps with a linear rise, in [0, 1)"""
    accumulate: int = 1
    """pieces that a worker's part of a batch is computed in"""
    clip: float = 0.0
    """largest norm of the gradient; 0: no clipping"""
    ema: float = 0.0
    """decay per step of averaged weights, in [0, 1); 0: none"""
    augment: Literal["none", "crop_flip", "randaugment"] | None = None
    """images: default crop_flip (random crop after padding by an eighth, horizontal flip)"""
    compile: bool = False
    """torch.compile the model"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the model's products; auto: bfloat16 on a GPU, float32 on a CPU (bfloat16 there needs a CPU with avx512_bf16)"""
    criterion: Literal["accuracy", "nll", "ece", "worst_group_accuracy"] = "accuracy"
    """what makes an epoch the best one"""
    patience: int = 0
    """epochs without a better one after which training stops; 0: never"""
    seed: int = 0
    """of initial weights, order and augmentation"""
    window: int = 8192
    """samples that are shuffled at a time where the data do not fit --cache-bytes"""
    cache_bytes: int = 1 << 30
    """decoded data up to this many bytes stay in each worker's memory, and every epoch is a full shuffle"""
    threads: int = 2
    """decoding threads of each worker"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Where it is trained and kept."""

    out: str | None = None
    """folder of checkpoints; the same command goes on there (default: RUN/models/LOSS-HASH)"""
    overwrite: bool = False
    """forget what --out holds"""
    workers: int = 1
    """processes that train together (with GPUs one each); one on this machine trains without Ray"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one; cuda without a GPU is an error"""
    max_failures: int | None = None
    """times that failed workers are replaced, going on from the last save (default 2 where Ray Train runs them, as it also
    does where this is given)"""
    log_graph: bool = False
    """log the classifier to MLflow as an exported graph, which loads without this package and takes half a minute"""

    def __post_init__(self) -> None:
        named(self, ("out",))
        at_least(self, 1, ("workers",))
        at_least(self, 0, ("max_failures",))


def train(
    options: RunOptions, learn: LearnOptions, model: ModelOptions, recipe: RecipeOptions, trainer: TrainerOptions
) -> dict[str, Any]:
    """Plan, train, and say how good it is."""
    from jobs import stages
    from pipelines.runs.lease import lease
    from pipelines.runs.record import Run
    from pipelines.training import folder
    from pipelines.training import plan as planning
    from pipelines.training import run as running
    from pipelines.training.objective import LossChoice

    # All that needs no data first: a mistake there is told at once.
    loss, how = LossChoice.parse(learn.loss, learn.loss_params), _recipe(learn.input, recipe)
    planning.check_correctness_group(learn.correctness)
    chosen = _choices(learn, model, loss.argument)
    if how.batch_size % trainer.workers:
        raise UserError(f"{trainer.workers}: must be a divisor of `batch_size` {how.batch_size}", "workers")
    run = Run.open(options.run)
    eval_run = None if learn.eval_run is None else Run.open(learn.eval_run, "eval_run")
    with contextlib.ExitStack() as held, ray_session(options):
        device = stages.resources(WorkerOptions(device=trainer.device)).device
        plan = planning.plan_training(run, trainer.out or "", loss, how, chosen, eval_run)
        plan = folder.placed(plan, run)
        held.enter_context(lease(plan.out, "training"))
        folder.settle(plan, trainer.overwrite)
        if done := folder.result_of(plan):
            say(f"train: already done in {plan.out}; another --out or --overwrite trains again")
            return done
        with _tracked_once(plan, options, learn, model, recipe, trainer) as tracker:
            started = time.monotonic()
            workers = running.Workers(trainer.workers, device, trainer.max_failures)
            where = "this process" if workers.here else f"{trainer.workers} workers of Ray Train"
            say(f"train: {plan.spec.model}, {sum(plan.expanded):,} samples an epoch, {where} on {device}, {plan.out}")
            outcome = running.train(plan, workers, _epoch_watch(plan, tracker))
            if learn.correctness != "none":
                with run.lease(learn.correctness):
                    planning.write_correctness(run, plan, outcome["history"], learn.correctness)
            result = _result(plan, outcome, time.monotonic() - started)
            tracker.metrics({k: v for k, v in result.items() if isinstance(v, float)})
            _log_artifacts(plan, outcome, tracker, trainer.log_graph)
        result["mlflow_run_id"] = tracker.run_id
        folder.finish(plan, result)
    say(
        f"train: accuracy {result['accuracy']:.4f}, ece {result['ece']:.4f}, nll {result['nll']:.4f} "
        f"(epoch {result['epoch'] + 1} of {result['epochs']}): {result['checkpoint']}"
    )
    return result


def _recipe(kind: str, options: RecipeOptions) -> "Recipe":
    from pipelines.training.loop import Recipe

    values = dataclasses.asdict(options)
    return Recipe(**{name: DEFAULTS[kind][name] if value is None else value for name, value in values.items()})


def _choices(learn: LearnOptions, model: ModelOptions, argument: str | None) -> "Choices":
    from pipelines.training.groups import GroupRule
    from pipelines.training.plan import Choices

    def rule(text: str | None, option: str, by_class: bool = False) -> GroupRule | None:
        return None if text is None else GroupRule.parse(text, option, by_class)

    return Choices(
        input=learn.input,
        model=model.model,
        weights=learn.weights or ("difficulty.weight" if argument == "weight" else None),
        groups=rule(learn.groups, "groups", learn.groups_by_class),
        group_method=learn.group_method,
        group_step_size=learn.group_step_size,
        group_adjustment=learn.group_adjustment,
        sampler=learn.sampler,
        upsample=rule(_upsampled(learn), "upsample"),
        upsample_factor=learn.upsample_factor,
        bins=rule(learn.bins, "bins"),
        holdout=learn.holdout,
        image_size=model.image_size,
        small_images=model.small_images,
        dropout=model.dropout,
        standardize=not model.no_standardize,
        subset=learn.subset,
        labels=learn.labels,
    )


def _upsampled(learn: LearnOptions) -> str | None:
    """What --sampler upsample repeats where --upsample says nothing: the highest of --groups, else the harder half."""
    if learn.sampler != "upsample" or learn.upsample is not None:
        return learn.upsample
    chosen = learn.groups or "difficulty.rmd:q2"
    say(f"train: --sampler upsample repeats the highest interval of {chosen}")
    return chosen


@contextlib.contextmanager
def _tracked_once(plan: "Plan", options: RunOptions, *groups: Any) -> Iterator[Tracker]:
    """The training's one MLflow run, noted in its folder: a new one, or the one that an earlier attempt there began."""
    from pipelines.training import folder

    before = folder.tracked_by(plan)
    folder.note(plan, before)
    with tracked("train", options, *(() if before else groups), run_id=before) as tracker:
        tracker.when_opened(lambda run_id: folder.note(plan, run_id))
        lineage = {name: plan.lineage[name] for name in ("run", "eval_run", "encoder", "source")} | {"out": plan.out}
        tracker.tags({f"lineage.{name}": value for name, value in lineage.items()})
        yield tracker


def _epoch_watch(plan: "Plan", tracker: Tracker) -> Callable[[dict[str, Any]], None]:
    """Says and logs each epoch."""
    from pipelines.training.loop import numbers_of

    shown = plan.evaluations[-1].name

    def watch(epoch: dict[str, Any]) -> None:
        tracker.metrics(numbers_of({k: v for k, v in epoch.items() if k != "epoch"}), step=epoch["epoch"] + 1)
        found = epoch[shown]
        worst = f" · worst group {found['worst_group_accuracy']:.4f}" if "worst_group_accuracy" in found else ""
        say(
            f"epoch {epoch['epoch'] + 1}/{plan.recipe.epochs}: loss {epoch['train_loss']:.4f} · {shown} accuracy "
            f"{found['accuracy']:.4f} · ece {found['ece']:.4f} · nll {found['nll']:.4f}{worst} · "
            f"{epoch['samples_per_second']:,.0f} samples/s"
        )

    return watch


def _result(plan: "Plan", outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
    from pipelines.runs import storage

    curve, best, reported = outcome["curve"], outcome["best"], plan.evaluations[-1].name
    found = curve[best][reported]
    return {
        **{name: found[name] for name in ("accuracy", "ece", "ece_mass", "nll", "samples")},
        **{name: found[name] for name in ("worst_group_accuracy", "groups", "bins") if name in found},
        "last": {name: curve[-1][reported][name] for name in ("accuracy", "ece", "ece_mass", "nll")},
        "evaluated_on": reported,
        "epoch": best,
        "epochs": len(curve),
        "train_samples": sum(plan.counts),
        **({"subset": plan.lineage["subset"]} if plan.lineage["subset"] else {}),
        "seconds": seconds,
        "seconds_to_first_step": curve[0]["seconds_to_first_step"],
        "samples_per_second": curve[-1]["samples_per_second"],
        "checkpoint": storage.join(plan.out, "best"),
        "out": plan.out,
    }


def _log_artifacts(plan: "Plan", outcome: dict[str, Any], tracker: Tracker, graph: bool) -> None:
    """The curves, the groups' confusion matrices, and the classifier with its signature."""
    if not tracker.active:
        return
    from ops.models import RECORD, WEIGHTS
    from pipelines.runs import storage
    from pipelines.training import figures

    curve, shown = outcome["curve"], plan.evaluations[-1].name
    documents = {"curve.json": curve, "lineage.json": plan.lineage}
    groups = curve[outcome["best"]][shown].get("groups", [])
    documents |= {f"groups/{number}.json": group for number, group in enumerate(groups)}
    for name, document in documents.items():
        tracker.file(json.dumps(document, indent=1).encode(), name)
    tracker.figure(figures.curves(curve, shown), "curves.png")
    spec = plan.spec
    shape = (spec.width,) if spec.input == "embeddings" else (3, spec.image_size, spec.image_size)
    kind = "float32" if spec.input == "embeddings" else "uint8"
    files = {name: storage.read_bytes(storage.join(plan.out, "best", name)) for name in (WEIGHTS, RECORD)}
    tracker.model(files, (kind, shape), spec.num_classes, graph)


COMMAND = Command("train", __doc__, (RunOptions, LearnOptions, ModelOptions, RecipeOptions, TrainerOptions), train)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
