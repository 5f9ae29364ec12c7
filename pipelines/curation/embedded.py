"""A shard's embeddings with their labels, batch by batch, and the scores that Gaussians give them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ops.arrays import on_device
from ops.mahalanobis import Gaussians, Scores
from pipelines.runs import column_groups, columns
from pipelines.runs.labels import Which, labels_of


class Embedded(NamedTuple):
    """Rows of a shard.

    Attributes
    ----------
    features : ndarray of shape (n, R, d), float16 or float32
        The views of each image that were asked for, the plain one first.
    labels : ndarray of shape (n,), int64
        -1 for none.
    dropped : ndarray of shape (n,), bool
        See `labels_of`.
    batch : RecordBatch
        With the columns asked for beside.
    """

    features: np.ndarray
    labels: np.ndarray
    dropped: np.ndarray
    batch: pa.RecordBatch

    @property
    def fitted_labels(self) -> np.ndarray:
        """The labels (n,) that Gaussians are fitted with: -1 for rows that are left out of the fit."""
        return np.where(self.dropped, -1, self.labels)


def iter_embedded(
    run_uri: str, shard: int, views: int = 1, beside: tuple[str, ...] = (), which: Which = "decided"
) -> Iterator[Embedded]:
    """A shard's rows in batches, so that memory does not grow with the shard; `views` = 1 reads the plain image's only."""
    labels, dropped = labels_of(run_uri, shard, which)
    names = ["embedding"] + (["augmented"] if views > 1 else [])
    start = 0
    for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, [*beside, *names]):
        rows = slice(start, start + batch.num_rows)
        parts = [columns.vectors(batch[name]) for name in names]
        features = np.concatenate(parts, axis=1) if views > 1 else parts[0]
        yield Embedded(features.reshape(batch.num_rows, views, -1), labels[rows], dropped[rows], batch)
        start = rows.stop


def scores_of(rows: Embedded, gaussians: Gaussians, fitted: bool, device: str) -> Scores:
    """Scores (n,) of a batch; where the Gaussians were `fitted` on its run, each sample is left out with all its views.

    In float64: rmd is a small difference of two large distances, which float32 rounds to steps of 1e-4 of its spread.
    """
    features = rows.features.astype(np.float64)
    labels = rows.labels if gaussians.num_classes else rows.fitted_labels
    return gaussians.scores(
        on_device(features[:, 0], device),
        on_device(labels, device),
        fitted=on_device((rows.fitted_labels >= 0) & fitted, device),
        views=on_device(features[:, 1:], device) if fitted and features.shape[1] > 1 else None,
    )
