"""Random signals to a command's processes, the same command again, and what was lost: one table. `make chaos`.

    python -m tests.chaos --kills 50 --seed 0 [--without-ray]

A small corpus is curated once without disturbance. Then, again and again, a command is started on a run, and at a random
moment one of its processes (the driver, a worker, the raylet, the GCS) gets SIGKILL, SIGTERM, or SIGSTOP and later SIGCONT.
The same command is started again until it succeeds, and its products are compared byte for byte with the undisturbed ones.
`--without-ray` leaves out embedding, for machines that have no time for Ray: embeddings are made by hand then.
"""

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

from tests.chaos_corpus import write_corpus
from tests.jobs.processes import processes
from tests.pipelines.synthetic import make_run

ROOT = Path(__file__).parents[1]
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
VICTIMS = {
    "driver": lambda title: " jobs." in title and "/ray/" not in title,
    "worker": lambda title: title.startswith("ray::"),
    "raylet": lambda title: "raylet/raylet" in title,
    "GCS": lambda title: "gcs_server" in title,
}
# A command whose work stays in its process: Ray is for what takes longer than its start, which on a busy machine all does.
IN_HAND = "import importlib, sys; from pipelines.runs import tasks; tasks.START_S = 1e9; \
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"
TRIES, LIMIT_S, GRACE_S = 4, 400, 30
# By stage: what is kept of an undisturbed run before it, and its options.
STAGES = {
    "curate": ((), []),
    "fit": (("embeddings", "quarantine"), ["--shrinkage", "0.2"]),
    "score": (("embeddings", "quarantine", "gaussians.npz", "percentiles", "stages/fit.json"), []),
    "select": (
        ("embeddings", "quarantine", "difficulty", "percentiles", "gaussians.npz", "stages/fit.json"),
        ["--top", "0.3"],
    ),
}
PRODUCTS = ("embeddings", "quarantine", "difficulty", "gaussians.npz", "percentiles", "subsets")


@dataclasses.dataclass
class Trial:
    """What happened to one command."""

    stage: str
    victim: str
    signal: str
    again: int = 0  # how often the same command was started again
    differing: tuple[str, ...] = ()  # products that are not those of an undisturbed run
    litter: tuple[str, ...] = ()  # hidden files that stayed in the run
    orphans: int = 0  # processes that outlived the command by more than GRACE_S
    traceback: bool = False
    gave_up: bool = False

    @property
    def bad(self) -> bool:
        return bool(self.differing or self.litter or self.orphans or self.traceback or self.gave_up)


class Bench:
    """A corpus, a run of it that nothing disturbed, and per stage what that stage gives."""

    def __init__(self, folder: Path, stages: list[str]):
        self.folder, self.run, self.stages = folder, folder / "run", stages
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "HARDSET_CHAOS": uuid.uuid4().hex
        }
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.whole = folder / "whole"
        if "curate" in stages:
            self.corpus = write_corpus(folder)
            self.undisturbed("curate")
        else:
            self.by_hand()
        shutil.copytree(self.run, self.whole)
        for stage in stages:
            if stage != "curate":
                self.undisturbed(stage)

    def undisturbed(self, stage: str) -> None:
        self.prepare(stage)
        started = time.monotonic()
        assert self.start(stage).wait() == 0, (self.folder / "log").read_text()
        self.seconds[stage] = time.monotonic() - started
        self.expected[stage] = self.products()

    def by_hand(self) -> None:
        """A run with embeddings that no encoder made, fitted and scored by the commands."""
        make_run(self.folder, sizes=(20, 15))
        for stage in ("fit", "score"):
            assert self.start(stage).wait() == 0, (self.folder / "log").read_text()

    def command(self, stage: str) -> list[str]:
        words = ["--run", str(self.run), "--mlflow", "none", "--ray-cpus", "2", *STAGES[stage][1]]
        if "curate" not in self.stages:  # in its own process, however busy the machine is
            return [sys.executable, "-c", IN_HAND, f"jobs.{stage}", *words]
        return [sys.executable, "-m", f"jobs.{stage}", *words, *(self.corpus if stage == "curate" else [])]

    def start(self, stage: str) -> subprocess.Popen:
        log = open(self.folder / "log", "w")  # noqa: SIM115
        return subprocess.Popen(
            self.command(stage), cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )

    def prepare(self, stage: str) -> None:
        """The run as it is before a stage: nothing, or what an undisturbed run holds then."""
        shutil.rmtree(self.run, ignore_errors=True)
        if stage == "curate":
            return
        self.run.mkdir()
        for name in ("run.json", "stages/embed.json", *STAGES[stage][0]):
            source, target = self.whole / name, self.run / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.exists():
                shutil.copy2(source, target)

    def products(self) -> dict[str, bytes]:
        files = (
            path for name in PRODUCTS for path in [self.run / name, *(self.run / name).rglob("*")] if path.is_file()
        )
        return {str(path.relative_to(self.run)): path.read_bytes() for path in files if not self.hidden(path)}

    def hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.run).parts)

    def litter(self) -> tuple[str, ...]:
        found = (path for path in self.run.rglob("*") if path.is_file() and self.hidden(path))
        return tuple(str(path.relative_to(self.run)) for path in found if ".leases" not in path.parts)

    def alive(self) -> list[tuple[int, str]]:
        """Processes of our commands."""
        mark, found = f"HARDSET_CHAOS={self.environment['HARDSET_CHAOS']}".encode(), []
        for pid, title in processes():
            try:
                if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append((pid, title))
            except OSError:
                continue
        return found


