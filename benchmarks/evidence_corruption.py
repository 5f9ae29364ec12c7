"""How do accuracy, ECE and difficulty move with the severity of a corruption, and does training with difficulty help?

python -m benchmarks.evidence_corruption --train RUN --shards 'DIR/test-000000.tar' --out FOLDER

All corruptions of the four families at five severities become one run, a shard each, embedded as --train was and scored
with its Gaussians. Heads trained with CE and with difficulty-aware entropy (Cui et al. 2023, eq. 9), three seeds. --train
must be scored (hardset curate).
"""

import argparse
import datetime
import json
import re
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks.heads import Head, predict_last, replace_section, spread, table, train_heads
from jobs.embed import main as embed
from jobs.options import RunOptions
from jobs.score import main as score
from jobs.session import ray_session
from ops.calibration import confidence_calibration_error
from pipelines import columns, figures
from pipelines.corrupt import corrupt_shards
from pipelines.loop import Recipe
from pipelines.objective import LossChoice
from pipelines.outcomes import load_outcomes, open_predictions
from pipelines.run import Run
from pipelines.shards import expand_shards
from pipelines.train import Choices

LOSSES = {
    "CE": (LossChoice(), None),
    "difficulty-aware": (LossChoice("difficulty_entropy", {"alpha": 0.3}), "difficulty.weight"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--shards", required=True, help="labelled shards to corrupt, few thousand images at most")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/corruption.md"))
    parser.add_argument("--kinds", nargs="+", default=["all"])
    parser.add_argument("--model", default="mlp:512")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ray-cpus", type=int)
    asked = parser.parse_args()
    with ray_session(RunOptions(run=asked.train, ray_cpus=asked.ray_cpus)):
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    run = Run.open(asked.train)
    counts = corrupt_shards(expand_shards(asked.shards), str(asked.out / "shards"), asked.kinds)
    # The clean shards first: severity 0.
    spec = "::".join([asked.shards, *counts["folders"]])
    words = ["--shards", spec, "--run", str(asked.out / "run"), "--encoder", run.config.encoder, "--mlflow", "none"]
    words += ["--label", run.config.label]
    assert embed(words) == 0, "embedding the corrupted shards failed"
    assert score([*words, "--gaussians", run.uri]) == 0, "scoring the corrupted shards failed"
    corrupted = Run.open(str(asked.out / "run"))
    found = {name: per_shard(asked, run, corrupted, name) for name in LOSSES}
    severity = np.array([severity_of(shard.url) for shard in corrupted.shards])
    rmd = np.array([mean_rmd(corrupted, shard) for shard in range(len(corrupted.shards))])
    (asked.out / "results.json").write_text(json.dumps({"severity": severity.tolist(), "rmd": rmd.tolist(), **found}))
    draw(asked, severity, rmd, found)
    replace_section(asked.report, "tables", report(asked, run, severity, rmd, found))


def per_shard(asked: argparse.Namespace, run: Run, corrupted: Run, name: str) -> dict[str, list[list[float]]]:
    """Accuracy and ECE of every shard, a list per seed."""
    loss, weights = LOSSES[name]
    heads = [
        Head(
            str(asked.out / "heads" / f"{loss.name}-{seed}"),
            loss,
            Recipe(epochs=asked.epochs, seed=seed, schedule="cosine"),
            Choices(model=asked.model, holdout=0.02, weights=weights),
        )
        for seed in range(asked.seeds)
    ]
    train_heads(run, heads)
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
    return float(columns.read(run.uri, columns.DIFFICULTY, shard, ["rmd"])["rmd"].to_numpy().mean())


def draw(asked: argparse.Namespace, severity: np.ndarray, rmd: np.ndarray, found: dict) -> None:
    shown = sorted(set(severity.tolist()))
    for metric in ("accuracy", "ece"):
        values = {
            name: [100 * np.mean(by_seed[metric], axis=0)[severity == s] for s in shown]
            for name, by_seed in found.items()
        }
        figure = figures.box_plots(values, [str(s) for s in shown], "severity (0: clean)", f"{metric}, %")
        (asked.out / f"{metric}-by-severity.png").write_bytes(figures.png(figure))
    figure = figures.box_plots(
        {"mean rmd": [rmd[severity == s] for s in shown]}, [str(s) for s in shown], "severity", "rmd"
    )
    (asked.out / "rmd-by-severity.png").write_bytes(figures.png(figure))


def report(asked: argparse.Namespace, run: Run, severity: np.ndarray, rmd: np.ndarray, found: dict) -> str:
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
    text = f"{datetime.date.today()}, {asked.model} on {run.config.encoder}, {asked.seeds} seeds; in percent but for rmd\n\n"
    return (
        text
        + table(header, rows)
        + f"\nSpearman of a shard's mean rmd with CE's error on it: {spearmanr(rmd, error).statistic:.3f}\n"
    )


if __name__ == "__main__":
    main()
