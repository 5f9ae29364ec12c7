"""A decided label reaches every later stage; a dropped sample is scored, but neither fitted on, selected nor trained on."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.samples import LabelSource
from pipelines.curation.decide import decide, undo
from pipelines.curation.fit import fit
from pipelines.curation.rules import Rule
from pipelines.curation.score import Weighting, score
from pipelines.curation.select import select
from pipelines.export import export
from pipelines.runs import joins
from pipelines.runs.labels import label_sources, labels_of
from pipelines.training.source import Source
from tests.pipelines.synthetic import make_run

RELABELLED, DROPPED = 5, 50  # positions in the corpus of 100


@pytest.fixture
def decided(tmp_path, ray_session):
    """(run, labels of the corpus, the label that sample 5 has now); sample 50 is dropped."""
    run, _, labels = make_run(tmp_path)
    new = int((labels[RELABELLED] + 1) % 3)
    (tmp_path / "d.csv").write_text(f"key,decision,label\ns000005,relabel,{new}\ns000050,drop,\n")
    decide(run, [str(tmp_path / "d.csv")], "anna")
    return run, labels, new


def test_labels_are_the_decided_ones(decided):
    run, labels, new = decided
    found = [labels_of(run.uri, shard) for shard in range(3)]
    expected = labels.copy()
    expected[RELABELLED] = new
    np.testing.assert_array_equal(np.concatenate([f.labels for f in found]), expected)
    assert np.flatnonzero(np.concatenate([f.dropped for f in found])).tolist() == [DROPPED]
    original = [labels_of(run.uri, shard, "original") for shard in range(3)]
    np.testing.assert_array_equal(np.concatenate([f.labels for f in original]), labels)
    assert not any(f.dropped.any() for f in original)


def test_only_shards_with_decisions_are_made_of_something_else(decided):
    run, _, _ = decided
    embedded = run.embedding_facts()
    before, after = label_sources(run, embedded, "original"), label_sources(run, embedded)
    assert [a != b for a, b in zip(before, after)] == [True, True, False]
    undo(run)
    assert label_sources(run, embedded) == before


def test_columns_are_joined_with_the_decided_label(decided):
    run, labels, new = decided
    table = joins.load(run.uri, ["decisions.decision", "decisions.by"])
    assert table["label"].to_pylist()[RELABELLED] == new
    assert table["decisions.decision"].to_pylist()[RELABELLED] == "relabel"
    assert table["decisions.decision"].null_count == 98
    assert joins.load(run.uri, [], "original")["label"].to_pylist() == labels.tolist()


def test_fit_and_score_use_the_decided_labels(tmp_path, decided):
    run, labels, new = decided
    fit(run)
    score(run, Weighting())
    table = joins.load(run.uri, ["difficulty.md", "difficulty.margin"])
    # The same corpus, labelled so from the start, without the dropped sample.
    other, _, _ = make_run(tmp_path / "other")
    corrected = labels.copy()
    corrected[RELABELLED] = new
    (tmp_path / "same.csv").write_text("key,decision\ns000050,drop\n")
    decide(other, [str(tmp_path / "same.csv")], "anna")
    from pipelines.runs import column_groups, columns

    embedded = column_groups.read(other.uri, columns.EMBEDDINGS, 0)
    facts = column_groups.facts(other.uri, columns.EMBEDDINGS, 0)
    facts = {name: value for name, value in facts.items() if name not in ("rows", "source")}
    relabelled = embedded.set_column(3, columns.LABEL, [corrected[:40].tolist()])
    column_groups.write(other.uri, columns.EMBEDDINGS, 0, relabelled, "relabelled", **facts)
    fit(other)
    score(other, Weighting())
    expected = joins.load(other.uri, ["difficulty.md", "difficulty.margin"])
    for name in ("difficulty.md", "difficulty.margin"):
        np.testing.assert_array_equal(table[name].to_numpy(), expected[name].to_numpy())
    assert table["difficulty.md"].null_count == 0  # the dropped one is scored


def test_a_decision_redoes_fit_and_score_and_undo_brings_the_old_numbers_back(tmp_path, ray_session):
    run, _, labels = make_run(tmp_path)
    fit(run)
    score(run, Weighting())
    before = joins.load(run.uri, ["difficulty.rmd"])["difficulty.rmd"].to_numpy()
    (tmp_path / "d.csv").write_text(f"key,label\ns000005,{(labels[5] + 1) % 3}\n")
    decide(run, [str(tmp_path / "d.csv")], "anna")
    assert not fit(run)["skipped"]
    assert score(run, Weighting())["shards_done"] == 3
    assert not np.array_equal(joins.load(run.uri, ["difficulty.rmd"])["difficulty.rmd"].to_numpy(), before)
    undo(run)
    fit(run)
    score(run, Weighting())
    np.testing.assert_array_equal(joins.load(run.uri, ["difficulty.rmd"])["difficulty.rmd"].to_numpy(), before)


def test_a_subset_holds_the_decided_label_and_keeps_the_other_beside_it(decided):
    run, labels, new = decided
    fit(run)
    score(run, Weighting())
    entry = select(run, Rule("difficulty.rmd", 1.0), "all")
    assert entry["samples"] == 99
    manifest = pq.read_table(f"{entry['path']}/manifest.parquet").to_pylist()
    changed = [row for row in manifest if row["original_label"] is not None]
    assert [(row["key"], row["label"], row["original_label"]) for row in changed] == [("s000005", new, labels[5])]
    with tarfile.open(f"{entry['path']}/all-000000.tar") as tar:
        assert tar.extractfile("s000005.cls").read() == str(new).encode()
        assert tar.extractfile("s000006.cls").read() == str(labels[6]).encode()
        assert tar.extractfile("s000005.txt").read() == b"kept"
        assert "s000050.cls" not in tar.getnames()
    card = Path(entry["path"], "README.md").read_text()
    assert "people decided on 2 samples" in card


def test_the_original_labels_can_be_looked_at(decided):
    run, labels, _ = decided
    assert fit(run, labels="original")["labels"] == "original"
    score(run, Weighting(), labels="original")
    entry = select(run, Rule("difficulty.rmd", 1.0, labels="original"), "all")
    manifest = pq.read_table(f"{entry['path']}/manifest.parquet")
    assert manifest["label"].to_pylist() == labels.tolist()
    assert manifest["original_label"].null_count == 100
    tables = [Source.of(run, input="embeddings", labels="original").keys(shard) for shard in range(3)]
    assert [label for table in tables for label in table["label"].to_pylist()] == labels.tolist()


def test_training_samples_have_the_decided_label(decided):
    run, _, new = decided
    source = Source.of(run, input="embeddings")
    tables = [source.keys(shard) for shard in range(3)]
    assert sum(table.num_rows for table in tables) == 99
    assert tables[0]["label"].to_pylist()[RELABELLED] == new
    assert tables[0].column_names == ["key", "shard", "row", "label"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_are_exported_for_training_elsewhere(tmp_path, decided, suffix):
    run, labels, new = decided
    out = str(tmp_path / f"labels.{suffix}")
    assert export(run, "labels", out)["rows"] == 100
    read = {"csv": pcsv.read_csv, "parquet": pq.read_table}[suffix]
    rows = read(out).to_pylist()
    assert [row["original_label"] for row in rows] == labels.tolist()
    assert (rows[RELABELLED]["label"], rows[RELABELLED]["decision"]) == (new, "relabel")
    assert rows[DROPPED]["decision"] == "drop"
    assert not rows[0]["decision"]


@pytest.mark.parametrize(
    ("source", "before", "label", "after"),
    [
        (LabelSource("cls"), b"3\n", 7, b"7"),
        (LabelSource("cls", ("cat", "dog")), b"cat", 1, b"dog"),
        (LabelSource("cls", ("cat", "dog")), b"0", 1, b"1"),
        (LabelSource("cls", ("7", "3")), b"7", 1, b"3"),
        (
            LabelSource("json:a.label"),
            b'{"a": {"label": 2, "x": "\xc3\xa9"}}',
            0,
            '{"a": {"label": 0, "x": "é"}}'.encode(),
        ),
        (LabelSource("json:label", ("cat", "dog")), b'{"label": "dog"}', 0, b'{"label": "cat"}'),
    ],
)
def test_a_label_member_keeps_its_form(source, before, label, after):
    assert source.write(before, label) == after
    assert source.read(after) == label
