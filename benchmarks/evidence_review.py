"""What reviewing buys: a simulated person, who knows the true labels, works the loop review -> decide -> fit -> score.

    python benchmarks/evidence_review.py --cifar10 DIR --work WORK [--labels worst]

DIR and WORK are those of evidence_subsets.py. In each round the person looks at the next samples of an order, decides, and the
run is fitted and scored again, by the functions behind `hardset decide`, `fit` and `score`. Three orders: `label_error` of the
scores of the moment; at random; and confident learning's, the probability of the given label under a linear head that did not
see the sample (five folds, once, at the beginning).

After each round: wrong labels that remain, and the accuracy of a linear head trained on the labels of the moment. Before the
first: the estimate of the corpus's error rate from 100 looks at the review page's random sample, over many draws, beside 100
and 300 looks at samples drawn plainly.
"""

import argparse
import csv
import datetime
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from evidence_subsets import FEATURES, Head, scored_run
from heads import replace_section, table

from jobs.options import RunOptions
from jobs.session import ray_session
from ops.review import stratified_rate, wilson_interval
from pipelines.curation import fit, score
from pipelines.curation.decide import decide
from pipelines.report import review
from pipelines.report.review import ReviewLimits
from pipelines.runs import joins
from pipelines.runs.record import Run

RESULTS = Path(__file__).with_name("review.md")
ROUNDS = (200, 500, 1000, 2000)  # samples looked at, all rounds together
FOLDS, DRAWS, LOOKS = 5, 200, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--labels", nargs="+", default=["worst", "aggregate"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    clean = np.load(options.cifar10 / "cifar10_train.npz")["clean"].astype(np.int64)
    features = np.load(options.cifar10 / FEATURES)
    truth = np.load(options.cifar10 / "cifar10_test.npz")["clean"].astype(np.int64)
    pack = (Head(features["train"], (features["test"].astype(np.float32), truth)), clean)
    for name in options.labels:
        run = scored_run(options.cifar10, options.work, name)
        with ray_session(RunOptions(run=run.uri)):
            replace_section(RESULTS, f"rounds {name}", rounds_section(run, options.work, pack, name))
            replace_section(RESULTS, f"estimate {name}", estimate_section(run, clean, name))


def columns_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The label that holds now and label_error of each image, in CIFAR-10's order."""
    found = joins.load(run.uri, ["difficulty.label_error"])
    order = np.argsort([int(key.rpartition("_")[2]) for key in found["key"].to_pylist()])
    return found["label"].to_numpy()[order], found["difficulty.label_error"].to_numpy()[order]


def self_confidence(head: Head, labels: np.ndarray) -> np.ndarray:
    """Probability of each given label under a head fitted on the other folds."""
    fold = np.random.default_rng(0).integers(FOLDS, size=len(labels))
    found = np.empty(len(labels))
    for held in range(FOLDS):
        rest, part = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        head.accuracy(rest, labels[rest])
        with torch.no_grad():
            probabilities = torch.softmax(head.layer(head.x[torch.from_numpy(part)]), dim=1).numpy()
        found[part] = probabilities[np.arange(len(part)), labels[part]]
    return found


def rounds_section(run: Run, work: Path, pack: tuple, name: str) -> str:
    head, clean = pack
    labels, _ = columns_of(run)
    fixed = {
        "at random": np.random.default_rng(0).random(len(labels)),
        "confident learning": -self_confidence(head, labels),
    }
    everything = np.arange(len(labels))
    start = [f"{(labels != clean).sum():,}", f"{100 * head.accuracy(everything, labels):.1f}"]
    rows = [["(before)", "0", "", *start]]
    for order in ("label_error", *fixed):
        copy = str(work / f"review-{name}-{order.replace(' ', '-')}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run.uri, copy)
        rows += _work_through(Run.open(copy), order, fixed.get(order), pack)
    names = [
        "order",
        "looked at",
        "wrong among those of the round",
        "wrong labels left",
        "accuracy of a linear head, %",
    ]
    return f"## Rounds of review, labels {name} {stamp()}\n\n{table(names, rows)}\n"


def _work_through(run: Run, order: str, ranks: np.ndarray | None, pack: tuple) -> list[list[str]]:
    head, clean = pack
    seen = np.zeros(len(clean), bool)
    rows = []
    for budget in ROUNDS:
        labels, suspicion = columns_of(run)
        rank = np.where(seen, -np.inf, suspicion if ranks is None else ranks)
        looked = np.argsort(-rank, kind="stable")[: budget - int(seen.sum())]
        wrong = (labels[looked] != clean[looked]).mean()
        file = Path(run.uri, "decisions.csv")
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["key", "label"])
            writer.writerows((f"train_{index:08d}", clean[index]) for index in looked)
        decide(run, [str(file)], "simulated")
        fit.fit(run)
        score.score(run, score.Weighting())
        seen[looked] = True
        labels, _ = columns_of(run)
        accuracy = head.accuracy(np.arange(len(labels)), labels)
        rows.append(
            [order, f"{budget:,}", f"{100 * wrong:.1f} %", f"{(labels != clean).sum():,}", f"{100 * accuracy:.1f}"]
        )
        print(rows[-1], flush=True)
    return rows


def estimate_section(run: Run, clean: np.ndarray, name: str) -> str:
    labels, _ = columns_of(run)
    truth = float((labels != clean).mean())
    stratified, plain = [], {LOOKS: [], 3 * LOOKS: []}
    for seed in range(DRAWS):
        found = review.collect(run, ReviewLimits(each=1, random=LOOKS, seed=seed))
        queue = next(queue for queue in found["queues"] if queue["name"] == "random")
        keys = [found["table"]["key"][number].as_py() for number in queue["ids"]]
        index = np.array([int(key.rpartition("_")[2]) for key in keys])
        strata, count = np.array(queue["strata"]), len(queue["sizes"])
        errors = np.bincount(strata[labels[index] != clean[index]], minlength=count)
        stratified.append(stratified_rate(queue["sizes"], errors, np.bincount(strata, minlength=count)))
        for looks, rates in plain.items():
            drawn = np.random.default_rng(seed).choice(len(labels), looks, replace=False)
            rates.append(wilson_interval(int((labels[drawn] != clean[drawn]).sum()), looks))
    ways = {f"{LOOKS} stratified by label_error": stratified} | {
        f"{looks} drawn plainly": r for looks, r in plain.items()
    }
    rows = []
    for way, rates in ways.items():
        rate, low, high = np.array(rates).T
        deviation = np.sqrt(np.mean((rate - truth) ** 2))
        cells = [f"{100 * rate.mean():.2f}", f"{100 * deviation:.2f}", f"{100 * (high - low).mean() / 2:.2f}"]
        rows.append([way, *cells, f"{100 * np.mean((low <= truth) & (truth <= high)):.0f} %"])
    head = [
        "looks",
        "estimate, % (mean)",
        "its error, points (root mean square)",
        "half the interval, points",
        "intervals that hold the truth",
    ]
    return f"## Estimate of the error rate, labels {name} ({100 * truth:.2f} % are wrong), {DRAWS} draws {stamp()}\n\n{table(head, rows)}\n"


def stamp() -> str:
    return f"({datetime.date.today().isoformat()}, {os.cpu_count()} CPU cores)"


if __name__ == "__main__":
    main()
