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

from benchmarks.heads import Head, encoder_of, predict_last, replace_section, spread, table, train_heads
from jobs.options import RunOptions
from jobs.session import ray_session
from pipelines.calibrate import METHODS, MetaTargets
from pipelines.loop import Recipe
from pipelines.objective import LossChoice
from pipelines.run import Run
from pipelines.sidebyside import Question, draw, side_by_side, store_figures
from pipelines.train import Choices

LOSSES = {
    "CE": ("cross_entropy", [{}]),
    "FL-53": ("focal_53", [{}]),
    "inverse focal": ("inverse_focal", [{"gamma": g} for g in (1.0, 2.0, 3.0)]),
    "dual focal": ("dual_focal", [{"gamma": g} for g in (1.0, 2.6, 5.0)]),
    "KDE-XE": ("kde_cross_entropy", [{"lam": 0.3}]),
    "AURC": ("aurc", [{}]),
    "AU": ("selective_aurc", [{"nu": n, "coverage": c} for n in (0.1, 0.3, 0.7) for c in (0.5, 0.75)]),
}
METRICS = ("accuracy", "ece", "ece_mass", "cwece", "nll")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="run to train on")
    parser.add_argument("--test", required=True, help="run of the same encoder, of at least 5 shards")
    parser.add_argument("--out", required=True, type=Path, help="folder for the heads; finished ones are used again")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/calibration_losses.md"))
    parser.add_argument("--model", default="mlp:512")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="heads trained at a time")
    measure(parser.parse_args())


def measure(asked: argparse.Namespace) -> None:
    run, test = Run.open(asked.train), Run.open(asked.test)
    chosen = {name: choose(run, asked, name) for name in LOSSES}
    heads = [
        Head(str(asked.out / f"{loss}-{seed}"), LossChoice(loss, chosen[name]), recipe(asked, seed), choices(asked))
        for name, (loss, _) in LOSSES.items()
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
    replace_section(asked.report, "tables", report(asked, answer.record, chosen, test))


def recipe(asked: argparse.Namespace, seed: int) -> Recipe:
    return Recipe(epochs=asked.epochs, seed=seed, schedule="cosine", weight_decay=5e-4)


def choices(asked: argparse.Namespace) -> Choices:
    return Choices(model=asked.model, holdout=0.1)


def choose(run: Run, asked: argparse.Namespace, name: str) -> dict:
    """The parameters of a loss with the lowest NLL on the held-out tenth after the last epoch."""
    loss, grid = LOSSES[name]
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


def report(asked: argparse.Namespace, record: dict, chosen: dict[str, dict], test: Run) -> str:
    def over_seeds(loss: str, suffix: str, metric: str) -> list[float | None]:
        return [record[f"{loss}-{seed}{suffix}"][metric] for seed in range(asked.seeds)]

    names = {loss: name for name, (loss, _) in LOSSES.items()}
    first = [
        [names[loss], ", ".join(f"{k} {v:g}" for k, v in chosen[names[loss]].items()) or "–"]
        + [spread(over_seeds(loss, "", m), 1 if m == "nll" else 100, 3 if m == "nll" else 2) for m in METRICS]
        for loss in names
    ]
    text = f"{datetime.date.today()}, {asked.model} on {encoder_of(Run.open(asked.train))}, {asked.epochs} epochs, "
    text += (
        f"{asked.seeds} seeds, {record['cross_entropy-0']['samples']:,} test samples; in percent but for NLL (nats)\n\n"
    )
    text += table(["loss", "chosen", "accuracy", "ECE", "ECE, equal mass", "class-wise ECE", "NLL"], first)
    for metric, title in (("cwece", "class-wise ECE (as Table 1)"), ("ece_mass", "ECE, equal mass (as Table 4)")):
        rows = []
        for suffix in ("", *(f".{method}" for method in METHODS)):
            cells = [
                f"{spread(over_seeds(loss, suffix, metric))} [{spread(over_seeds(loss, suffix, 'accuracy'), digits=1)}]"
                for loss in names
            ]
            rows.append([suffix.lstrip(".") or "before", *cells])
        text += f"\n{title}, accuracy in brackets\n\n" + table(["", *names.values()], rows)
    return text


if __name__ == "__main__":
    main()
