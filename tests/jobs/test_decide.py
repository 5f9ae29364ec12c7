"""hardset decide from start to end: a file, the labels of later commands, undo, mistakes in one line."""

import json

import pytest

from jobs.decide import main as decide
from jobs.fit import main as fit
from jobs.inspect import main as inspect
from jobs.score import main as score
from jobs.select import main as select
from pipelines.runs import joins
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)[0].uri


def options(run, *more):
    return ["--run", run, "--mlflow", "none", *map(str, more)]


def result(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_correction_reaches_fit_score_and_a_subset(run, tmp_path, capsys):
    file = tmp_path / "decisions.csv"
    file.write_text("key,decision,label\ns000001,relabel,2\ns000002,drop,\n")
    assert decide(options(run, "--from", file, "--by", "anna", "--json")) == 0
    assert result(capsys)["decide"]["added"] == 2
    assert fit(options(run)) == score(options(run)) == 0
    assert select(options(run, "--by", "difficulty.rmd", "--top", "1.0", "--where", "", "--name", "all")) == 0
    capsys.readouterr()
    assert inspect(["--run", run, "--json"]) == 0
    shown = result(capsys)
    assert (shown["decisions"]["relabel"], shown["decisions"]["drop"]) == (1, 1)
    manifest = f"{Run.open(run).uri}/subsets/all/manifest.parquet"
    import pyarrow.parquet as pq

    rows = {row["key"]: row for row in pq.read_table(manifest).to_pylist()}
    assert rows["s000001"]["label"] == 2
    assert "s000002" not in rows
    assert joins.load(run, ["difficulty.md"])["difficulty.md"].null_count == 0


def test_undo(run, tmp_path, capsys):
    file = tmp_path / "decisions.csv"
    file.write_text("key,decision\ns000002,drop\n")
    assert decide(options(run, "--from", file)) == 0
    assert decide(options(run, "--undo", "--json")) == 0
    assert result(capsys)["decide"]["in_force"] == {"keep": 0, "relabel": 0, "drop": 0}
    assert decide(options(run, "--undo")) == 2
    assert "--undo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("key,decision\nnowhere,keep\n", [], "--from"),
        (None, [], "--from"),
        ("key,decision\ns000001,keep\n", ["--undo"], "--from"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(run, tmp_path, capsys, text, more, said):
    words = []
    if text is not None:
        (tmp_path / "d.csv").write_text(text)
        words = ["--from", tmp_path / "d.csv"]
    assert decide(options(run, *words, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_a_file_that_is_not_there(run, tmp_path, capsys):
    assert decide(options(run, "--from", tmp_path / "none.csv")) == 2
    assert "none.csv: cannot be read" in capsys.readouterr().err
