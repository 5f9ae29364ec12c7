"""The arithmetic of a plan, and a worker measured alone."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from pipelines.corpus.shards import expand_shards
from pipelines.curation.workers import STEPS, Resources
from pipelines.planning import plan
from pipelines.planning.measure import MOST_SHARDS, Probe, _parts, _repeats
from pipelines.planning.plan import Measured, StageCost
from pipelines.runs import columns, storage
from pipelines.runs.record import CorpusConfig, Shard
from tests.pipelines.synthetic import make_run, write_shards

MEASURED = Measured(
    shard_bytes=(1_000_000, 1_000_000),
    shard_samples=(100, 100),
    left_out=2,
    step_seconds={"read": 0.0001, "decode": 0.001, "transfer": 0.0, "model": 0.004, "write": 0.0001},
    batch_seconds=(0.002, 0.003, 0.002, 0.003),
    startup_s=10.0,
    session_s=5.0,
    stages={
        "fit": StageCost(2.0, 0.1),
        "score": StageCost(1.0, 0.05),
        "select": StageCost(1.0, 0.0),
        "report": StageCost(3.0, 0.01),
    },
    bytes_per_sample={"embeddings": 1000.0, "difficulty": 50.0, "quarantine": 1.0, "subsets/hard": 1000.0},
    worker_bytes=1 << 30,
    device="cpu",
    workers=2,
    decoders=1,
    cores=2.0,
)


def test_the_listed_shards():
    found = plan.project(MEASURED, num_shards=50, total_bytes=50_000_000)
    seconds = found["seconds"]
    assert (found["samples"], found["shards"], found["workers"]) == (5000, 50, 2)
    assert seconds["embed"] == pytest.approx(10 + 5000 * 0.0025)
    assert seconds["fit"] == pytest.approx(2 + 50 * 0.1) and seconds["score"] == pytest.approx(1 + 50 * 0.05)
    assert seconds["select"] == pytest.approx(1 + 50 * plan.DRIVER_S_PER_TASK)
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in ("start", *plan.STAGES)))
    assert found["core_hours"] == pytest.approx(2 * seconds["total"] / 3600) and found["gpu_hours"] == 0
    assert found["storage_bytes"]["embeddings"] == pytest.approx(5e6)
    assert found["bad_fraction"] == 0.01
    assert found["read_bytes"] == pytest.approx(5e7) and found["read_bytes_per_s"] == pytest.approx(1e4 / 0.0025)


def test_the_interval_is_the_t_interval_of_the_parts():
    seconds = plan.project(MEASURED, 50, 50_000_000)["seconds"]
    x = np.array(MEASURED.batch_seconds)
    half = stats.t.interval(0.9, 3, x.mean(), stats.sem(x))[1] / x.mean() - 1
    at_work = seconds["total"] - 15  # start-up does not grow with the corpus
    assert seconds["interval"] == pytest.approx([seconds["total"] - half * at_work, seconds["total"] + half * at_work])


def test_shards_that_differ_widen_the_interval_unless_all_are_measured():
    uneven = dataclasses.replace(MEASURED, shard_samples=(80, 120))
    few, every = plan.project(uneven, 50, 50_000_000), plan.project(uneven, 2, 2_000_000)
    assert few["samples_interval"][0] < 5000 < few["samples_interval"][1]
    assert every["samples_interval"] == [200, 200]
    even = plan.project(MEASURED, 50, 50_000_000)["seconds"]["interval"]
    wide = few["seconds"]["interval"]
    assert wide[1] - wide[0] > even[1] - even[0]


def test_billions_on_many_gpus():
    gpu = dataclasses.replace(MEASURED, device="cuda", workers=1, decoders=4, cores=8.0)
    found = plan.project(gpu, 50, 50_000_000, samples=5_850_000_000, workers=64)
    assert found["shards"] == 58_500_000 and found["cores"] == 512
    assert found["samples_per_s"] == pytest.approx(64 / 0.0025)
    assert found["gpu_hours"] == pytest.approx(64 * (10 + 5.85e9 * 0.0025 / 64) / 3600)
    assert found["memory_bytes"]["driver"] > 100e9  # which says that such shards are too small


def test_the_bottleneck():
    assert plan.bottleneck(MEASURED).startswith("model: 77 % of a worker's time")
    steps = {"read": 1e-5, "decode": 0.01, "transfer": 1e-5, "model": 0.001, "write": 1e-5}
    gpu = dataclasses.replace(MEASURED, device="cuda", decoders=4, workers=1, step_seconds=steps)
    assert "decoding" in plan.bottleneck(dataclasses.replace(gpu, batch_seconds=(0.0026,) * 3))
    assert plan.bottleneck(dataclasses.replace(gpu, batch_seconds=(0.02,) * 3)).startswith("cores:")


def test_a_single_part_has_no_interval():
    assert plan.relative_half_width([3.0]) == 0.0


def test_planned_against_actual(tmp_path):
    run = make_run(tmp_path)[0]
    assert plan.against_actual(run) is None
    plan.store(run, plan.project(MEASURED, 3, 300_000))
    run.finish_stage("embed", rows=90, left_out=10, seconds=5.0, shards_done=2, shards_skipped=1)
    found = plan.against_actual(type(run).open(run.uri))
    assert found["samples"]["actual"] == 100 and found["bad_fraction"]["actual"] == 0.1
    planned = 10 + 30 * 0.0025
    assert found["seconds embed"] == {
        "planned": pytest.approx(planned),
        "actual": 5.0,
        "ratio": pytest.approx(5 / planned),
    }
    size = sum(path.stat().st_size for path in (tmp_path / "run/embeddings").iterdir())
    assert found["bytes embeddings"]["actual"] == size
    assert "seconds fit" not in found and "last 2 shards" in found["note"]


def test_parts_leave_out_the_start_and_the_end():
    # Two workers start at 10 s, then 100 samples every second; the last ones come late.
    times = np.concatenate([10 + np.arange(20), [40.0]])
    assert _parts(times, np.full(21, 100), workers=2) == pytest.approx((0.01,) * 8)
    assert len(_parts(np.array([1.0, 2.0]), np.array([5, 5]), workers=2)) == 1


@pytest.mark.parametrize(
    ("alone_s", "workers", "expected"), [(2.0, 2, 20), (1000.0, 2, 6), (1e-9, 2, MOST_SHARDS // 2)]
)
def test_repeats(alone_s, workers, expected):
    shards = [Shard("a", 1000, 0), Shard("b", 1000, 0)]
    assert _repeats(shards, alone_s, workers, target_s=20.0) == expected


def test_a_worker_alone(tmp_path):
    write_shards(tmp_path / "shards", (30,))
    config = CorpusConfig("pixels:4", "", width=16)
    probe = Probe(config, Resources(batch_size=8), str(tmp_path / "scratch"))
    found = probe.shard(0, expand_shards(str(tmp_path / "shards"))[0])
    assert (found["samples"], found["left_out"]) == (30, 0)
    assert set(found["seconds"]) == set(STEPS)
    assert all(found["seconds"][step] > 0 for step in ("read", "decode", "model", "write"))
    assert probe.peak_bytes() > 100e6 and math.isfinite(probe.peak_bytes())
    assert storage.exists(str(tmp_path / "scratch" / columns.EMBEDDINGS / "000000.parquet"))
