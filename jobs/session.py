"""Ray and MLflow around a command: started, used, closed."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.options import RunOptions, SessionOptions
from pipelines.runs import cluster
from pipelines.runs.errors import UserError
from pipelines.runs.nested import flatten
from pipelines.runs.retries import RETRY_VARIABLE

# Read when Ray is imported, which therefore happens inside the functions below.
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
for name, value in (RAY_SETTINGS | MLFLOW_SETTINGS).items():
    os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_session(options: SessionOptions) -> Iterator[None]:
    """How to connect to Ray, should a stage need it: the cluster asked for, or a local one that ends with the command."""
    address = os.environ.get("RAY_ADDRESS", "local") if options.ray_address == "auto" else options.ray_address
    cpus = (options.ray_cpus or cluster.cores()) if address == "local" else None

    def start() -> None:
        own = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else _for_workers()
        try:
            start_ray(address=address, **own)
        except ConnectionError as error:
            raise UserError(f"{address}: no Ray there ({error})", "ray_address") from None
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False

    with cluster.session(start, cpus):
        yield


def _for_workers() -> dict[str, Any]:
    """What workers of a cluster do not inherit from this process."""
    patience = os.environ.get(RETRY_VARIABLE)
    return {"runtime_env": {"env_vars": {RETRY_VARIABLE: patience}}} if patience else {}


def start_ray(tries: int = 3, **options: Any) -> None:
    """`ray.init`, tried again where a busy machine did not bring the node up within Ray's 30 s."""
    import ray

    for attempt in range(1, tries + 1):
        try:
            with _without_the_level_line():
                ray.init(log_to_driver=False, logging_level="error", **options)
            return
        except Exception as error:  # a plain Exception is what Ray raises then
            if attempt == tries or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


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


class Tracker:
    """One MLflow run; without tracking every call does nothing."""

    def __init__(self, run_id: str | None = None, uri: str | None = None):
        self.run_id, self.uri = run_id, uri

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log the numbers among `values`; nested names are joined with dots."""
        if self.run_id:
            import mlflow

            numbers = {k: float(v) for k, v in flatten(values).items() if isinstance(v, int | float) and v == v}
            mlflow.log_metrics(numbers, step=step)

    def text(self, text: str, name: str) -> None:
        """Store a text artifact."""
        if self.run_id:
            import mlflow

            mlflow.log_text(text, name)


@contextlib.contextmanager
def tracked(command: str, options: RunOptions, *config: Any) -> Iterator[Tracker]:
    """The command's one MLflow run: its flattened config now, what it logs meanwhile, failed if it fails."""
    uri = options.mlflow or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{pathlib.Path('mlflow.db').resolve()}"
    if uri == "none":
        yield Tracker()
        return
    import mlflow

    for noisy in ("alembic", "mlflow", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    name = f"{command} {pathlib.PurePath(options.run).name}"
    with _store(mlflow, uri), mlflow.start_run(run_name=name) as active:
        params = {"command": command, "run": options.run}
        for group in config:
            params |= flatten(dataclasses.asdict(group))
        mlflow.log_params({name: str(value)[:6000] for name, value in params.items()})
        yield Tracker(active.info.run_id, uri)


@contextlib.contextmanager
def _store(mlflow: Any, uri: str) -> Iterator[None]:
    """A tracking store in use. MLflow notes it in the environment, where the process's next command would take it from."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        try:
            mlflow.set_tracking_uri(uri)
            _set_experiment(mlflow, uri)
        except Exception as error:  # of MLflow, of the database below it, of the network
            raise UserError(f"{uri}: {' '.join(str(error).split())[:200]}", "mlflow") from None
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _set_experiment(mlflow: Any, uri: str) -> None:
    """The experiment `hardset`; with sqlite its artifacts lie beside the database, not in the working directory."""
    if uri.startswith("sqlite:///") and mlflow.get_experiment_by_name("hardset") is None:
        folder = pathlib.Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
        with contextlib.suppress(mlflow.exceptions.MlflowException):  # another command made it meanwhile
            mlflow.create_experiment("hardset", artifact_location=folder.as_uri())
    mlflow.set_experiment("hardset")
