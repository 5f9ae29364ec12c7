"""What is in a run, sampled and summarised for its report: one plain dict, its `data` for the page's own script."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus.loss import loss_of
from pipelines.report import trusted
from pipelines.report.curves import agreement, error_by_difficulty, histogram, outcome, risk_coverage, rounded
from pipelines.report.pictures import pictures, places
from pipelines.report.scan import (
    MAIN,
    MARGIN,
    NEAREST,
    Available,
    Limits,
    Scan,
    available,
    floats,
    picks,
    scan,
    shown_class,
)
from pipelines.report.words import visible
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.summary import quarantine_reasons

AGREEMENT_ROWS = 100_000
RANDOM_PICTURES = 240
PAIRS = 200
EXAMPLES = 5
# The scores of which a row also says where it stands within its class.
RANKED_IN_CLASS = ("difficulty.rmd", "difficulty.margin", "confusion.confusion")
BOX = (5, 25, 50, 75, 95)  # percentiles of a class's box
SEVERITY = re.compile(r"([a-z_]+)-([1-5])")  # the folder that hardset corrupt writes a shard into


def collect(
    run: Run,
    limits: Limits | None = None,
    class_names: Sequence[str] = (),
    watched: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that the report shows but for evaluations.

    Parameters
    ----------
    run : Run
        With whatever stages are finished.
    limits : Limits, optional
    class_names : sequence of str
        Names to show for a run whose classes have none.
    watched : dict, optional
        The prediction set that each trust set is about, where an evaluation said so.

    Returns
    -------
    found : dict
        samples, rows, left_out, shards, pending (shards not embedded yet), quarantine, notes, and `data`, JSON-able.
    """
    limits = limits or Limits()
    have = available(run, limits)
    embedded = [facts for facts in column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards)) if facts]
    rows, left_out = (sum(facts[name] for facts in embedded) for name in ("rows", "left_out"))
    found = {
        "samples": rows + left_out,
        "rows": rows,
        "left_out": left_out,
        "loss": loss_of(embedded),
        "shards": len(run.shards),
        "pending": len(run.shards) - len(embedded),
        "quarantine": quarantine_reasons(run, EXAMPLES),
        "notes": list(have.notes),
        "data": {"rows": None},
    }
    if rows:
        found["data"] = _data(run, have, limits, class_names, found["notes"])
        found["data"] |= _outcomes(run, have, found["data"].pop("values"), found["data"]["main"], watched or {})
    return found


def _data(run: Run, have: Available, limits: Limits, class_names: Sequence[str], notes: list[str]) -> dict[str, Any]:
    wanted = picks(have, limits, len(run.classes))
    scanned = scan(run, have, list(wanted.values()), limits)
    picked = {purpose: scanned.picked[pick] for purpose, pick in wanted.items()}
    main = next((name for name in MAIN if name in picked_scores(scanned, have)), None)
    names = shown_names(run, class_names, scanned.classes)
    ids = _Ids([*picked.values(), scanned.points])
    shown, problems = pictures(run, _most_wanted(picked, scanned.points), limits)
    notes += problems
    classes = shown_class(scanned.values)
    return {
        "classes": names,
        "labelled": bool((columns.labels_or_minus_one(scanned.values["label"]) >= 0).any()),
        "main": main,
        "scores": _scores(scanned, have),
        "every": scanned.step,
        "valued": scanned.values.num_rows,
        "total": sum(scanned.classes.values()),
        "rows": ids.rows(have, shown, scanned.values, classes),
        "pictures": list(shown.values()),
        "shards": {shard: run.shards[shard].url for shard in sorted({shard for shard, _ in ids.places})},
        "gallery": [ids.of[place] for place in shown if place in ids.of],
        "fitting": next((table.num_rows for purpose, table in picked.items() if purpose == f"fitting {main}"), 0),
        "exact": {end: _sizes(picked, f"{end} ") for end in ("high", "low")},
        "each": max((pick.count for pick in wanted.values() if pick.of_each == "class"), default=0),
        "suspects": _suspect_ids(picked, ids),
        "doubted_hardest": _doubted_share(picked.get(f"high {main}")),
        "doubted": sum(scanned.pairs.values()),
        "trusted": trusted.collect(run, scanned.values, main, scanned.classes, sum(scanned.pairs.values())),
        "points": [ids.of[place] for place in places(scanned.points)],
        "pairs": [[given, nearest, count] for (given, nearest), count in scanned.pairs.most_common(PAIRS)],
        "per_class": _per_class(scanned, classes, main),
        "values": scanned.values,
    }


def _outcomes(
    run: Run, have: Available, values: pa.Table, main: str | None, watched: Mapping[str, str]
) -> dict[str, Any]:
    """Curves of predictions, of trust in them, of corruptions, and the agreement of scores."""
    trusts = {
        score.name.split("/")[1].rpartition(".")[0]: score.name for score in have.scores if "trust/" in score.name
    }
    return {
        "sets": {name: _prediction_set(values, name, main) for name in have.predictions},
        "trusts": {
            name: {"of": watched[name], "risk_coverage": curve}
            for name, column in trusts.items()
            if watched.get(name) in have.predictions and (curve := _trust_curve(values, column, watched[name]))
        },
        "severity": _severity(run, values, have, main),
        "agreement": _agreement(values, have),
    }


