"""Plan a training: everything that can be wrong is found, counted and resolved before work starts. And its correctness."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ops.decoding import decode_image
from ops.models import ClassifierSpec, build_classifier
from pipelines.corpus.shardlist import look_up
from pipelines.corpus.shards import iter_images
from pipelines.curation.subsets import check_subset
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import UserError, concerning
from pipelines.runs.executor import Output, Stage, Task, write_shards
from pipelines.runs.labels import Which, label_sources
from pipelines.runs.record import PRODUCTS, Run, fingerprint
from pipelines.training.assess import EvaluationSet
from pipelines.training.groups import GroupRule, Resampling
from pipelines.training.loop import Plan, Recipe
from pipelines.training.objective import Grouping, LossChoice
from pipelines.training.source import Source
from pipelines.training.survey import check_trainable, moments, survey

SAMPLERS = ("uniform", "upsample", "balanced")
CORRECTNESS = "correctness"
CORRECTNESS_SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.score_field("correctness.correctness"),
        pa.field("epochs", pa.int32(), metadata={"meaning": "training epochs that saw the sample; 0 if held out"}),
    ]
)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a person chooses, beside the recipe and the loss; names are those of the flags.

    Attributes
    ----------
    model : str or None
        None: `linear` on embeddings, `cifar_resnet20` on images up to 64 px, else timm's `resnet18`.
    groups, upsample, bins : GroupRule or None
        Quantiles among them are those of the training run. `bins` only divides the evaluation; it is left out where a
        run has no such column.
    subset : str or None
        Of the training run: what is trained on, and held out, are its samples alone.
    labels : {"decided", "original"}
        Of the training run.
    holdout : float or None
        Share of the samples that are not trained on but evaluated; None: 0.1 without an evaluation run, else 0.
    """

    input: str = "embeddings"
    model: str | None = None
    weights: str | None = None
    groups: GroupRule | None = None
    group_method: str = "dro"
    group_step_size: float = 0.01
    group_adjustment: float = 0.0
    sampler: str = "uniform"
    upsample: GroupRule | None = None
    upsample_factor: int = 2
    bins: GroupRule | None = None
    holdout: float | None = None
    image_size: int | None = None
    small_images: bool = False
    dropout: float = 0.0
    standardize: bool = True
    subset: str | None = None
    labels: Which = "decided"


def plan_training(
    run: Run, out: str, loss: LossChoice, recipe: Recipe, choices: Choices, eval_run: Run | None = None
) -> Plan:
    """Check and count everything that a training needs.

    Raises
    ------
    ValueError
        For a column that is not there or lacks values, a group without samples, one class only, an evaluation run
        with another encoder or other classes, shards that have changed, a model that does not exist.
    """
    _check_choices(choices, loss)
    _check_columns(run, choices)
    classes = _checked_classes(run, eval_run, choices.input)
    subset = None if choices.subset is None else check_subset(run, choices.subset, "subset")
    with concerning("model", "small_images", "dropout", "input"):
        spec = _spec(run, choices, classes)
        build_classifier(spec)  # so that a model that does not exist is told now
    groups = _resolved(choices.groups, run, classes)
    sampling = _resolved(choices.upsample, run, classes) if choices.sampler == "upsample" else groups
    holdout = choices.holdout if choices.holdout is not None else (0.1 if eval_run is None else 0.0)
    named = [choices.weights] + [rule.column for rule in (groups, sampling) if rule is not None]
    wanted = tuple(dict.fromkeys(name for name in named if name is not None))
    source = Source.of(
        run, input=choices.input, columns=wanted, part="train" if holdout else "all", holdout=holdout,
        seed=recipe.seed, image_size=spec.image_size or 0, subset=choices.subset,
        labels=choices.labels,
    )  # fmt: skip
    if choices.input == "images":
        _check_shards_unchanged(run)
    found = survey(source, len(classes), groups if choices.sampler != "upsample" else sampling)
    check_trainable(found, classes, groups if choices.sampler != "upsample" else None)
    counts_of_groups = found.group_counts
    if choices.sampler == "upsample" and groups is not None:
        by_group = survey(source, len(classes), groups)
        check_trainable(by_group, classes, groups)
        counts_of_groups = by_group.group_counts
    resampling = _resampling(choices, sampling, found)
    mean, std = (
        moments(source, run.config.width) if choices.input == "embeddings" and choices.standardize else (None, None)
    )
    return Plan(
        out=out,
        spec=spec,
        recipe=recipe,
        loss=loss,
        source=source,
        counts=found.counts,
        evaluations=_evaluations(run, eval_run, source, groups, choices.bins, holdout, len(classes)),
        weights=choices.weights,
        weight_mean=_weight_mean(choices.weights, found.means),
        grouping=_grouping(choices, groups, counts_of_groups),
        resampling=resampling,
        expanded=found.expanded(resampling),
        mean=mean,
        std=std,
        lineage=_lineage(run, eval_run, loss, recipe, choices, wanted, subset),
    )


