"""What `hardset evaluate` stored in a run, as the report's tables: metrics with intervals, groups, out of distribution."""

import json
from typing import Any

from pipelines.evaluation.evaluate import EVALUATION
from pipelines.runs import storage
from pipelines.runs.record import Run

# (metric, its heading, whether it is a fraction to be shown in percent)
METRICS = (
    ("accuracy", "Accuracy", True),
    ("worst_class_accuracy", "Worst class", True),
    ("worst_group_accuracy", "Worst group", True),
    ("ece", "ECE", True),
    ("ece_mass", "ECE, equal mass", True),
    ("nll", "NLL", False),
    ("brier", "Brier", False),
    ("aurc", "AURC", True),
    ("e_aurc", "Excess AURC", True),
    ("auroc", "AUROC of failures", True),
    ("fpr95", "FPR95", True),
    ("tpr", "TPR", True),
    ("tnr", "TNR", True),
)
OUTSIDE = ("fpr95", "auroc", "aupr_in", "aupr_out")


def files(run: Run) -> list[str]:
    """The stored evaluations of a run."""
    return storage.list_files(run.path(EVALUATION), ".json")


def stored(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """Every stored evaluation, by name, and what could not be read."""
    found, notes = [], []
    for path in files(run):
        try:
            found.append(json.loads(storage.read_bytes(path)))
        except ValueError as error:
            notes.append(f"{path.rpartition('/')[2]} is not JSON ({error}); run hardset evaluate again")
    return sorted(found, key=lambda entry: (bool(entry.get("trust_in")), str(entry.get("name")))), notes


def watched(evaluations: list[dict[str, Any]]) -> dict[str, str]:
    """The prediction set that each trust set was evaluated on."""
    return {entry["name"].removesuffix(".trust"): entry["trust_in"] for entry in evaluations if entry.get("trust_in")}


def metric_table(evaluations: list[dict[str, Any]], sets: dict[str, Any]) -> dict[str, Any]:
    """Headings and rows of metrics with their 95 % intervals; a set that was never evaluated has the few known from here.

    Parameters
    ----------
    evaluations : list of dict
        `stored`'s.
    sets : dict
        Outcome curves of each prediction set (`data`), None for one without labels.
    """
    evaluated = {entry["name"] for entry in evaluations}
    everything = evaluations + [
        {"name": name, **found} for name, found in sets.items() if found and name not in evaluated
    ]
    there = [metric for metric in METRICS if any(entry.get(metric[0]) is not None for entry in everything)]
    rows = [
        {"name": entry["name"], "of": entry.get("trust_in"), "cells": [_cell(entry, *metric) for metric in there]}
        for entry in everything
    ]
    intervals = any(cell and cell["between"] for row in rows for cell in row["cells"])
    return {"headings": [heading for _, heading, _ in there], "rows": rows, "intervals": intervals}


def _cell(entry: dict[str, Any], metric: str, _: str, fraction: bool) -> dict[str, str] | None:
    value = entry.get(metric)
    if value is None:
        return None
    between = entry.get("intervals", {}).get(metric)
    unit = " %" if fraction else ""
    return {
        "value": _shown(value, fraction) + unit,
        "between": " – ".join(_shown(v, fraction) for v in between) + unit if between else "",
    }


def _shown(value: float, fraction: bool) -> str:
    return f"{100 * value:.1f}" if fraction else f"{value:.3f}"


def groups(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy and mean confidence of each group of each set."""
    return [
        {"set": entry["name"], **{name: part.get(name) for name in ("part", "count", "accuracy", "confidence", "ece")}}
        for entry in evaluations
        for part in entry.get("slices", ())
        if part["slice"] == "group" and part["count"]
    ]


def outside(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Detection of another run's samples by each confidence; None where no evaluation asked for it."""
    rows = [
        {"name": entry["name"], "score": score, "cells": [_cell(metrics, m, "", True) for m in OUTSIDE]}
        for entry in evaluations
        for score, metrics in entry.get("ood", {}).items()
        if isinstance(metrics, dict)
    ]
    runs = sorted({entry["ood"]["run"] for entry in evaluations if "ood" in entry})
    return (
        {"runs": runs, "headings": [name.upper().replace("_", " ") for name in OUTSIDE], "rows": rows} if rows else None
    )
