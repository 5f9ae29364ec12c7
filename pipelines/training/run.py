"""Run a planned training: in this process, or by the workers of Ray Train.

One worker on this machine needs neither Ray's start nor a second copy of everything: the loop runs here. Ray Train runs it
for several workers, on a cluster, and where failed workers are to be replaced. The results are the same.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipelines.runs import cluster, storage
from pipelines.runs.errors import StageFailed
from pipelines.training.checkpoints import read_state
from pipelines.training.documents import read_json
from pipelines.training.loop import Plan, Workplace, is_done, numbers_of, train_classifier

MAX_FAILURES = 2  # of Ray Train's workers, where nothing else is asked for
Watch = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who trains; none of it changes a result but the order of sums.

    Attributes
    ----------
    max_failures : int or None
        Times that failed workers are replaced, which only Ray Train does. None: MAX_FAILURES if it is Ray Train's anyway.
    """

    count: int = 1
    device: str = "cpu"
    max_failures: int | None = None

    @property
    def here(self) -> bool:
        """Whether the loop runs in this process."""
        return self.count == 1 and self.max_failures is None and cluster.small_work_stays_here()

    def threads(self) -> int:
        """Threads of each worker."""
        return max(1, int(cluster.capacity().cpus // self.count))


def train(plan: Plan, workers: Workers, watch: Watch = lambda entry: None) -> dict[str, Any]:
    """Run a plan; goes on where an earlier attempt in the same folder stopped.

    Parameters
    ----------
    watch : callable
        Called in this process with each new epoch's entry of the curve, its `epoch` (from 0) among them.

    Returns
    -------
    result : dict
        `curve`, `best` (epoch, from 0), `history` (2, N).

    Raises
    ------
    StageFailed
        If the storage failed, or workers more than `max_failures` times. What is saved stays; the same call goes on
        from there.
    """
    before = read_state(plan.state_path)
    if before is None or not is_done(plan.recipe, before["epoch"], before["best"]):
        (_train_here if workers.here else _train_with_ray)(plan, workers, watch)
    state = read_state(plan.state_path)
    return {name: state[name] for name in ("curve", "best", "history")}


def _train_here(plan: Plan, workers: Workers, watch: Watch) -> None:
    try:
        with _threads(workers.threads()):
            train_classifier(
                plan,
                Workplace(device="cuda:0" if workers.device == "cuda" else "cpu"),
                after_epoch=lambda entry, done: watch({"epoch": done - 1} | entry),
            )
    except (OSError, torch.OutOfMemoryError) as error:
        raise _failure(error, plan) from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_with_ray(plan: Plan, workers: Workers, watch: Watch) -> None:
    cpus = cluster.connect().cluster_resources().get("CPU", 1)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    share = workers.threads() if cpus >= workers.count else 0.9 * cpus / workers.count
    failures = MAX_FAILURES if workers.max_failures is None else workers.max_failures
    trainer = TorchTrainer(
        _work,
        train_loop_config={"plan": plan, "workers": workers, "threads": workers.threads()},
        torch_config=TorchConfig(backend="nccl" if workers.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.device == "cuda", resources_per_worker={"CPU": share}
        ),
        run_config=RunConfig(name=".ray", storage_path=plan.out, failure_config=FailureConfig(max_failures=failures)),
    )
    follower = Follower(plan.out, watch)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _failure(_first_cause(error), plan) from error
    finally:
        follower.close()
    storage.remove_tree(storage.join(plan.out, ".ray"))


def _work(config: dict[str, Any]) -> None:
    """Ray Train worker."""
    import ray.train.torch

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device()) if config["workers"].device == "cuda" else "cpu"
    place = Workplace(context.get_world_rank(), context.get_world_size(), device)
    torch.set_num_threads(config["threads"])

    def report(entry: dict[str, Any], done: int) -> None:
        # Every rank must report; the report is also what keeps ranks together.
        ray.train.report({"epoch": done} | numbers_of(entry))

    train_classifier(config["plan"], place, report)


class Follower:
    """A thread that hands each new entry of a training's saved curve to `watch`."""

    def __init__(self, out: str, watch: Watch, interval_s: float = 1.0):
        self.path, self.watch, self.interval_s = storage.join(out, "curve.json"), watch, interval_s
        self.seen = len(read_json(self.path) or [])
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True, name="follow")
        self.thread.start()

    def close(self) -> None:
        """Hand over what is left, and stop."""
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.stop.wait(self.interval_s):
            self._look()
        self._look()

    def _look(self) -> None:
        curve = read_json(self.path) or []
        for epoch in range(self.seen, len(curve)):
            self.watch({"epoch": epoch} | curve[epoch])
        self.seen = max(self.seen, len(curve))


def _first_cause(error: Exception) -> BaseException:
    """What a worker of Ray Train met: the first that says itself what failed, else that of the first worker."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [_unwrapped(cause) for _, cause in sorted(failures.items())] or [error]
    return next((cause for cause in causes if isinstance(cause, StageFailed)), causes[0])


def _unwrapped(error: BaseException) -> BaseException:
    while (inner := getattr(error, "cause", None) or getattr(error, "_base_exc", None)) is not None:
        error = inner
    return error


def _failure(error: BaseException, plan: Plan) -> StageFailed:
    kept = f"the last saved epoch is kept in {plan.out}" if storage.exists(plan.state_path) else "no epoch was saved"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return StageFailed(
        f"train: {type(error).__name__}: {lines[-1][:300] if lines else 'no message'}; {kept}, "
        "the same command goes on from there"
    )
