"""kill -9 of the driver, of an actor, of a reader: every sample exactly once, finished shards not done again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.jobs.processes import belongs_to, processes

SHARDS, SIZE = 12, 20
ROOT = Path(__file__).parents[2]
ENCODER = """
import time, torch

class Slow(torch.nn.Module):
    image_size, mean, std, interpolation = 4, (0.5,) * 3, (0.5,) * 3, "bilinear"

    def forward(self, x):
        time.sleep(0.05 * len(x) / 20)
        return x.flatten(1)[:, :12]

def slow():
    return Slow()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def command(tmp_path, make_image, make_shard):
    for number in range(SHARDS):
        samples = [
            (f"{number}_{i}", {"jpg": make_image(100 * number + i), "cls": str(i % 2).encode()}) for i in range(SIZE)
        ]
        make_shard(tmp_path / f"shards/{number:03d}.tar", samples)
    (tmp_path / "slow.py").write_text(ENCODER)
    words = ["--shards", tmp_path / "shards", "--run", tmp_path / "run", "--encoder", f"module:{tmp_path}/slow.py:slow"]
    words += ["--mlflow", "none", "--ray-cpus", "2", "--batch-size", "5", "--json"]
    return [sys.executable, "-m", "jobs.curate", *map(str, words)]


def start(command, log):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=open(log, "w"), stderr=subprocess.STDOUT)


def finished(run):
    return {path: stamp(path) for path in (run / "embeddings").glob("*.parquet")}


def stamp(path):
    """What changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def wait_for_shards(process, run, count):
    while len(finished(run)) < count:
        assert process.poll() is None, "the command ended too early"
        time.sleep(0.05)


def check_whole(tmp_path, log):
    result = json.loads(Path(log).read_text().splitlines()[-1])
    assert result["embed"]["rows"] == SHARDS * SIZE and result["embed"]["left_out"] == 0
    keys = ds.dataset(tmp_path / "run/difficulty").to_table(columns=["key"])["key"].to_pylist()
    assert sorted(keys) == sorted(f"{n}_{i}" for n in range(SHARDS) for i in range(SIZE))
    assert not list((tmp_path / "run").rglob(".*.tmp-*"))


def test_the_driver_is_killed_and_the_same_command_goes_on(tmp_path, command):
    process = start(command, tmp_path / "first.log")
    wait_for_shards(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(tmp_path / "run")
    assert 3 <= len(before) < SHARDS
    again = start(command, tmp_path / "second.log")
    assert again.wait(timeout=300) == 0, (tmp_path / "second.log").read_text()
    check_whole(tmp_path, tmp_path / "second.log")
    assert f"{len(before)} of {SHARDS} shards already done" in (tmp_path / "second.log").read_text()
    assert {path: stamp(path) for path in before} == before


@pytest.mark.parametrize("victim", ["WriteShards"])
def test_a_worker_is_killed_and_nothing_is_lost(tmp_path, command, victim):
    process = start(command, tmp_path / "log")
    killed = 0
    while process.poll() is None and not killed:
        for pid, title in processes():
            if title.startswith("ray::") and victim in title and belongs_to(pid, process.pid):
                os.kill(pid, signal.SIGKILL)
                killed += 1
                break
        time.sleep(0.01)
    assert killed, f"no {victim} was seen"
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    check_whole(tmp_path, tmp_path / "log")
