"""Run directories that were damaged, or made by a stranger: every command ends with a status and one line, or does its work."""

import random
import shutil
import time

import pytest

from jobs.export import main as export
from jobs.fit import main as fit
from jobs.inspect import main as inspect
from jobs.report import main as report
from jobs.score import main as score
from jobs.select import main as select
from tests.mutations import mutate
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")
COMMANDS = {"inspect": inspect, "fit": fit, "score": score, "select": select, "report": report, "export": export}
LIMIT_S = 120  # of one command on this tiny run, on a busy machine


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ray_session):
    """A small run with all that fit, score, select and report make."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, sizes=(14, 9))
    for command in (fit, score, select, report):
        assert command(words(command, folder / "run", folder)) == 0
    return folder / "run"


def words(command, run, folder):
    if command is export:
        return ["--run", str(run), "--columns", "difficulty.rmd", "--out", str(folder / "out.csv")]
    return ["--run", str(run)] + ([] if command is inspect else ["--mlflow", "none"])


def try_one(whole, folder, seed, capfd):
    rng = random.Random(seed)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    victim = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    victim.write_bytes(mutate(victim.read_bytes(), rng))
    name = rng.choice(list(COMMANDS))
    capfd.readouterr()
    started = time.monotonic()
    told = f"seed {seed}: hardset {name} after {victim.relative_to(run)} was damaged"
    try:
        status = COMMANDS[name](words(COMMANDS[name], run, folder))
    except Exception as error:
        raise AssertionError(f"{told}: a traceback") from error
    said = capfd.readouterr().err
    assert status in (0, 1, 2), told
    assert "Traceback" not in said, f"{told}: {said}"
    assert status == 0 or said.splitlines()[-1].startswith(f"hardset {name}: "), f"{told}: {said}"
    assert time.monotonic() - started < LIMIT_S, told


@pytest.mark.parametrize("seed", range(24))
def test_damaged_runs(whole, tmp_path, seed, capfd):
    try_one(whole, tmp_path, seed, capfd)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_damaged_runs(whole, tmp_path, capfd):
    wrong = []
    for seed in range(1000, 2000):
        try:
            try_one(whole, tmp_path, seed, capfd)
        except AssertionError as error:
            wrong.append(f"{error} {error.__cause__!r}")
    assert not wrong, "\n".join(wrong)
