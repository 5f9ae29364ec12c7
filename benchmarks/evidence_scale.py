"""Where do driver and bookkeeping give out with a million shards? No image is read.

python -m benchmarks.evidence_scale --folder SCRATCH [--shards 1000000] [--only STEP …]

Each step runs in a process of its own, which says its seconds and its peak memory; a step on Ray runs fewer tasks where a
million would take hours, and says how many. SCRATCH gets a folder of empty shards and a run whose column group consists of
hard links to a few Parquet files (a listing and a million footers cost what they cost; the disk stays small).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.runs import column_groups, columns
from pipelines.runs.record import CorpusConfig, Run, Shard

LINKS = 50_000  # of one file; ext4 allows 65,000
CONFIG = CorpusConfig(encoder="open_clip:ViT-B-32/laion2b", encoder_fingerprint="f" * 64, width=768)
URL = "s3://a-bucket-with-a-name/laion5b/part/{:07d}.tar"


def timed(call: Callable) -> tuple[object, list[float]]:
    """The result; seconds that passed, and seconds of CPU that this process used (other work may share the machine)."""
    started, used = time.perf_counter(), time.process_time()
    result = call()
    return result, [round(time.perf_counter() - started, 3), round(time.process_time() - used, 3)]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def entries(count: int) -> list[Shard]:
    return [Shard(URL.format(i), 300_000_000, 1_700_000_000_000_000_000) for i in range(count)]


def listing(folder: Path, count: int) -> dict:
    """Expand a brace pattern of that many local shards, and the folder that holds them."""
    from pipelines.corpus.shards import expand_shards

    shards = folder / "shards"
    if not shards.exists():
        shards.mkdir(parents=True)
        (shards / "0.source").write_bytes(b"")
        for i in range(count):
            if i % LINKS == 0:
                source = shards / f"{i}.source"
                source.write_bytes(b"")
            os.link(source, shards / f"{i:07d}.tar")
    before = peak_mib()
    braces, brace_s = timed(lambda: expand_shards(f"{shards}/{{0000000..{count - 1:07d}}}.tar"))
    peak = peak_mib()
    found, folder_s = timed(lambda: expand_shards(str(shards)))
    assert braces == found and len(found) == count
    return {"braces_s": brace_s, "folder_s": folder_s, "before_mib": before, "braces_mib": peak, "peak_mib": peak_mib()}


def record(folder: Path, count: int) -> dict:
    """Make, write, open, extend and finish a stage of a run of that many shards."""
    shards, before = entries(count), peak_mib()
    run, create_s = timed(lambda: Run.create(str(folder / "run"), CONFIG, shards))
    created = peak_mib()
    _, open_s = timed(lambda: Run.open(run.uri))
    _, finish_s = timed(lambda: run.finish_stage("embed", rows=0))
    _, again_s = timed(lambda: Run.create(run.uri, CONFIG, shards))
    return {
        "create_s": create_s, "open_s": open_s, "finish_stage_s": finish_s, "open_by_the_same_command_s": again_s,
        "run_json_mb": (folder / "run/run.json").stat().st_size / 1e6,
        "before_mib": before, "create_mib": created, "peak_mib": peak_mib(),
    }  # fmt: skip


def indented(folder: Path, count: int) -> dict:
    """The same record through json.dumps(indent=1), as run.json was written before."""
    record = {"shards": [shard.found() for shard in entries(count)]}
    before = peak_mib()
    text, seconds = timed(lambda: json.dumps(record, indent=1, ensure_ascii=False))
    return {"seconds": seconds, "mb": len(text) / 1e6, "before_mib": before, "peak_mib": peak_mib()}


def bookkeeping(folder: Path, count: int) -> dict:
    """Which of that many embedded shards are pending: one listing, every footer once; and again in the same process."""
    from pipelines.curation.embed import embedding_source, pending_shards

    run = Run.open(str(folder / "run"))
    group = folder / "run" / columns.EMBEDDINGS
    if not group.exists():
        digest = "d" * 64
        facts = {
            "left_out": 3,
            "max_label": None,
            "digest": digest,
            "size": 300_000_000,
            "mtime_ns": run.shards[0].mtime_ns,
        }
        table = columns.embeddings_schema(768, "float16", 1).empty_table()
        for i in range(count):
            if i % LINKS == 0:
                column_groups.write(run.uri, "sources", i, table, embedding_source(CONFIG, digest), **facts)
                source = folder / "run" / column_groups.file_name("sources", i)
                group.mkdir(exist_ok=True)
            os.link(source, folder / "run" / column_groups.file_name(columns.EMBEDDINGS, i))
        time.sleep(column_groups.SETTLED_S)
    before = peak_mib()
    _, source_s = timed(lambda: [embedding_source(CONFIG, str(i)) for i in range(10_000)])
    pending, first_s = timed(lambda: pending_shards(run))
    assert pending == []
    first = peak_mib()
    _, again_s = timed(lambda: pending_shards(run))
    facts, facts_s = timed(run.embedding_facts)
    assert len(facts) == count
    return {
        "pending_s": first_s, "pending_again_s": again_s, "facts_again_s": facts_s, "hash_10000_sources_s": source_s,
        "before_mib": before, "first_mib": first, "peak_mib": peak_mib(),
    }  # fmt: skip


def nothing(item: int) -> int:
    """A task without work."""
    return item


def plus(a: int, b: int) -> int:
    return a + b


def scheduling(folder: Path, count: int) -> dict:
    """20,000 Ray tasks without work in order; and a sum over all shards in at most 1,024 tasks."""
    from pipelines.runs.tasks import in_order, merged_parts

    ray_here()
    sum(in_order(nothing, [(i,) for i in range(100)]))
    before, tasks = peak_mib(), 20_000
    total, seconds = timed(lambda: sum(in_order(nothing, ((i,) for i in range(tasks)))))
    assert total == tasks * (tasks - 1) // 2
    after = peak_mib()
    items = [(i,) for i in range(count)]
    parts, merged_s = timed(lambda: list(merged_parts(nothing, items, merge=plus)))
    assert sum(part for part, _ in parts) == count * (count - 1) // 2
    return {
        "tasks": tasks, "tasks_s": seconds, "before_mib": before, "after_mib": after,
        "merged_tasks": len(parts), "merged_s": merged_s, "peak_mib": peak_mib(),
    }  # fmt: skip


def dataset(folder: Path, count: int) -> dict:
    """A pool's dataset of shards' addresses: what the driver pays for it, for 1,000 and for 5,000 shards."""
    import ray

    from pipelines.runs.executor import Task, handfuls, rows_of

    ray_here()

    def read(shards: int) -> int:
        tasks = [Task(number, entry, "") for number, entry in enumerate(entries(shards))]
        data = ray.data.from_arrow([rows_of(block) for block in handfuls(tasks, 64)])
        return sum(len(batch["shard"]) for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"))

    read(10)
    found = {"start_mib": peak_mib()}
    for shards in (1_000, 5_000):
        rows, seconds = timed(lambda shards=shards: read(shards))
        assert rows == shards
        found |= {f"{shards}_s": seconds, f"{shards}_mib": peak_mib()}
    return found | {"peak_mib": peak_mib()}


def gaussians(folder: Path, count: int) -> dict:
    """Merging the 1,024 sums that come to the driver, d = 768, without classes and with a thousand."""
    import pickle

    from ops.gaussian import GaussianStats

    rng = np.random.default_rng(0)
    found = {}
    for classes in (0, 1000):
        pilot, x = np.zeros(768), rng.normal(size=(4096, 768)).astype(np.float32)
        labels = rng.integers(0, classes, 4096) if classes else None
        part = GaussianStats(classes, 768, pilot=pilot).update(x, labels)
        total = GaussianStats(classes, 768, pilot=pilot)

        def merge_all(total: GaussianStats = total, part: GaussianStats = part) -> GaussianStats:
            for _ in range(1024):
                total = total.merge(part)
            return total

        merged, seconds = timed(merge_all)
        assert merged.count == 1024 * 4096
        found |= {f"{classes}_classes_s": seconds, f"{classes}_classes_mb_each": len(pickle.dumps(part)) / 1e6}
    return found | {"peak_mib": peak_mib()}


def ray_here() -> None:
    """A local Ray of two cores."""
    import ray

    from jobs.session import start_ray

    start_ray(address="local", num_cpus=2, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False


STEPS = {f.__name__: f for f in (listing, record, indented, bookkeeping, gaussians, scheduling, dataset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(STEPS[asked.step](asked.folder, asked.shards)))
        return
    for name in asked.only:
        command = [sys.executable, "-m", "benchmarks.evidence_scale", "--folder", str(asked.folder), "--step", name]
        done = subprocess.run(
            [*command, "--shards", str(asked.shards)], check=True, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
        )
        print(name, done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
