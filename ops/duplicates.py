"""Groups of duplicates out of pairs, and the one of each group that is kept."""

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

SURE = 0.7  # correlation of details from which on two pictures are one, whatever their embeddings say
LIKELY, NEAR = 0.65, 0.5  # … from which on they are where the embeddings' similarity is at least `NEAR`


def is_same_picture(correlation: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Whether pairs show one picture.

    Parameters
    ----------
    correlation : ndarray of shape (n,)
        `ops.fingerprints.picture_correlation`, in [0, 1].
    similarity : ndarray of shape (n,)
        Of the whitened embeddings, in [−1, 1].

    Returns
    -------
    same : bool ndarray of shape (n,)
    """
    return (correlation >= SURE) | ((correlation >= LIKELY) & (similarity >= NEAR))


def duplicate_groups(pairs: np.ndarray, samples: int) -> np.ndarray:
    """The group of each sample: samples that pairs connect, directly or in a chain, are one group.

    Parameters
    ----------
    pairs : integer array of shape (m, 2)
        Positions in [0, samples).
    samples : int

    Returns
    -------
    groups : ndarray of shape (samples,), int64
        The smallest position of each sample's group; its own where no pair has it.
    """
    graph = scipy.sparse.coo_matrix((np.ones(len(pairs), bool), pairs.T), shape=(samples, samples))
    _, group = connected_components(graph, directed=False)
    first = np.full(samples, samples)
    np.minimum.at(first, group, np.arange(samples))
    return first[group]


def kept_of_groups(groups: np.ndarray, pixels: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """The sample to keep of each sample's group: most pixels, then most bytes, then first.

    Parameters
    ----------
    groups : integer array of shape (n,)
        Samples with the same number are one group.
    pixels, num_bytes : integer arrays of shape (n,)

    Returns
    -------
    kept : ndarray of shape (n,), int64
        Position of the sample that is kept; its own for that one.
    """
    order = np.lexsort((np.arange(len(groups)), -num_bytes, -pixels, groups))
    _, starts, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    kept = np.empty(len(groups), np.int64)
    kept[order] = order[starts][inverse]
    return kept
