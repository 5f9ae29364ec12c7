"""Leases: real processes on a local folder, on S3 (conditional PUTs) and on a store that only fsspec knows (claims)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from pipelines.runs import holder, lease_stores, storage
from pipelines.runs.holder import Holder
from pipelines.runs.lease import Busy, check_idle, lease

HOLDING = """
import sys, time
from pipelines.runs import holder, lease
holder.COMMAND.set("hardset embed")
with lease.lease(sys.argv[1], "subsets/hard"):
    print("held", flush=True)
    time.sleep(600)
"""
COUNTING = """
import sys
from pipelines.runs import lease, storage
for _ in range(int(sys.argv[2])):
    with lease.lease(sys.argv[1], "count", wait_s=120):
        file = storage.join(sys.argv[1], "count")
        before = int(storage.read_bytes(file)) if storage.exists(file) else 0
        storage.write_text_atomic(file, str(before + 1))
"""


@pytest.fixture(params=["local", "s3", "claims"])
def folder(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    return str(tmp_path / "run") if request.param == "local" else f"local://{tmp_path}/run"


def start(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_a_second_command_is_told_of_the_first_and_a_killed_ones_lease_is_taken_over_at_once(folder):
    first = start(HOLDING, folder)
    assert first.stdout.readline() == "held\n"
    try:
        with lease(folder, "subsets/easy"):  # another product
            pass
        told = (
            rf"subsets/hard is being written by hardset embed \(process {first.pid} on \S+, since 20\S+\); wait for it"
        )
        with pytest.raises(Busy, match=told), lease(folder, "subsets/hard"):
            pass
        with pytest.raises(Busy, match=told):
            check_idle(folder)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert lease_stores.products(folder) == ["subsets/hard"]
    check_idle(folder)
    with lease(folder, "subsets/hard"):
        assert lease_stores.products(folder) == ["subsets/hard"]
    assert lease_stores.products(folder) == []
    if storage.local_path(folder):
        assert os.listdir(folder) == []


def test_no_two_hold_it_at_once(folder):
    processes = [start(COUNTING, folder, 5) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert storage.read_bytes(storage.join(folder, "count")) == b"15"


@pytest.mark.parametrize(("stale_s", "busy"), [(60.0, True), (-60.0, False)])
def test_a_lease_of_another_machine_is_taken_over_after_minutes_without_a_refresh(folder, monkeypatch, stale_s, busy):
    monkeypatch.setattr(holder, "STALE_S", stale_s)
    theirs = dataclasses.replace(Holder.here(), machine="another", host="other-host", pid=7)
    held = lease_stores.acquire(folder, "report", theirs)
    assert held.beat()
    if hasattr(held, "descriptor"):
        os.close(held.descriptor)  # as on a file system that carries no locks to other machines
    if busy:
        with pytest.raises(Busy, match=r"process 7 on other-host"), lease(folder, "report"):
            pass
    else:
        with lease(folder, "report"):
            assert hasattr(held, "descriptor") or not held.beat(), "its holder does not notice"
            if not hasattr(held, "descriptor"):
                held.release()  # which must not take ours away
            assert lease_stores.products(folder) == ["report"]


def test_a_lease_ends_with_its_body_however_it_ends(folder):
    with pytest.raises(ZeroDivisionError), lease(folder, "report"):
        raise ZeroDivisionError
    with lease(folder, "report"):
        pass


@pytest.mark.parametrize("text", [b"", b"[]", b"[" * 100_000, b'{"pid": "x"}', b"\xff"])
def test_what_is_no_lease_holds_nothing(tmp_path, text):
    (tmp_path / ".leases").mkdir()
    (tmp_path / ".leases/report").write_bytes(text)
    with lease(str(tmp_path), "report"):
        assert json.loads((tmp_path / ".leases/report").read_bytes())["pid"] == os.getpid()


def test_leases_are_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.leases").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link"), lease(str(tmp_path / "run"), "report"):
        pass
    assert os.listdir(tmp_path / "outside") == []
