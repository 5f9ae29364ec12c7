"""A small run with all that a report can show, some of it hostile, made by hand."""

import numpy as np
import pyarrow as pa

from pipelines.curation.fit import fit
from pipelines.curation.score import Weighting, score
from pipelines.evaluation.detection import evaluate_trust
from pipelines.evaluation.evaluate import Slicing, evaluate, store
from pipelines.evaluation.outcomes import open_predictions
from pipelines.report.page import report
from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run
from tests.pipelines.predicted import noisy_logits, sharded, write_predictions, write_trust
from tests.pipelines.synthetic import make_run

HOSTILE = '</script><img src=x onerror="document.title=1">'
SIZES, CLASSES = (70, 0, 130), 4


def rewrite(run, shard, change, **more):
    """Write a shard's embeddings again as `change(table)`, with more facts, under their old source."""
    facts = column_groups.facts(run.uri, columns.EMBEDDINGS, shard)
    known = {name: value for name, value in facts.items() if name not in ("rows", "source")}
    table = change(column_groups.read(run.uri, columns.EMBEDDINGS, shard))
    column_groups.write(run.uri, columns.EMBEDDINGS, shard, table, facts["source"], **known | more)


def mislabel(run, labels, share=0.2):
    """Give a share of the samples another class; returns the labels that the run has then."""
    rng = np.random.default_rng(3)
    wrong = np.where(
        rng.random(len(labels)) < share, (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES, labels
    )
    for shard, _, part in sharded(run, wrong):
        rewrite(run, shard, lambda table, part=part: table.set_column(3, columns.LABEL, pa.array(part)))
    return wrong


def quarantine(run, shard, reasons):
    """Say that a shard's embeddings leave samples out, for these reasons."""
    entries = [
        {"shard": shard, "row": 900 + n, "key": HOSTILE, "member": None, "stage": "embed", "reason": reason}
        for n, reason in enumerate(reasons)
    ]
    table = pa.Table.from_pylist(entries, schema=columns.QUARANTINE_SCHEMA)
    column_groups.write(run.uri, columns.QUARANTINE, shard, table, "by hand")
    rewrite(run, shard, lambda table: table, left_out=len(reasons))


def make_reported(folder):
    """A run with scores, predictions, trust in them, evaluations by groups, a shard without rows, a quarantine, and its report."""
    run, _, labels = make_run(folder, SIZES, CLASSES)
    quarantine(run, 2, ["label 17 is no class", f"cannot be decoded: {HOSTILE}", "label 18 is no class"])
    labels = mislabel(run, labels)
    fit(run)
    score(run, Weighting())
    write_predictions(run, noisy_logits(labels, CLASSES), "mine")
    slicing = Slicing.parse("difficulty.rmd:0").resolve(run)
    mine = open_predictions(run, "mine")
    store(run, evaluate(run, mine, slicing=slicing, replicates=20), 0.0)
    write_trust(run, np.random.default_rng(4).normal(size=len(labels)), "oracle")
    store(run, evaluate_trust(run, "oracle", mine, replicates=0), 0.0, trust_in="mine")
    report(run)
    return Run.open(run.uri)


# Names that a corpus may bring: markup, a template, an object's own property, no name, a long one, one that turns the text around.
NAMES = (HOSTILE, "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "__proto__", "", "n" * 200, '\u202eback & "forth"')


def make_hostile(folder):
    """A scored run whose keys, class names and reasons of the quarantine are made to break the page."""
    run, _, _ = make_run(folder, (140,), len(NAMES))
    rewrite(run, 0, lambda table: table.set_column(0, "key", pa.array([f"{HOSTILE}{n}" for n in range(140)])))
    quarantine(run, 0, NAMES)
    fit(run)
    score(run, Weighting())
    report(run, NAMES)
    return Run.open(run.uri)


LACKING = {
    "unlabelled": {"sizes": (30,), "labelled": False},
    "one class": {"sizes": (30,), "classes": 1},
    "embedded": {"sizes": (20, 10)},
    "all but one": {"sizes": (1,), "classes": 1},
    "empty": {"sizes": (0,)},
}


def make_lacking(folder, names=tuple(LACKING)):
    """Runs by what they lack, with their reports: labels, a second class, scores, any good sample."""
    made = {name: make_run(folder / name.replace(" ", "-"), **LACKING[name])[0] for name in names}
    for name, run in made.items():
        if name in ("unlabelled", "one class"):
            fit(run)
            score(run, Weighting())
        if name == "empty":
            quarantine(run, 0, ["no image"] * 7)
        report(run)
    return made
