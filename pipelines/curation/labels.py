"""The label of each sample, as every stage after embedding reads it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.runs import column_groups, columns


def labels_of(run_uri: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a shard's embeddings, in their order.

    Returns
    -------
    labels : ndarray of shape (rows,), int64
        Class of each sample, -1 where it has none.
    dropped : ndarray of shape (rows,), bool
        Samples that nothing is to be fitted or trained on. They keep their label.
    """
    column = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["label"])["label"]
    labels = columns.labels_or_minus_one(column)
    return labels, np.zeros(len(labels), bool)


def label_sources(embedded: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows and labels of each shard are made from; `embedded` is `Run.embedding_facts()`."""
    return [facts["source"] for facts in embedded]
