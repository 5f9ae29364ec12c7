"""Percentiles of a run equal sorting its scores, follow it when it grows, and depend on no cut."""

import numpy as np
import pyarrow as pa
import pytest

from ops import ranks
from pipelines.corpus.shards import expand_shards
from pipelines.curation import fit, percentiles, score
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")
NAMES = [f"difficulty.{name}_percentile{among}" for name in ("rmd", "margin") for among in ("", "_in_class")]


def scored(run, weighting=None):
    fit.fit(run, "none")
    score.score(run, weighting or score.Weighting())
    return joins.load(run.uri, ["difficulty.rmd", "difficulty.margin", *NAMES])


def shares(scores):
    return np.searchsorted(np.sort(scores), scores, side="right") / len(scores)


def difficulty_files(run):
    return [storage.read_bytes(run.path(column_groups.file_name("difficulty", s))) for s in range(len(run.shards))]


@pytest.fixture(scope="module")
def one(tmp_path_factory, ray_session):
    """A scored run of three shards and its table. Not to be written to."""
    run = make_run(tmp_path_factory.mktemp("one"))[0]
    return run, scored(run)


def test_percentiles_are_those_of_sorting_overall_and_within_each_class(one):
    _, table = one
    labels = table["label"].to_numpy()
    for name in ("rmd", "margin"):
        values = table[f"difficulty.{name}"].to_numpy()
        found = table[f"difficulty.{name}_percentile"].to_numpy()
        np.testing.assert_allclose(found, shares(values), rtol=1e-6)
        assert found[values.argmax()] == 1
        within = table[f"difficulty.{name}_percentile_in_class"].to_numpy()
        for label in np.unique(labels):
            np.testing.assert_allclose(within[labels == label], shares(values[labels == label]), rtol=1e-6)


def test_the_metadata_tells_direction_unit_and_source(one):
    schema = column_groups.schema(one[0].uri, "difficulty")
    rmd, percentile = (columns.about(schema.field(name)) for name in ("rmd", "rmd_percentile_in_class"))
    assert rmd["direction"] == "larger = harder" and rmd["source"].endswith("eq. 5") and "squared" in rmd["unit"]
    assert percentile["percentile_of"] == "rmd" and percentile["direction"] == "larger = harder"
    scores = {f.name for f in schema if pa.types.is_floating(f.type)}
    assert all(columns.about(schema.field(name))["direction"] for name in scores)


def test_tables_of_many_scores_give_the_same_columns_within_their_error(one, tmp_path, monkeypatch):
    _, table = one
    monkeypatch.setattr(
        percentiles, "RankCounter", lambda classes, scores: ranks.RankCounter(classes, scores, exact=20)
    )
    monkeypatch.setattr(percentiles, "ROWS_PER_TASK", 1)
    other = make_run(tmp_path)[0]
    coarse = scored(other)
    assert other.stage("percentiles/difficulty")["rounds"] > 1
    for name in NAMES:
        np.testing.assert_allclose(coarse[name].to_numpy(), table[name].to_numpy(), atol=1 / 256)


def test_a_lost_file_and_a_stage_that_died_between_are_mended_to_the_same_bytes(tmp_path):
    run = make_run(tmp_path)[0]
    scored(run)
    before = difficulty_files(run)
    storage.remove_tree(run.path(column_groups.file_name("difficulty", 1)))
    assert score.score(Run.open(run.uri), score.Weighting())["shards_done"] == 1
    assert difficulty_files(run) == before
    # Scored but not completed: as after a kill between the two passes.
    facts = column_groups.facts(run.uri, "difficulty", 2)
    table = column_groups.read(run.uri, "difficulty", 2)
    column_groups.write(
        run.uri, "difficulty", 2, table, facts["scored"], scored=facts["scored"], embeddings=facts["embeddings"]
    )
    assert score.score(Run.open(run.uri), score.Weighting())["shards_done"] == 1
    assert difficulty_files(run) == before


def test_growth_rewrites_every_percentile_and_equals_a_fresh_run(tmp_path):
    fresh = make_run(tmp_path / "fresh", sizes=(40, 25, 35))[0]
    grown = make_run(tmp_path / "grown", sizes=(40, 25, 35))[0]
    record, shards = grown.record["shards"], list(grown.shards)
    grown.record["shards"] = record[:2]
    grown.save()
    fit.fit(grown, "none")
    assert score.score(grown, score.Weighting())["rows"] == 65
    young = column_groups.read(grown.uri, "difficulty", 0)["rmd_percentile"].to_pylist()
    listed = expand_shards(str(tmp_path / "grown" / "shards"))
    run = Run.create(grown.uri, grown.config, listed)
    assert run.shards == shards
    expected, found = scored(fresh), scored(run)
    for name in NAMES:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert found[NAMES[0]].to_pylist()[:40] != young


def test_another_runs_gaussians_bring_their_reference(one, tmp_path):
    fitted, table = one
    run = make_run(tmp_path / "new", sizes=(10, 20))[0]
    fit.adopt(run, fitted)
    score.score(run, score.Weighting())
    new = joins.load(run.uri, ["difficulty.rmd", *NAMES])
    known, values = np.sort(table["difficulty.rmd"].to_numpy()), new["difficulty.rmd"].to_numpy()
    expected = np.searchsorted(known, values, side="right") / len(known)
    np.testing.assert_allclose(new["difficulty.rmd_percentile"].to_numpy(), expected, rtol=1e-6)
    # Without labels a sample has a place among all, and none within a class.
    blind = make_run(tmp_path / "blind", sizes=(10, 20), labelled=False)[0]
    fit.adopt(blind, fitted)
    score.score(blind, score.Weighting())
    unlabelled = joins.load(blind.uri, NAMES)
    assert unlabelled[NAMES[0]].null_count == 0 and unlabelled[NAMES[1]].null_count == 30


def test_a_reference_that_was_never_scored_leaves_percentiles_null_until_it_is(tmp_path):
    fitted = make_run(tmp_path / "fitted")[0]
    fit.fit(fitted, "none")
    run = make_run(tmp_path / "new", sizes=(10, 20))[0]
    fit.adopt(run, fitted)
    score.score(run, score.Weighting())
    assert joins.load(run.uri, NAMES)[NAMES[0]].null_count == 30
    score.score(fitted, score.Weighting())
    fit.adopt(run, Run.open(fitted.uri))
    assert score.score(run, score.Weighting())["shards_done"] == 2
    assert joins.load(run.uri, NAMES)[NAMES[0]].null_count == 0


def test_without_classes_there_are_none(tmp_path):
    table = scored(make_run(tmp_path, labelled=False)[0])
    assert all(table[name].null_count == 100 for name in NAMES)
