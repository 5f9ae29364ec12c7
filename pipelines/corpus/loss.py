"""What is lost of a corpus, in samples: those left out for certain, and those that an unreadable rest is estimated to hold."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Of what the reader says at a shard's end, what is noted with its embeddings.
READER_FACTS = ("digest", "ends", "apart", "end_mark", "rest_bytes", "rest_samples")


class Loss(NamedTuple):
    """Samples of some shards that are not used.

    Attributes
    ----------
    certain : int
        Samples that were read and left out, each with a reason in quarantine.
    estimated : int
        Samples that unreadable rests hold, by their bytes over the bytes per sample of what was read of the shard, or, of
        a shard of which no sample was read, of all shards.
    bytes : int
        Of these rests.
    rests : int
        How many shards have one.
    """

    certain: int
    estimated: int
    bytes: int
    rests: int

    @property
    def samples(self) -> int:
        """All that is lost, estimates included."""
        return self.certain + self.estimated

    def fraction(self, rows: int) -> float:
        """Of all samples, `rows` of which are used, the share that is lost: in [0, 1]."""
        return self.samples / max(1, rows + self.samples)


def loss_of(shards: Iterable[Mapping[str, Any]]) -> Loss:
    """The loss of shards by what is noted of each: rows, left_out, size, rest_bytes, rest_samples.

    `left_out` counts an unreadable rest as one. Runs embedded before rests were measured note none, and count that one.
    """
    certain = estimated = lost_bytes = rests = read_bytes = read_samples = 0
    unmeasured = []
    for noted in shards:
        rest, size = noted.get("rest_samples", 0), noted.get("rest_bytes", 0)
        has_rest = rest is None or rest > 0
        left_out = noted["left_out"] - has_rest
        certain, rests, lost_bytes = certain + left_out, rests + has_rest, lost_bytes + size
        read_samples, read_bytes = read_samples + noted["rows"] + left_out, read_bytes + noted["size"] - size
        if rest is None:
            unmeasured.append(size)
        else:
            estimated += rest
    each = read_samples / read_bytes if read_bytes > 0 else 0.0
    return Loss(certain, estimated + sum(max(1, round(size * each)) for size in unmeasured), lost_bytes, rests)