def _check_choices(choices: Choices, loss: LossChoice) -> None:
    if choices.sampler not in SAMPLERS:
        raise UserError(f"{choices.sampler}: expected one of {', '.join(SAMPLERS)}", "sampler")
    if choices.sampler == "upsample" and choices.upsample is None:
        raise UserError("upsample: needs `upsample` COLUMN:EDGE, such as difficulty.rmd:q2", "sampler")
    if choices.sampler != "upsample" and choices.upsample is not None:
        raise UserError(f"has no meaning with `sampler` {choices.sampler}; add `sampler` upsample", "upsample")
    if choices.sampler == "balanced" and choices.groups is None:
        raise UserError("balanced: needs `groups`", "sampler")
    if choices.upsample_factor < 1:
        raise UserError(f"{choices.upsample_factor}: a whole number of at least 1", "upsample_factor")
    if choices.holdout is not None and not 0 <= choices.holdout < 1:
        raise UserError(f"{choices.holdout}: expected a fraction in [0, 1)", "holdout")
    if loss.argument == "weight" and choices.weights is None:
        raise UserError(f"{loss.name} needs a column, such as difficulty.weight", "weights")


def _check_columns(run: Run, choices: Choices) -> None:
    """Each column that is trained on is there, a number for each sample; the error names the option that asked for it."""
    rules = (("groups", choices.groups), ("upsample", choices.upsample))
    asked = [("weights", choices.weights), *((field, rule and rule.column) for field, rule in rules)]
    for field, column in asked:
        if column is not None:
            column_groups.check_score(run.uri, len(run.shards), column, field)


def _checked_classes(run: Run, eval_run: Run | None, kind: str) -> list[str]:
    """The classes to learn, at least two, the evaluation run's among them."""
    run.embedding_facts()
    classes = run.classes
    if run.config.label == "none" or not classes:
        raise UserError(f"{run.uri}: has no labels to train on (`label` {run.config.label})", "run")
    if len(classes) < 2:
        raise UserError(f"{run.uri}: one class only ({classes[0]!r}); a classifier needs at least 2", "run")
    if eval_run is None:
        return classes
    eval_run.embedding_facts()
    if eval_run.config.label == "none" or not eval_run.classes:
        raise UserError(f"{eval_run.uri}: has no labels to evaluate on", "eval_run")
    if len(eval_run.classes) > len(classes):
        raise UserError(f"{eval_run.uri}: has {len(eval_run.classes)} classes, `run` has {len(classes)}", "eval_run")
    if run.config.class_names and eval_run.config.class_names and classes[: len(eval_run.classes)] != eval_run.classes:
        raise UserError(f"{eval_run.uri}: its classes have other names than those of `run`", "eval_run")
    ours, theirs = run.config, eval_run.config
    if kind == "embeddings" and not ours.same_embedding(theirs):
        raise UserError(
            f"{eval_run.uri}: made with encoder {theirs.encoder!r} (d = {theirs.width}), `run` with {ours.encoder!r} "
            f"(d = {ours.width}); embed it with the same encoder",
            "eval_run",
        )
    return classes


def _spec(run: Run, choices: Choices, classes: list[str]) -> ClassifierSpec:
    if choices.input == "embeddings":
        return ClassifierSpec(
            "embeddings", choices.model or "linear", len(classes), tuple(classes), width=run.config.width,
            encoder=run.config.encoder, encoder_fingerprint=run.config.encoder_fingerprint, dropout=choices.dropout,
        )  # fmt: skip
    size = choices.image_size or _first_image_size(run)
    model = choices.model or ("cifar_resnet20" if size <= 64 else "resnet18")
    # An ImageNet stem leaves 2 × 2 of a 64-pixel picture: up to there the small one is the default of ResNets.
    small = choices.small_images or (size <= 64 and "resnet" in model)
    small = small and not model.startswith("cifar_")
    return ClassifierSpec(
        choices.input, model, len(classes), tuple(classes), image_size=size, small_images=small, dropout=choices.dropout
    )


