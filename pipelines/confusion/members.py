"""The members of a confusion ensemble in a run: one small checkpoint per member and epoch, how its training went and goes on.

    models/confusion/FORM/seed-0000/
      member.json                what it was made from (`source`), loss and accuracy of each finished epoch
      epoch-0001.safetensors …   the weights after that epoch
      resume-0020.safetensors    heads: optimiser state after the last one, to go on from
      training/                  networks: the training pipeline's own folder, which has that state

`member.json` is written last, so an epoch counts once all its files are there.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors.torch
import torch

from pipelines.runs import cluster, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.labels import label_sources
from pipelines.runs.record import Run, fingerprint

FOLDER = "models/confusion"
TRIES = 3  # of a training whose workers die
State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an ensemble is trained and scored. None of it changes a score."""

    device: str = "cpu"
    workers: int = 1
    cpus_per_worker: float = 1.0
    batch_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of an ensemble: where it lies in the run, what it is made from, its finished epochs."""

    form: str
    seed: int
    source: str
    history: tuple[dict[str, float], ...] = ()

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.form}/seed-{self.seed:04d}"

    @property
    def epochs(self) -> int:
        return len(self.history)

    def diverged(self, epochs: int, commonest: float) -> str | None:
        """Why the member is of no use within its first `epochs`, or None.

        Its loss is not finite, or at the end it is right no more often than `commonest`, the share of the commonest class.
        """
        for epoch, entry in enumerate(self.history[:epochs], start=1):
            if not math.isfinite(entry["loss"]):
                return f"loss {entry['loss']} in epoch {epoch}"
        accuracy = self.history[epochs - 1]["accuracy"]
        if accuracy <= commonest:
            return f"accuracy {accuracy:.3f} after {epochs} epochs, the commonest class has {commonest:.3f}"
        return None


def plan_members(run: Run, form: str, identity: Sequence[Any], seeds: Sequence[int]) -> list[Member]:
    """The members that an ensemble consists of, with the epochs that are there already.

    A member is made from the run's shards, how it is trained (`identity`, JSON-able) and its seed.
    """
    inputs = label_sources(run, run.embedding_facts())
    sources = {seed: fingerprint("confusion member", inputs, *identity, seed) for seed in seeds}
    return [find_member(run.uri, form, seed, source) for seed, source in sources.items()]


def train_members(
    run: Run, members: Sequence[Member], epochs: int, start: Callable[[list[Member]], list[Any]]
) -> list[Member]:
    """Train what of `members` is not trained up to `epochs`; the members in their order.

    Parameters
    ----------
    start : callable
        Starts tasks for members that lack epochs, which yield lists of members after each epoch that they have kept.

    Raises
    ------
    StageFailed
        If workers die again and again. Finished epochs are kept.
    """
    known = {m.seed: m for m in members}
    for _ in range(TRIES):
        pending = [m for m in known.values() if m.epochs < epochs]
        if not pending:
            break
        ray = cluster.connect()
        for member in pending:
            if not member.epochs:  # what lies there was made from something else
                storage.remove_tree(run.path(member.folder))
        try:
            for group in _as_they_come(start(pending)):
                known |= {member.seed: member for member in group}
                say_progress(group, epochs)
            break
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
            known = {m.seed: find_member(run.uri, m.form, m.seed, m.source) for m in members}
    else:
        raise StageFailed(f"confusion: training workers died {TRIES} times; finished epochs are kept, start it again")
    return [known[m.seed] for m in members]


def _as_they_come(streams: list[Any]) -> Iterator[list[Member]]:
    """What streaming tasks yield, whichever comes first."""
    ray = cluster.connect()
    while streams:
        ready, streams = ray.wait(streams, num_returns=1)
        try:
            yield ray.get(next(ready[0]))
        except StopIteration:
            continue
        streams += ready


def find_member(run_uri: str, form: str, seed: int, source: str) -> Member:
    """The member as far as it is trained; without an epoch where there is none or it was made from something else."""
    fresh = Member(form, seed, source)
    try:
        found = json.loads(storage.read_bytes(storage.join(run_uri, fresh.folder, "member.json")))
    except (FileNotFoundError, NotADirectoryError):
        return fresh
    if found["source"] != source:
        return fresh
    return dataclasses.replace(fresh, history=tuple(found["history"]))


def commit_epoch(run_uri: str, member: Member, entry: dict[str, float], weights: State, resume: State) -> Member:
    """Add an epoch to a member: its weights, the state to go on from if there is any, then the record that makes it count."""
    grown = dataclasses.replace(member, history=(*member.history, entry))
    _save(weights, _path(run_uri, grown, "epoch", grown.epochs))
    if resume:
        _save(resume, _path(run_uri, grown, "resume", grown.epochs))
    record = {"source": grown.source, "form": grown.form, "seed": grown.seed, "history": grown.history}
    storage.write_text_atomic(storage.join(run_uri, grown.folder, "member.json"), json.dumps(record, indent=1) + "\n")
    if member.epochs:
        storage.remove_tree(_path(run_uri, member, "resume", member.epochs))
    return grown


def load_epoch(run_uri: str, member: Member, epoch: int) -> State:
    """A member's weights after an epoch, counted from 1."""
    return _load(_path(run_uri, member, "epoch", epoch))


def load_resume(run_uri: str, member: Member) -> State:
    """The optimiser's state after a member's last finished epoch."""
    return _load(_path(run_uri, member, "resume", member.epochs))


def say_progress(members: Sequence[Member], epochs: int) -> None:
    """`confusion: epoch 3 of 20 · seeds 0, 2 · loss 1.21, 1.20 · accuracy 0.56, 0.56` on standard error."""
    parts = [f"epoch {members[0].epochs} of {epochs}", f"seeds {', '.join(str(m.seed) for m in members)}"]
    for name in ("loss", "accuracy"):
        parts.append(f"{name} {', '.join(f'{m.history[-1][name]:.3f}' for m in members)}")
    sys.stderr.write(f"confusion: {' · '.join(parts)}\n")


def report(members: Sequence[Member], epochs: int) -> list[dict[str, Any]]:
    """Loss and accuracy after `epochs`, one entry per member, JSON-able."""
    return [{"seed": m.seed, **m.history[epochs - 1]} for m in members]


def _path(run_uri: str, member: Member, kind: str, epoch: int) -> str:
    return storage.join(run_uri, member.folder, f"{kind}-{epoch:04d}.safetensors")


def _save(state: State, uri: str) -> None:
    with storage.write_atomic(uri) as stream:
        stream.write(safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in state.items()}))


def _load(uri: str) -> State:
    return safetensors.torch.load(storage.read_bytes(uri))
