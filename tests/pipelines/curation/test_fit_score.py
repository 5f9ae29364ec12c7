"""Fit and score over shards equal the ops on the whole array, whatever the cut."""

import numpy as np
import pytest

from ops.difficulty import Reference, difficulty_weight
from ops.gaussian import GaussianStats
from pipelines.curation import fit, score
from pipelines.runs import joins
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def scored(run, **options):
    fit.fit(run, "none")
    score.score(run, score.Weighting(**options))
    return joins.load(
        run.uri, [f"difficulty.{name}" for name in ("md", "md_agn", "rmd", "weight", "nearest_class", "margin")]
    )


def column(table, name):
    return table[f"difficulty.{name}"].to_numpy()


def test_scores_are_those_of_the_whole_array(tmp_path):
    run, features, labels = make_run(tmp_path)
    table = scored(run, scale="standardize")
    gaussians = GaussianStats(3, features.shape[1]).update(features, labels).fit()
    expected = gaussians.scores(features, labels)
    for name in ("md", "md_agn", "rmd", "margin"):
        np.testing.assert_allclose(column(table, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert column(table, "nearest_class").tolist() == expected.nearest_class.tolist()
    reference = Reference.of(expected.rmd)
    # The mean is 0 but for rounding: over the samples fitted on, md and md_agn both average to d.
    np.testing.assert_allclose(fit.load_gaussians(run).reference, reference, rtol=1e-4, atol=1e-4)
    weight = difficulty_weight(expected.rmd, 0.7, 1e-3, scale="standardize", reference=reference)
    np.testing.assert_allclose(column(table, "weight"), weight, rtol=1e-3, atol=1e-6)


def test_the_cut_into_shards_does_not_matter(tmp_path):
    whole, parts = make_run(tmp_path / "a", sizes=(100,))[0], make_run(tmp_path / "b", sizes=(1, 49, 20, 30))[0]
    one, many = scored(whole), scored(parts)
    spread = column(one, "rmd").std()
    np.testing.assert_allclose(column(many, "rmd"), column(one, "rmd"), atol=1e-4 * spread)


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


def test_another_runs_gaussians_score_unlabelled_samples_by_their_nearest_class(tmp_path):
    fitted, _, _ = make_run(tmp_path / "fitted", seed=0)
    fit.fit(fitted, "none")
    run, features, _ = make_run(tmp_path / "new", seed=0, sizes=(10, 20), labelled=False)
    fit.adopt(run, fitted)
    score.score(run, score.Weighting(scale="minmax"))
    table = joins.load(
        run.uri, ["difficulty.rmd", "difficulty.nearest_md", "difficulty.md_agn", "difficulty.weight", "difficulty.md"]
    )
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
    assert min(fit.fit(run, "auto")["shrinkage"]) > 0


def test_kmeans_distance_is_that_of_the_stored_centres(tmp_path):
    run, features, _ = make_run(tmp_path)
    fit.fit(run, "none")
    centers = score.kmeans_centers(run, 4)
    score.score(run, score.Weighting(), centers)
    found = joins.load(run.uri, ["difficulty.kmeans"])["difficulty.kmeans"].to_numpy()
    expected = np.linalg.norm(features[:, None] - centers[None], axis=2).min(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.array_equal(score.kmeans_centers(run, 4), centers)
    with pytest.raises(ValueError, match="kmeans 101: "):
        score.kmeans_centers(run, 101)
