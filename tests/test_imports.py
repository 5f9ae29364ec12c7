"""What each kind of process imports before it works: what it doesn't use, it doesn't wait for."""

import subprocess
import sys

import pytest

from jobs.hardset import COMMANDS

SLOW = {
    "matplotlib", "mlflow", "open_clip", "pandas", "plotly", "ray", "scipy.stats", "sklearn", "sympy", "timm", "torch",
    "torch._dynamo", "torchvision",
}  # fmt: skip
PROCESSES = {
    # --help, and a mistake in an option
    "help": ([f"jobs.{name}" for name in COMMANDS], set()),
    # the driver of a command that reads column groups and looks for what is to be done
    "stages": (
        ["jobs.stages", "jobs.tracking", "jobs.session", "pipelines.runs.executor", "pipelines.runs.tasks"],
        set(),
    ),
    "inspect and export": (["pipelines.summary", "pipelines.export", "pipelines.planning.plan"], set()),
    "validate": (["pipelines.corpus.validate", "pipelines.corpus.shards"], set()),
    "compare": (["pipelines.evaluation.compare", "pipelines.training.trainings"], {"scipy.stats"}),
    "report": (["pipelines.report.page"], {"scipy.stats"}),
    # whoever runs a model: PyTorch, and not what it would pull in with torchvision
    "evaluate": (["pipelines.evaluation.sidebyside"], {"torch"}),
    "embedding worker": (["pipelines.curation.embedder"], {"torch"}),
    "predict": (["pipelines.evaluation.predict"], {"torch"}),
    "train": (["pipelines.training.plan", "pipelines.training.run"], {"torch"}),
    "MLflow's loader of classifiers": (["pipelines.training.pyfunc"], {"torch"}),
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_imports_only_what_it_uses(kind):
    modules, allowed = PROCESSES[kind]
    code = f"import sys, {', '.join(modules)}; print(*({SLOW!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= allowed
