"""Which loss calibrates best on noisy labels, and is it the difficulty or the strength? One table, seeds × losses.

    python benchmarks/evidence_training.py --run RUN --eval-run RUN2 [--seeds 3] [--epochs 20]

RUN: embeddings with difficulty/; RUN2: the test set's by the same encoder. One process trains all: Ray only plans.
"""

import argparse
import dataclasses
import os
import tempfile
import time

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import torch

from ops.difficulty import difficulty_weight, kmeans_difficulty
from pipelines import columns
from pipelines.groups import GroupRule, Resampling
from pipelines.loop import Plan, Recipe, Training, Workplace
from pipelines.objective import Grouping, LossChoice
from pipelines.run import Run
from pipelines.train import Choices, plan_training

WEIGHT = "difficulty.weight"
ALPHA = 0.3


def rows(weights: dict[str, np.ndarray], plan: Plan) -> list[tuple[str, LossChoice, str | None, dict]]:
    """(name, loss, weights, changes to the plan) of each line of the table."""
    er, der, ce = "entropy_regularized", "difficulty_entropy", LossChoice()
    mean = float(weights["per_dim"].mean())
    plain = ("cross_entropy", "label_smoothing", "focal", "l1_norm", "poly1", "correctness_ranking")
    lines = [(name, LossChoice(name), None, {}) for name in plain]
    lines.append((f"entropy_regularized α {ALPHA}", LossChoice(er, {"alpha": ALPHA}), None, {}))
    strength = round(ALPHA * mean, 3)
    lines.append((f"entropy_regularized α {strength} = {ALPHA} · mean", LossChoice(er, {"alpha": strength}), None, {}))
    for name, weight in weights.items():
        label = f"difficulty_entropy α {ALPHA}, {name} (mean {weight.mean():.3f})"
        lines.append((label, LossChoice(der, {"alpha": ALPHA}), name, {}))
    for method in ("erm", "reweight", "dro"):
        grouping = dataclasses.replace(plan.grouping, method=method)
        lines.append((f"two groups: {method}", ce, None, {"grouping": grouping}))
    for factor in (2, 4):
        resampling = Resampling(plan.grouping.rule, (1, factor))
        lines.append((f"two groups: hard × {factor}", ce, None, {"resampling": resampling, "factor": factor}))
    for alpha in (0.1, 0.2, 0.4, 0.5):
        lines.append((f"difficulty_entropy α {alpha}, per_dim", LossChoice(der, {"alpha": alpha}), "per_dim", {}))
    return lines


def weights_of(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Eq. 10's weights from several difficulties, scales and temperatures, in shard order."""
    table = columns.load(run.uri, ["difficulty.rmd", "difficulty.md", "embeddings.embedding"])
    rmd, md = (table[f"difficulty.{name}"].to_numpy().astype(np.float64) for name in ("rmd", "md"))
    features = columns.vectors(table["embeddings.embedding"])
    kmeans = kmeans_difficulty(features, k=len(run.classes), seed=seed).astype(np.float64)
    dim = run.config.width
    per_dim = difficulty_weight(rmd, scale="per_dim", dim=dim)
    return {
        "per_dim": per_dim,
        "per_dim, shuffled": np.random.default_rng(seed).permutation(per_dim),
        "per_dim, sign turned": difficulty_weight(-rmd, scale="per_dim", dim=dim),
        "per_dim, T 0.2": difficulty_weight(rmd, temperature=0.2, scale="per_dim", dim=dim),
        "per_dim, T 0.05": difficulty_weight(rmd, temperature=0.05, scale="per_dim", dim=dim),
        "minmax": difficulty_weight(rmd, scale="minmax"),
        "standardize": difficulty_weight(rmd, scale="standardize"),
        "none": difficulty_weight(rmd, scale="none"),
        "MD per_dim": difficulty_weight(md, scale="per_dim", dim=dim),
        "K-means minmax": difficulty_weight(kmeans, scale="minmax"),
    }


def train_once(plan: Plan, caches: dict, weight: np.ndarray | None) -> dict[str, float]:
    """Metrics after the last epoch."""
    training = Training(plan, Workplace())
    if "train" in caches:
        training.loader._cache, training.eval_loaders[0]._cache = caches["train"], caches["eval"]
    else:
        next(iter(training.loader.epoch(0))), next(iter(training.eval_loaders[0].epoch()))
        caches |= {"train": training.loader._cache, "eval": training.eval_loaders[0]._cache}
    if weight is not None:
        values = caches["train"].values | {WEIGHT: torch.from_numpy(weight.astype(np.float32))}
        training.loader._cache = caches["train"]._replace(values=values)
    while not training.done:
        found = training.run_epoch()["eval"]
    numbers = {name: 100 * found[name] for name in ("accuracy", "ece", "ece_mass")} | {"nll": found["nll"]}
    easy, hard = found["groups"]
    return numbers | {"easy error": 100 * (1 - easy["accuracy"]), "hard error": 100 * (1 - hard["accuracy"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--eval-run", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--groups", default="difficulty.rmd:q2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    run, other = Run.open(options.run), Run.open(options.eval_run)
    choices = Choices(weights=WEIGHT, groups=GroupRule.parse(options.groups), holdout=0.0)
    recipe = Recipe(epochs=options.epochs)
    plan = plan_training(run, "", LossChoice("difficulty_entropy"), recipe, choices, other)
    weights = weights_of(run)
    ray.shutdown()
    counts = np.asarray(plan.grouping.counts)
    caches: dict = {}
    sizes = f"{sum(plan.counts):,} training, {sum(plan.evaluations[0].counts):,} test samples, groups {counts.tolist()}"
    print(f"{sizes}, {options.epochs} epochs, {options.seeds} seeds (mean ± std), after the last epoch\n")
    print(
        "| loss | accuracy % | ECE % | ECE (mass) % | NLL | easy error % | hard error % | s |\n|---|---|---|---|---|---|---|---|"
    )
    for name, loss, which, changes in rows(weights, plan):
        started, found = time.perf_counter(), []
        factor = changes.pop("factor", None)
        if factor:
            changes["expanded"] = (int(counts[0] + factor * counts[1]),) + (0,) * (len(plan.counts) - 1)
        # A table line without groups still evaluates them.
        changes.setdefault("grouping", Grouping(plan.grouping.rule, plan.grouping.counts, "erm"))
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as out:
                this = dataclasses.replace(
                    plan,
                    out=out,
                    loss=loss,
                    weights=WEIGHT if which else None,
                    recipe=dataclasses.replace(recipe, seed=seed),
                    **changes,
                )
                found.append(train_once(this, caches, weights[which] if which else None))
        cells = [np.array([one[key] for one in found]) for key in found[0]]
        shown = [
            f"{c.mean():.{4 if key == 'nll' else 2}f} ± {c.std(ddof=len(c) > 1):.{4 if key == 'nll' else 2}f}"
            for key, c in zip(found[0], cells)
        ]
        print(f"| {name} | {' | '.join(shown)} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
