"""hardset compare: τ, ρ, r and the overlap of two runs' columns, joined by key."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kendalltau

from jobs import compare
from pipelines.evaluation import compare as comparing
from pipelines.runs import column_groups
from tests.ops.golden import cases
from tests.pipelines.synthetic import make_run

NAME = "scores.hardness"


def write_scores(run, scores, name="hardness", keys=None):
    """A column group `scores` of a run made by `make_run`, in corpus order."""
    start = 0
    for shard in range(len(run.shards)):
        base = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
        part = slice(start, start + len(base))
        if keys is not None:
            base = base.set_column(0, "key", pa.array(keys[part]))
        table = base.append_column(name, pa.array(scores[part], pa.float32()))
        column_groups.write(run.uri, "scores", shard, table, "by hand")
        start += len(base)


@pytest.fixture
def pair(tmp_path):
    """Two runs over the same 100 samples, cut differently, with related scores; the arrays too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=100).astype(np.float32)
    y = (x + rng.normal(size=100)).astype(np.float32)
    a, b = make_run(tmp_path / "a", (60, 40))[0], make_run(tmp_path / "b", (10, 50, 40))[0]
    write_scores(a, x)
    write_scores(b, y)
    return a, b, x, y


def test_runs_of_another_cut_match_by_key(pair):
    a, b, x, y = pair
    found = comparing.compare_columns(a, b, NAME)
    np.testing.assert_allclose(found["kendall_tau"], kendalltau(x, y).statistic, atol=1e-12)
    assert (found["matched"], found["only_first"], found["only_second"], found["ambiguous"]) == (100, 0, 0, 0)
    top = set(np.argsort(-x)[:10]) & set(np.argsort(-y)[:10])
    assert found["top_overlap"] == len(top) / 10


def test_a_run_against_itself_and_against_its_opposite(pair):
    a, b, x, _ = pair
    same = comparing.compare_columns(a, a, NAME)
    np.testing.assert_allclose([same[k] for k in ("kendall_tau", "spearman", "pearson", "top_overlap")], 1)
    write_scores(b, -x)
    opposite = comparing.compare_columns(a, b, NAME)
    np.testing.assert_allclose([opposite[k] for k in ("kendall_tau", "spearman", "pearson")], -1)
    assert opposite["top_overlap"] == 0


def test_order_and_missing_samples_are_taken_care_of(pair):
    a, b, x, y = pair
    order = np.random.default_rng(1).permutation(100)
    keys = np.array([f"s{i:06d}" if i >= 20 else f"elsewhere{i}" for i in order])
    scores = y[order].copy()
    scores[order == 50] = np.nan
    write_scores(b, scores, keys=keys.tolist())
    found = comparing.compare_columns(a, b, NAME)
    kept = np.setdiff1d(np.arange(20, 100), [50])
    assert (found["matched"], found["only_first"], found["only_second"]) == (79, 21, 20)
    np.testing.assert_allclose(found["kendall_tau"], kendalltau(x[kept], y[kept]).statistic, atol=1e-12)


def test_a_key_in_two_shards_is_told_apart_by_the_shards_url():
    def table(urls, keys):
        return pa.table({"url": urls, "key": keys, "score": np.arange(len(keys), dtype=float)})

    first, second = table(["u", "v", "v"], ["k", "k", "l"]), table(["v", "u", "v"], ["k", "k", "l"])
    left, right, ambiguous = comparing.match(first, second)
    assert dict(zip(left.tolist(), right.tolist())) == {0: 1, 1: 0, 2: 2} and ambiguous == 0
    twice = table(["u", "u", "v"], ["k", "k", "l"])
    left, right, ambiguous = comparing.match(twice, second)
    assert (left.tolist(), right.tolist(), ambiguous) == ([2], [2], 2)


@pytest.mark.parametrize("case", [c for c in cases("correlation.npz") if "x" in c.inputs], ids=repr)
def test_agreement_equals_the_golden_correlations(case):
    found = comparing.agreement(case.inputs["x"], case.inputs["y"])
    for ours, theirs in (("kendall_tau", "kendall_tau_b"), ("spearman", "spearman"), ("pearson", "pearson")):
        np.testing.assert_allclose(found[ours], float(case.outputs[theirs]), rtol=1e-12)


def test_a_column_that_does_not_vary_has_no_correlation_and_json_says_null(pair, capsys):
    a, b, *_ = pair
    write_scores(b, np.ones(100))
    assert compare.main([a.uri, b.uri, "--column", NAME, "--mlflow", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kendall_tau"] is None and found["matched"] == 100


def test_tenths_rise_where_errors_follow_the_score():
    scores = np.arange(1000.0)
    wrong = scores >= 500
    found = comparing.describe_errors(scores, wrong)
    assert found["tenths"] == [0] * 5 + [1] * 5 and found["error_rate_all"] == 0.5
    assert found["pearson_bands"] > 0.85 and sum(found["count"]) == 1000
    assert np.isnan(comparing.describe_errors(np.ones(5), np.ones(5, bool))["pearson_bands"])


def test_the_command_takes_two_runs_anywhere_and_prints_json(pair, capsys):
    a, b, x, y = pair
    for words in (
        [a.uri, b.uri, "--column", NAME],
        ["--column", NAME, "--json", a.uri, b.uri],
        ["--column=" + NAME, a.uri, b.uri],
    ):
        assert compare.main([*words, "--mlflow", "none", "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        np.testing.assert_allclose(found["kendall_tau"], kendalltau(x, y).statistic, atol=1e-12)
    assert compare.main(["--run", a.uri, "--column", NAME, "--mlflow", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kendall_tau"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--column", "scores.nothing"), "has no column 'nothing' with a number for each sample, it has hardness"),
        (("--column", "difficulty.rmd"), "has no difficulty/"),
        (("--column", "hardness"), "expected GROUP.COLUMN"),
        (("--column", "embeddings.embedding"), "a number for each sample"),
        (("--column", NAME, "--bands", "1"), "--bands 1"),
        (("--column", NAME, "a-third-run"), "expected RUN RUN2, found 3"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(pair, capsys, words, told):
    assert compare.main([pair[0].uri, pair[1].uri, *words, "--mlflow", "none"]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_runs_without_a_sample_in_common_are_refused(pair, capsys):
    a, b, _, y = pair
    write_scores(b, y, keys=[f"other{i}" for i in range(100)])
    assert compare.main([a.uri, b.uri, "--column", NAME, "--mlflow", "none"]) == 2
    assert "0 samples" in capsys.readouterr().err