def one(bench: Bench, rng: random.Random) -> Trial:
    """One trial."""
    stage = rng.choice(bench.stages)
    victim = rng.choice(list(VICTIMS)) if stage == "curate" else "driver"
    trial = Trial(stage, victim, rng.choice(SIGNALS))
    bench.prepare(stage)
    process = bench.start(stage)
    disturb(bench, process, trial, rng.uniform(0, bench.seconds[stage]), rng)
    status = ended(process)
    trial.traceback = "Traceback" in (bench.folder / "log").read_text() and trial.signal != "SIGKILL"
    while status != 0 and trial.again < TRIES:
        wait_for_end(bench)
        trial.again += 1
        status = ended(bench.start(stage))
    trial.gave_up = status != 0
    if trial.gave_up:
        shutil.copy(bench.folder / "log", bench.folder / f"gave_up_{stage}.log")
    found, expected = bench.products(), bench.expected[stage]
    trial.differing = tuple(n for n in sorted(found.keys() | expected.keys()) if found.get(n) != expected.get(n))
    trial.litter, trial.orphans = bench.litter(), wait_for_end(bench)
    return trial


def disturb(bench: Bench, process: subprocess.Popen, trial: Trial, after: float, rng: random.Random) -> None:
    """Wait for the moment and the victim, and send the signal."""
    time.sleep(after)
    while process.poll() is None:
        found = [pid for pid, title in bench.alive() if VICTIMS[trial.victim](title)]
        if found:
            pid = rng.choice(found)
            try:
                os.kill(pid, getattr(signal, trial.signal))
                if trial.signal == "SIGSTOP":
                    time.sleep(rng.uniform(0.5, 5))
                    os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
            return
        time.sleep(0.02)
    trial.signal = "none (it had ended)"


def ended(process: subprocess.Popen) -> int:
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def wait_for_end(bench: Bench) -> int:
    """How many processes of the command are left after a while; they are ended then."""
    until = time.monotonic() + GRACE_S
    while (left := bench.alive()) and time.monotonic() < until:
        time.sleep(0.2)
    for pid, _ in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(left)


def table(trials: list[Trial]) -> str:
    """Markdown: a row per kind of trial."""
    head = (
        "| stage | to | signal | trials | again | differing | litter | orphans | tracebacks | gave up |\n"
        + "|---" * 10
        + "|"
    )
    kinds = Counter((t.stage, t.victim, t.signal) for t in trials)
    lines = [head]
    for kind, count in sorted(kinds.items()):
        of = [t for t in trials if (t.stage, t.victim, t.signal) == kind]
        cells = [
            count, sum(t.again > 0 for t in of), sum(bool(t.differing) for t in of), sum(bool(t.litter) for t in of),
            sum(t.orphans > 0 for t in of), sum(t.traceback for t in of), sum(t.gave_up for t in of),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, [*kind, *cells])) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-ray", action="store_true")
    asked = parser.parse_args()
    rng, trials = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory(prefix="hardset-chaos-") as folder:
        bench = Bench(Path(folder), [stage for stage in STAGES if stage != "curate" or not asked.without_ray])
        for number in range(asked.kills):
            trial = one(bench, rng)
            trials.append(trial)
            print(f"{number + 1}/{asked.kills} {trial}", file=sys.stderr, flush=True)
            if trial.gave_up:
                print((bench.folder / "log").read_text()[-2000:], file=sys.stderr, flush=True)
    print(table(trials))
    print(f"\n{len(trials)} trials, seed {asked.seed}: {sum(t.bad for t in trials)} with something wrong")
    return int(any(t.bad for t in trials))


if __name__ == "__main__":
    raise SystemExit(main())
