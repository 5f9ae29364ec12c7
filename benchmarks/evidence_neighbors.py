"""What neighbours find: wrong labels, and leaks between CIFAR-10's test and training images.

    python benchmarks/evidence_neighbors.py labels --cifar10 DIR --work WORK
    python benchmarks/evidence_neighbors.py leaks  --cifar10 DIR --work WORK

DIR holds CIFAR-10's images as JPEG, CIFAR-10N's label sets, features of one encoder and make_shards.py. WORK keeps what is
made: shards, and runs over them whose embeddings are those features. Results go into benchmarks/neighbors.md, a section each.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from heads import replace_section, table
from scipy.stats import rankdata

from jobs.options import RunOptions
from jobs.session import ray_session
from pipelines.corpus.shards import expand_shards
from pipelines.curation import fit, score
from pipelines.neighbors import stage
from pipelines.runs import column_groups, columns, tasks
from pipelines.runs.record import CorpusConfig, Run

RESULTS = Path(__file__).with_name("neighbors.md")
FEATURES = "features_mobilenet_v2_128_pca256.npz"
LABEL_SETS = ("worst", "random1", "aggregate")
SIZES = (1_500, 5_000, 15_000, 50_000)
PER_SHARD = 2_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("labels", "leaks"))
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of labels")
    options = parser.parse_args()
    sections = {
        "labels": labels,
        "leaks": leaks,
    }
    tasks.START_S = float(
        "inf"
    )  # in this process, one thread: the same results without Ray's start and its workers' imports
    text = sections[options.what](options)
    print(text)
    replace_section(RESULTS, options.what, text)


def run_of(pack: Path, work: Path, split: str, label: str, size: int | None = None) -> Run:
    """A run over shards of the pack whose embeddings are its features; the same random `size` images for every label set."""
    name = f"{split}-{label}" + (f"-{size}" if size else "")
    shards, uri = work / f"shards-{name}", str(work / f"run-{name}")
    if not shards.exists():
        made = [sys.executable, str(pack / "make_shards.py"), "--split", split, "--label", label, "--per-shard"]
        made += [str(PER_SHARD), "--out", str(shards), *(["--size", str(size)] if size else [])]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    if not Run.exists(uri):
        write_embeddings(uri, shards, pack, split, label, size)
    return Run.open(uri)


def write_embeddings(uri: str, shards: Path, pack: Path, split: str, label: str, size: int | None) -> None:
    """The column group that `hardset embed` would write, from features that were computed elsewhere."""
    vectors = np.load(pack / FEATURES)[split].astype(np.float32)
    given = np.load(pack / f"cifar10_{split}.npz")[label].astype(np.int64)
    chosen = np.arange(len(vectors))
    if size and size < len(vectors):  # as make_shards.py chooses them
        chosen = np.sort(np.random.default_rng(0).choice(len(vectors), size, replace=False))
    config = CorpusConfig(f"numpy:{FEATURES}", FEATURES, vectors.shape[1], "cls")
    run = Run.create(uri, config, expand_shards(str(shards)))
    schema = columns.embeddings_schema(vectors.shape[1], "float32", 1)
    for shard in range(len(run.shards)):
        rows = chosen[shard * PER_SHARD : (shard + 1) * PER_SHARD]
        made = {
            "key": [f"{split}_{row:08d}" for row in rows],
            "shard": np.full(len(rows), shard),
            "row": np.arange(len(rows)),
            "label": given[rows],
            "embedding": columns.vector_array(vectors[rows], pa.float32()),
        }
        known = pa.table({f.name: made.get(f.name, pa.nulls(len(rows), f.type)) for f in schema}).cast(schema)
        facts = {"left_out": 0, "max_label": 9, "digest": str(shard), "size": 0, "mtime_ns": 0}
        column_groups.write(run.uri, columns.EMBEDDINGS, shard, known, f"{split} {label} {size} {shard}", **facts)
    run.set_classes([str(label) for label in range(10)])
    run.finish_stage("embed", rows=len(chosen), left_out=0, seconds=0.0)


def read(run: Run, group: str, names: list[str]) -> dict[str, np.ndarray]:
    tables = [column_groups.read(run.uri, group, shard, names) for shard in range(len(run.shards))]
    return {name: pa.concat_tables(tables)[name].to_numpy() for name in names}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    ranks, n = rankdata(scores), positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def index_of(keys: np.ndarray) -> np.ndarray:
    return np.array([int(key.rpartition("_")[2]) for key in keys])


def labels(options: argparse.Namespace) -> str:
    """AUROC of human mislabels by margin, vote and label_error, and of density against difficulty."""
    clean = np.load(options.cifar10 / "cifar10_train.npz")["clean"].astype(int)
    rows = []
    for size in options.sizes:
        for label in LABEL_SETS:
            run = run_of(options.cifar10, options.work, "train", label, None if size == 50_000 else size)
            with ray_session(RunOptions(run=run.uri)):
                stage.neighbors(run)
                fit.fit(run)
                score.score(run, score.Weighting())
            found = read(run, "difficulty", ["key", "label", "margin", "label_error"])
            near = read(run, "neighbors", ["vote", "density"])
            wrong = found["label"] != clean[index_of(found["key"])]
            values = [found["margin"], near["vote"], found["label_error"]]
            rows.append([f"{size:,}", label, *(f"{auroc(np.nan_to_num(v), wrong):.3f}" for v in values)])
            print(rows[-1], flush=True)
    return table(["N", "labels", "margin", "vote", "label_error"], rows)


def leaks(options: argparse.Namespace) -> str:
    """CIFAR-10's test images against its training images."""
    train = run_of(options.cifar10, options.work, "train", "clean")
    test = run_of(options.cifar10, options.work, "test", "clean")
    started = time.monotonic()
    with ray_session(RunOptions(run=test.uri)):
        counts = stage.neighbors(test, 30, train, "train")
        print(counts, flush=True)
        within = stage.neighbors(train, 30)
    seconds = time.monotonic() - started
    names = ["neighbor_shard", "neighbor_row", "duplicate_of_row", "similarity"]
    near = read(test, "neighbors/against/train", names)
    labels = {side: read(run, "embeddings", ["label"])["label"] for side, run in (("train", train), ("test", test))}
    first = np.array([s[0] for s in near["neighbor_shard"]]) * PER_SHARD + np.array(
        [r[0] for r in near["neighbor_row"]]
    )
    right = labels["train"][first] == labels["test"]
    leaked = ~np.isnan(near["duplicate_of_row"].astype(float))
    rows = [
        ["test images that are in the training set", f"{counts['duplicates']:,} of {counts['rows']:,}"],
        ["of them byte for byte", f"{counts['identical']:,}"],
        ["duplicates within the training set", f"{within['duplicates']:,} in {within['duplicate_groups']:,} groups"],
        ["largest group", f"{within['largest_group']:,}"],
        ["accuracy of the nearest neighbour, all test images", f"{100 * right.mean():.2f} %"],
        ["without those that leak", f"{100 * right[~leaked].mean():.2f} %"],
        ["of those that leak", f"{100 * right[leaked].mean():.2f} %"],
        ["seconds of both searches", f"{seconds:.0f}"],
    ]
    return table(["", ""], rows)


if __name__ == "__main__":
    main()
