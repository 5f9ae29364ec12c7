"""The Ray that a process works with: started or joined only once something needs it.

A command says how, by `session`; a stage calls `connect` where it is about to use Ray. A command that has nothing to
compute, or little, never imports Ray, whose start takes longer than most of what such a command does.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Where a driver of NVIDIA shows its GPUs: bare metal and containers, Jetson, Windows' Linux.
_GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/nvhost-gpu", "/dev/dxg")


class Capacity(NamedTuple):
    """What Ray can hand out: CPU cores, GPUs, nodes."""

    cpus: float
    gpus: int
    nodes: int


class _Session(NamedTuple):
    start: Callable[[], None]
    cpus: int | None


_session: _Session | None = None


@contextlib.contextmanager
def session(start: Callable[[], None], cpus: int | None) -> Iterator[None]:
    """While this lasts `connect` starts Ray; what it started ends with it.

    Within another session, or where Ray is connected already, nothing changes: that Ray is used, and stays.

    Parameters
    ----------
    start : callable
        Starts a local Ray, or joins a cluster.
    cpus : int, optional
        CPU cores of the local Ray that `start` starts. None: it joins a cluster, which does all the work.
    """
    global _session
    if _session is not None or connected():
        yield
        return
    _session = _Session(start, cpus)
    try:
        yield
    finally:
        _session = None
        if connected():
            sys.modules["ray"].shutdown()


def connected() -> bool:
    """Whether this process is connected to a Ray. Does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def connect() -> ModuleType:
    """The package `ray`, connected. RuntimeError outside of a session."""
    if not connected():
        if _session is None:
            raise RuntimeError("Ray is needed and no session says how to start it; call ray.init() before")
        _session.start()  # which may set what Ray reads when it is imported
    return sys.modules["ray"]


def small_work_stays_here() -> bool:
    """Whether small work is done in this process: not where a cluster was asked for, nor where Ray was started before."""
    return _session is not None and _session.cpus is not None


def capacity() -> Capacity:
    """What Ray can hand out. It is asked where it is connected, is a cluster, or there may be GPUs; else it isn't started."""
    if small_work_stays_here() and not connected() and not _may_have_gpus():
        return Capacity(_session.cpus, 0, 1)
    ray = connect()
    found = ray.cluster_resources()
    return Capacity(found.get("CPU", 0), int(found.get("GPU", 0)), len(ray.nodes()))


def cores() -> int:
    """CPU cores that this process may use: its affinity and the quota of its control group (v2), at least 1."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups, or "max"
        quota, period = (int(word) for word in Path("/sys/fs/cgroup/cpu.max").read_text().split())
        found = min(found, max(1, quota // period))
    return found


def _may_have_gpus() -> bool:
    return any(next(Path("/").glob(pattern.lstrip("/")), None) for pattern in _GPU_DEVICES)
