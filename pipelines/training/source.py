"""Which samples of a run a training or an evaluation uses, with which columns beside them. Loads no torch."""

import dataclasses

import pyarrow as pa

from ops.draws import uniform
from pipelines.curation import subsets
from pipelines.runs import joins
from pipelines.runs.labels import DECISION, Which, is_dropped
from pipelines.runs.record import Run, Shard


@dataclasses.dataclass(frozen=True)
class Source:
    """Which samples of a run, with what beside them; small, and picklable for a worker.

    Attributes
    ----------
    input : {"embeddings", "images"}
    columns : tuple of str
        Full names (`difficulty.weight`); NaN where a row has no value.
    part : {"all", "train", "holdout"}
        With `holdout` a fraction f > 0, a hash of (seed, shard, row) puts each sample into "holdout" with probability f.
    subset : str or None
        Only the samples of this subset of the run, by its manifest.
    labels : {"decided", "original"}
    """

    run_uri: str
    shards: tuple[Shard, ...]
    input: str
    columns: tuple[str, ...] = ()
    part: str = "all"
    holdout: float = 0.0
    seed: int = 0
    image_size: int = 0
    max_pixels: int = 100_000_000
    subset: str | None = None
    labels: Which = "decided"

    @classmethod
    def of(cls, run: Run, **values: object) -> "Source":
        """The source that a run is, with `values` for the other attributes."""
        return cls(run.uri, tuple(run.shards), max_pixels=run.config.max_pixels, **values)

    @property
    def exif(self) -> str:
        """Whether pictures are turned as their EXIF data says, for the whole run."""
        return self.shards[0].exif if self.shards else "ignore"

    def keys(self, shard: int) -> pa.Table:
        """key, shard, row, label and the columns of a shard's samples, in shard order. Reads no vectors, no images."""
        table = joins.join(self.run_uri, shard, [*self.columns, DECISION], self.labels)
        keep = table["label"].is_valid().to_numpy(zero_copy_only=False) & ~is_dropped(table[DECISION])
        if self.subset is not None:
            keep &= subsets.holds(table, self.run_uri, self.subset, shard)
        if self.part != "all" and self.holdout:
            held = uniform(self.seed, shard, table["row"].to_numpy()) < self.holdout
            keep &= held == (self.part == "holdout")
        return table.drop_columns([DECISION]).filter(pa.array(keep))
