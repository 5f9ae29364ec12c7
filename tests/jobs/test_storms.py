"""The main job on an object store on a bad day, through a proxy that makes it so: the results are those of a good day."""

import random

import pytest

from jobs.curate import main as curate
from jobs.fit import main as fit
from jobs.score import main as score
from jobs.select import main as select
from pipelines.runs import storage
from pipelines.runs.retries import RETRY_VARIABLE
from tests.faulty_proxy import Fault, error

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1200), pytest.mark.slow]

GROUPS = ("embeddings", "difficulty", "quarantine", "subsets")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_image, make_shard):
    """Two shards of 20 samples."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        samples = [
            (f"{number}_{i}", {"jpg": make_image(50 * number + i), "cls": str(i % 3).encode()}) for i in range(20)
        ]
        make_shard(folder / f"train-{number:06d}.tar", samples)
    return folder


@pytest.fixture
def uploaded(faulty, shards):
    """The shards in the bucket, as a folder behind the proxy."""
    for path in sorted(shards.iterdir()):
        with storage.write_atomic(storage.join(faulty.folder, "shards", path.name)) as file:
            file.write(path.read_bytes())
    return storage.join(faulty.folder, "shards")


def words(shards, run, *more):
    return ["--shards", shards, "--run", run, "--encoder", "pixels:3", "--workers", "1", "--mlflow", "none", *more]


def products(run):
    return {
        storage.split_query(uri)[0].removeprefix(storage.split_query(run)[0]): storage.read_bytes(uri)
        for group in GROUPS
        for uri in storage.list_files(storage.join(run, group))
    }


@pytest.fixture
def calm(faulty, uploaded):
    """What the job gives where nothing fails."""
    run = storage.join(faulty.folder, "calm")
    assert curate(words(uploaded, run)) == 0
    return products(run)


def weather(seed):
    """A rule: about every eighth request fails in one of the ways that pass, or lies."""
    rng = random.Random(seed)
    faults = [error(503, "SlowDown"), error(500, "InternalError"), Fault(reset=True), Fault(keep=0.5), Fault(pause=0.5)]
    return lambda request: rng.choice(faults) if rng.random() < 0.12 else None


def test_the_main_job_in_bad_weather(faulty, uploaded, calm):
    run = storage.join(faulty.folder, "stormy")
    faulty.set(weather(0))
    assert curate(words(uploaded, run)) == 0
    assert len(faulty.seen) > 50
    faulty.set(lambda request: None)
    assert products(run) == calm


@pytest.mark.parametrize("seconds", [1, 10, 60, 300])
def test_outages_of_writes_and_look_ups(faulty, uploaded, calm, seconds, monkeypatch):
    """Nothing answers for so long, from the moment that the second file of the run is written."""
    monkeypatch.setenv(RETRY_VARIABLE, "600")
    run, began = storage.join(faulty.folder, "outage"), []

    def rule(request):
        if request.method == "PUT" and "/outage/" in request.path:
            began.append(request.age)
        out = len(began) > 1 and request.age < began[1] + seconds
        return error(503, "SlowDown") if out else None

    faulty.set(rule)
    assert curate(words(uploaded, run)) == 0
    faulty.set(lambda request: None)
    assert products(run) == calm


def test_credentials_that_expire_in_the_middle_are_said_at_once_and_what_is_done_is_kept(faulty, uploaded, calm, capfd):
    run = storage.join(faulty.folder, "expired")
    assert curate(words(uploaded, run, "--top", "0.3")) == 0
    for at in range(3):
        faulty.set(lambda request, at=at: error(400, "ExpiredToken") if request.number >= 5 * at else None)
        capfd.readouterr()
        assert curate(words(uploaded, run)) in (1, 2)
        last = capfd.readouterr().err.splitlines()[-1]
        assert "credentials have expired" in last and "Traceback" not in last
    faulty.set(lambda request: None)
    assert curate(words(uploaded, run)) == 0
    assert products(run) == calm


@pytest.mark.parametrize("stage", ["fit", "score", "select"])
def test_killed_after_any_write_of_an_object_store(faulty, uploaded, calm, stage):
    """From some PUT or DELETE on nothing is accepted, as if the process had died there; then the same command again."""
    run = storage.join(faulty.folder, "prefix")
    commands = {
        "fit": (fit, ["--shrinkage", "0.3"]),
        "score": (score, ["--temperature", "2"]),
        "select": (select, ["--top", "0.3"]),
    }
    command, more = commands[stage]
    assert curate(words(uploaded, run)) == 0
    whole = ["--run", run, "--mlflow", "none"]
    for at in range(20):
        changes, refused = [], []

        def rule(request, at=at, changes=changes, refused=refused):
            if request.method in ("PUT", "DELETE", "POST") and "/.leases/" not in request.path:
                changes.append(request.path)
                if len(changes) > at:
                    refused.append(request.path)
                    return error(403, "AccessDenied")
            return None

        faulty.set(rule)
        command([*whole, *more])
        faulty.set(lambda request: None)
        for again, options in ((fit, []), (score, []), (select, ["--where", "difficulty.margin < 0"])):
            assert again([*whole, *options]) == 0
        assert products(run) == calm, at
        if not refused:
            return
    pytest.fail("more writes than were tried")
