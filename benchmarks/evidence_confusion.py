"""What the confusion score is worth on real images: error by score, transfer to other models, seeds and epochs.

    python benchmarks/evidence_confusion.py --members TRAIN_RUN --scores TEST_RUN OTHER_TEST_RUN … --outside TEST_RUN:NAME … --out docs

--members  run whose heads `hardset confusion --seeds 3 --epochs 20` trained; robustness is computed from its checkpoints
--scores   test runs with confusion columns (of other ensembles too); the first is judged, the others are what it transfers to
--outside  predictions/NAME of a test run: classifiers that are in no ensemble, with labels

Writes confusion_evidence.md and confusion.png into --out. Labels are used here only to judge: no scorer saw them.
"""

import argparse
import datetime
import json
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import torch

from ops.correlation import error_bands
from pipelines.confusion.heads import HeadScorer
from pipelines.confusion.members import FOLDER, Member, Placement
from pipelines.evaluation.compare import agreement, describe_errors, match, scored_keys
from pipelines.runs import column_groups
from pipelines.runs.record import Run
from pipelines.runs.storage import join, list_files, read_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMN = "confusion.confusion"
EPOCHS, SEEDS = (5, 10, 20), (1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", required=True)
    parser.add_argument("--form", default="embeddings-linear", help="folder of the members under models/confusion")
    parser.add_argument("--scores", nargs="+", required=True)
    parser.add_argument("--outside", nargs="+", required=True)
    parser.add_argument("--out", default="docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = Run.open(options.scores[0])
    scores = scored_keys(test, COLUMN)
    outside = {label(o): outside_errors(scores, o) for o in options.outside}
    variants = robustness_scores(Run.open(options.members), options.form, test)
    parts = [
        f"# The confusion score on real images\n\n{datetime.date.today()}. Written by `benchmarks/evidence_confusion.py`; "
        f"{len(scores):,} test images whose labels no scorer saw.\n",
        errors_section(scores["score"].to_numpy(), outside),
        transfer_section(test, options.scores, scores["score"].to_numpy(), outside),
        robustness_section(variants, outside),
    ]
    text = "\n".join(parts)
    print(text)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.out, "confusion_evidence.md").write_text(text, encoding="utf-8")
    draw(scores["score"].to_numpy(), outside, variants, Path(options.out, "confusion.png"))


def label(place: str) -> str:
    """RUN:NAME -> NAME (RUN's folder)."""
    uri, _, name = place.rpartition(":")
    return f"{name} ({Path(uri).name})"


def outside_errors(scores: pa.Table, place: str) -> np.ndarray:
    """Errors (n,) of a classifier, in the order of the scores; every sample must have a prediction."""
    uri, _, name = place.rpartition(":")
    run = Run.open(uri)
    group = f"predictions/{name}"
    parts = []
    for number, shard in enumerate(run.shards):
        table = column_groups.read(run.uri, group, number, ["key", "label", "prediction"])
        wrong = table["label"].to_numpy() != table["prediction"].to_numpy()
        parts.append(pa.table({"url": [shard.url] * len(table), "key": table["key"], "wrong": wrong.astype(float)}))
    theirs = pa.concat_tables(parts)
    left, right, _ = match(scores, theirs)
    if len(left) != len(scores):
        raise SystemExit(f"--outside {place}: has predictions of {len(left)} of the {len(scores)} scored samples")
    return theirs["wrong"].to_numpy()[right].astype(bool)


def robustness_scores(run: Run, form: str, test: Run) -> dict[tuple[int, int], np.ndarray]:
    """Scores (n,) of the test run for each (seeds, epochs), from the members' checkpoints."""
    folder = join(run.uri, FOLDER, form)
    members = [read_member(uri) for uri in list_files(folder, "member.json")][: max(SEEDS)]
    if len(members) < max(SEEDS) or min(m.epochs for m in members) < max(EPOCHS):
        raise SystemExit(f"--members {run.uri}: needs {max(SEEDS)} members of {max(EPOCHS)} epochs in {folder}")
    found = {}
    for seeds in SEEDS:
        scorer = HeadScorer(run.uri, members[:seeds], max(EPOCHS), Placement())
        parts = [entropies for shard in range(len(test.shards)) for _, entropies in scorer.shard(test.uri, shard)]
        entropies = np.concatenate(parts)
        found |= {(seeds, epochs): entropies[:, :epochs].mean(axis=1) for epochs in EPOCHS}
    return found


def read_member(uri: str) -> Member:
    record = json.loads(read_bytes(uri))
    return Member(record["form"], record["seed"], record["source"], tuple(record["history"]))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def errors_section(scores: np.ndarray, outside: dict[str, np.ndarray]) -> str:
    rows, tenth_rows = [], []
    for name, wrong in outside.items():
        found = describe_errors(scores, wrong)
        rises, worst = rises_within_sampling(found["tenths"], len(scores) // 10)
        rows.append([
            name, f"{found['error_rate_all']:.4f}", f"{found['pearson_bands']:.3f}", f"{found['pearson_samples']:.3f}",
            "yes" if rises else "no", f"{worst:+.2f}",
        ])  # fmt: skip
        tenth_rows.append([name, *(f"{rate:.3f}" for rate in found["tenths"])])
    return (
        "## Error rate by score\n\n"
        + table(
            ["model outside the ensemble", "error", "Pearson, 10 equal-width bins", "Pearson, samples",
             "rises from tenth to tenth", "least step, in standard errors"], rows)
        + "\nError rate by tenths of the samples, easiest first:\n\n"
        + table(["model", *map(str, range(1, 11))], tenth_rows)
    )  # fmt: skip


def rises_within_sampling(tenths: list[float], size: int) -> tuple[bool, float]:
    """Whether no step between tenths falls by more than two standard errors; the least step in standard errors."""
    rates = np.array(tenths)
    variance = rates * (1 - rates) / size + 1e-12
    steps = np.diff(rates) / np.sqrt(variance[1:] + variance[:-1])
    return bool(steps.min() > -2), float(steps.min())


def transfer_section(test: Run, others: list[str], scores: np.ndarray, outside: dict[str, np.ndarray]) -> str:
    rows, first = [], scored_keys(test, COLUMN)
    for uri in others:
        other = Run.open(uri)
        second = scored_keys(other, COLUMN)
        left, right, _ = match(first, second)
        theirs = second["score"].to_numpy()[right]
        found = agreement(scores[left], theirs)
        errors = [describe_errors(theirs, wrong[left]) for wrong in outside.values()]
        rows.append([
            f"{Path(uri).name}: {described(other)}", f"{len(left):,}", f"{found['kendall_tau']:.3f}",
            f"{found['spearman']:.3f}", f"{found['pearson']:.3f}", f"{100 * found['top_overlap']:.1f} %",
            *(f"{e['pearson_bands']:.3f} / {e['pearson_samples']:.3f}" for e in errors),
        ])  # fmt: skip
    hardest = np.argsort(-scores, kind="stable")[: len(scores) // 10]
    random = np.random.default_rng(0).permutation(len(scores))[: len(scores) // 10]
    accuracies = [
        [name, *(f"{1 - errors.mean():.3f}" for errors in (wrong, wrong[random], wrong[hardest]))]
        for name, wrong in outside.items()
    ]
    return (
        "## Transfer\n\nScores of several ensembles: their agreement with the first, and their correlation with the errors of models, "
        "over 10 bins / over samples.\n\n"
        + table(
            ["ensemble", "images", "Kendall τ", "Spearman", "Pearson", "same hardest tenth", *outside], rows)
        + "\nAccuracy of models outside the ensemble:\n\n"
        + table(["model", "all", "a random tenth", "the most confusing tenth"], accuracies)
    )  # fmt: skip


def described(run: Run) -> str:
    entry = run.stage("confusion")
    # An encoder given by a file is told by its factory: the path is this machine's.
    return (
        f"{entry['form']}, {entry['seeds']} × {entry['epochs']}, run of {run.config.encoder.rpartition(':')[2].strip()}"
    )


def robustness_section(variants: dict[tuple[int, int], np.ndarray], outside: dict[str, np.ndarray]) -> str:
    fullest = variants[max(SEEDS), max(EPOCHS)]
    name, wrong = next(iter(outside.items()))
    rows = []
    for (seeds, epochs), scores in variants.items():
        curve, with_full = describe_errors(scores, wrong), agreement(scores, fullest)
        low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
        rows.append([
            f"{seeds} × {epochs}", f"{scores.mean():.3f}", f"{scores.std():.3f}", f"{low:.3f}", f"{middle:.3f}", f"{high:.3f}",
            f"{curve['pearson_bands']:.3f}", f"{curve['pearson_samples']:.3f}", f"{with_full['kendall_tau']:.3f}",
            f"{100 * with_full['top_overlap']:.1f} %",
        ])  # fmt: skip
    head = ["seeds × epochs", "mean, bits", "std", "5 %", "median", "95 %", "Pearson with error, bins", "samples",
            "τ with the fullest", "same hardest tenth"]  # fmt: skip
    return f"## Seeds and epochs (Figures 5 and 6 of the paper)\n\nError of {name}.\n\n" + table(head, rows)


def draw(
    scores: np.ndarray, outside: dict[str, np.ndarray], variants: dict[tuple[int, int], np.ndarray], path: Path
) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, wrong in outside.items():
        bands = error_bands(scores, wrong)
        spread = np.sqrt(bands.error_rate * (1 - bands.error_rate) / bands.count)
        left.errorbar(bands.centre, bands.error_rate, spread, marker="o", capsize=2, label=name)
    left.set(
        xlabel="confusion score, bits", ylabel="error rate", title="Error of models outside the ensemble, ± 1 s.e."
    )
    left.legend(fontsize=8)
    edges = np.linspace(0, max(values.max() for values in variants.values()), 40)
    wrong = next(iter(outside.values()))
    for (seeds, epochs), values in variants.items():
        style = {"linestyle": "-" if seeds == max(SEEDS) else "--", "color": f"C{EPOCHS.index(epochs)}"}
        middle.hist(values, edges, histtype="step", label=f"{seeds} × {epochs}", **style)
        bands = error_bands(values, wrong)
        right.plot(bands.centre, bands.error_rate, marker=".", label=f"{seeds} × {epochs}", **style)
    middle.set(xlabel="confusion score, bits", ylabel="images", yscale="log", title="Distribution, seeds × epochs")
    right.set(xlabel="confusion score, bits", ylabel="error rate", title="Error by score, seeds × epochs")
    for axes in (middle, right):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