def _first_image_size(run: Run) -> int:
    """Shorter side of the run's first usable image, 224 at most."""
    for shard in range(len(run.shards)):
        rows = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["row"])["row"].to_numpy()
        if not len(rows):
            continue
        for _, images in iter_images(run.shards[shard], rows[:1]):
            return min(224, *decode_image(images[0], run.config.max_pixels, run.config.exif).shape[-2:])
    raise UserError(f"{run.uri}: no usable image in its shards", "run")


def _resolved(rule: GroupRule | None, run: Run, classes: list[str]) -> GroupRule | None:
    if rule is None:
        return None
    if rule.by_class:
        rule = dataclasses.replace(rule, num_classes=len(classes))
    return rule.resolve(run)


def _resampling(choices: Choices, rule: GroupRule | None, found: Any) -> Resampling | None:
    if choices.sampler == "upsample":
        # The hardest interval comes `factor` times, all others once.
        per_class = rule.num_classes if rule.by_class else 1
        ordinary = rule.num_groups - per_class
        return Resampling(rule, (1,) * ordinary + (choices.upsample_factor,) * per_class)
    if choices.sampler == "balanced":
        counts = found.group_counts
        return Resampling(rule, tuple((counts.sum() / (len(counts) * counts)).tolist()))
    return None


def _grouping(choices: Choices, groups: GroupRule | None, counts: np.ndarray | None) -> Grouping | None:
    if groups is None:
        return None
    return Grouping(
        groups, tuple(counts.tolist()), choices.group_method, choices.group_step_size, choices.group_adjustment
    )


def _weight_mean(weights: str | None, means: dict[str, float]) -> float:
    if weights is None:
        return 1.0
    if not means[weights] > 0:
        raise UserError(f"{weights}: their mean is {means[weights]}; weights must not be negative or all 0", "weights")
    return means[weights]


def _evaluations(
    run: Run,
    eval_run: Run | None,
    source: Source,
    groups: GroupRule | None,
    bins: GroupRule | None,
    holdout: float,
    num_classes: int,
) -> tuple[EvaluationSet, ...]:
    """Held-out samples first, where there are any: they decide the best epoch. The evaluation run is reported."""
    found = []
    bins = None if bins is None or not _has(run, bins.column) else bins.resolve(run)
    if holdout:
        found.append(_evaluation("holdout", run, source, groups, bins, num_classes, part="holdout"))
    if eval_run is not None:
        found.append(_evaluation("eval", eval_run, Source.of(
            eval_run, input=source.input, image_size=source.image_size), groups, bins, num_classes, part="all"))  # fmt: skip
    if not found:
        raise UserError("0: nothing is left to evaluate on; give `eval_run`, or hold out a share", "holdout")
    return tuple(found)


def _evaluation(
    name: str, run: Run, source: Source, groups: GroupRule | None, bins: GroupRule | None, num_classes: int, part: str
) -> EvaluationSet:
    """Groups and bins whose column this run lacks are left out."""
    groups = groups if groups is not None and _has(run, groups.column) else None
    bins = bins if bins is not None and _has(run, bins.column) else None
    wanted = tuple(dict.fromkeys(rule.column for rule in (groups, bins) if rule is not None))
    source = dataclasses.replace(source, columns=wanted, part=part)
    try:
        counts = survey(source, num_classes).counts
    except ValueError as error:
        if part != "holdout":
            raise
        raise UserError(f"{source.holdout}: {error}", "holdout") from None
    return EvaluationSet(name, source, counts, groups, bins)


def _has(run: Run, column: str) -> bool:
    group, name = columns.split_name(column)
    facts = column_groups.all_facts(run.uri, group, len(run.shards))
    return all(facts) and name in column_groups.schema(run.uri, group).names


