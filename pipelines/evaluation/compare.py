"""Compare: how far two runs rank the same samples alike by a column, and how a column goes with a classifier's errors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import kendalltau, pearsonr, spearmanr

from ops.checks import UndefinedMetricError
from ops.correlation import ErrorBands, error_bands, error_correlation
from pipelines.runs import column_groups, columns, joins
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

TOP = 0.1  # the share of the highest scores whose overlap is told


def compare_columns(run: Run, other: Run, column: str, other_column: str | None = None) -> dict[str, Any]:
    """Rank agreement of a column in two runs, over the samples that both have.

    Parameters
    ----------
    run, other : Run
        They may be the same, and hold the same shards in another order or other shards with the same samples.
    column, other_column : str
        'GROUP.COLUMN' in each run; by default the same in both.

    Returns
    -------
    agreement : dict
        kendall_tau (τ-b), spearman, pearson, each in [-1, 1], NaN where a column does not vary; top_overlap, in [0, 1]: the
        share of the highest tenth that both have (0.1 is chance); matched, only_first, only_second, ambiguous: samples.

    Raises
    ------
    ValueError
        If a run lacks the column or it is no number, or fewer than two samples match.

    Notes
    -----
    Samples match by key; where a key occurs more than once in a run, by shard URL and key. Memory grows with the number
    of samples (a key and a float of each), time with n log n.
    """
    first, second = scored_keys(run, column), scored_keys(other, other_column or column)
    left, right, ambiguous = match(first, second)
    if len(left) < 2:
        raise UserError(
            f"{column}: {len(left)} samples of {run.uri} ({len(first):,}) and {other.uri} ({len(second):,}) "
            "have a key in common; compare runs over the same images",
            "column",
        )
    x, y = (table["score"].to_numpy()[rows] for table, rows in ((first, left), (second, right)))
    counts = {
        "matched": len(left),
        "only_first": len(first) - len(left),
        "only_second": len(second) - len(right),
        "ambiguous": ambiguous,
    }
    return agreement(x, y) | counts


def agreement(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Kendall's τ-b, Spearman's ρ, Pearson's r and the overlap of the highest tenths, of paired scores (n,)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    varies = min(np.ptp(x), np.ptp(y)) > 0
    found = {
        "kendall_tau": kendalltau(x, y).statistic if varies else np.nan,
        "spearman": spearmanr(x, y).statistic if varies else np.nan,
        "pearson": pearsonr(x, y).statistic if varies else np.nan,
        "top_overlap": top_overlap(x, y),
    }
    return {name: float(value) for name, value in found.items()}


def top_overlap(x: np.ndarray, y: np.ndarray, share: float = TOP) -> float:
    """Of the `share` of samples that are highest in `x`, the fraction that is in the highest of `y`; ties in row order."""
    count = max(1, round(share * len(x)))
    highest = (np.argsort(-values, kind="stable")[:count] for values in (x, y))
    return len(np.intersect1d(*highest)) / count


def scored_keys(run: Run, column: str) -> pa.Table:
    """url, key, score (float64) of a run's samples that have a finite score, in shard order."""
    column_groups.check_score(run.uri, len(run.shards), column, "column")
    group, name = columns.split_name(column)
    parts = [_shard_scores(run, shard, url, group, name) for shard, url in _shards(run)]
    return pa.concat_tables(parts)


def _shards(run: Run) -> Iterator[tuple[int, str]]:
    return ((number, shard.url) for number, shard in enumerate(run.shards))


def _shard_scores(run: Run, shard: int, url: str, group: str, name: str) -> pa.Table:
    table = column_groups.read(run.uri, group, shard, ["key", name])
    scores = table[name].cast(pa.float64())
    urls = pa.array([url] * len(table), pa.string()).dictionary_encode()
    table = pa.table({"url": urls.cast(pa.string()), "key": table["key"], "score": scores})
    return table.filter(pc.is_finite(scores).fill_null(False))


