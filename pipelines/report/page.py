"""The report of a run: one HTML file that opens from disk without a network, with all its data and pictures inside."""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from pipelines.report import duplicates, evaluation, review_page, trusted, words
from pipelines.report.assets import asset, environment, json_block, packed, plotly_script
from pipelines.report.data import collect
from pipelines.report.scan import Limits
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.record import Run, fingerprint, library_versions
from pipelines.summary import groups_of

FILE, REVIEW = "report/index.html", "report/review.html"
HEAD_BYTES = 4096  # of a page: its source stands in there
ASSETS = ("page.html", "page.css", "page.js", "charts.js", "review.html", "review.css", "review.js")


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
    if before and source_of(path) == source:
        return before | {"path": path, "skipped": True}
    started = time.monotonic()
    evaluations, problems = evaluation.stored(run)
    found = collect(run, limits, class_names, evaluation.watched(evaluations))
    found["copies"], more = duplicates.collect(run, limits)
    found["notes"] += problems + more
    review = review_page.render(run, found["data"].get("classes", run.classes))
    if review is not None:
        storage.write_text_atomic(run.path(*REVIEW.split("/")), review.html)
        found["notes"] += [note for note in review.notes if note not in found["notes"]]
    else:
        storage.remove_tree(run.path(*REVIEW.split("/")))
    page = render(run, found, evaluations, source, review is not None)
    # Last, as it is the file whose source says what both were made from.
    storage.write_text_atomic(path, page)
    entry = {
        "source": source,
        "samples": found["samples"],
        "pictures": len(found["data"].get("pictures", ())),
        "bytes": len(page.encode()),
        "review": review and review.queues,
        "seconds": time.monotonic() - started,
    }
    run.finish_stage("report", **entry)
    return entry | {"path": path, "skipped": False}


def _inputs(run: Run) -> list[Any]:
    """What decides the page: the run's record, the sources of its columns, its evaluations."""
    record = {name: value for name, value in run.record.items() if name not in ("versions", "stages", "plan")}
    stages = {name: entry for name, entry in run.stages().items() if name not in ("report", "plan")}
    groups = [columns.QUARANTINE, columns.DECISIONS, *groups_of(run)]
    facts = {group: column_groups.all_facts(run.uri, group, len(run.shards)) for group in groups}
    sources = {group: [fact and fact["source"] for fact in found] for group, found in facts.items()}
    evaluations = [[path, fingerprint(storage.read_bytes(path).decode())] for path in evaluation.files(run)]
    return [record | {"stages": stages}, sources, evaluations]


def source_of(uri: str) -> str | None:
    """What a report says that it was made from; None where there is none of ours."""
    try:
        head = storage.read_bytes(uri)[:HEAD_BYTES].decode(errors="replace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    found = re.search(r'<meta name="hardset-source" content="(\w+)">', head)
    return found and found.group(1)


def render(
    run: Run, found: dict[str, Any], evaluations: list[dict[str, Any]], source: str, reviewed: bool = False
) -> str:
    """The page of what `data.collect` and `evaluation.stored` found; `reviewed`: the review page lies beside it."""
    found["data"]["groups"] = evaluation.groups(evaluations)
    found["data"]["title"] = words.run_name(run)
    tables = {
        "metrics": evaluation.metric_table(evaluations, found["data"].get("sets", {})),
        "outside": evaluation.outside(evaluations),
    }
    templates = environment()
    templates.filters |= {"percent": words.percent, "breakable": breakable}
    return templates.get_template("page.html").render(
        **tables,
        title=found["data"]["title"],
        source=source,
        reviewed=reviewed,
        words=words,
        trusted=trusted,
        run=run,
        found=found,
        notes=found["notes"],
        sections=sections(found, bool(tables["metrics"]["rows"])),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data=Markup(json_block(found["data"])),
        css=Markup(asset("page.css")),
        script=Markup(asset("page.js")),
        charts=Markup(asset("charts.js")),
        plotly=packed(plotly_script()),
    )


def sections(found: dict[str, Any], evaluated: bool) -> dict[str, str]:
    """Identifier and title of each section that this run has something for, in their order."""
    data = found["data"]
    there = {
        "gallery": ("Hardest and easiest", data.get("gallery") and data.get("scores")),
        "suspects": ("Likely label errors", data.get("suspects")),
        "duplicates": ("Duplicates", found["copies"]["duplicates"]),
        "leaks": ("Leaks", found["copies"]["leaks"]),
        "map": ("Hard or mislabelled", _mapped(data)),
        "trusted": ("Hard and clean", data.get("trusted")),
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


def breakable(text: str) -> Markup:
    """Text, escaped, whose paths may wrap after a slash rather than within a name."""
    return Markup(re.sub(r"(?<=/)(?=[^/])", "<wbr>", escape(text)))
