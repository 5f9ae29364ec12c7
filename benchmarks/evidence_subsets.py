"""What a subset is made of, what a classifier learns from it, and what it is worth as a benchmark.

    python benchmarks/evidence_subsets.py --cifar10 DIR --work WORK                      # make-up and training, four label sets
    python benchmarks/evidence_subsets.py --cifar10 DIR --work WORK --benchmark RUN RUN2     # subsets of the test images, judged

RUN, RUN2: runs of another encoder over the training and the test images with clean labels, RUN2 scored with RUN's Gaussians.

DIR holds CIFAR-10's images as JPEG, CIFAR-10N's label sets, features of one encoder and make_shards.py. WORK keeps what is made:
shards of each label set, a run over them whose embeddings are these features, scored by `fit` and `score` with their defaults.

Rows are chosen by `pipelines.curation.rules`, as `hardset select` chooses them, without writing 160 subsets of tars. A head is one
linear layer on standardised features, fitted by L-BFGS with a weak ridge: it has one optimum, so that a rule without chance has no
spread, and what is drawn at random is drawn with three seeds.
"""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from heads import replace_section, spread, table

from jobs.options import RunOptions
from jobs.session import ray_session
from pipelines.corpus.shards import expand_shards
from pipelines.curation import fit, rules, score
from pipelines.curation.rules import Pool, Rule
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.record import CorpusConfig, Run

