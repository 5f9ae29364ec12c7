"""Which loss calibrates best, and is it the difficulty or the strength of it? Do groups help the hard half? Seeds × lines.

    python benchmarks/evidence_training.py --run RUN --eval-run RUN2 [--seeds 3] [--epochs 20] [--model mlp:256] [--only REGEX]

RUN: embeddings with difficulty/; RUN2: the test set's, by the same encoder (images, with --input images: by any).
--groups COLUMN:EDGE or COLUMN:q2   two groups whose errors each line tells, and which the last lines train on
--only REGEX                        the lines whose name it is found in
--plan FILE                         the plan is kept there, or taken from there as it was made: then no Ray is started

One process trains all, with the recipes of `hardset train`. Nothing is selected on RUN2: the numbers are those after the last
epoch, the only one that is evaluated.
"""

import argparse
import dataclasses
import os
import pickle
import re
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import torch

from ops.difficulty import difficulty_weight, kmeans_difficulty
from pipelines.runs import columns, joins
from pipelines.runs.record import Run
from pipelines.training.groups import GroupRule, Resampling
from pipelines.training.loop import Plan, Recipe, Training, Workplace
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices, plan_training

WEIGHT = "difficulty.weight"
RECIPES = {
    "embeddings": Recipe(),
    "images": Recipe(30, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="one_cycle", augment="crop_flip"),
}
ALPHA = 0.3
PLAIN = ("cross_entropy", "label_smoothing", "focal", "l1_norm", "poly1", "correctness_ranking")
# Weights whose mean strength plain entropy regularisation is given too; only a gain over that is one by difficulty.
MATCHED = ("per_dim", "per_dim, T 0.2", "minmax")
# Weights that are also tried with the α that makes their mean strength that of per_dim: then only their order differs.
EQUAL = ("per_dim, T 0.2", "per_dim, T 0.05", "minmax", "minmax, shuffled", "MD minmax", "K-means minmax")
COLUMNS = ("accuracy %", "ECE %", "ECE (mass) %", "NLL", "easy error %", "hard error %")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: a loss with weights by name, what is done with the two groups, how often the hard one comes."""

    name: str
    loss: LossChoice = dataclasses.field(default_factory=LossChoice)
    weight: str | None = None
    method: str = "erm"
    hard: int = 1


def lines(weights: dict[str, np.ndarray]) -> list[Line]:
    """All lines of the table."""
    found = [Line(name, LossChoice(name)) for name in PLAIN]
    found.append(_entropy(ALPHA))
    for name in MATCHED:
        found.append(_entropy(float(ALPHA * weights[name].mean()), f" = {ALPHA} · mean of {name}"))
    found += [_difficulty(ALPHA, name, f" (mean {weight.mean():.3f})") for name, weight in weights.items()]
    found += [Line(f"two groups: {method}", method=method) for method in ("erm", "reweight", "dro")]
    found += [Line(f"two groups: hard × {factor}", hard=factor) for factor in (2, 4)]
    for name in EQUAL:
        alpha = ALPHA * weights["per_dim"].mean() / weights[name].mean()
        found.append(_difficulty(round(float(alpha), 3), name, ", equal strength"))
    for alpha in (0.05, 0.1, 0.2, 0.4):
        found += [_entropy(alpha), _difficulty(alpha, "per_dim"), _difficulty(alpha, "minmax")]
    return found


def _entropy(alpha: float, why: str = "") -> Line:
    return Line(f"entropy_regularized α {alpha:.3g}{why}", LossChoice("entropy_regularized", {"alpha": alpha}))


def _difficulty(alpha: float, weight: str, more: str = "") -> Line:
    return Line(
        f"difficulty_entropy α {alpha}, {weight}{more}", LossChoice("difficulty_entropy", {"alpha": alpha}), weight
    )


def weights_of(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Eq. 10's weights from several difficulties, scales and temperatures, in shard order."""
    table = joins.load(run.uri, ["difficulty.rmd", "difficulty.md", "embeddings.embedding"])
    rmd, md = (table[f"difficulty.{name}"].to_numpy().astype(np.float64) for name in ("rmd", "md"))
    features = columns.vectors(table["embeddings.embedding"])
    kmeans = kmeans_difficulty(features, k=len(run.classes), seed=seed).astype(np.float64)
    dim, shuffle = run.config.width, np.random.default_rng(seed).permutation
    per_dim, minmax = difficulty_weight(rmd, scale="per_dim", dim=dim), difficulty_weight(rmd, scale="minmax")
    return {
        "per_dim": per_dim,
        "per_dim, shuffled": shuffle(per_dim),
        "per_dim, sign turned": difficulty_weight(-rmd, scale="per_dim", dim=dim),
        "per_dim, T 0.2": difficulty_weight(rmd, temperature=0.2, scale="per_dim", dim=dim),
        "per_dim, T 0.05": difficulty_weight(rmd, temperature=0.05, scale="per_dim", dim=dim),
        "minmax": minmax,
        "minmax, shuffled": shuffle(minmax),
        "minmax, sign turned": difficulty_weight(-rmd, scale="minmax"),
        "standardize": difficulty_weight(rmd, scale="standardize"),
        "none": difficulty_weight(rmd, scale="none"),
        "MD per_dim": difficulty_weight(md, scale="per_dim", dim=dim),
        "MD minmax": difficulty_weight(md, scale="minmax"),
        "K-means minmax": difficulty_weight(kmeans, scale="minmax"),
    }