def _check_shards_unchanged(run: Run) -> None:
    infos = look_up([shard.url for shard in run.shards], f"of {run.uri}")
    for shard, info in zip(run.shards, infos):
        if info.kind != "file":
            raise UserError(f"shard {shard.url}: it is not there any more, and `input` images reads it")
        if shard.size and info.size != shard.size:
            raise UserError(
                f"shard {shard.url}: has {info.size} bytes, {shard.size} when it was embedded; embed it again"
            )


def _lineage(
    run: Run,
    eval_run: Run | None,
    loss: LossChoice,
    recipe: Recipe,
    choices: Choices,
    wanted: tuple[str, ...],
    subset: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the classifier was made from; `source` is the hash that decides whether a training is the same one."""
    sources = {columns.EMBEDDINGS: label_sources(run, run.embedding_facts(), choices.labels)}
    sources |= {name: _sources(run, columns.split_name(name)[0]) for name in wanted}
    evaluated = None if eval_run is None else (eval_run.uri, _sources(eval_run, columns.EMBEDDINGS))
    config = {
        "loss": dataclasses.asdict(loss),
        "recipe": _recipe_record(recipe),
        "choices": dataclasses.asdict(choices),
    }
    if choices.labels == "decided":
        del config["choices"]["labels"]
    if subset is None:
        del config["choices"]["subset"]  # as in the records of versions that knew none
    else:
        sources["subset"] = subset["source"]
    told = {name: subset[name] for name in ("source", "rule", "samples") if name in subset} if subset else {}
    return {
        "run": run.uri,
        "eval_run": None if eval_run is None else eval_run.uri,
        "encoder": run.config.encoder,
        "config": config,
        "subset": None if subset is None else {"name": choices.subset, **told},
        "source": fingerprint("train", sources, evaluated, json.loads(json.dumps(config))),
    }


def _recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe; without the precision where it is the one that there was before there was a choice."""
    values = dataclasses.asdict(recipe)
    if recipe.precision == "auto":
        del values["precision"]
    return values


def _sources(run: Run, group: str) -> list[str]:
    if group == columns.EMBEDDINGS:
        return label_sources(run, run.embedding_facts())
    return [fact["source"] if fact else "" for fact in column_groups.all_facts(run.uri, group, len(run.shards))]


def check_correctness_group(name: str) -> None:
    """ValueError unless a column group of this name can hold correctness: a folder's name, and no other product's."""
    columns.check_name("correctness", name)
    if name != CORRECTNESS and name in PRODUCTS:
        raise UserError(f"{name}: a run keeps something else in {name}/; take another name", "correctness")


def write_correctness(run: Run, plan: Plan, history: Any, group: str = CORRECTNESS) -> None:
    """Write how often each training sample was right as a column group; samples held out are there with null.

    The frequency over training epochs, each sample judged as it was trained on (augmented, dropout on): Moon et al. 2020.
    """
    right, seen = (part.numpy() for part in history)
    made_from = plan.lineage["source"]
    arguments = (plan.source, tuple(plan.counts), right, seen)
    stage = Stage(group, group, [made_from] * len(plan.counts), CorrectnessShards, arguments)
    for _ in write_shards(run, stage, range(len(plan.counts))):
        pass
    run.finish_stage(group, source=made_from, out=plan.out, epochs=int(seen.max()))


class CorrectnessShards:
    """The correctness columns of a shard: `pipelines.runs.executor`'s worker."""

    def __init__(self, source: Source, counts: Sequence[int], right: np.ndarray, seen: np.ndarray):
        self.source, self.right, self.seen = source, right, seen
        self.first = np.concatenate([[0], np.cumsum(counts)])

    def run(self, task: Task) -> Output:
        mine = slice(*self.first[task.shard : task.shard + 2])
        right, seen = self.right[mine], self.seen[mine]
        table = column_groups.read(self.source.run_uri, columns.EMBEDDINGS, task.shard, ["key", "shard", "row"])
        at = np.searchsorted(table["row"].to_numpy(), self.source.keys(task.shard)["row"].to_numpy())
        fraction, epochs = np.full(table.num_rows, np.nan, np.float32), np.zeros(table.num_rows, np.int32)
        fraction[at] = right / np.maximum(seen, 1)
        epochs[at] = seen
        table = table.append_column("correctness", pa.array(fraction, mask=epochs == 0))
        return Output(table.append_column("epochs", pa.array(epochs)).cast(CORRECTNESS_SCHEMA))
