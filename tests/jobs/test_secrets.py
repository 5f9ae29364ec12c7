"""Nothing that a command prints, stores or logs holds a credential that it was given in a URI."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from pipelines.corpus.shards import expand_shards
from pipelines.runs import credentials
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

ROOT = Path(__file__).parents[2]
SECRETS = ("KEYKEYKEY", "SEC/RETSECRET", "SEC%2FRETSECRET", "hunter2hunter2")


def start(*words, cwd, variables=()):
    """A command in a process of its own; what it printed, without the credentials of the tests in its environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    environment |= {"PYTHONPATH": str(ROOT), "AWS_SHARED_CREDENTIALS_FILE": os.devnull} | dict(variables)
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def leaks(data, where):
    return [f"{secret} in {where}" for secret in SECRETS if secret.encode() in data]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_and_all_it_leaves_behind_hold_no_credentials(s3_server, s3_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(credentials.VARIABLE, "")
    bucket = s3_folder.split("/")[2]
    base = f"s3://KEYKEYKEY:SEC%2FRETSECRET@{bucket}"
    client = boto3.client("s3", endpoint_url=s3_server)
    by_hand = make_run(tmp_path, (12, 12))[0]
    for file in (tmp_path / "shards").glob("*.tar"):
        client.upload_file(str(file), bucket, f"shards/{file.name}")
    run = Run.create(f"{base}/run", by_hand.config, expand_shards(f"{base}/shards/train-00000{{0..1}}.tar"))
    run.set_classes(by_hand.classes)
    for file in (tmp_path / "run/embeddings").iterdir():
        client.upload_file(str(file), bucket, f"run/embeddings/{file.name}")
    run.finish_stage("embed", rows=24, left_out=0, seconds=0.0)
    monkeypatch.setenv(credentials.VARIABLE, "")
    words, tracked = ["--run", f"{base}/run"], ["--mlflow", f"sqlite:///{tmp_path}/mlflow.db"]
    untracked = ["--mlflow", "none"]
    said = ""
    for command in (
        ["jobs.fit", *words, *untracked], ["jobs.score", *words, *untracked], ["jobs.select", *words, *tracked, "--json"],
        ["jobs.report", *words, *tracked], ["jobs.inspect", *words, "--json"],
        ["jobs.export", *words, "--to", "table", "--out", str(tmp_path / "table.parquet")],
    ):  # fmt: skip
        done = start(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    found = leaks(said.encode(), "what was printed")
    names = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]]
    for name in names:
        found += leaks(name.encode() + client.get_object(Bucket=bucket, Key=name)["Body"].read(), name)
    for path in tmp_path.rglob("*"):
        found += leaks(path.read_bytes(), path) if path.is_file() else []
    assert found == []
    assert {"run/report/index.html", "run/subsets/hard/manifest.parquet", "run/stages/score.json"} <= set(names)
    assert (tmp_path / "mlflow.db").exists() and f"s3://{bucket}/run" in said


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["jobs.embed", "--run", "r", "--shards", "s3://KEYKEYKEY:SEC%2FRETSECRET@no-such/x.tar", "--encoder", "pixels:2"], 2),
        (["jobs.inspect", "--run", "s3://KEYKEYKEY:SEC%2FRETSECRET@no-such-bucket/x"], 2),
        (["jobs.select", "--run", "RUN", "--mlflow", "postgresql://user:hunter2hunter2@127.0.0.1:1/db"], 2),
        (["jobs.select", "--run", "RUN", "--colour", "https://h/x?token=hunter2hunter2"], 2),
        (["jobs.validate", "--shards", "https://127.0.0.1:1/x.tar?token=hunter2hunter2", "--label", "none"], 2),
    ],
)  # fmt: skip
def test_no_mistake_is_told_with_a_credential(s3_server, tmp_path, words, status):
    made = make_run(tmp_path, (10,))[0].uri
    done = start(*(made if word == "RUN" else word for word in words), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert leaks((done.stdout + done.stderr).encode(), "what was printed") == []
