"""Do the calibration losses calibrate? CE, FL-53, inverse focal, dual focal, KDE-XE, AURC and AU, before and after
temperature scaling, MetaMis and MetaAcc, as Tables 1, 2 and 4 of the reweighted-risk paper (Zhou et al.).

python -m benchmarks.evidence_calibration_losses --train RUN --test RUN --out FOLDER

Heads on embeddings. γ, ν and coverage are chosen on a held-out tenth of the training run (lowest NLL, one seed);
calibrators are fitted on a fifth of the test run's shards, and everything is measured on the others. What is finished in
--out is used again: another folder for other settings.
"""

import argparse
import datetime
import json
from pathlib import Path

from benchmarks.heads import (
    Head,
    add_head_options,
    encoder_of,
    predict_last,
    replace_section,
    spread,
    table,
    train_heads,
)
from jobs.options import RunOptions
from jobs.session import ray_session
from pipelines.evaluation.calibrate import METHODS, MetaTargets
from pipelines.evaluation.sidebyside import Question, draw, side_by_side, store_figures
from pipelines.runs.record import Run
from pipelines.training.loop import Recipe
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices

# Name in folders and predictions -> name in tables, loss, the parameters to choose from.
LOSSES = {
    "cross_entropy": ("CE", "cross_entropy", [{}]),
    "focal_53": ("FL-53", "focal_53", [{}]),
    "inverse_focal": ("inverse focal", "inverse_focal", [{"gamma": g} for g in (1.0, 2.0, 3.0)]),
    "dual_focal": ("dual focal", "dual_focal", [{"gamma": g} for g in (1.0, 2.6, 5.0)]),
    "kde_cross_entropy": ("KDE-XE", "kde_cross_entropy", [{"lam": 0.3}]),
    "aurc": ("AURC", "aurc", [{}]),
    "selective_aurc": (
        "AU",
        "selective_aurc",
        [{"nu": n, "coverage": c} for n in (0.1, 0.3, 0.7) for c in (0.5, 0.75)],
    ),
    "selective_aurc_default": ("AU, default", "selective_aurc", [{"nu": 0.3, "coverage": 0.75}]),
}
METRICS = ("accuracy", "ece", "ece_mass", "cwece", "nll")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="run to train on")
    parser.add_argument("--test", required=True, help="run of the same encoder, of at least 5 shards")
    parser.add_argument("--out", required=True, type=Path, help="folder for the heads; finished ones are used again")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/calibration_losses.md"))
    add_head_options(parser, epochs=20)
    measure(parser.parse_args())


def measure(asked: argparse.Namespace) -> None:
    run, test = Run.open(asked.train), Run.open(asked.test)
    chosen = {key: choose(run, asked, key) for key in LOSSES}
    heads = [
        Head(str(asked.out / f"{key}-{seed}"), LossChoice(loss, chosen[key]), recipe(asked, seed), choices(asked))
        for key, (_, loss, _) in LOSSES.items()
        for seed in range(asked.seeds)
    ]
    train_heads(run, heads, asked.processes)
    sets = [Path(head.folder).name for head in heads]
    question = Question(tuple(sets), calibrate=METHODS, targets=MetaTargets(0.05, 0.95), bootstrap=0)
    with ray_session(RunOptions(run=asked.test)):
        for head, name in zip(heads, sets):
            predict_last(test, head.folder, name)
        answer = side_by_side(test, question)
    shown = [f"{loss}-0{suffix}" for loss in ("cross_entropy", "selective_aurc") for suffix in ("", ".temperature")]
    drawn = {name: figure for name, figure in draw(answer).items() if name.removesuffix("-reliability") in shown}
    store_figures(test, drawn)
    (asked.out / "results.json").write_text(json.dumps(answer.record, indent=1))
    replace_section(asked.report, "tables", report(asked, answer.record, chosen))


def recipe(asked: argparse.Namespace, seed: int) -> Recipe:
    return Recipe(epochs=asked.epochs, seed=seed, schedule="cosine", weight_decay=5e-4)


def choices(asked: argparse.Namespace) -> Choices:
    return Choices(model=asked.model, holdout=0.1)


def choose(run: Run, asked: argparse.Namespace, key: str) -> dict:
    """The parameters of a loss with the lowest NLL on the held-out tenth after the last epoch."""
    name, loss, grid = LOSSES[key]
    if len(grid) == 1:
        return grid[0]
    label = ["-".join(f"{k}{v:g}" for k, v in params.items()) for params in grid]
    heads = [
        Head(str(asked.out / "choice" / f"{loss}-{text}"), LossChoice(loss, params), recipe(asked, 0), choices(asked))
        for text, params in zip(label, grid)
    ]
    nll = [summary["curve"][-1]["holdout"]["nll"] for summary in train_heads(run, heads, asked.processes)]
    print(name, {text: round(value, 4) for text, value in zip(label, nll)}, flush=True)
    return grid[nll.index(min(nll))]


def report(asked: argparse.Namespace, record: dict, chosen: dict[str, dict]) -> str:
    def over_seeds(key: str, suffix: str, metric: str) -> list[float | None]:
        return [record[f"{key}-{seed}{suffix}"][metric] for seed in range(asked.seeds)]

    names = {key: name for key, (name, _, _) in LOSSES.items()}
    first = [
        [name, ", ".join(f"{k} {v:g}" for k, v in chosen[key].items()) or "–"]
        + [spread(over_seeds(key, "", m), 1 if m == "nll" else 100, 3 if m == "nll" else 2) for m in METRICS]
        for key, name in names.items()
    ]
    run, samples = Run.open(asked.train), record["cross_entropy-0"]["samples"]
    images = sum(facts["rows"] for facts in run.embedding_facts())
    text = f"{datetime.date.today()}, {asked.model} on {encoder_of(run)}, {images:,} training images, a tenth of them held out, "
    text += f"{asked.epochs} epochs, {asked.seeds} seeds, {samples:,} test samples; in percent but for NLL (nats)\n\n"
    text += table(["loss", "chosen", "accuracy", "ECE", "ECE, equal mass", "class-wise ECE", "NLL"], first)
    titles = {
        "cwece": "class-wise ECE (as Table 1)",
        "ece": "ECE, equal width (as Table 2)",
        "ece_mass": "ECE, equal mass (as Table 4)",
    }
    for metric, title in titles.items():
        rows = []
        for suffix in ("", *(f".{method}" for method in METHODS)):
            cells = [
                f"{spread(over_seeds(key, suffix, metric))} [{spread(over_seeds(key, suffix, 'accuracy'), digits=1)}]"
                for key in names
            ]
            rows.append([suffix.lstrip(".") or "before", *cells])
        text += f"\n{title}, accuracy in brackets\n\n" + table(["", *names.values()], rows)
    return text


if __name__ == "__main__":
    main()
