"""One way to run a stage: the example of CONTRIBUTING.md, and what happens to processes that die."""

import importlib
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed
from pipelines.runs.executor import Output, Pool, Stage, Task, execute, handfuls
from pipelines.runs.isolated import InHand, IsolatedWorker, Suspects
from pipelines.runs.record import Shard, fingerprint
from tests.pipelines.synthetic import make_run

ROOT = Path(__file__).parents[3]
EXAMPLE = re.search(
    r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text().partition("## A stage")[2], re.DOTALL
)[1]


class Norms:
    """As the example of CONTRIBUTING.md, in a module that other processes can import."""

    def __init__(self, run_uri):
        self.run_uri = run_uri

    def run(self, task):
        table = column_groups.read(self.run_uri, "embeddings", task.shard)
        norms = np.linalg.norm(columns.vectors(table["embedding"]), axis=1)
        return Output(table.select(["key", "shard", "row"]).append_column("norm", pa.array(norms)))


class NormsByRow(Norms):
    """The same, a table for each row, and facts that are known at the end; dies once where it is told to."""

    def __init__(self, run_uri, marker=None):
        super().__init__(run_uri)
        self.marker = marker

    def run(self, task):
        whole, facts, notes = super().run(task).tables, {}, {}

        def tables():
            for row in range(whole.num_rows):
                if self.marker and task.shard == 1 and not os.path.exists(self.marker):
                    Path(self.marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield whole.slice(row, 1)
            facts["largest"], notes["pid"] = float(whole["norm"].to_numpy().max()), os.getpid()

        return Output(tables(), facts, notes, whole.schema)


class OneRowLess(Norms):
    def run(self, task):
        return Output(super().run(task).tables.slice(1))


def stage(run, worker=Norms, *more, **options):
    facts = run.embedding_facts()
    sources = [fingerprint("norms", f["source"]) for f in facts]
    return Stage("norms", "norms", sources, worker, (run.uri, *more), rows=[f["rows"] for f in facts], **options)


def check(run, features):
    found = np.concatenate([column_groups.read(run.uri, "norms", s)["norm"].to_numpy() for s in range(3)])
    np.testing.assert_allclose(found, np.linalg.norm(features, axis=1), rtol=1e-6)
    for shard in range(3):
        read = column_groups.facts(run.uri, "norms", shard)
        assert read["embeddings"] == column_groups.facts(run.uri, "embeddings", shard)["source"]


@pytest.mark.usefixtures("ray_session")
def test_the_example_of_contributing_works(tmp_path, monkeypatch):
    (tmp_path / "norms_of_contributing.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    run, features, _ = make_run(tmp_path)
    counts = importlib.import_module("norms_of_contributing").write_norms(run)
    assert (counts["rows"], counts["shards_done"]) == (100, 3)
    check(run, features)


@pytest.mark.usefixtures("work_in_ray")
@pytest.mark.parametrize("pool", [None, Pool(2, 0.5), Pool((1, 2), 0.5)])
def test_a_stage_writes_each_shard_once_and_notes_itself(tmp_path, pool, capsys):
    run, features, _ = make_run(tmp_path)
    counts = execute(run, stage(run, pool=pool), extra=7)
    assert (counts["rows"], counts["shards_done"], counts["shards_skipped"]) == (100, 3, 0)
    check(run, features)
    assert run.stage("norms")["extra"] == 7 and "norms: shards 3/3" in capsys.readouterr().err
    (tmp_path / "run/norms/000001.parquet").unlink()
    before = (tmp_path / "run/norms/000000.parquet").stat().st_ino
    counts = execute(run, stage(run, pool=pool))
    assert (counts["shards_done"], counts["shards_skipped"]) == (1, 2)
    assert (tmp_path / "run/norms/000000.parquet").stat().st_ino == before
    check(run, features)


@pytest.mark.usefixtures("work_in_ray")
@pytest.mark.parametrize("pool", [None, Pool(2, 0.5)])
def test_a_worker_that_is_killed_loses_and_doubles_nothing(tmp_path, pool):
    run, features, _ = make_run(tmp_path)
    execute(run, stage(run, NormsByRow, str(tmp_path / "killed"), pool=pool))
    assert (tmp_path / "killed").exists() and not list((tmp_path / "run/norms").glob(".*"))
    check(run, features)
    facts = column_groups.facts(run.uri, "norms", 1)
    assert facts["rows"] == 25 and facts["largest"] == column_groups.read(run.uri, "norms", 1)["norm"].to_numpy().max()


@pytest.mark.usefixtures("work_in_ray")
def test_other_rows_than_embeddings_fail_the_stage(tmp_path):
    run, _, _ = make_run(tmp_path)
    with pytest.raises(StageFailed, match=r"norms: .* rows for the .* embeddings of shard"):
        execute(run, stage(run, OneRowLess))
    assert run.stage("norms") is None


def test_small_shards_share_a_block_and_a_million_make_few():
    def blocks(sizes, workers=2):
        found = handfuls([Task(n, Shard("", size, 0), "") for n, size in enumerate(sizes)], workers)
        assert [task.shard for block in found for task in block] == list(range(len(sizes)))
        return [len(block) for block in found]

    assert blocks([1] * 7) == [1] * 7
    assert blocks([1] * 320) == [20] * 16
    assert max(blocks([1] * 20_000)) == 64
    assert blocks([500 << 20] * 5) == [1] * 5
    assert len(blocks([500 << 20] * 1_000_000)) <= 4200


class Steps:
    """A worker of numbers 0 … 9 in batches of 3; `bad` numbers do what they are told to."""

    in_hand, suspects = InHand(), Suspects()

    def __init__(self, bad):
        self.bad = bad

    def run(self, task):
        done, left_out = [], dict(self.suspects.bad)
        rows = [row for row in range(10) if row not in left_out]
        for start in range(0, len(rows), 3):
            batch = rows[start : start + 3]
            groups = [[r] for r in batch] if any(self.suspects.go_alone("add", r) for r in batch) else [batch]
            for group in groups:
                with self.in_hand.hold("add", group[0], group[-1]):
                    for row in group:
                        {"dies": lambda: os._exit(3), "hangs": lambda: time.sleep(1000)}.get(self.bad.get(row), int)()
                self.in_hand.passed(len(group))
                done += group
        return done, left_out


def run_steps(worker, task):
    return worker.run(task)


def isolated(bad, limit_s=1.0):
    worker = IsolatedWorker(Steps, (bad,), limit_s)
    try:
        return worker.call(run_steps, Task(0, Shard("", 0, 0), ""))
    finally:
        worker.close()


def test_samples_that_kill_or_hang_their_process_are_found_and_left_out():
    done, left_out = isolated({4: "dies", 7: "hangs"})
    assert done == [0, 1, 2, 3, 5, 6, 8, 9]
    assert left_out == {4: "the process died on it", 7: "no answer in 1 s"}


def test_a_worker_that_dies_on_every_sample_ends_the_stage_after_a_few():
    with pytest.raises(StageFailed, match="fails for every sample: the process died on it, 3 in a row"):
        isolated(dict.fromkeys(range(10), "dies"))


def test_errors_of_an_isolated_worker_are_its_own():
    with pytest.raises(ZeroDivisionError) as error:
        worker = IsolatedWorker(Steps, ({},), 1.0)
        try:
            worker.call(divide, Task(0, Shard("", 0, 0), ""))
        finally:
            worker.close()
    assert "divide" in error.value.__notes__[0]


def divide(worker, task):
    return 1 / task.shard
