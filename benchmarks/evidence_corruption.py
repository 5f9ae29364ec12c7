"""How do accuracy, ECE and difficulty move with the severity of a corruption, and does training with difficulty help?

python -m benchmarks.evidence_corruption --train RUN --shards 'DIR/test-000000.tar' --out FOLDER

The corruptions at five severities become one run, a shard each, embedded as --train was and scored with its Gaussians.
Heads trained with CE, with difficulty-aware entropy (Cui et al. 2023, eq. 9) and with plain entropy regularisation of the same
mean strength, three seeds. --train must be scored (hardset curate).
"""

import argparse
import dataclasses
import datetime
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.heads import (
    ALPHA,
    Head,
    add_head_options,
    difficulty_losses,
    encoder_of,
    predict_last,
    replace_section,
    spread,
    table,
    train_heads,
)
from jobs.embed import main as embed
from jobs.options import RunOptions
from jobs.score import main as score
from jobs.session import ray_session
from ops.calibration import confidence_calibration_error
from pipelines.corpus.corrupt import corrupt_shards
from pipelines.corpus.shards import expand_shards
from pipelines.evaluation import figures
from pipelines.evaluation.outcomes import load_outcomes, open_predictions
from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run
from pipelines.training.loop import Recipe
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--shards", required=True, help="labelled shards to corrupt, few thousand images at most")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/corruption.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/corruption.png"))
    parser.add_argument("--kinds", nargs="+", default=["all"])
    add_head_options(parser, epochs=15)
    measure(parser.parse_args())


def measure(asked: argparse.Namespace) -> None:
    run = Run.open(asked.train)
    losses = difficulty_losses(run)
    del losses[f"ER, α {ALPHA}"]  # stronger than the difficulty-aware loss: no fair comparison
    heads = {name: heads_of(asked, *choice) for name, choice in losses.items()}
    train_heads(run, [head for of_loss in heads.values() for head in of_loss], asked.processes)
    with ray_session(RunOptions(run=asked.train)):
        corrupted = corrupted_run(asked, run)
        found = {name: per_shard(corrupted, of_loss) for name, of_loss in heads.items()}
    severity = np.array([severity_of(shard.url) for shard in corrupted.shards])
    rmd = np.array([mean_rmd(corrupted, shard) for shard in range(len(corrupted.shards))])
    (asked.out / "results.json").write_text(json.dumps({"severity": severity.tolist(), "rmd": rmd.tolist(), **found}))
    asked.picture.write_bytes(figures.png(draw(severity, rmd, found), dpi=80))
    replace_section(asked.report, "tables", report(asked, corrupted, severity, rmd, found))


def corrupted_run(asked: argparse.Namespace, run: Run) -> Run:
    """A run whose first shard is clean, which counts as severity 0, and whose others are its corruptions."""
    counts = corrupt_shards(expand_shards(asked.shards), str(asked.out / "shards"), asked.kinds)
    spec = "::".join([asked.shards, *counts["folders"]])
    words = ["--shards", spec, "--run", str(asked.out / "run"), "--encoder", run.config.encoder, "--mlflow", "none"]
    words += ["--label", run.config.label]
    assert embed(words) == 0, "embedding the corrupted shards failed"
    assert score([*words, "--gaussians", run.uri]) == 0, "scoring the corrupted shards failed"
    return Run.open(str(asked.out / "run"))


def heads_of(asked: argparse.Namespace, loss: LossChoice, weights: str | None) -> list[Head]:
    recipe = Recipe(epochs=asked.epochs, schedule="cosine", weight_decay=5e-4)
    chosen = Choices(model=asked.model, holdout=0.02, weights=weights)
    return [
        Head(str(asked.out / "heads" / f"{loss.name}-{seed}"), loss, dataclasses.replace(recipe, seed=seed), chosen)
        for seed in range(asked.seeds)
    ]


def per_shard(corrupted: Run, heads: list[Head]) -> dict[str, list[list[float]]]:
    """Accuracy and ECE of every shard, a list per seed."""
    found: dict[str, list[list[float]]] = {"accuracy": [], "ece": []}
    for head in heads:
        label = Path(head.folder).name
        predict_last(corrupted, head.folder, label)
        predictions = open_predictions(corrupted, label)
        parts = [load_outcomes(predictions.over([shard])) for shard in predictions.shards]
        found["accuracy"].append([float(part.correct.mean()) for part in parts])
        found["ece"].append([confidence_calibration_error(part.confidences["msp"], part.correct) for part in parts])
    return found


def severity_of(url: str) -> int:
    """From the folder's name; 0 for the clean shard."""
    match = re.search(r"-(\d)/[^/]+$", url)
    return int(match.group(1)) if match else 0


def mean_rmd(run: Run, shard: int) -> float:
    return float(column_groups.read(run.uri, columns.DIFFICULTY, shard, ["rmd"])["rmd"].to_numpy().mean())


def draw(severity: np.ndarray, rmd: np.ndarray, found: dict) -> Figure:
    """Accuracy, ECE and mean rmd by severity, a box over the kinds of corruption each."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    shown = sorted(set(severity.tolist()))
    panels = {
        f"{label}, %": {name: 100 * np.mean(by_seed[metric], axis=0) for name, by_seed in found.items()}
        for metric, label in (("accuracy", "accuracy"), ("ece", "ECE"))
    }
    for axes, (label, values) in zip(figure.subplots(1, 3), (panels | {"mean rmd": {"rmd": rmd}}).items()):
        boxes = {name: [of_shard[severity == s] for s in shown] for name, of_shard in values.items()}
        figures.draw_boxes(axes, boxes, [str(s) for s in shown], "severity (0: clean)", label)
    return figure


def report(asked: argparse.Namespace, corrupted: Run, severity: np.ndarray, rmd: np.ndarray, found: dict) -> str:
    rows = []
    for s in sorted(set(severity.tolist())):
        mine = severity == s
        cells = [
            spread(np.asarray(by_seed[metric])[:, mine].mean(axis=1))
            for by_seed in found.values()
            for metric in ("accuracy", "ece")
        ]
        rows.append([str(s), str(int(mine.sum())), *cells, f"{rmd[mine].mean():.1f}"])
    header = ["severity", "shards", *(f"{m}, {name}" for name in found for m in ("accuracy", "ECE")), "mean rmd"]
    error = 1 - np.mean(found["CE"]["accuracy"], axis=0)
    images = corrupted.embedding_facts()[0]["rows"]
    text = f"{datetime.date.today()}, {asked.model} on {encoder_of(corrupted)}, {asked.epochs} epochs, {asked.seeds} seeds, "
    text += f"{images:,} images a shard, a shard a kind and severity; means over the kinds, in percent but for rmd\n\n"
    return (
        text
        + table(header, rows)
        + f"\nSpearman of a shard's mean rmd with CE's error on it: {spearmanr(rmd, error).statistic:.3f}\n"
    )


if __name__ == "__main__":
    main()
