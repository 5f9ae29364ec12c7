"""Two commands on one run at once: the second one ends at once and names the first; a run that grows loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.embed import main as embed
from jobs.fit import main as fit
from jobs.report import main as report
from jobs.score import main as score
from jobs.select import main as select
from pipelines.corpus.shards import expand_shards
from pipelines.curation import fit as fitting
from pipelines.curation import score as scoring
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).parents[2]
HOLDING = """
import contextlib, sys, time
from pipelines.runs import holder
from pipelines.runs.record import Run
holder.COMMAND.set("hardset curate")
with contextlib.ExitStack() as held:
    for product in sys.argv[2:]:
        held.enter_context(Run.open(sys.argv[1]).lease(product))
    print("held", flush=True)
    time.sleep(600)
"""
ENCODER = """
import os, time, torch

class Waiting(torch.nn.Module):
    image_size, mean, std, interpolation = 4, (0.5,) * 3, (0.5,) * 3, "bilinear"

    def forward(self, x):
        while not os.path.exists(os.path.join(os.path.dirname(__file__), "go")):
            time.sleep(0.05)
        return x.flatten(1)[:, :12]

def waiting():
    return Waiting()
"""


def test_what_another_command_writes_is_left_to_it(tmp_path, capsys):
    run = make_run(tmp_path, (20, 15))[0]
    fitting.fit(run, "none")
    scoring.score(run, scoring.Weighting())
    products = ("embeddings", "gaussians.npz", "difficulty", "subsets/hard", "report")
    first = subprocess.Popen([sys.executable, "-c", HOLDING, run.uri, *products], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        words = ["--run", run.uri, "--mlflow", "none"]
        for command, product in (
            (select, "subsets/hard"), (report, "report"), (fit, "gaussians.npz"), (score, "difficulty"),
        ):  # fmt: skip
            capsys.readouterr()
            assert command(words) == 1
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"{product} is being written by hardset curate (process {first.pid} on " in line
        assert embed([*words, "--overwrite", "--shards", str(tmp_path / "shards"), "--encoder", "pixels:2"]) == 1
        assert Run.open(run.uri).stage("score") is not None, "nothing is removed under a running command"
        assert select([*words, "--name", "another"]) == 0
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert select(words) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_of_two_embeds_ends_at_once_and_growth_meanwhile_loses_nothing(
    tmp_path, make_image, make_shard, capsys
):
    def shard(number):
        samples = [(f"{number}_{i}", {"jpg": make_image(9 * number + i), "cls": str(i % 2).encode()}) for i in range(4)]
        make_shard(tmp_path / f"shards/{number:03d}.tar", samples)

    shard(0)
    shard(1)
    (tmp_path / "waiting.py").write_text(ENCODER)
    words = ["--run", str(tmp_path / "run"), "--mlflow", "none"]
    made = [*words, "--shards", str(tmp_path / "shards"), "--encoder", f"module:{tmp_path}/waiting.py:waiting"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    first = subprocess.Popen([sys.executable, "-m", "jobs.embed", *made, "--ray-cpus", "1"], cwd=ROOT, env=environment)
    while not (tmp_path / "run/.leases/embeddings").exists():
        assert first.poll() is None
        time.sleep(0.1)
    assert embed(made) == 1
    assert f"embeddings is being written by hardset embed (process {first.pid} on " in capsys.readouterr().err
    shard(2)
    run = Run.open(str(tmp_path / "run"))
    Run.create(run.uri, run.config, expand_shards(str(tmp_path / "shards")))
    (tmp_path / "go").touch()
    assert first.wait() == 0
    grown = Run.open(run.uri)
    assert len(grown.shards) == 3 and grown.stage("embed")["rows"] == 8 and grown.classes == ["0", "1"]
    assert embed(made) == 0
    assert Run.open(run.uri).stage("embed")["shards_done"] == 1
    assert Run.open(run.uri).stage("embed")["rows"] == 12
