"""Peak memory of fit and score does not grow with the number of samples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys
from pathlib import Path
import ray
from pipelines.curation import fit, score
from tests.pipelines.synthetic import make_run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder, shards = Path(sys.argv[1]), int(sys.argv[2])
run, features, labels = make_run(folder, sizes=(4000,) * shards, dim=64)
del features, labels
made = peak()
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
fit.fit(run, "none")
score.score(run, score.Weighting())
# One core, so one worker did it all.
print(json.dumps({"worker": ray.get(ray.remote(peak).remote()), "driver": peak(), "made": made}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_times_the_samples_take_the_same_memory(tmp_path):
    peaks = []
    for shards in (3, 30):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / str(shards)), str(shards)],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    few, many = peaks
    assert many["worker"] < 1.1 * few["worker"] + 10, peaks  # MiB
    # Making the corpus by hand holds it whole in the driver; what fit and score add to that must not grow.
    assert many["driver"] - many["made"] < 1.2 * (few["driver"] - few["made"]) + 30, peaks
