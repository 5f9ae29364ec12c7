"""The report of a run: one HTML file that opens from disk without a network, with all its data and pictures inside."""

import base64
import gzip
import importlib.resources
import json
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from pipelines.report import evaluation, words
from pipelines.report.data import collect
from pipelines.report.scan import Limits
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.record import Run, fingerprint, library_versions
from pipelines.summary import groups_of

FILE = "report/index.html"
TEMPLATE = "template"
ASSETS = ("page.html", "page.css", "page.js", "charts.js")


def report(run: Run, class_names: Sequence[str] = (), limits: Limits | None = None) -> dict[str, Any]:
    """Write RUN/report/index.html, unless it is there and nothing that it shows has changed.

    Parameters
    ----------
    run : Run
    class_names : sequence of str
        Names to show where the run itself has none, in the order of the labels.
    limits : Limits, optional
        How much the page holds.

    Returns
    -------
    entry : dict
        path, samples, pictures, bytes, seconds, and `skipped`.

    Raises
    ------
    ValueError
        If there are fewer names than classes.
    """
    limits = limits or Limits()
    made_by = [library_versions()["hardset"], str(limits), *(asset(name) for name in ASSETS)]
    source = fingerprint("report", _inputs(run), list(class_names), made_by)
    before, path = run.stage("report"), run.path(*FILE.split("/"))
    if before and before["source"] == source and storage.exists(path):
        return before | {"path": path, "skipped": True}
    started = time.monotonic()
    evaluations, problems = evaluation.stored(run)
    found = collect(run, limits, class_names, evaluation.watched(evaluations))
    found["notes"] += problems
    page = render(run, found, evaluations)
    storage.write_text_atomic(path, page)
    entry = {
        "source": source,
        "samples": found["samples"],
        "pictures": len(found["data"].get("pictures", ())),
        "bytes": len(page.encode()),
        "seconds": time.monotonic() - started,
    }
    run.finish_stage("report", **entry)
    return entry | {"path": path, "skipped": False}


def _inputs(run: Run) -> list[Any]:
    """What decides the page: the run's record, the sources of its columns, its evaluations."""
    record = {name: value for name, value in run.record.items() if name not in ("versions", "stages", "plan")}
    stages = {name: entry for name, entry in run.stages().items() if name not in ("report", "plan")}
    groups = [columns.QUARANTINE, *groups_of(run)]
    facts = {group: column_groups.all_facts(run.uri, group, len(run.shards)) for group in groups}
    sources = {group: [fact and fact["source"] for fact in found] for group, found in facts.items()}
    evaluations = [[path, fingerprint(storage.read_bytes(path).decode())] for path in evaluation.files(run)]
    return [record | {"stages": stages}, sources, evaluations]


def render(run: Run, found: dict[str, Any], evaluations: list[dict[str, Any]]) -> str:
    """The page of what `data.collect` and `evaluation.stored` found."""
    found["data"]["groups"] = evaluation.groups(evaluations)
    found["data"]["title"] = words.run_name(run)
    tables = {
        "metrics": evaluation.metric_table(evaluations, found["data"].get("sets", {})),
        "outside": evaluation.outside(evaluations),
    }
    environment = Environment(
        loader=PackageLoader(__package__, TEMPLATE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters |= {"percent": words.percent, "breakable": breakable}
    return environment.get_template("page.html").render(
        **tables,
        title=found["data"]["title"],
        words=words,
        run=run,
        found=found,
        notes=found["notes"],
        sections=sections(found, bool(tables["metrics"]["rows"])),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data=Markup(json_block(found["data"])),
        css=Markup(asset("page.css")),
        script=Markup(asset("page.js")),
        charts=Markup(asset("charts.js")),
        plotly=packed(get_plotlyjs()),
    )


def sections(found: dict[str, Any], evaluated: bool) -> dict[str, str]:
    """Identifier and title of each section that this run has something for, in their order."""
    data = found["data"]
    there = {
        "gallery": ("Hardest and easiest", data.get("gallery") and data.get("scores")),
        "suspects": ("Likely label errors", data.get("suspects")),
        "map": ("Hard or mislabelled", _mapped(data)),
        "classes": ("Classes", len(data.get("per_class") or ()) > 1),
        "scores": ("Scores", data.get("scores")),
        "predictions": ("Predictions", evaluated),
        "severity": ("Corruptions", data.get("severity")),
        "agreement": ("Agreement", data.get("agreement")),
        "quarantine": ("Left out", True),
        "run": ("Run", True),
    }
    return {name: title for name, (title, something) in there.items() if something}


def _mapped(data: dict[str, Any]) -> bool:
    """Whether samples have both a margin and the main score."""
    names = {score["name"] for score in data.get("scores", ())}
    return {"difficulty.rmd", "difficulty.margin"} <= names


def json_block(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element whatever strings it holds."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def packed(script: str) -> str:
    """A script as base64 of its gzip, the same bytes each time; the page unpacks it for the first chart."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def breakable(text: str) -> Markup:
    """Text, escaped, whose paths may wrap after a slash rather than within a name."""
    return Markup(re.sub(r"(?<=/)(?=[^/])", "<wbr>", escape(text)))


def asset(name: str) -> str:
    """The text of a file of the template folder."""
    return importlib.resources.files(__package__).joinpath(TEMPLATE, name).read_text(encoding="utf-8")
