"""Loss in samples: what is certain, what is estimated, and the fraction of all."""

import pytest

from pipelines.corpus.loss import Loss, loss_of


def shard(rows, left_out, size, rest_bytes=0, rest_samples=0):
    return {"rows": rows, "left_out": left_out, "size": size, "rest_bytes": rest_bytes, "rest_samples": rest_samples}


@pytest.mark.parametrize(
    ("shards", "loss"),
    [
        ([], Loss(0, 0, 0, 0)),
        ([shard(90, 10, 1000)], Loss(10, 0, 0, 0)),
        ([shard(40, 11, 1000, 500, 50)], Loss(10, 50, 500, 1)),
        # Nothing of the second shard was read: its bytes over those per sample of the first.
        ([shard(90, 10, 1000), shard(0, 1, 700, 700, None)], Loss(10, 70, 700, 1)),
        ([shard(0, 1, 700, 700, None)], Loss(0, 1, 700, 1)),
        ([{"rows": 5, "left_out": 2, "size": 9}], Loss(2, 0, 0, 0)),  # embedded before rests were measured
    ],
)
def test_what_is_lost(shards, loss):
    assert loss_of(shards) == loss


def test_half_a_corpus_that_cannot_be_read_is_half_a_corpus():
    """One bad entry of 501 is 0.2 %, and it was below the limit of 1 %: the samples behind it are what counts."""
    assert loss_of([shard(500, 1, 1000, 500, 500)]).fraction(500) == 0.5
    assert Loss(0, 0, 0, 0).fraction(0) == 0.0
