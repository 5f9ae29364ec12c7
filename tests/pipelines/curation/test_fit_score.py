"""Fit and score over shards equal the ops on the whole array, whatever the cut."""

import numpy as np
import pyarrow as pa
import pytest

from ops.difficulty import Reference, difficulty_weight
from ops.gaussian import GaussianStats
from ops.neighbors import vote
from pipelines.curation import fit, score, votes
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def scored(run, **options):
    fit.fit(run, "none")
    score.score(run, score.Weighting(**options))
    return joins.load(
        run.uri,
        [f"difficulty.{name}" for name in columns.DIFFICULTY_SCHEMA.names if name not in columns.KEYS_AND_LABEL],
    )


def column(table, name):
    return table[f"difficulty.{name}"].to_numpy()


def test_scores_are_those_of_the_whole_array(tmp_path):
    run, features, labels = make_run(tmp_path)
    table = scored(run, scale="standardize")
    gaussians = GaussianStats(3, features.shape[1]).update(features, labels).fit()
    expected = gaussians.scores(features, labels, fitted=True)
    for name in ("md", "md_agn", "rmd", "margin", "md_loo", "rmd_loo", "nearest_md"):
        np.testing.assert_allclose(column(table, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert (column(table, "md_loo") > column(table, "md")).all()
    np.testing.assert_allclose(column(table, "label_error"), percentile_ranks(column(table, "margin")), rtol=1e-6)
    assert column(table, "nearest_class").tolist() == expected.nearest_class.tolist()
    reference = Reference.of(expected.rmd)
    # The mean is 0 but for rounding: over the samples fitted on, md and md_agn both average to d.
    np.testing.assert_allclose(fit.load_gaussians(run).reference, reference, rtol=1e-4, atol=1e-4)
    weight = difficulty_weight(expected.rmd, 0.7, 1e-3, scale="standardize", reference=reference)
    np.testing.assert_allclose(column(table, "weight"), weight, rtol=1e-3, atol=1e-6)


def percentile_ranks(values):
    return np.searchsorted(np.sort(values), values, side="right") / len(values)


def test_the_cut_into_shards_does_not_matter(tmp_path):
    whole, parts = make_run(tmp_path / "a", sizes=(100,))[0], make_run(tmp_path / "b", sizes=(1, 49, 20, 30))[0]
    one, many = scored(whole), scored(parts)
    spread = column(one, "rmd").std()
    for name in ("rmd", "rmd_loo", "margin"):
        np.testing.assert_allclose(column(many, name), column(one, name), atol=1e-4 * spread)


def test_again_nothing_is_redone_and_no_byte_changes(tmp_path):
    run = make_run(tmp_path)[0]
    scored(run)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = Run.open(run.uri)
    assert fit.fit(again, "none")["skipped"]
    assert score.score(again, score.Weighting())["shards_done"] == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_another_weighting_rewrites_the_scores_only(tmp_path):
    run = make_run(tmp_path)[0]
    scored(run)
    assert fit.fit(run, "none")["skipped"]
    assert score.score(run, score.Weighting(temperature=2.0))["shards_done"] == 3


def test_without_labels_there_is_the_agnostic_distance_only(tmp_path):
    run, features, _ = make_run(tmp_path, labelled=False)
    table = scored(run)
    assert table["difficulty.rmd"].null_count == table["difficulty.weight"].null_count == len(features)
    expected = GaussianStats(0, features.shape[1]).update(features).fit().agnostic_distances(features)
    np.testing.assert_allclose(column(table, "md_agn"), expected, rtol=1e-4)
    assert table["difficulty.label_error"].null_count == table["difficulty.margin"].null_count == len(features)


def test_another_runs_gaussians_score_unlabelled_samples_by_their_nearest_class(tmp_path):
    fitted, _, _ = make_run(tmp_path / "fitted", seed=0)
    fit.fit(fitted, "none")
    run, features, _ = make_run(tmp_path / "new", seed=0, sizes=(10, 20), labelled=False)
    fit.adopt(run, fitted)
    score.score(run, score.Weighting(scale="minmax"))
    table = joins.load(
        run.uri,
        [
            "difficulty.rmd",
            "difficulty.nearest_md",
            "difficulty.md_agn",
            "difficulty.weight",
            "difficulty.md",
            "difficulty.rmd_loo",
            "difficulty.label_error",
        ],
    )
    np.testing.assert_array_equal(column(table, "rmd_loo"), column(table, "rmd"))
    assert table["difficulty.label_error"].null_count == len(features)
    np.testing.assert_allclose(
        column(table, "rmd"), column(table, "nearest_md") - column(table, "md_agn"), rtol=1e-4, atol=1e-4
    )
    assert table["difficulty.md"].null_count == len(features)
    assert 0 <= column(table, "weight").min() <= column(table, "weight").max() <= 1
    assert run.classes == fitted.classes


def test_a_class_that_the_gaussians_do_not_know_is_named(tmp_path):
    fitted = make_run(tmp_path / "fitted", classes=3)[0]
    fit.fit(fitted, "none")
    run = make_run(tmp_path / "new", classes=5)[0]
    with pytest.raises(ValueError, match=r"class '3'.*unknown there, it has 3 classes"):
        fit.adopt(run, fitted)


def test_singular_covariances_are_an_error_with_the_way_out_and_auto_takes_it(tmp_path):
    run = make_run(tmp_path, sizes=(5,), dim=6)[0]
    with pytest.raises(ValueError, match="shrinkage"):
        fit.fit(run, "none")
    entry = fit.fit(run, "auto")
    assert min(entry["shrinkage"]) > 0 and entry["target"] == "diagonal"
    assert entry["curve"]["log_loss"][0] is None and len(entry["curve"]["shrinkage"]) == 13


def test_kmeans_distance_is_that_of_the_stored_centres(tmp_path):
    run, features, _ = make_run(tmp_path)
    fit.fit(run, "none")
    centers = score.kmeans_centers(run, 4)
    score.score(run, score.Weighting(), centers)
    found = joins.load(run.uri, ["difficulty.kmeans"])["difficulty.kmeans"].to_numpy()
    expected = np.linalg.norm(features[:, None] - centers[None], axis=2).min(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.array_equal(score.kmeans_centers(run, 4), centers)
    with pytest.raises(ValueError, match="kmeans 101"):
        score.kmeans_centers(run, 101)


def all_columns(run):
    names = [name for name in columns.DIFFICULTY_SCHEMA.names if name not in columns.KEYS_AND_LABEL]
    return joins.load(run.uri, [f"difficulty.{name}" for name in names])


def test_labelled_samples_of_another_run_are_not_left_out_and_ranked_among_themselves(tmp_path):
    fitted = make_run(tmp_path / "fitted", seed=0)[0]
    fit.fit(fitted, "none")
    run, features, labels = make_run(tmp_path / "new", seed=0, sizes=(10, 20))
    fit.adopt(run, fitted)
    score.score(run, score.Weighting())
    table = all_columns(run)
    expected = fit.load_gaussians(fitted).scores(features.astype(float), labels)
    np.testing.assert_allclose(column(table, "margin"), expected.margin, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(column(table, "md_loo"), column(table, "md"))
    np.testing.assert_array_equal(column(table, "rmd_loo"), column(table, "rmd"))
    np.testing.assert_allclose(column(table, "label_error"), percentile_ranks(column(table, "margin")), rtol=1e-6)


def test_the_shrinkage_is_that_of_the_whole_array_and_measured_on_evenly_spaced_rows(tmp_path, monkeypatch):
    run, features, labels = make_run(tmp_path / "all", dim=12)
    stats = GaussianStats(3, 12).update(features, labels)
    expected = stats.fit("auto", (features, labels))
    entry = fit.fit(run, "auto")
    found = fit.load_gaussians(run)
    assert found.shrinkage == expected.shrinkage and found.target == "diagonal"
    np.testing.assert_allclose(found.curve, expected.curve, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(entry["curve"]["log_loss"], found.curve[1])
    monkeypatch.setattr(fit, "CHOICE_ROWS", 50)
    monkeypatch.setattr(fit, "CHOICE_TASK_ROWS", 7)
    sampled = make_run(tmp_path / "some", sizes=(1, 49, 20, 30), dim=12)[0]
    fit.fit(sampled, "auto")
    some = stats.shrinkage_search().measure(features[::2], labels[::2])
    np.testing.assert_allclose(fit.load_gaussians(sampled).curve[1], some.within / 50, rtol=1e-3, atol=1e-3)


def test_one_class_has_the_agnostic_distance_only(tmp_path):
    run, features, _ = make_run(tmp_path, classes=1)
    assert fit.fit(run, "auto")["classes_present"] == 1
    assert score.score(run, score.Weighting())["label_error_of"] == []
    table = all_columns(run)
    known = {name for name in table.column_names if table[name].null_count < len(features)}
    assert known == {"key", "shard", "row", "label", "difficulty.md_agn"}


def test_all_views_of_an_image_are_left_out_together(tmp_path):
    run, features, labels = make_run(tmp_path, views=3)
    fit.fit(run, "none")
    score.score(run, score.Weighting())
    table = all_columns(run)
    stats = GaussianStats(3, 6).update(features.reshape(-1, 6), np.repeat(labels, 3))
    expected = stats.fit().scores(features[:, 0], labels, fitted=True, views=features[:, 1:])
    for name in ("md", "rmd", "md_loo", "rmd_loo", "margin"):
        np.testing.assert_allclose(column(table, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_gaussians_are_believed_by_what_they_say_not_by_the_record(tmp_path):
    """As after a kill between the file and its record: the file is of 0.5, the record of "none"."""
    run = make_run(tmp_path)[0]
    fit.fit(run, "none")
    before = storage.read_bytes(run.path("gaussians.npz"))
    first = dict(run.stage("fit"))
    fit.fit(run, 0.5)
    del first["finished"]
    run.finish_stage("fit", **first)
    with pytest.raises(UserError, match="run hardset fit first"):
        score.score(run, score.Weighting())
    assert not fit.fit(run, "none")["skipped"]
    assert storage.read_bytes(run.path("gaussians.npz")) == before
    # And the other way: the file is there, its record is lost.
    other = dict(run.stage("fit"))
    del other["finished"]
    run.finish_stage("fit", **other | {"source": "of before"})
    assert fit.fit(run, "none")["skipped"] and run.stage("fit")["source"] == other["source"]
    score.score(run, score.Weighting())


def test_ranks_that_are_lost_or_of_others_are_counted_again(tmp_path):
    run = make_run(tmp_path)[0]
    scored(run)
    files = [run.path(column_groups.file_name("difficulty", shard)) for shard in range(3)]
    before = [storage.read_bytes(file) for file in files]
    for damage in (b"", b"no npz", None):
        storage.remove_tree(files[1])
        if damage is None:
            storage.remove_tree(run.path("percentiles"))
        else:
            with storage.write_atomic(run.path("percentiles/difficulty.margin.npz")) as stream:
                stream.write(damage)
        assert score.score(Run.open(run.uri), score.Weighting())["shards_done"] == 1
        assert [storage.read_bytes(file) for file in files] == before


def test_the_votes_of_neighbours_are_half_of_label_error(tmp_path):
    """From the lists and the labels; the column of votes, which may be of older labels, is not read."""
    run, _, labels = make_run(tmp_path)
    margin = column(scored(run), "margin")
    rng, sizes = np.random.default_rng(0), (40, 25, 35)
    starts = np.cumsum([0, *sizes])
    neighbors, similarity = rng.integers(0, 100, (100, 5)), rng.uniform(0, 1, (100, 5)).astype(np.float32)
    for shard, size in enumerate(sizes):
        rows = slice(starts[shard], starts[shard + 1])
        table = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
        of_shard = np.searchsorted(starts, neighbors[rows], side="right") - 1
        lists = (of_shard, neighbors[rows] - starts[of_shard], similarity[rows])
        for name, values, kind in zip(votes.LISTS, lists, (pa.int32(), pa.int64(), pa.float32())):
            table = table.append_column(name, pa.array(values.tolist(), pa.list_(kind)))
        stale = pa.nulls(size, pa.float32())
        column_groups.write(run.uri, "neighbors", shard, table.append_column("vote", stale), f"by hand {shard}")
    counts = score.score(run, score.Weighting())
    assert counts["shards_done"] == 3 and counts["label_error_of"] == ["margin", "vote"]
    expected = (percentile_ranks(margin) + percentile_ranks(vote(labels, labels[neighbors], similarity))) / 2
    np.testing.assert_allclose(column(all_columns(run), "label_error"), expected, rtol=1e-5)


def test_label_error_is_the_mean_of_the_parts_there_are():
    from ops.ranks import RankSketch

    sketch = RankSketch()
    sketch.add(np.array([1, 2, 3, 4], np.float32))
    table = sketch.table()
    margin, vote = np.array([1, np.nan, 4, np.nan]), np.array([4, 2, np.nan, np.nan])
    np.testing.assert_array_equal(score.label_error(margin, table, vote, table), [0.625, 0.5, 1, np.nan])
    np.testing.assert_array_equal(score.label_error(margin, table, None, None), [0.25, np.nan, 1, np.nan])
    assert np.isnan(score.label_error(margin, None, None, None)).all()
