"""Every stage, killed before each of its storage operations, and interrupted there by another command.

Afterwards the same command, or the one of before, gives byte for byte what it gives on a run where nothing happened; and
no later stage takes what is left for something else.
"""

import contextlib
import shutil

import pytest

from pipelines.curation.fit import fit
from pipelines.curation.rules import Rule
from pipelines.curation.score import Weighting, kmeans_centers, score
from pipelines.curation.select import select
from pipelines.report.page import report
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.record import Run
from tests.crash import Killed, Operations
from tests.pipelines.synthetic import make_run


def fit_with(shrinkage):
    return leased("gaussians.npz", lambda run: fit(run, shrinkage))


def score_with(temperature):
    return leased("difficulty", lambda run: score(run, Weighting(temperature=temperature)))


def cluster_with(k):
    return leased("difficulty", lambda run: score(run, Weighting(), kmeans_centers(run, k)))


def select_with(count):
    return leased("subsets/hard", lambda run: select(run, Rule("difficulty.rmd", count), samples_per_shard=7))


def report_with(names):
    return leased("report", lambda run: report(run, names))


def leased(product, work):
    """As a command does it."""

    def command(run):
        with run.lease(product):
            return work(run)

    return command


def nothing(run):
    return None


# By stage: what is done before, the command that was finished, the one that is killed, what later stages do.
STAGES = {
    "fit": ([], fit_with("none"), fit_with(0.5), score_with(0.7)),
    "score": ([fit_with("none")], score_with(0.7), score_with(2.0), select_with(9)),
    "kmeans": ([fit_with("none")], cluster_with(3), cluster_with(4), nothing),
    "select": ([fit_with("none"), score_with(0.7)], select_with(6), select_with(13), nothing),
    "report": (
        [fit_with("none"), score_with(0.7)],
        report_with(["a", "b", "c"]),
        report_with(["d", "e", "f"]),
        nothing,
    ),
}


class Bench:
    """A run at one place, whose state is kept and put back."""

    def __init__(self, folder):
        self.folder, self.kept = folder, folder / "kept"
        self.run_folder = folder / "run"

    def run(self):
        return Run.open(str(self.run_folder))

    def keep(self):
        shutil.copytree(self.run_folder, self.kept)

    def put_back(self):
        shutil.rmtree(self.run_folder)
        shutil.copytree(self.kept, self.run_folder)

    def products(self, swept=True):
        """All files by name, hidden ones too, without the records of how long it took."""
        found = {}
        for path in sorted(self.run_folder.rglob("*")):
            name = str(path.relative_to(self.run_folder))
            if path.is_file() and not name.startswith(("stages/", ".leases/", "run.json")):
                assert not swept or "/." not in f"/{name}", f"{name} was left"
                found[name] = path.read_bytes() if "report/" not in name else self.told(path)
        return found

    @staticmethod
    def told(path):
        """Pages say when they were made; their names of classes tell one from the other."""
        text = path.read_text()
        return [name for name in "abcdef" if f'"{name}"' in text]


@pytest.fixture(autouse=True)
def killed_processes_are_dead(monkeypatch):
    """What was killed here shares our process number."""
    monkeypatch.setattr("pipelines.runs.local_files._is_alive", lambda pid: False)


SLOW = ("kmeans", "report")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in STAGES])
def stage(request, tmp_path, ray_session):
    """(bench, the command of before, the command, what follows, and what these give on an undisturbed run)."""
    make_run(tmp_path, sizes=(14, 9))
    bench = Bench(tmp_path)
    made_before, old, new, later = STAGES[request.param]
    for command in made_before:
        command(bench.run())
    bench.keep()
    fresh = {}
    for command in (new, old):  # the last one stays
        bench.put_back()
        command(bench.run())
        later(bench.run())
        fresh[command] = bench.products()
        if command is old:
            bench.put_back()
            command(bench.run())
    assert fresh[old] != fresh[new]
    shutil.rmtree(bench.kept)
    bench.keep()
    return bench, old, new, later, fresh


def check(bench, command, later, fresh, at):
    command(bench.run())
    later(bench.run())
    found = bench.products()
    assert found.keys() == fresh[command].keys(), at
    assert [name for name in found if found[name] != fresh[command][name]] == [], at


def operations_of(bench, command):
    with Operations(bench.run_folder) as operations:
        command(bench.run())
    bench.put_back()
    return operations.seen


def kill(bench, command, at):
    bench.put_back()
    with Operations(bench.run_folder, at), pytest.raises(Killed):
        command(bench.run())


def test_killed_before_each_operation(stage):
    bench, old, new, later, fresh = stage
    seen = operations_of(bench, new)
    assert len(seen) > 1
    for at, operation in enumerate(seen):
        for command in (new, old):
            kill(bench, new, at)
            check(bench, command, later, fresh, (at, operation))


def test_later_stages_after_a_kill_give_one_or_the_other_or_refuse(stage):
    """What follows at once, without the killed command again, never mixes two states."""
    bench, old, new, later, fresh = stage
    if later is nothing:
        pytest.skip("nothing reads it")
    for at, operation in enumerate(operations_of(bench, new)):
        kill(bench, new, at)
        try:
            later(bench.run())
        except UserError:
            continue  # said, in a line
        found = bench.products(swept=False)
        assert any(later_part(found, old) == later_part(fresh[c], old) for c in (old, new)), (at, operation)


def later_part(products, _):
    """What the later stage wrote: difficulty after fit, the subset after score."""
    kept = [name for name in products if name.startswith("subsets/")] or [
        name for name in products if name.startswith("difficulty/0")
    ]
    return {name: products[name] for name in kept}


# Commands that hold other leases, so that they may run at the same time.
MEANWHILE = {
    "fit": [score_with(2.0), select_with(20), report_with(["d", "e", "f"])],
    "score": [fit_with(0.5), select_with(20), report_with(["d", "e", "f"])],
    "kmeans": [fit_with(0.5), select_with(20), report_with(["d", "e", "f"])],
    "select": [fit_with(0.5), score_with(2.0), report_with(["d", "e", "f"])],
    "report": [fit_with(0.5), score_with(2.0), select_with(20)],
}
CHAIN = [fit_with("none"), cluster_with(3), select_with(9), report_with(["a", "b", "c"])]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_another_command_between_any_two_operations(name, tmp_path, ray_session):
    """Whatever ran into whatever: the whole chain of commands afterwards is the chain on an undisturbed run."""
    make_run(tmp_path, sizes=(14, 9))
    bench = Bench(tmp_path)
    for command in CHAIN:
        command(bench.run())
    fresh = bench.products()
    bench.keep()
    new = STAGES[name][2]
    with Operations(bench.run_folder) as operations:
        new(bench.run())
    for at, operation in enumerate(operations.seen):
        for other in MEANWHILE[name]:
            bench.put_back()
            try:
                with Operations(bench.run_folder, at, lambda: quietly(other, bench.run())):  # noqa: B023
                    new(bench.run())
            except (UserError, StageFailed):
                pass  # said, in a line
            for command in CHAIN:
                command(bench.run())
            found = bench.products()
            assert found.keys() == fresh.keys(), (at, operation)
            assert [file for file in found if found[file] != fresh[file]] == [], (at, operation)


def quietly(command, run):
    with contextlib.suppress(UserError):
        command(run)
