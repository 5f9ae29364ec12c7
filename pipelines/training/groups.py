"""Groups of samples made from a score column by edges or by quantiles, optionally crossed with the class."""

import dataclasses
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines.runs import columns, joins
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order

SKETCH = 1025  # evenly spaced quantiles kept per shard: an edge is off by less than 0.1 % of the samples


@dataclasses.dataclass(frozen=True)
class GroupRule:
    """Samples in G = (len(edges) + 1) intervals of a column, times K if `by_class`.

    Interval i is edges[i-1] <= value < edges[i], so group 0 has the lowest scores. With `by_class` the group is
    interval · K + label. `quantiles` (a number of equally full intervals) stands in for edges until `resolve`.
    """

    column: str
    edges: tuple[float, ...] = ()
    quantiles: int | None = None
    by_class: bool = False
    num_classes: int = 0

    def __post_init__(self) -> None:
        columns.split_name(self.column)

    @classmethod
    def parse(cls, text: str, field: str = "groups", by_class: bool = False, num_classes: int = 0) -> "GroupRule":
        """`confusion.confusion:5` (one edge), `difficulty.rmd:-10,0,10` (three), `difficulty.rmd:q2` (two halves)."""
        column, colon, cut = text.rpartition(":")
        try:
            if not colon:
                raise ValueError
            if cut.startswith("q"):
                count = int(cut[1:])
                if count < 2:
                    raise ValueError
                return cls(column, (), count, by_class, num_classes)
            edges = tuple(float(word) for word in cut.split(","))
            if not all(np.isfinite(edges)) or any(b <= a for a, b in pairwise(edges)):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{text}: expected COLUMN:EDGES with rising edges, such as confusion.confusion:5 or "
                "difficulty.rmd:-10,0, or COLUMN:qN for N equally full groups, such as difficulty.rmd:q2",
                field,
            ) from None
        return cls(column, edges, None, by_class, num_classes)

    @property
    def num_groups(self) -> int:
        """G."""
        intervals = self.quantiles or len(self.edges) + 1
        return intervals * self.num_classes if self.by_class else intervals

    def names(self) -> list[str]:
        """A readable name for each group."""
        assert self.quantiles is None, "names need edges"
        name = columns.split_name(self.column)[1]
        bounds = [f"{edge:.4g}" for edge in self.edges]
        intervals = [f"{name} < {bounds[0]}"] if bounds else [f"any {name}"]
        intervals += [f"{low} <= {name} < {high}" for low, high in pairwise(bounds)]
        intervals += [f"{name} >= {bounds[-1]}"] if bounds else []
        if not self.by_class:
            return intervals
        return [f"{interval}, class {label}" for interval in intervals for label in range(self.num_classes)]

    def assign(self, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Group (n,) int64 of each sample from its score and label."""
        assert self.quantiles is None, "quantiles are resolved before groups are assigned"
        interval = np.searchsorted(np.asarray(self.edges, np.float64), np.asarray(values, np.float64), side="right")
        return interval * self.num_classes + labels if self.by_class else interval

    def resolve(self, run: Run) -> "GroupRule":
        """The same rule with numbers for edges: quantiles over the labelled rows of `run`, within 0.1 % of the rank.

        Raises
        ------
        ValueError
            If the run lacks the column, or too many equal values make an interval empty.
        """
        if self.quantiles is None:
            return self
        shards = [(shard,) for shard in range(len(run.shards))]
        parts = [part for part in in_order(sketch, shards, run.uri, self.column) if len(part[0])]
        if not parts:
            raise UserError(f"column {self.column}: no sample has a value there")
        values = np.concatenate([values for values, _ in parts])
        weights = np.concatenate([np.full(len(values), weight) for values, weight in parts])
        order = np.argsort(values, kind="stable")
        reached = weights[order].cumsum()
        wanted = np.arange(1, self.quantiles) / self.quantiles * reached[-1]
        edges = values[order][np.searchsorted(reached, wanted, side="right").clip(max=len(order) - 1)]
        if len(np.unique(edges)) < len(edges) or edges[0] == values[order[0]]:
            raise UserError(
                f"{self.column}:q{self.quantiles}: so many equal values that a group has no samples; name edges, or fewer"
            )
        return dataclasses.replace(self, edges=tuple(edges.tolist()), quantiles=None)


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How often a sample of each group appears in an epoch. Whole numbers: exactly so often. Others: on average."""

    rule: GroupRule
    factors: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether every epoch holds the same samples."""
        return all(float(factor).is_integer() for factor in self.factors)

    def repeats(self, groups: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Times (n,) that each sample appears: its factor, rounded at random by `uniform` (n,) in [0, 1)."""
        return np.floor(np.asarray(self.factors)[groups] + uniform).astype(np.int64)


def sketch(shard: int, run_uri: str, column: str) -> tuple[np.ndarray, float]:
    """Ray task: at most SKETCH values that stand for a shard's column, and how many samples each stands for."""
    table = joins.join(run_uri, shard, [column])
    values = np.asarray(table[column].filter(table["label"].is_valid()).drop_null().to_numpy(), np.float64)
    if len(values) <= SKETCH:
        return np.sort(values), 1.0
    return np.quantile(values, np.linspace(0, 1, SKETCH), method="nearest"), len(values) / SKETCH


def scores(table: pa.Table, column: str) -> np.ndarray:
    """A joined column as float64; NaN where a row has no value."""
    return np.asarray(table[column].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
