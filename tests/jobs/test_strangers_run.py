"""A run directory that somebody else made: no code that it names runs, and what is strange in it is one line."""

import json

import pytest

from jobs.curate import main as curate
from jobs.embed import main as embed
from jobs.fit import main as fit
from jobs.inspect import main as inspect
from jobs.plan import main as plan
from jobs.score import main as score
from tests.pipelines.synthetic import make_run

CODE = """
import pathlib
pathlib.Path(__file__).with_name("it-ran").touch()
"""


@pytest.fixture
def theirs(tmp_path):
    """A run whose second shard is pending and whose encoder is a Python file."""
    run = make_run(tmp_path, (20, 15))[0]
    run.record["config"]["encoder"] = f"module:{tmp_path}/theirs.py:make"
    run.save()
    (tmp_path / "run/embeddings/000001.parquet").unlink()
    (tmp_path / "theirs.py").write_text(CODE)
    return run


@pytest.mark.parametrize(
    ("command", "more"), [(embed, []), (curate, []), (embed, ["--normalize"]), (fit, ["--views", "2"]), (plan, [])]
)
def test_an_encoder_that_is_code_runs_only_if_it_is_named_again(theirs, tmp_path, capsys, command, more):
    words = ["--run", theirs.uri, *more, *([] if command is plan else ["--mlflow", "none"])]
    assert command(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--encoder: the run remembers module:{tmp_path}/theirs.py:make, which is Python code" in line
    assert not (tmp_path / "it-ran").exists()
    assert embed([*words[:2], "--mlflow", "none", "--encoder", theirs.config.encoder]) == 2  # it has no such function
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"source": ' * 3_000, "[]", "\0", "null"])
@pytest.mark.parametrize("name", ["run.json", "stages/fit.json"])
def test_json_that_is_not_ours_is_one_line_with_its_file(tmp_path, capsys, name, text):
    run = make_run(tmp_path, (20, 15))[0]
    (tmp_path / "run" / name).write_text(text)
    for command in (inspect, fit if name == "run.json" else score):
        assert command(["--run", run.uri, "--mlflow", "none"]) == 2
        err = capsys.readouterr().err
        assert name in err and err.count("\n") == 1, json.dumps(err[:300])