RESULTS = Path(__file__).with_name("subsets.md")
LABEL_SETS = ("clean", "aggregate", "random1", "worst")
SHARES = (0.02, 0.1, 0.3, 0.6)
SEEDS = (0, 1, 2)
PER_SHARD = 5000
TRUSTED = "difficulty.margin < 0"
FEATURES = "features_mobilenet_v2_128_pca256.npz"
BY = "difficulty.rmd"
RIDGE = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--where", default=TRUSTED, help="what makes a label trusted")
    parser.add_argument(
        "--benchmark", nargs=2, metavar=("RUN", "RUN2"), help="judge subsets of the test images instead"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.benchmark:
        with ray_session(RunOptions(run=str(options.work))):
            replace_section(RESULTS, "benchmark", benchmark_section(options))
        return
    clean = np.load(options.cifar10 / "cifar10_train.npz")["clean"].astype(np.int64)
    features = np.load(options.cifar10 / FEATURES)
    test = (
        features["test"].astype(np.float32),
        np.load(options.cifar10 / "cifar10_test.npz")["clean"].astype(np.int64),
    )
    with ray_session(RunOptions(run=str(options.work))):
        runs = {name: scored_run(options.cifar10, options.work, name) for name in LABEL_SETS}
        replace_section(RESULTS, "make-up", makeup_section(runs, clean, options.where))
        replace_section(RESULTS, "training", training_section(runs, features["train"], test, options.where))


def scored_run(pack: Path, work: Path, labels: str, split: str = "train", like: Run | None = None) -> Run:
    """A run over shards with one of the label sets, its embeddings the features of the pack; fitted, or `like` another, and scored."""
    name = labels if split == "train" else split
    shards = work / f"shards-{name}"
    if not shards.exists():
        make = [sys.executable, str(pack / "make_shards.py"), "--split", split, "--label", labels]
        subprocess.run([*make, "--per-shard", str(PER_SHARD), "--out", str(shards)], check=True)
    uri = str(work / f"run-{name}")
    if not Run.exists(uri):
        write_embeddings(uri, shards, pack, labels, split)
    run = Run.open(uri)
    if like is None:
        fit.fit(run)
    else:
        fit.adopt(run, like)
    score.score(run, score.Weighting())
    return Run.open(uri)


def write_embeddings(uri: str, shards: Path, pack: Path, labels: str, split: str) -> None:
    """The column group that `hardset embed` would write, from features that were computed elsewhere."""
    values = np.load(pack / FEATURES)[split].astype(np.float32)
    given = np.load(pack / f"cifar10_{split}.npz")[labels].astype(np.int64)
    config = CorpusConfig(f"numpy:{FEATURES}", FEATURES, values.shape[1], "cls")
    run = Run.create(uri, config, expand_shards(str(shards)))
    schema = columns.embeddings_schema(values.shape[1], "float32", 1)
    for shard in range(len(run.shards)):
        rows = np.arange(shard * PER_SHARD, min(len(values), (shard + 1) * PER_SHARD))
        made = {
            "key": [f"{split}_{row:08d}" for row in rows],
            "shard": np.full(len(rows), shard),
            "row": np.arange(len(rows)),
            "label": given[rows],
            "embedding": columns.vector_array(values[rows], pa.float32()),
        }
        known = pa.table({field.name: made.get(field.name, pa.nulls(len(rows), field.type)) for field in schema})
        facts = {"left_out": 0, "max_label": int(given[rows].max()), "digest": str(shard), "size": 0, "mtime_ns": 0}
        column_groups.write(
            run.uri, columns.EMBEDDINGS, shard, known.cast(schema), f"{split} {labels} {shard}", **facts
        )
    run.finish_stage("embed", rows=len(values), left_out=0, seconds=0.0)


def chosen(run: Run, rule: Rule) -> pa.Table:
    """key, shard, row, label, score of the samples that a rule selects."""
    pool, cuts, _ = rules.find_cuts(run, Pool.of(run, rule))
    taken = enumerate(rules.taken_of_shards(run, pool, cuts))
    return pa.concat_tables([rules.selected(shard, pool, cuts, before) for shard, (_, before) in taken])


def index_of(found: pa.Table) -> np.ndarray:
    """Numbers of images in CIFAR-10's order, which their keys hold."""
    return np.array([int(key.rpartition("_")[2]) for key in found["key"].to_pylist()])


def wrong_share(found: pa.Table, clean: np.ndarray) -> float:
    return float((found["label"].to_numpy() != clean[index_of(found)]).mean())


def makeup_section(runs: dict[str, Run], clean: np.ndarray, where: str) -> str:
    rows = []
    for name, run in runs.items():
        everything = chosen(run, Rule(BY, 1.0))
        hardest = chosen(run, Rule(BY, 0.1))
        trusted, both = (
            chosen(run, Rule(BY, 1.0, where=where)),
            chosen(run, Rule(BY, 0.1, where=where)),
        )
        shares = [f"{100 * wrong_share(found, clean):.1f}" for found in (everything, hardest, trusted, both)]
        means = [f"{np.mean(found['score'].to_numpy()):.2f}" for found in (hardest, both)]
        rows.append([name, *shares, f"{len(trusted):,}", *means])
    head = [
        "labels",
        "corpus",
        "hardest tenth",
        f"all with `{where}`",
        "hardest tenth of these: `curate`'s",
        "pass",
        "mean rmd, hardest",
        "mean rmd, `curate`'s",
    ]
    return f"{stamp(runs)}; wrong labels in percent, a tenth being one of the samples that pass\n\n{table(head, rows)}"


def stamp(runs: dict[str, Run]) -> str:
    run = next(iter(runs.values()))
    rows, shrinkage = sum(f["rows"] for f in run.embedding_facts()), run.stage("fit")["shrinkage"]
    return f"{datetime.date.today()}, {rows:,} images, {run.config.encoder}, shrinkage {[round(float(s), 3) for s in shrinkage]}"


def training_section(runs: dict[str, Run], features: np.ndarray, test: tuple, where: str) -> str:
    """Accuracy on clean test images of heads trained on shares of the corpus, by how the share is chosen."""
    head = Head(features, test)
    rows = [["all", "–", *(f"{100 * head.accuracy(*samples(run, Rule(BY, 1.0))):.1f}" for run in runs.values())]]
    for share in SHARES:
        count = round(share * len(features))
        for name, make, seeds in ways(count, where):
            cells = []
            for run in runs.values():
                drawn = [samples(run, make(seed)) for seed in seeds]
                short = "" if len(drawn[0][0]) == count else f" ({len(drawn[0][0]):,})"
                cells.append(spread([head.accuracy(*found) for found in drawn], digits=1) + short)
            rows.append([f"{100 * share:g} %", name, *cells])
            print(" | ".join(rows[-1]), flush=True)
    about = f"{stamp(runs)}; accuracy in percent on {len(test[1]):,} clean test images; ± over three draws; "
    about += "in brackets: all that pass, where fewer do"
    return f"{about}\n\n{table(['share', 'chosen', *runs], rows)}"


def ways(count: int, where: str) -> list[tuple]:
    """Name, rule of a seed, seeds."""
    return [
        ("random", lambda seed: Rule(BY, count, random=True, seed=seed), SEEDS),
        ("hardest", lambda _: Rule(BY, count), (0,)),
        ("easiest", lambda _: Rule(BY, count, lowest=True), (0,)),
        ("hard and clean", lambda _: Rule(BY, count, where=where), (0,)),
        ("random, clean", lambda seed: Rule(BY, count, where=where, random=True, seed=seed), SEEDS[:1]),
        ("stratified, clean", lambda seed: Rule(BY, count, where=where, stratify=(BY, 20), seed=seed), SEEDS),
    ]


def samples(run: Run, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and labels of the images that a rule selects."""
    found = chosen(run, rule)
    return index_of(found), found["label"].to_numpy()


class Head:
    """A linear head on features that are standardised over the corpus, fitted from where the last fit ended: the loss is convex."""

    def __init__(self, features: np.ndarray, test: tuple):
        x = torch.from_numpy(features.astype(np.float32))
        mean, deviation = x.mean(dim=0), x.std(dim=0)
        self.x, self.test = (x - mean) / deviation, ((torch.from_numpy(test[0]) - mean) / deviation, test[1])
        self.layer = torch.nn.Linear(x.shape[1], 10)
        for parameter in self.layer.parameters():
            torch.nn.init.zeros_(parameter)

    def accuracy(self, index: np.ndarray, labels: np.ndarray) -> float:
        """The share of test images that a head gets right that was fitted on some images with these labels."""
        return float(1 - self.wrong(index, labels).mean())

    def wrong(self, index: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Fit on some images with these labels; whether it is wrong about each test image."""
        x, y = self.x[torch.from_numpy(index)], torch.from_numpy(labels.astype(np.int64))
        parameters = list(self.layer.parameters())
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=100, history_size=20, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(self.layer(x), y) + RIDGE / 2 * self.layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            return self.layer(self.test[0]).argmax(dim=1).numpy() != self.test[1]


def benchmark_section(options: argparse.Namespace) -> str:
    """Error of four classifiers on subsets of the test images, and what people say of their labels."""
    ours = scored_run(options.cifar10, options.work, "clean")
    tests = {
        "v2": scored_run(options.cifar10, options.work, "clean", "test", ours),
        "v1": Run.open(options.benchmark[1]),
    }
    trains = {"v2": ours, "v1": Run.open(options.benchmark[0])}
    wrong = {}
    for encoder, train in trains.items():
        features, test = (in_order_of_images(run) for run in (train, tests[encoder]))
        head = Head(features[0], test)
        wrong[f"linear, {encoder}"] = head.wrong(np.arange(len(features[0])), features[1])
        wrong[f"MLP, {encoder}"] = mlp_wrong(head.x, features[1], *head.test)
    names = list(wrong)
    pack = np.load(options.cifar10 / "cifar10_test.npz")
    agreed = pack["human_probs"][np.arange(len(pack["clean"])), pack["clean"]]
    doubtful = np.zeros(len(agreed), bool)
    doubtful[pack["label_errors"]] = True
    rows = []
    for chosen_by, drawn in test_subsets(tests, len(agreed), options.where).items():
        errors = np.mean([[wrong[name][index].mean() for name in names] for index in drawn], axis=0)
        ranks = errors.argsort().argsort() + 1
        cells = [f"{100 * error:.1f} ({rank})" for error, rank in zip(errors, ranks)]
        people = [
            np.mean([agreed[index].mean() for index in drawn]),
            np.mean([doubtful[index].sum() for index in drawn]),
        ]
        rows.append([chosen_by, f"{len(drawn[0]):,}", *cells, f"{100 * people[0]:.1f}", f"{people[1]:.0f}"])
        print(" | ".join(rows[-1]), flush=True)
    head = ["test images", "images", *names, "people who give the label", "label errors known"]
    about = f"{datetime.date.today()}; error in percent and rank of heads trained on 50,000 clean images; people: CIFAR-10H, mean share "
    about += "of 47 to 63 people per image, in percent; label errors: 54 images of whose label at most two of five people are sure"
    return f"{about}\n\n{table(head, rows)}"


def test_subsets(tests: dict[str, Run], total: int, where: str) -> dict[str, list[np.ndarray]]:
    """Numbers of the test images in each subset, several where it is drawn at random."""

    def of(run: Run, rule: Rule) -> np.ndarray:
        return index_of(chosen(run, rule))

    found = {"all": [np.arange(total)]}
    found["random tenth"] = [of(tests["v2"], Rule(BY, 0.1, random=True, seed=seed)) for seed in range(10)]
    for encoder, run in tests.items():
        found[f"hardest tenth by rmd, {encoder}"] = [of(run, Rule(BY, 0.1))]
        found[f"hardest tenth of those with `{where}`, {encoder}"] = [of(run, Rule(BY, 0.1, where=where))]
        if storage.exists(run.path("confusion")):
            found[f"most confusing tenth, {encoder}"] = [of(run, Rule("confusion.confusion", 0.1))]
    return found


def in_order_of_images(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, d) and labels (n,) of a run, in CIFAR-10's order."""
    parts = [column_groups.read(run.uri, columns.EMBEDDINGS, shard) for shard in range(len(run.shards))]
    whole = pa.concat_tables([part.select(["key", "label", "embedding"]).replace_schema_metadata() for part in parts])
    order = np.argsort(index_of(whole))
    return columns.vectors(whole["embedding"])[order].astype(np.float32), columns.labels_or_minus_one(whole["label"])[
        order
    ]


def mlp_wrong(
    x: torch.Tensor, labels: np.ndarray, test: torch.Tensor, truth: np.ndarray, epochs: int = 10
) -> np.ndarray:
    """Whether an MLP with one hidden layer of 512, trained by AdamW, is wrong about each test image."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    steps = epochs * (len(x) // 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    y = torch.from_numpy(labels)
    for step in range(steps):
        if step % (len(x) // 256) == 0:
            order = torch.randperm(len(x))
        at = order[step % (len(x) // 256) * 256 :][:256]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model(test).argmax(dim=1).numpy() != truth


if __name__ == "__main__":
    main()
