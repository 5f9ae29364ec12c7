"""`ray job submit` against a Ray of this machine: the run is there, and a bad option says why in the job's log."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-0123456789abcdef"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of a head node of our own, with token authentication as Ray turns it on by itself.

    Its agent has a port of its own: with the usual one taken by another Ray of this machine no job would ever be taken.
    """
    import tempfile

    port, dashboard, agent = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # its sockets' paths may not be long
        environment = os.environ | TOKEN
        environment.pop("RAY_ADDRESS", None)
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
             f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        wait_until_jobs_are_taken(address)
        yield address
        head.terminate()
        head.wait(timeout=60)


def wait_until_jobs_are_taken(address):
    """The agent that starts jobs comes up some time after the port is open; until then Ray answers 500."""
    words = [BIN / "ray", "job", "submit", "--address", address, "--", "true"]
    for _ in range(60):
        done = subprocess.run(words, env=os.environ | TOKEN, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode == 0:
            return
        time.sleep(2)
    raise AssertionError(done.stdout + done.stderr)


def submit(cluster, *words):
    return subprocess.run(
        [BIN / "ray", "job", "submit", "--address", cluster, "--working-dir", ".", "--", sys.executable, "-m", "jobs.curate", *words],
        cwd=ROOT, env=os.environ | TOKEN, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def test_a_job_writes_its_run(cluster, tmp_path, make_image, make_shard):
    shard = make_shard(
        tmp_path / "a.tar", [(f"k{i}", {"jpg": make_image(i), "cls": str(i % 2).encode()}) for i in range(12)]
    )
    done = submit(
        cluster, "--shards", shard, "--run", str(tmp_path / "run"), "--encoder", "pixels:3", "--mlflow", "none"
    )
    assert done.returncode == 0 and "succeeded" in done.stdout.lower(), done.stdout + done.stderr
    assert (tmp_path / "run/difficulty/000000.parquet").exists()


def test_a_bad_option_fails_with_its_reason_in_the_log(cluster, tmp_path):
    done = submit(cluster, "--shards", "nowhere-*.tar", "--run", str(tmp_path / "run"), "--encoder", "pixels:3")
    assert done.returncode == 1
    assert "hardset curate: error: --shards nowhere-*.tar" in done.stdout + done.stderr
