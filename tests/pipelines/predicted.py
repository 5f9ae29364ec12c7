"""Prediction sets and trust sets written by hand onto a synthetic run."""

import numpy as np
import pyarrow as pa
from scipy.special import softmax

from pipelines.evaluation.outcomes import predictions_schema
from pipelines.runs import column_groups, columns


def sharded(run, values):
    """(shard, its embeddings rows, its part of `values`) of a run, in order."""
    start = 0
    for shard in range(len(run.shards)):
        base = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["key", "shard", "row", "label"])
        yield shard, base, values[start : start + base.num_rows]
        start += base.num_rows


def write_predictions(run, logits, name="p", **facts):
    """The prediction set `name` of a run from logits (n, K)."""
    for shard, base, part in sharded(run, np.asarray(logits, np.float32)):
        probs = softmax(part.astype(float), axis=1)
        table = base.append_column("logits", columns.vector_array(part, pa.float32()))
        table = table.append_column("prediction", pa.array(part.argmax(axis=1)))
        table = table.append_column("confidence", pa.array(probs.max(axis=1), pa.float32()))
        column_groups.write(
            run.uri, f"predictions/{name}", shard, table.cast(predictions_schema(part.shape[1])), "hand", **facts
        )


def write_trust(run, z, name="t", **facts):
    """The trust set `name` of a run from z (n,)."""
    for shard, base, part in sharded(run, np.asarray(z, np.float32)):
        table = base.drop_columns(["label"]).append_column("trust", pa.array(part))
        column_groups.write(
            run.uri, f"trust/{name}", shard, table.append_column("trusted", pa.array(part > 0)), "hand", **facts
        )


def replace(run, shard, change, group="predictions/p"):
    """Rewrite one shard's file of a group as `change(table)`, as if it had been so from the start."""
    table, facts = column_groups.read(run.uri, group, shard), column_groups.facts(run.uri, group, shard)
    column_groups.write(run.uri, group, shard, change(table), **{k: v for k, v in facts.items() if k != "rows"})


def noisy_logits(labels, classes=3, strength=2.0, seed=5):
    """Logits that are right about two times in three."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(labels), classes)) + strength * np.eye(classes)[labels] * rng.random((len(labels), 1))