def _trust_curve(values: pa.Table, column: str, predictions: str) -> dict[str, list[float]] | None:
    """Risk and coverage of a prediction set when a trust set says which ones to keep; None without a label."""
    trust, correct = floats(values[column]), _correct(values, predictions)
    known = np.isfinite(trust) & np.isfinite(correct)
    return risk_coverage(trust[known], correct[known] == 1) if known.any() else None


def picked_scores(scanned: Scan, have: Available) -> set[str]:
    """The scores of which some row has a value."""
    return {score.name for score in have.scores if np.isfinite(floats(scanned.values[score.name])).any()}


def shown_names(run: Run, given: Sequence[str], found: dict[int, int]) -> list[str]:
    """A name for each class: the run's, else the given ones, else 'class 3'."""
    names = [f"class {name}" if name.isdecimal() else name for name in run.classes]
    names += [f"class {label}" for label in range(len(names), max(found, default=-1) + 1)]
    if given and run.config.class_names is None:
        if len(given) < len(names):
            raise UserError(f"{len(given)} names, the run has {len(names)} classes", "classes")
        names = list(given)
    return [visible(name) or f"class {label}" for label, name in enumerate(names)]


class _Ids:
    """Full rows of the page under one numbering, each sample once."""

    def __init__(self, tables: Sequence[pa.Table]):
        everything = pa.concat_tables(tables)
        found = places(everything)
        self.of = {place: number for number, place in enumerate(dict.fromkeys(found))}
        first = {place: at for at, place in reversed(list(enumerate(found)))}
        self.table = everything.take(pa.array([first[place] for place in self.of]))
        self.places = list(self.of)

    def rows(
        self, have: Available, shown: dict[tuple[int, int], str], values: pa.Table, classes: np.ndarray
    ) -> dict[str, Any]:
        """The table by columns, as JSON takes it."""
        picture = {place: number for number, place in enumerate(shown)}
        integers = {name: columns.labels_or_minus_one(self.table[name]).tolist() for name in have.integers}
        return {
            "key": self.table["key"].to_pylist(),
            "shard": self.table["shard"].to_pylist(),
            "row": self.table["row"].to_pylist(),
            "label": columns.labels_or_minus_one(self.table["label"]).tolist(),
            "class": shown_class(self.table).tolist(),
            "nearest": integers.pop(NEAREST, None),
            "predicted": {name.split("/")[1].removesuffix(".prediction"): v for name, v in integers.items()},
            "scores": {s.name: [rounded(v) for v in floats(self.table[s.name])] for s in have.scores},
            "in_class": {
                name: [rounded(v, 4) for v in in_class(self.table, name, values, classes)]
                for name in RANKED_IN_CLASS
                if name in self.table.column_names
            },
            "picture": [picture.get(place, -1) for place in self.places],
        }


def in_class(table: pa.Table, name: str, values: pa.Table, classes: np.ndarray) -> np.ndarray:
    """Share (n,) of the scores of its class that do not exceed a row's; NaN without a score.

    Of the rows of `values`, whose classes are `classes` (N,): all of the corpus, or evenly spaced ones of a large one.
    """
    scores, mine, known = floats(table[name]), shown_class(table), floats(values[name])
    found = np.full(len(scores), np.nan)
    for label in np.unique(mine).tolist():
        rows, among = (mine == label) & np.isfinite(scores), np.sort(known[(classes == label) & np.isfinite(known)])
        if len(among):
            found[rows] = np.searchsorted(among, scores[rows], side="right") / len(among)
    return found


def _doubted_share(hardest: pa.Table | None) -> float | None:
    """Of the hardest samples, the share that sits nearer another class."""
    if hardest is None or MARGIN not in hardest.column_names or not len(hardest):
        return None
    return rounded((floats(hardest[MARGIN]) > 0).mean())


def _sizes(picked: dict[str, pa.Table], start: str) -> dict[str, int]:
    """How many rows were picked for each purpose that starts so."""
    return {purpose.removeprefix(start): t.num_rows for purpose, t in picked.items() if purpose.startswith(start)}


def _most_wanted(picked: dict[str, pa.Table], points: pa.Table) -> list[tuple[int, int]]:
    """Samples in the order in which they deserve a picture; last some evenly spaced ones, for comparison."""
    order = sorted(picked, key=lambda purpose: ("of each" in purpose, not purpose.startswith(("suspects", "fitting"))))
    spaced = points.take(pa.array(np.unique(np.linspace(0, points.num_rows - 1, RANDOM_PICTURES).astype(int))))
    return [place for table in [*(picked[purpose] for purpose in order), spaced] for place in places(table)]


