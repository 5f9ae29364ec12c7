"""Options, errors and exit status, as a person meets them."""

import dataclasses
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import hardset
from jobs.command import Command
from jobs.options import RunOptions
from jobs.session import tracked
from pipelines.runs.errors import StageFailed, UserError, concerning

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    """Toys.

    They have more lines.
    """

    size_cm: float = 2.5
    """length in cm, in (0, 100]"""
    count: int | float = 0.1
    """fraction or number"""
    fast: bool = False
    """whether it is fast"""
    names: list[str] = dataclasses.field(default_factory=list)
    """what it is called"""
    json: bool = False
    """one JSON object"""

    def __post_init__(self):
        if self.size_cm <= 0:
            raise UserError(f"{self.size_cm}: must be above 0", "size_cm")


def command(body=dataclasses.asdict):
    return Command("toy", "Play.", (Toy,), body)


def parsed(*argv):
    return command().parse(list(argv))[0]


def test_flags_over_file_over_defaults(tmp_path):
    config = tmp_path / "toy.yaml"
    config.write_text("size_cm: 7\nfast: true\nnames: [a, b]\n")
    assert parsed("--config", str(config), "--size-cm", "9") == Toy(size_cm=9, fast=True, names=["a", "b"])


def test_dashes_and_underscores_are_alike():
    assert parsed("--size_cm=3", "--names", "x_y", "z") == parsed("--size-cm", "3", "--names", "x_y", "z")


def test_whole_numbers_and_fractions_are_told_apart():
    assert parsed("--count", "500").count == 500 and isinstance(parsed("--count", "500").count, int)
    assert parsed("--count", "0.5").count == 0.5


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--size-cm", "long"], "--size-cm long: expected a number"),
        (["--size-cm", "-1"], "--size-cm -1"),
        (["--colour", "red"], "--colour"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, named, capsys):
    assert command().main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert named in lines[0] and lines[0].startswith("hardset toy: error:")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("7: too many; take `other_one` or `from_`", "size_cm"), 2, "error: --size-cm 7: too many; take --other-one or --from"),
        (UserError("which? there are none", "from_"), 2, "error: --from: which? there are none"),
        (UserError("two things\nat once"), 2, "error: two things at once"),
        (StageFailed("more than `max_bad_fraction` 0.01; kept"), 1, "more than --max-bad-fraction 0.01; kept"),
        (OSError("disk"), 1, "OSError: disk; finished shards are kept"),
    ],
)  # fmt: skip
def test_errors_become_status_and_one_line(error, status, told, capsys):
    def fail(_):
        raise error

    assert command(fail).main([]) == status
    assert capsys.readouterr().err == f"hardset toy: {told}\n"


@pytest.mark.parametrize(
    "bug",
    [
        lambda _: np.zeros(3) + np.zeros(4),
        lambda _: [a for a, b in ["abc"]],
        lambda _: int("x"),
        lambda _: np.linalg.cholesky(-np.eye(2)),
        lambda _: pa.array(["x"]).cast("int64"),
        lambda _: b"\xff".decode(),
        lambda _: {}["x"],
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(Exception, match=r"\S") as caught:
        command(bug).main([])
    assert not isinstance(caught.value, UserError)


def test_a_bug_in_a_process_of_its_own_ends_with_status_1_and_its_traceback():
    code = (
        "import sys, dataclasses\nfrom jobs.command import Command\n"
        "@dataclasses.dataclass(frozen=True)\nclass Toy:\n    'Toys.'\n    size: int = 1\n    'cm'\n"
        "sys.exit(Command('toy', 'Play.', (Toy,), lambda _: (lambda a, b: a)(*'abc')).main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "positional argument" in done.stderr


def test_what_ops_says_of_a_parameter_becomes_the_mistake_in_an_option():
    for text, field, message in (
        ("encoder 'x': no such form", "encoder", "'x': no such form"),
        ("small_images: resnet has no stem", "small_images", "resnet has no stem"),
        ("size is 0", "encoder", "size is 0"),
    ):
        with pytest.raises(UserError) as caught, concerning("encoder", "small_images"):
            raise ValueError(text)
        assert (caught.value.field, caught.value.message) == (field, message)
        assert pickle.loads(pickle.dumps(caught.value)).field == field
    with pytest.raises(UserError) as caught, concerning("encoder"):
        raise UserError("7: no", "label")
    assert str(caught.value) == "label 7: no"


def test_json_is_the_last_line(capsys):
    assert command().main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["size_cm"] == 2.5


def test_every_command_explains_every_option(capsys):
    for name in hardset.COMMANDS:
        assert hardset.main([name, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "default:" in text and "--config" in text, name


def test_usage_lists_every_command(capsys):
    assert hardset.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in hardset.COMMANDS)
    assert hardset.main(["no-such"]) == 2


def test_the_version_is_told_without_importing_a_command(capsys):
    assert hardset.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hardset {importlib.metadata.version('hardset')}\n"


def test_the_module_form_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.inspect", "--run", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("hardset inspect: error: --run nowhere")


def test_a_command_leaves_the_next_ones_tracking_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracked("toy", RunOptions(run="r", mlflow=f"sqlite:///{tmp_path}/a.db")) as tracker:
        assert tracker.run_id and (tmp_path / "a.db").exists()
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with pytest.raises(ValueError, match=r"mlflow sqlite:.*pyproject.toml"):
        tracked("toy", RunOptions(run="r", mlflow=f"sqlite:///{ROOT}/pyproject.toml")).__enter__()
    assert "MLFLOW_TRACKING_URI" not in os.environ