def plan_once(options: argparse.Namespace) -> tuple[Plan, dict[str, np.ndarray]]:
    """The plan that all lines vary, and the weights; Ray counts the samples."""
    if options.plan and Path(options.plan).exists():
        return pickle.loads(Path(options.plan).read_bytes())
    import ray

    run, other = Run.open(options.run), Run.open(options.eval_run)
    choices = Choices(
        input=options.input, model=options.model, weights=WEIGHT, groups=GroupRule.parse(options.groups), holdout=0.0
    )
    recipe = RECIPES[options.input]
    recipe = dataclasses.replace(recipe, epochs=options.epochs or recipe.epochs)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    plan = plan_training(run, "", LossChoice("difficulty_entropy"), recipe, choices, other)
    ray.shutdown()
    found = plan, weights_of(run)
    if options.plan:
        Path(options.plan).write_bytes(pickle.dumps(found))
    return found


def vary(plan: Plan, line: Line, seed: int, out: str) -> Plan:
    """The plan of one training."""
    grouping = dataclasses.replace(plan.grouping, method=line.method)
    easy, hard = grouping.counts
    # The loader asks only for the sum, as all is in memory.
    expanded = (easy + line.hard * hard,) + (0,) * (len(plan.counts) - 1)
    return dataclasses.replace(
        plan,
        out=out,
        loss=line.loss,
        weights=WEIGHT if line.weight else None,
        grouping=grouping,
        resampling=Resampling(grouping.rule, (1, line.hard)) if line.hard > 1 else None,
        expanded=expanded,
        recipe=dataclasses.replace(plan.recipe, seed=seed),
    )


def train_once(plan: Plan, caches: dict, weight: np.ndarray | None) -> list[float]:
    """The metrics of COLUMNS after the last epoch; the decoded samples are kept in `caches` for the next training."""
    training = Training(plan, Workplace())
    if "train" in caches:
        training.loader._cache, training.eval_loaders[0]._cache = caches["train"], caches["eval"]
    else:
        next(iter(training.loader.epoch(0))), next(iter(training.eval_loaders[0].epoch()))
        caches |= {"train": training.loader._cache, "eval": training.eval_loaders[0]._cache}
    if weight is not None:
        values = caches["train"].values | {WEIGHT: torch.from_numpy(weight.astype(np.float32))}
        training.loader._cache = caches["train"]._replace(values=values)
    while training.epoch < plan.recipe.epochs - 1:
        training._train_epoch()
        training.epoch += 1
    found = training.run_epoch()["eval"]
    easy, hard = (1 - group["accuracy"] for group in found["groups"])
    shares = [found["accuracy"], found["ece"], found["ece_mass"], easy, hard]
    percent = [100 * share for share in shares]
    return [*percent[:3], found["nll"], *percent[3:]]


def cells(found: list[list[float]]) -> list[str]:
    """Mean ± standard deviation over the seeds, of each column."""
    values = np.array(found)
    digits = [4 if column == "NLL" else 2 for column in COLUMNS]
    spreads = values.std(axis=0, ddof=1) if len(values) > 1 else [None] * len(COLUMNS)
    return [
        f"{mean:.{d}f}" + ("" if spread is None else f" ± {spread:.{d}f}")
        for mean, spread, d in zip(values.mean(axis=0), spreads, digits)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--eval-run", required=True)
    parser.add_argument("--input", choices=("embeddings", "images"), default="embeddings")
    parser.add_argument("--model", help="default: that of hardset train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: that of hardset train")
    parser.add_argument("--groups", default="difficulty.rmd:q2")
    parser.add_argument("--only", default="")
    parser.add_argument("--plan")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, weights = plan_once(options)
    wanted = [line for line in lines(weights) if re.search(options.only, line.name)]
    print(
        f"{sum(plan.counts):,} training, {sum(plan.evaluations[0].counts):,} test samples, {plan.spec.model}, "
        f"{plan.recipe.epochs} epochs, {options.seeds} seeds; training samples of {' | '.join(plan.grouping.rule.names())}: "
        f"{' | '.join(f'{count:,}' for count in plan.grouping.counts)}\n"
    )
    print(f"| loss | {' | '.join(COLUMNS)} | s |\n|---|{'---|' * (len(COLUMNS) + 1)}", flush=True)
    caches: dict = {}
    for line in wanted:
        started, found = time.perf_counter(), []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as out:
                weight = weights[line.weight] if line.weight else None
                found.append(train_once(vary(plan, line, seed, out), caches, weight))
        print(f"| {line.name} | {' | '.join(cells(found))} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
