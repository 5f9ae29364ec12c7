"""Confusion: an ensemble of small models, M members × T epochs -> how much they disagree about each sample.

    train   heads on the embeddings (pipelines.confusion.heads) or small image models (pipelines.confusion.images)
    score   a pool of workers, each of which loads the members once -> confusion/SHARD.parquet

Plain tasks would load M × T checkpoints again for each shard, or move them to the GPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.confusion.members import Member, Placement, report
from pipelines.runs import columns
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.executor import Output, Pool, Stage, Task, execute
from pipelines.runs.record import Run, fingerprint

CONFUSION = "confusion"
SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.score_field("confusion.confusion"),
        pa.field("epochs", pa.int32(), metadata={"meaning": "epochs T that the score is a mean over"}),
        pa.field("seeds", pa.int32(), metadata={"meaning": "members M whose probabilities are averaged"}),
        columns.score_field("confusion.entropy_std"),
    ]
)


class ScoreShards:
    """The confusion columns of a shard: `pipelines.runs.executor`'s worker, which loads the members once."""

    def __init__(
        self, scorer: type, members_uri: str, members: Sequence[Member], epochs: int, place: Placement, run_uri: str
    ):
        torch.set_num_threads(max(1, int(place.cpus_per_worker)))
        self.run_uri, self.seeds = run_uri, len(members)
        self.scorer = scorer(members_uri, members, epochs, place)

    def run(self, task: Task) -> Output:
        parts = self.scorer.shard(self.run_uri, task.shard)
        return Output((confusion_table(keys, found, self.seeds) for keys, found in parts), schema=SCHEMA)


def confusion_table(keys: pa.RecordBatch | pa.Table, entropies: np.ndarray, seeds: int) -> pa.Table:
    """The confusion columns of samples whose entropies at each epoch, (n, T) in bits, are given."""
    rows, epochs = entropies.shape
    values = {
        "confusion": entropies.mean(axis=1, dtype=np.float64),
        "epochs": np.full(rows, epochs),
        "seeds": np.full(rows, seeds),
        "entropy_std": entropies.std(axis=1, dtype=np.float64),
    }
    return pa.table({field.name: keys[field.name] for field in columns.KEYS} | values).select(SCHEMA.names).cast(SCHEMA)


def usable(members: Sequence[Member], epochs: int, commonest: float, drop: bool) -> tuple[list[Member], dict[int, str]]:
    """The members to score with, and why others diverged (by seed).

    Raises
    ------
    StageFailed
        If a member with a loss that is not finite would have to be used, or none is left.
    """
    reasons = {m.seed: reason for m in members if (reason := m.diverged(epochs, commonest))}
    fatal = {seed: why for seed, why in reasons.items() if why.startswith("loss")}
    if fatal and not drop:
        told = "; ".join(f"seed {seed}: {why}" for seed, why in fatal.items())
        raise StageFailed(f"confusion: members diverged ({told}); leave them out with `drop_diverged`, or lower `lr`")
    kept = [m for m in members if not drop or m.seed not in reasons]
    if not kept:
        raise StageFailed(f"confusion: all {len(members)} members diverged: {'; '.join(reasons.values())}")
    return kept, reasons


def check_same_encoder(run: Run, other: Run) -> None:
    """ValueError unless heads trained on one run's embeddings understand the other's."""
    ours, theirs = run.config, other.config
    if not ours.same_embedding(theirs):
        raise UserError(
            f"{other.uri}: embedded with {theirs.encoder!r}, the members learnt from {ours.encoder!r} "
            f"embeddings of {run.uri}; embed it with the same encoder, or take `input` images",
            "score_run",
        )


def score(
    run: Run, trained: Run, members: Sequence[Member], epochs: int, scorer: type, place: Placement
) -> dict[str, Any]:
    """Write `confusion/` of `run` with members of the run `trained` (it may be the same), where it is missing or old.

    Returns
    -------
    counts : dict
        rows, shards done now and skipped, seconds, seeds, epochs.

    Raises
    ------
    ValueError
        If the run is not embedded.
    StageFailed
        If a scoring worker dies again and again, or writes other rows than the run has. Finished shards are kept.
    """
    facts = run.embedding_facts()
    made_from = [member.source for member in members]
    stage = Stage(
        CONFUSION,
        CONFUSION,
        [fingerprint(CONFUSION, f["source"], made_from, epochs) for f in facts],
        ScoreShards,
        (scorer, trained.uri, tuple(members), epochs, place, run.uri),
        rows=[f["rows"] for f in facts],
        pool=Pool(place.workers, place.cpus_per_worker, 1 if place.device == "cuda" else 0),
    )
    entry = {"seeds": len(members), "epochs": epochs, "trained_on": trained.uri, "form": members[0].form}
    counts = execute(run, stage, **entry, members=report(members, epochs))
    return {name: value for name, value in counts.items() if name != "members"}
