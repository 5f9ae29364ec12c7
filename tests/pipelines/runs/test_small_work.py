"""Small work is done in the command's own process, without Ray; more of it goes to Ray, with the same results."""

import subprocess
import sys
import textwrap

import pytest

BEGIN = """
import sys, time
from pipelines.runs import cluster, tasks

def double(number, seconds):
    time.sleep(seconds)
    return 2 * number

started = []
def start():
    started.append(True)
    raise SystemExit("Ray was started")

items = [(i,) for i in range(40)]
"""


def output_of(code: str) -> str:
    """What a fresh process prints: this one has Ray imported."""
    done = subprocess.run([sys.executable, "-c", BEGIN + textwrap.dedent(code)], capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


def test_small_work_never_imports_ray():
    code = """
        with cluster.session(start, cpus=2):
            found = list(tasks.in_order(double, items, 0.0))
        print(found == [2 * i for i, in items], started, "ray" in sys.modules)
    """
    assert output_of(code) == "True [] False"


@pytest.mark.parametrize("cpus", ["2", "None"])
def test_what_would_take_long_or_belongs_to_a_cluster_goes_to_ray(cpus):
    code = f"""
        tasks.TRIAL_S, tasks.START_S = 0.1, 2.0
        with cluster.session(start, cpus={cpus}):
            for number, found in enumerate(tasks.in_order(double, items, 0.1)):
                print(found, flush=True)
    """
    *before, last = output_of(code).splitlines()
    assert last == "Ray was started"
    assert before == ([] if cpus == "None" else ["0", "2"])


def test_no_item_needs_no_cluster():
    code = """
        with cluster.session(start, cpus=None):
            print(list(tasks.in_order(double, [], 0.0)), started, "ray" in sys.modules)
    """
    assert output_of(code) == "[] [] False"


def test_threads_are_those_of_a_task():
    code = """
        import numpy
        from threadpoolctl import threadpool_info

        def threads(number):
            return max(pool["num_threads"] for pool in threadpool_info())

        with cluster.session(start, cpus=2):
            print(list(tasks.in_order(threads, [(0,)])))
    """
    assert output_of(code) == "[1]"
