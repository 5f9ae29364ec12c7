"""hardset report: its status, its JSON, the page in MLflow, and a run that lies on an object store."""

import json
import re
import shutil

import mlflow
import pytest

from jobs.report import main as report
from pipelines.runs import storage
from pipelines.runs.record import Run
from tests.pipelines.reported import make_lacking

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def one_class(tmp_path_factory, ray_session):
    """A small scored run."""
    return make_lacking(tmp_path_factory.mktemp("runs"), ["one class"])["one class"]


@pytest.fixture
def copied(one_class, tmp_path):
    shutil.copytree(one_class.uri, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    return str(tmp_path / "run")


def result_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_page_is_written_and_stored_with_mlflow(copied, tmp_path, capsys):
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert report(["--run", copied, "--mlflow", tracking, "--json"]) == 0
    entry = result_of(capsys)["report"]
    page = storage.read_bytes(entry["path"])
    assert entry["samples"] == entry["pictures"] == 30 and entry["bytes"] == len(page) and not entry["skipped"]
    client = mlflow.MlflowClient(tracking)
    run = client.search_runs([client.get_experiment_by_name("hardset").experiment_id])[0]
    stored = client.download_artifacts(run.info.run_id, "report/index.html", str(tmp_path))
    assert storage.read_bytes(stored) == page
    assert run.data.metrics["pictures"] == 30
    assert report(["--run", copied, "--mlflow", "none", "--json"]) == 0
    assert result_of(capsys)["report"]["skipped"]


def test_names_of_classes(copied, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("<b>heron</b>\n")
    assert report(["--run", copied, "--classes", str(tmp_path / "names.txt"), "--mlflow", "none"]) == 0
    page = storage.read_bytes(Run.open(copied).path("report", "index.html")).decode()
    data = re.search(r'id="data">(.*?)</script>', page, re.S).group(1)
    assert json.loads(data)["classes"] == ["<b>heron</b>"] and "<b>heron" not in page
    assert report(["--run", copied, "--classes", str(tmp_path / "none.txt"), "--mlflow", "none"]) == 2
    assert "--classes" in capsys.readouterr().err


def test_no_run_is_the_users_mistake(tmp_path, capsys):
    assert report(["--run", str(tmp_path / "nothing"), "--mlflow", "none"]) == 2
    assert "no run.json there" in capsys.readouterr().err


def test_a_run_on_an_object_store(one_class, s3_folder):
    for path in storage.list_files(one_class.uri):
        target = storage.join(s3_folder, path.removeprefix(one_class.uri))
        with storage.write_atomic(target) as stream:
            stream.write(storage.read_bytes(path))
    storage.remove_tree(storage.join(s3_folder, "report"))
    assert report(["--run", s3_folder, "--mlflow", "none"]) == 0
    assert b'id="gallery"' in storage.read_bytes(storage.join(s3_folder, "report", "index.html"))
    assert Run.open(s3_folder).stage("report")["samples"] == 30
