"""The report's section on hard and clean: what the hardest samples are made of, and how far the class Gaussians can be trusted."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.curation import subsets
from pipelines.report.curves import error_by_difficulty, rounded
from pipelines.report.scan import MARGIN, floats
from pipelines.report.words import number, percent, plural
from pipelines.runs import columns
from pipelines.runs.record import Run

LEFT_OUT = "difficulty.md_loo"
FEW = 10  # a class of fewer samples has a mean of hardly any


def collect(
    run: Run, values: pa.Table, main: str | None, classes: dict[int, int], doubted: int
) -> dict[str, Any] | None:
    """What the section shows; None without margins.

    Parameters
    ----------
    run : Run
    values : Table
        Scores of evenly spaced rows.
    main : str or None
        The score that the hardest are the hardest by.
    classes : dict
        Samples of each class, of the whole corpus.
    doubted : int
        Samples of the whole corpus whose margin is above 0.

    Returns
    -------
    found : dict
        tenths: of each tenth by the main score, the share whose margin is above 0, with its interval; judged: the share
        of samples that have a margin; error: of these, the share above 0; left_out: how the margin was computed; curve: of
        shrinkage; classes: numbers of classes by their size.
    """
    if MARGIN not in values.column_names or main is None:
        return None
    margin, difficulty = floats(values[MARGIN]), floats(values[main])
    known = np.isfinite(margin)
    if not known.any():
        return None
    fit = run.stage("fit") or {}
    sizes = np.array([count for label, count in classes.items() if label >= 0])
    return {
        "tenths": error_by_difficulty(difficulty[known], margin[known] > 0),
        "judged": rounded(known.mean()),
        "error": rounded((margin[known] > 0).mean()),
        "doubted": doubted,
        "left_out": "other" if "from" in fit else "own" if LEFT_OUT in values.column_names else "no",
        "curve": _curve(fit),
        "classes": {
            "all": len(sizes),
            "single": int((sizes == 1).sum()),
            "few": int(((sizes > 1) & (sizes < FEW)).sum()),
        },
    }


def _curve(fit: dict[str, Any]) -> dict[str, Any] | None:
    """Amounts of shrinkage, the log-loss of the class that each leaves, and the one chosen."""
    told = fit.get("curve")
    if not told or "from" in fit:
        return None
    points = [(s, loss) for s, loss in zip(told["shrinkage"], told["log_loss"]) if loss is not None]
    if len(points) < 2:
        return None
    amounts, losses = zip(*points)
    return {"shrinkage": list(amounts), "log_loss": [rounded(loss) for loss in losses], "chosen": fit["shrinkage"][0]}


def sentences(run: Run, data: dict[str, Any]) -> list[str]:
    """What the charts of the section say, in words."""
    found = data["trusted"]
    return [text for text in (_hardest(data), *_subsets(run), _error(found), _shrinkage(found), _rare(found)) if text]


def _hardest(data: dict[str, Any]) -> str | None:
    tenths = data["trusted"]["tenths"]
    if len(tenths) < 10:
        return None
    main = columns.split_name(data["main"])[1]
    every = "" if data["every"] == 1 else f" of the {data['valued']:,} images looked at"
    hardest, easiest = tenths[-1]["error"], tenths[0]["error"]
    return (
        f"Of the hardest tenth by {main}{every}, {percent(hardest)} have a label in doubt, of the easiest {percent(easiest)}. "
        f"The condition margin < 0 leaves {percent(1 - hardest)} of the hardest tenth."
    )


def _subsets(run: Run) -> list[str]:
    """Each subset that says how many samples it was chosen among."""
    found = []
    for name in sorted(entry.removeprefix("select/") for entry in run.stages() if entry.startswith("select/")):
        facts = subsets.facts_of(run.uri, name) or {}
        if "passed" in facts:
            where = facts["told"].get("where")
            among = f"{facts['passed']:,} images"
            among = f"the {among} of {facts['scored']:,} where {where}" if where else among
            found.append(f"Subset {name}: {facts['samples']:,} of {among}.")
    return found


def _error(found: dict[str, Any]) -> str:
    how = {
        "own": "Each left out of the Gaussians that judge it, ",
        "other": "Judged by another run's Gaussians, ",
        "no": "Judged by Gaussians that it was itself fitted on, which flatters it (hardset score leaves each one out), ",
    }[found["left_out"]]
    some = "" if found["judged"] == 1 else f" of those with a margin ({percent(found['judged'])} of all)"
    return (
        f"{how}{percent(found['error'])} of the images{some} sit nearer another class than that of their label. That is the "
        "error rate of the class Gaussians as a classifier: wrong labels, hard images and classes that the features hardly "
        "tell apart are all in it. It is not the number of wrong labels: only people who look at a sample of them can say that."
    )


def _shrinkage(found: dict[str, Any]) -> str | None:
    curve = found["curve"]
    if curve is None:
        return None
    at = dict(zip(curve["shrinkage"], curve["log_loss"]))
    best, plain = at.get(curve["chosen"]), at.get(0.0)
    if best is None:
        return None
    without = "impossible without" if plain is None else f"{number(plain)} without"
    return f"Shrinkage {curve['chosen']:g} within classes: log-loss {number(best)} nats an image left out, {without}."


def _rare(found: dict[str, Any]) -> str | None:
    sizes, parts = found["classes"], []
    if sizes["single"]:
        classes = plural(sizes["single"], "class", "classes")
        parts.append(
            f"{classes} of {sizes['all']:,} with one image, which has no margin: without it there is no such class"
        )
    if sizes["few"]:
        classes = plural(sizes["few"], "class", "classes")
        parts.append(
            f"{classes} of {sizes['all']:,} with 2 to {FEW - 1} images, which are near a mean that they largely make themselves: "
            "small by rmd, not by rmd_loo"
        )
    return f"Rare classes: {'; '.join(parts)}." if parts else None
