"""RUN/report/review.html: the queues of `review` with their pictures, in one file that works without a network."""

from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from pipelines.report import review, words
from pipelines.report.assets import asset, environment, json_block
from pipelines.report.pictures import pictures
from pipelines.report.review import Columns, Place, ReviewLimits
from pipelines.report.scan import Limits
from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order

LARGE, SMALL = 384, 80  # pixels of the longer side of a sample's picture and of a neighbour's
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula to a spreadsheet
# How scores are shown: name, decimals.
SCORES = {"label_error": 3, "margin": 1, "rmd": 1}


class ReviewPage(NamedTuple):
    """The page, notes on pictures that are missing, and how many samples stand in each queue."""

    html: str
    notes: list[str]
    queues: dict[str, int]


def render(run: Run, names: list[str], limits: ReviewLimits | None = None) -> ReviewPage | None:
    """The review page of a run; None where there is nothing to review.

    Parameters
    ----------
    run : Run
    names : list of str
        Of the classes, as they are shown.
    limits : ReviewLimits, optional
    """
    found = review.collect(run, limits or ReviewLimits())
    if found is None:
        return None
    data, notes = _data(run, names, found)
    html = (
        environment()
        .get_template("review.html")
        .render(
            title=words.run_name(run),
            data=Markup(json_block(data)),
            css=Markup(asset("page.css") + asset("review.css")),
            script=Markup(asset("review.js")),
        )
    )
    return ReviewPage(html, notes, {queue["name"]: len(queue["ids"]) for queue in found["queues"]})


def _data(run: Run, names: list[str], found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    have: Columns = found["have"]
    rows = found["table"].to_pylist()
    near = [review.neighbor_places(row, have) for row in rows]
    originals = [_original(row, have) for row in rows]
    labels = _labels(run, {place for some in near for place in some})
    own = [(row["shard"], row["row"]) for row in rows]
    large, notes = pictures(run, [*own, *(place for place in originals if place)], Limits(), LARGE)
    small, more = pictures(run, dict.fromkeys(place for some in near for place in some), Limits(), SMALL)
    keys = _keys(run, [place for place in originals if place])
    store: list[str] = []
    at: dict[tuple[str, Place], int] = {}
    for kind, some in (("large", large), ("small", small)):
        for place, picture in some.items():
            at[kind, place] = len(store)
            store.append(picture)
    samples = []
    for row, place, around, original in zip(rows, own, near, originals):
        near_labels = [labels.get(one, -1) for one in around]
        sample = {
            "key": row["key"],
            "shard": row["shard"],
            "row": row["row"],
            "label": -1 if row["label"] is None else row["label"],
            "suggestion": review.suggestion(row, have, near_labels),
            "scores": _scores(row),
            "picture": at.get(("large", place), -1),
            "near": [
                {"label": label, "picture": at.get(("small", one), -1)} for one, label in zip(around, near_labels)
            ],
        }
        if original is not None:
            sample["original"] = {"key": keys.get(original, ""), "picture": at.get(("large", original), -1)}
        samples.append(sample)
    data = {
        "id": fingerprint(run.uri, [shard.url for shard in run.shards])[:12],
        "classes": names,
        "written": [str(n) if name.startswith(FORMULA) else name for n, name in enumerate(run.classes)],
        "queues": found["queues"],
        "samples": samples,
        "pictures": store,
    }
    return data, [*notes, *(note for note in more if note not in notes)]


def _original(row: dict[str, Any], have: Columns) -> Place | None:
    if have.duplicate is None:
        return None
    shard, number = (row[name] for name in have.duplicate)
    return None if number is None else (shard, number)


def _scores(row: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, decimals in SCORES.items():
        value = row.get(f"{columns.DIFFICULTY}.{name}")
        if value is not None and np.isfinite(value):
            found[name] = f"{value:.{decimals}f}".replace("-", "−")
    return found


def _by_shard(places: set[Place] | list[Place]) -> list[tuple[int, list[int]]]:
    wanted: dict[int, list[int]] = {}
    for shard, row in sorted(set(places)):
        wanted.setdefault(shard, []).append(row)
    return list(wanted.items())


def _labels(run: Run, places: set[Place]) -> dict[Place, int]:
    """The labels of some samples, -1 for none."""
    return {place: label for part in in_order(_rows, _by_shard(places), run.uri) for place, (_, label) in part.items()}


def _keys(run: Run, places: list[Place]) -> dict[Place, str]:
    return {place: key for part in in_order(_rows, _by_shard(places), run.uri) for place, (key, _) in part.items()}


def _rows(shard: int, rows: list[int], run_uri: str) -> dict[Place, tuple[str, int]]:
    """Ray task: key and label of some rows of a shard."""
    table = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["key", "row", "label"])
    found = zip(
        table["row"].to_pylist(), table["key"].to_pylist(), columns.labels_or_minus_one(table["label"]).tolist()
    )
    wanted = set(rows)
    return {(shard, row): (key, label) for row, key, label in found if row in wanted}
