"""The label of each sample as every stage after embedding reads it: the corpus's, or the one that was decided since."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.runs import column_groups, columns, decisions
from pipelines.runs.record import Run, fingerprint

Which = Literal["decided", "original"]
DECISION = "decisions.decision"  # the column that `is_dropped` is about


class Labels(NamedTuple):
    """Labels of a shard's embeddings, in their order.

    Attributes
    ----------
    labels : ndarray of shape (rows,), int64
        Class of each sample, -1 where it has none.
    dropped : ndarray of shape (rows,), bool
        Samples that are neither fitted on, selected, nor trained on. They keep their label.
    """

    labels: np.ndarray
    dropped: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """The labels (rows,), -1 for dropped samples too: those that classifiers are trained and judged with."""
        return np.where(self.dropped, -1, self.labels)


def labels_of(run_uri: str, shard: int, which: Which = "decided") -> Labels:
    """The labels of one shard; `original`: as the corpus gives them, whatever was decided."""
    table = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["key", "row", "label"])
    return decided_labels(table, history_of(run_uri, shard, which))


def history_of(run_uri: str, shard: int, which: Which) -> pa.Table:
    """The decisions that count for a shard's labels: none for the original ones."""
    return decisions.read_history(run_uri, shard) if which == "decided" else columns.DECISIONS_SCHEMA.empty_table()


def decided_labels(table: pa.Table, history: pa.Table) -> Labels:
    """The labels of a shard's table of embeddings (key, row, label) after the decisions of a history."""
    labels = columns.labels_or_minus_one(table["label"])
    if not history.num_rows or not len(labels):
        return Labels(labels, np.zeros(len(labels), bool))
    now = decisions.of_rows(history, table)
    decided = now["decision"].is_valid().to_numpy(zero_copy_only=False)
    return Labels(np.where(decided, columns.labels_or_minus_one(now["label"]), labels), is_dropped(now["decision"]))


def is_dropped(decision: pa.ChunkedArray) -> np.ndarray:
    """Which rows of a column `decisions.decision` are dropped, (rows,) bool."""
    return pa.compute.equal(decision, decisions.DROP).fill_null(False).to_numpy(zero_copy_only=False)


def label_sources(run: Run, embedded: Sequence[dict[str, Any]], which: Which = "decided") -> list[str]:
    """What the rows and labels of each shard are made from; `embedded` is `run.embedding_facts()`."""
    states = decisions.states(run) if which == "decided" else [None] * len(embedded)
    return [
        facts["source"] if state is None else fingerprint("decided", facts["source"], state)
        for facts, state in zip(embedded, states)
    ]
