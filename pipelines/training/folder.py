"""A training's folder as a command meets it: free, or holding an earlier part of the same training, or its result.

OUT/train.json    what the training was made from, and its MLflow run
OUT/result.json   what it came to, once it is finished
"""

import dataclasses
import json
from typing import Any

from pipelines.runs import storage
from pipelines.runs.errors import UserError
from pipelines.runs.nested import flatten
from pipelines.runs.record import Run
from pipelines.training.documents import read_json, write_json
from pipelines.training.loop import Plan

PARTS = ("best", "last", "state.pt", "curve.json", "result.json", "train.json", ".ray")


def placed(plan: Plan, run: Run) -> Plan:
    """The plan with its folder: the one asked for, else one of the run's, named by the loss and the plan's hash."""
    out = plan.out or run.path("models", f"{plan.loss.name}-{plan.lineage['source'][:12]}")
    plan = dataclasses.replace(plan, out=storage.absolute(out))
    storage.check_writable(plan.out)
    return plan


def settle(plan: Plan, overwrite: bool) -> None:
    """See that the folder holds nothing, or an earlier part of the same training; UserError otherwise."""
    if overwrite:
        for name in PARTS:
            storage.remove_tree(storage.join(plan.out, name))
    before = read_json(storage.join(plan.out, "train.json"))
    if before is not None and before["source"] != plan.lineage["source"]:
        what = _difference(before["config"], plan.lineage["config"])
        raise UserError(f"{plan.out}: holds another training ({what}); take another `out`, or `overwrite`", "out")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    before, now = flatten(before), flatten(json.loads(json.dumps(now)))
    for name, value in now.items():
        if before.get(name) != value:
            return f"{name.rpartition('.')[2]} {before.get(name)!r} there, {value!r} asked for"
    return "made from other embeddings or columns"


def tracked_by(plan: Plan) -> str | None:
    """The MLflow run of an earlier attempt; None without one."""
    return (read_json(storage.join(plan.out, "train.json")) or {}).get("mlflow_run_id")


def note(plan: Plan, mlflow_run_id: str | None) -> None:
    """Write down what is trained here."""
    record = {name: plan.lineage[name] for name in ("source", "config", "run", "eval_run")}
    write_json(storage.join(plan.out, "train.json"), record | {"mlflow_run_id": mlflow_run_id})


def result_of(plan: Plan) -> dict[str, Any] | None:
    """What the training came to, if it is finished."""
    return read_json(storage.join(plan.out, "result.json"))


def finish(plan: Plan, result: dict[str, Any]) -> None:
    """Note the result, which makes the training a finished one."""
    write_json(storage.join(plan.out, "result.json"), result)
