"""The process that talks to MLflow for a command: started beside the work, told over a pipe what to log.

MLflow takes seconds to import, may wait for a server, and raises what it likes. Here that delays and ends nothing but this
process. It is a program of its own, `python -P jobs/mlflow_process.py`: on standard input come pickled messages
(name, arguments), the first one `open`; on standard output go pickled replies ("run", id) and ("problem", text).
"""

import contextlib
import importlib.metadata
import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

EXPERIMENT = "hardset"
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's own limits for one request


class Recorder:
    """One MLflow run; each method is a message of the command."""

    def __init__(self, uri: str, artifacts: str | None, run_name: str, run_id: str | None):
        import mlflow

        for noisy in ("alembic", "mlflow", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.mlflow = mlflow
        with _locked(artifacts):
            mlflow.set_tracking_uri(uri)
            if artifacts is not None and mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
            mlflow.set_experiment(EXPERIMENT)
        if run_id is not None:
            with contextlib.suppress(mlflow.exceptions.MlflowException):  # deleted meanwhile: a new one then
                mlflow.start_run(run_id=run_id)
        self.run_id = (mlflow.active_run() or mlflow.start_run(run_name=run_name)).info.run_id

    def params(self, values: dict[str, str]) -> None:
        items = list(values.items())
        for start in range(0, len(items), PARAMS_AT_ONCE):
            self.mlflow.log_params(dict(items[start : start + PARAMS_AT_ONCE]))

    def metrics(self, values: dict[str, float], step: int | None) -> None:
        items = list(values.items())
        for start in range(0, len(items), METRICS_AT_ONCE):
            self.mlflow.log_metrics(dict(items[start : start + METRICS_AT_ONCE]), step=step)

    def tags(self, values: dict[str, str]) -> None:
        self.mlflow.set_tags(values)

    def file(self, data: bytes, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(data)
            self.mlflow.log_artifact(str(path), str(Path(name).parent) if "/" in name else None)

    def model(self, files: dict[str, bytes], inputs: tuple[str, tuple[int, ...]], classes: int, graph: bool) -> None:
        """A classifier's checkpoint with its signature, to be loaded by this package; with `graph` as an exported graph."""
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        kind, shape = np.dtype(inputs[0]), inputs[1]
        takes, gives = TensorSpec(kind, (-1, *shape)), TensorSpec(np.dtype("float32"), (-1, classes))
        signature = ModelSignature(Schema([takes]), Schema([gives]))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            if graph:
                self._graph(folder, signature, np.zeros((2, *shape), kind))
            else:
                self.mlflow.pyfunc.log_model(
                    name="model",
                    loader_module="pipelines.training.pyfunc",
                    data_path=folder,
                    signature=signature,
                    pip_requirements=[f"hardset=={importlib.metadata.version('hardset')}"],
                )

    def _graph(self, folder: str, signature: Any, example: Any) -> None:
        import torch

        sys.path.append(str(Path(__file__).parents[1]))
        from ops.models import load_classifier

        self.mlflow.pytorch.log_model(
            load_classifier(folder),
            name="model",
            signature=signature,
            input_example=example,  # two samples: from one, the exported graph would take one sample for ever
            serialization_format="pt2",  # a graph and tensors, no pickle
            # Named, as inferring them would load the model in another process.
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "numpy"],
        )

    def end(self, status: str) -> None:
        self.mlflow.end_run(status)


@contextlib.contextmanager
def _locked(artifacts: str | None) -> Iterator[None]:
    """Of several first commands in a folder one makes the database, the others wait. No lock where a server has it."""
    if artifacts is None or os.name == "nt":
        yield
        return
    import fcntl

    folder = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def main() -> None:
    """Log what the command says until it ends, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then says how the run ended
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever MLflow prints
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)  # left by somebody else; the command says what is meant
    import mlflow  # before the first message comes: that is the point of being started early

    try:
        serve(sys.stdin.buffer, replies)
    except (EOFError, BrokenPipeError):  # the command is gone
        if mlflow.active_run() is not None:
            mlflow.end_run("KILLED")


def serve(messages: BinaryIO, replies: BinaryIO) -> None:
    """Answer messages up to `end`. After an error that will not pass nothing more is tried."""

    def reply(*words: str | None) -> None:
        pickle.dump(words, replies)
        replies.flush()

    _, (folder, *arguments) = pickle.load(messages)
    try:
        if folder is not None:
            os.chdir(folder)
        recorder = Recorder(*arguments)
    except Exception as error:  # of MLflow, of the database below it, of the network
        reply("problem", _line(error))
        return
    reply("run", recorder.run_id)
    name, usable = "", True
    while name != "end":
        name, arguments = pickle.load(messages)
        if not usable:
            continue
        try:
            getattr(recorder, name)(*arguments)
        except Exception as error:
            usable = (
                getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
            )  # one value is wrong, others may not be
            reply("problem", _line(error))


def _line(error: Exception) -> str:
    """The error's own words, in one line: SQLAlchemy and urllib3 add paragraphs."""
    text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    return text[:200]


if __name__ == "__main__":
    main()
