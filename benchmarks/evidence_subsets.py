"""What a subset is made of, what a classifier learns from it, and what it is worth as a benchmark.

    python benchmarks/evidence_subsets.py --cifar10 DIR --work WORK                      # make-up and training, four label sets
    python benchmarks/evidence_subsets.py --cifar10 DIR --work WORK --benchmark RUN2 …   # test runs with predictions and confusion

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
from pipelines.runs import column_groups, columns
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
    parser.add_argument("--benchmark", nargs="+", metavar="RUN2", help="judge subsets of these test runs instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.benchmark:
        from evidence_benchmark import benchmark_section

        replace_section(RESULTS, "benchmark", benchmark_section(options.benchmark, options.cifar10))
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


def scored_run(pack: Path, work: Path, labels: str) -> Run:
    """A run over shards with one of the label sets, its embeddings the features of the pack; fitted and scored."""
    shards = work / f"shards-{labels}"
    if not shards.exists():
        make = [sys.executable, str(pack / "make_shards.py"), "--split", "train", "--label", labels]
        subprocess.run([*make, "--per-shard", str(PER_SHARD), "--out", str(shards)], check=True)
    uri = str(work / f"run-{labels}")
    if not Run.exists(uri):
        write_embeddings(uri, shards, pack, labels)
    run = Run.open(uri)
    fit.fit(run)
    score.score(run, score.Weighting())
    return Run.open(uri)


def write_embeddings(uri: str, shards: Path, pack: Path, labels: str) -> None:
    """The column group that `hardset embed` would write, from features that were computed elsewhere."""
    values = np.load(pack / FEATURES)["train"].astype(np.float32)
    given = np.load(pack / "cifar10_train.npz")[labels].astype(np.int64)
    config = CorpusConfig(f"numpy:{FEATURES}", FEATURES, values.shape[1], "cls")
    run = Run.create(uri, config, expand_shards(str(shards)))
    schema = columns.embeddings_schema(values.shape[1], "float32", 1)
    for shard in range(len(run.shards)):
        rows = np.arange(shard * PER_SHARD, min(len(values), (shard + 1) * PER_SHARD))
        made = {
            "key": [f"train_{row:08d}" for row in rows],
            "shard": np.full(len(rows), shard),
            "row": np.arange(len(rows)),
            "label": given[rows],
            "embedding": columns.vector_array(values[rows], pa.float32()),
        }
        known = pa.table({field.name: made.get(field.name, pa.nulls(len(rows), field.type)) for field in schema})
        facts = {"left_out": 0, "max_label": int(given[rows].max()), "digest": str(shard), "size": 0, "mtime_ns": 0}
        column_groups.write(run.uri, columns.EMBEDDINGS, shard, known.cast(schema), f"{labels} {shard}", **facts)
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
        """Fit on some images with these labels; the share of test images that it gets right."""
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
            return float((self.layer(self.test[0]).argmax(dim=1).numpy() == self.test[1]).mean())


if __name__ == "__main__":
    main()
