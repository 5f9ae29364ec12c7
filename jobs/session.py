"""Ray and MLflow around a command: started, used, closed."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from jobs.options import RunOptions, SessionOptions
from jobs.tracking import Tracker
from pipelines.runs import cluster, credentials
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.retries import RETRY_VARIABLE

# Read by Ray when it is imported, and by the processes that it starts.
RAY_SETTINGS = {
    "RAY_DATA_LOG_LEVEL": "ERROR",  # else 29 lines per dataset
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else a warning per pool of actors
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` every worker would start through uv
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray ends a process that has idled for a second once there are more of them than free cores, and actors hold those:
    # on 2 cores readers and writers were started again and again, 4 s of imports each, for a third of the time.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is not there is told after 15 s, not 4 min
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password that its address may hold
}
# An empty one is meant as none; Ray and tempfile would take it at its word.
NOT_EMPTY = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_NAMESPACE", "TMPDIR", "MLFLOW_TRACKING_URI")
JOIN_S = 10.0  # that a cluster's head may take to accept a connection
# Ray's sockets lie deep below its folder, and a socket's path has 107 bytes at most.
SOCKET_PATH, BELOW_FOLDER = 107, len("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store")


def set_environment() -> None:
    """Settings of Ray and MLflow where the environment has none; to be called before either is imported."""
    for name in NOT_EMPTY:
        if os.environ.get(name) == "":
            del os.environ[name]
    for name, value in (RAY_SETTINGS | MLFLOW_SETTINGS).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_session(options: SessionOptions) -> Iterator[None]:
    """How to connect to Ray, should a stage need it: the cluster asked for, or a local one that ends with the command."""
    named = options.ray_address != "auto"
    address = options.ray_address if named else os.environ.get("RAY_ADDRESS") or "local"
    cpus = (options.ray_cpus or cluster.cores()) if address == "local" else None

    def start() -> None:
        if address == "local":
            start_ray(address="local", num_cpus=cpus, include_dashboard=False, **_folder())
        else:
            _join(address, named)

    with cluster.session(start, cpus):
        yield


def _for_workers() -> dict[str, Any]:
    """What workers of a cluster do not inherit from this process."""
    patience = os.environ.get(RETRY_VARIABLE)
    return {"runtime_env": {"env_vars": {RETRY_VARIABLE: patience}}} if patience else {}


def _join(address: str, named: bool) -> None:
    """Connect to a cluster. UserError where nobody answers: Ray itself would try for a quarter of an hour."""
    problem = _unreachable(address)
    try:
        if problem is None:
            start_ray(address=address, **_for_workers())
    except ConnectionError as error:
        problem = " ".join(str(error).split())[:200]
    if problem is not None:
        what = f"{address}: no Ray there ({problem}); give the address of a cluster that runs, or `ray_address` local"
        raise UserError(what, "ray_address") if named else UserError(f"RAY_ADDRESS {what}")


def _unreachable(address: str) -> str | None:
    """Why no connection to a head can be made within JOIN_S; None if it can, or the address names no host."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return str(error)
    if host is None or port is None:
        return None
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return None
        except OSError as error:
            if time.monotonic() + 1 > deadline:
                return error.strerror or str(error)
            time.sleep(1)


def _folder() -> dict[str, str]:
    """Where a Ray of ours keeps its sockets and logs; said only where the usual folder's path is too long for sockets."""
    usual = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    room = SOCKET_PATH - BELOW_FOLDER
    if len(os.fsencode(usual)) <= room:
        return {}
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(folder, os.W_OK | os.X_OK):
            return {"_temp_dir": f"{folder}/ray"}
    raise UserError(
        f"TMPDIR {usual}: too long a path for Ray's sockets; set RAY_TMPDIR to a folder of at most {room} characters"
    )


def start_ray(tries: int = 3, **options: Any) -> None:
    """`ray.init`, tried again where a busy machine did not bring the node up within Ray's 30 s."""
    set_environment()
    ray = _imported()
    for attempt in range(1, tries + 1):
        try:
            with _without_the_level_line(), _our_sigterm():
                ray.init(log_to_driver=False, logging_level="error", **options)
            break
        except Exception as error:  # a plain Exception is what Ray raises then
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == tries:
                raise StageFailed(
                    f"Ray did not start in {tries} tries of half a minute: this machine is too busy, or has too little "
                    "memory; start the same command again"
                ) from error
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False


def _imported() -> Any:
    """The package `ray`, without its handler of signals in this process, which ends a stopped command in a C++ stack.

    The setting is read at the import; workers, which get the environment of the start, keep theirs.
    """
    name = "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import ray
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
    return ray


@contextlib.contextmanager
def _our_sigterm() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM with `sys.exit`: while it starts that means Ctrl-C, and then ours is back."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray has changed nothing either
            signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def _without_the_level_line() -> Iterator[None]:
    """Hold back standard error while Ray starts, whose core writes a line about its log level; what else came is passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            heard.seek(0)
            for line in heard:
                if b"Set ray log level" not in line:
                    os.write(2, line)


@contextlib.contextmanager
def tracked(command: str, options: RunOptions, *config: Any, run_id: str | None = None) -> Iterator[Tracker]:
    """The command's one MLflow run: its flattened config now, what it logs meanwhile, failed if it fails.

    With `run_id` the run of an earlier attempt goes on. What MLflow cannot take is a warning at the end.
    """
    uri = tracking_uri(options)
    tracker = Tracker(uri, f"{command} {pathlib.PurePath(options.run or '').name}", run_id)
    params = {"command": command, "run": options.run}
    for group in config:
        params |= dataclasses.asdict(group)
    tracker.params(params)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        problem = tracker.end(status)
        if problem and status == "FINISHED":
            line = f"hardset {command}: warning: --mlflow {uri}: {problem}; the result itself is kept\n"
            sys.stderr.write(credentials.redact(line))


def tracking_uri(options: RunOptions) -> str | None:
    """The store that is asked for; None for no tracking."""
    uri = options.mlflow or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{pathlib.Path('mlflow.db').resolve()}"
    return None if uri == "none" else uri