def _suspect_ids(picked: dict[str, pa.Table], ids: _Ids) -> list[int]:
    """The likeliest label errors first."""
    tables = [table for purpose, table in picked.items() if purpose.startswith("suspects")]
    numbers = list(dict.fromkeys(ids.of[place] for table in tables for place in places(table)))
    margins = floats(ids.table[MARGIN]) if numbers else []
    return sorted(numbers, key=lambda number: -margins[number])


def _scores(scanned: Scan, have: Available) -> list[dict[str, Any]]:
    found = []
    for score in have.scores:
        drawn = histogram(floats(scanned.values[score.name]))
        if drawn:
            about = {"meaning": score.meaning, "direction": score.direction, "unit": score.unit}
            found.append({"name": score.name, "label": score.label, **about, "histogram": drawn})
    return found


def _per_class(scanned: Scan, classes: np.ndarray, main: str | None) -> list[dict[str, Any]]:
    """Of each class: samples, how many of them sit nearer another one and which, percentiles of the main score."""
    values = floats(scanned.values[main]) if main else np.full(len(classes), np.nan)
    order = np.argsort(classes, kind="stable")
    numbers, starts = np.unique(classes[order], return_index=True)
    found = []
    for number, rows in zip(numbers.tolist(), np.split(order, starts[1:])):
        doubts = {nearest: count for (given, nearest), count in scanned.pairs.items() if given == number}
        finite = values[rows][np.isfinite(values[rows])]
        found.append(
            {
                "class": number,
                "count": scanned.classes[number],
                "doubted": sum(doubts.values()),
                "suggested": max(doubts, key=doubts.__getitem__, default=None),
                "box": [rounded(v) for v in np.percentile(finite, BOX)] if len(finite) else None,
            }
        )
    return [entry for entry in found if entry["class"] >= 0]


def _correct(values: pa.Table, name: str) -> np.ndarray:
    """1.0 where the prediction is the label, 0.0 where it is not, NaN where either is missing."""
    labels = columns.labels_or_minus_one(values["label"])
    predicted = columns.labels_or_minus_one(values[f"predictions/{name}.prediction"])
    return np.where((labels >= 0) & (predicted >= 0), (labels == predicted).astype(float), np.nan)


def _prediction_set(values: pa.Table, name: str, main: str | None) -> dict[str, Any] | None:
    """Outcome curves of a prediction set and its error by difficulty; None without a label."""
    correct = _correct(values, name)
    column = f"predictions/{name}.confidence"
    confidence = floats(values[column]) if column in values.column_names else np.full(len(correct), np.nan)
    known = np.isfinite(correct) & np.isfinite(confidence)
    if not known.any():
        return None
    difficulty = floats(values[main])[known] if main else np.zeros(0)
    by_difficulty = error_by_difficulty(difficulty, correct[known] == 0) if main else []
    return outcome(confidence[known], correct[known] == 1) | {"by_difficulty": by_difficulty}


def _severity(run: Run, values: pa.Table, have: Available, main: str | None) -> list[dict[str, Any]]:
    """Of shards that hardset corrupt wrote: mean of the main score and accuracy by kind and severity."""
    of_shard = {shard: _corruption(run.shards[shard].url) for shard in have.shards}
    if not any(of_shard.values()):
        return []
    shards, parts = values["shard"].to_numpy(), []
    correct = {name: _correct(values, name) for name in have.predictions}
    main_values = floats(values[main]) if main else np.full(len(shards), np.nan)
    for kind in [*sorted(set(of_shard.values()) - {None}), None]:
        rows = np.isin(shards, [shard for shard, its in of_shard.items() if its == kind])
        if rows.any():
            entry = {"kind": kind[0] if kind else "none", "severity": kind[1] if kind else 0, "count": int(rows.sum())}
            accuracy = {name: _mean(values_[rows]) for name, values_ in correct.items()}
            parts.append(entry | {"mean": _mean(main_values[rows]), "accuracy": accuracy})
    return parts


def _corruption(url: str) -> tuple[str, int] | None:
    found = SEVERITY.fullmatch(url.rpartition("/")[0].rpartition("/")[2])
    return (found.group(1), int(found.group(2))) if found else None


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return rounded(finite.mean()) if len(finite) else None


def _agreement(values: pa.Table, have: Available) -> dict[str, Any] | None:
    """Rank agreement of the scores with a value, all turned so that higher = harder; `weight` is rmd in other units."""
    some = values.take(pa.array(np.arange(0, values.num_rows, -(-values.num_rows // AGREEMENT_ROWS))))
    scores = {}
    for score in have.scores:
        found = floats(some[score.name])
        if np.isfinite(found).sum() > 2 and np.nanstd(found) > 0 and score.name != "difficulty.weight":
            safer = "safer" in score.direction or "easier" in score.direction
            scores[f"{score.label}, reversed" if safer else score.label] = -found if safer else found
    return agreement(scores) if len(scores) > 1 else None