def match(first: pa.Table, second: pa.Table) -> tuple[np.ndarray, np.ndarray, int]:
    """Row numbers of the samples that two tables of url and key have in common, and how many rows stayed ambiguous."""
    by = ["key"]
    if _repeated(first, by).any() or _repeated(second, by).any():
        by = ["url", "key"]
    sides, ambiguous = [], 0
    for table in (first, second):
        unclear = _repeated(table, by)
        ambiguous += int(unclear.sum())
        rows = np.flatnonzero(~unclear)
        sides.append(table.select(by).take(rows).append_column("at", pa.array(rows)))
    joined = sides[0].join(sides[1], keys=by, join_type="inner", right_suffix="_right").sort_by("at")
    return joined["at"].to_numpy(), joined["at_right"].to_numpy(), ambiguous


def _repeated(table: pa.Table, by: list[str]) -> np.ndarray:
    """Which rows share their `by` with another row."""
    rows = table.select(by).append_column("at", pa.array(np.arange(len(table))))
    groups = rows.group_by(by).aggregate([("at", "count"), ("at", "min")])
    if len(groups) == len(rows):
        return np.zeros(len(rows), bool)
    found = rows.join(groups.filter(pc.greater(groups["at_count"], 1)), keys=by, join_type="left semi")
    repeated = np.zeros(len(rows), bool)
    repeated[found["at"].to_numpy()] = True
    return repeated


def error_curve(run: Run, column: str, predictions: str, bands: int = 10) -> dict[str, Any]:
    """Error rate of a classifier's predictions over a column: in bands of equal width, and in tenths of the samples.

    Parameters
    ----------
    run : Run
    column : str
        'GROUP.COLUMN', higher = harder.
    predictions : str
        NAME of `predictions/NAME`, with labels.
    bands : int
        Bands of equal width from the smallest to the largest score.

    Returns
    -------
    curve : dict
        pearson_bands, pearson_samples (NaN where undefined), centre, count, error_rate per band that holds a sample,
        tenths: error rate of each tenth of the samples, the lowest scores first; error_rate of all; samples.

    Raises
    ------
    ValueError
        If a column is missing or no sample has a label, a prediction and a score.

    Notes
    -----
    Albiero et al. 2023, Figures 2 and 6.
    """
    group = f"predictions/{predictions}"
    wanted = [column, f"{group}.label", f"{group}.prediction"]
    table = pa.concat_tables([joins.join(run.uri, shard, wanted) for shard in range(len(run.shards))])
    table = table.select(wanted).filter(pc.is_finite(table[column].cast(pa.float64())).fill_null(False)).drop_null()
    if not len(table):
        raise UserError(f"{predictions}: no sample of {run.uri} has a label, a prediction and {column}", "predictions")
    wrong = pc.not_equal(table[f"{group}.prediction"], table[f"{group}.label"]).to_numpy()
    return describe_errors(table[column].to_numpy().astype(np.float64), wrong, bands)


def describe_errors(scores: np.ndarray, wrong: np.ndarray, bands: int = 10) -> dict[str, Any]:
    """`error_curve` of scores (n,) and errors (n,), JSON-able."""
    try:
        pearson = error_correlation(scores, wrong, bands)._asdict()
    except UndefinedMetricError:
        pearson = {"bands": np.nan, "samples": np.nan}
    found: ErrorBands = error_bands(scores, wrong, bands)
    return {
        "samples": len(scores),
        "error_rate_all": float(wrong.mean()),
        "pearson_bands": pearson["bands"],
        "pearson_samples": pearson["samples"],
        "centre": found.centre.tolist(),
        "count": found.count.tolist(),
        "error_rate": found.error_rate.tolist(),
        "tenths": tenths(scores, wrong),
    }


def tenths(scores: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Error rate of each tenth of the samples, the lowest scores first; as equal in size as can be."""
    order = np.argsort(scores, kind="stable")
    return [float(part.mean()) for part in np.array_split(wrong[order], min(10, len(order)))]
