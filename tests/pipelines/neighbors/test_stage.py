"""The stage against the operators on the whole array: in one run and in another, exact and by cells, after a kill."""

from pathlib import Path

import numpy as np
import pytest

from ops.neighbors import nearest, recall, vote
from ops.whitening import fit_whitening
from pipelines.neighbors import filing, search, stage
from pipelines.runs import column_groups, decisions
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def lists_of(run, other=None):
    """Positions in the corpus that was searched, similarities and votes, of all shards."""
    group = "neighbors" if other is None else "neighbors/against/train"
    tables = [column_groups.read(run.uri, group, shard) for shard in range(len(run.shards))]
    firsts = np.cumsum([0, *(facts["rows"] for facts in (other or run).embedding_facts())])
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [f"s{i:06d}" for i in range(len(rows))]
    positions = [[int(firsts[s] + r) for s, r in zip(row["neighbor_shard"], row["neighbor_row"])] for row in rows]
    votes = np.array([np.nan if row["vote"] is None else row["vote"] for row in rows])
    return np.array(positions), np.array([row["similarity"] for row in rows]), votes


def expected(features, k, others=None):
    reference = features if others is None else others
    x = reference.astype(np.float64)
    whitening = fit_whitening(x.mean(axis=0), np.cov(x.T, bias=True), len(x))
    own = np.arange(len(features)) if others is None else None
    return nearest(whitening.apply(features), whitening.apply(reference), k, own)


def test_lists_and_votes_are_those_of_the_whole_array_for_any_cut(tmp_path):
    for name, sizes in (("a", (100,)), ("b", (1, 49, 20, 30))):
        run, features, labels = make_run(tmp_path / name, sizes=sizes)
        counts = stage.neighbors(run, k=7)
        positions, similarity, votes = lists_of(run)
        wanted = expected(features, 7)
        np.testing.assert_array_equal(positions, wanted.positions)
        np.testing.assert_allclose(similarity, wanted.similarity, atol=1e-6)
        np.testing.assert_allclose(votes, vote(labels, labels[positions], similarity), atol=1e-6)
        assert counts["exact"] and counts["recall"] == 1.0 and counts["rows"] == 100


def test_in_another_run_by_its_mean_and_covariance(tmp_path):
    train, features, _ = make_run(tmp_path / "train")
    test, others, _ = make_run(tmp_path / "test", sizes=(12, 9), seed=3)
    counts = stage.neighbors(test, 5, train, "train")
    positions, similarity, votes = lists_of(test, train)
    wanted = expected(others, 5, features)
    np.testing.assert_array_equal(positions, wanted.positions)
    np.testing.assert_allclose(similarity, wanted.similarity, atol=1e-6)
    assert np.isnan(votes).all() and counts["against"] == train.uri
    with pytest.raises(UserError, match="another name"):
        stage.neighbors(test, 5, make_run(tmp_path / "more")[0], "train")


@pytest.fixture
def small_pieces(monkeypatch):
    """Many blocks, groups and chunks of a small run."""
    monkeypatch.setattr(filing, "BLOCK_BYTES", 150 * (4 * 6 + 1024 + 64))
    monkeypatch.setattr(search, "GROUP_ROWS", 130)
    monkeypatch.setattr(search, "CHUNK_ROWS", 40)


def test_pieces_change_nothing(tmp_path, small_pieces):
    run, features, _ = make_run(tmp_path, sizes=(120, 100, 180))
    stage.neighbors(run, k=6)
    positions, similarity, _ = lists_of(run)
    wanted = expected(features, 6)
    np.testing.assert_array_equal(positions, wanted.positions)
    np.testing.assert_allclose(similarity, wanted.similarity, atol=1e-6)


def test_by_cells_the_recall_is_measured_and_holds(tmp_path, small_pieces):
    run, features, _ = make_run(tmp_path, sizes=(400, 300, 500))
    counts = stage.neighbors(run, k=5, exact_pairs=0)
    positions, similarity, _ = lists_of(run)
    wanted = expected(features, 5)
    assert not counts["exact"] and 1 < counts["probes"] < counts["cells"]
    assert recall(positions, wanted.positions) == pytest.approx(counts["recall"], abs=0.02)
    assert counts["recall"] >= 0.95
    assert (np.diff(similarity) <= 0).all() and (similarity <= wanted.similarity + 1e-6).all()


def bytes_of(run):
    return {path.name: path.read_bytes() for path in Path(run.uri, "neighbors").glob("*.parquet")}


def test_again_nothing_is_searched_and_after_new_decisions_only_votes_change(tmp_path, monkeypatch):
    run, _, labels = make_run(tmp_path)
    stage.neighbors(run, k=4)
    before, (lists, similarity, votes) = bytes_of(run), lists_of(run)
    monkeypatch.setattr(search, "search_group", None)  # a search would fail
    assert stage.neighbors(Run.open(run.uri), k=4)["shards_done"] == 0
    assert bytes_of(run) == before
    decided = labels.copy()
    decided[[0, 50]] = (labels[[0, 50]] + 1) % 3
    relabel(run, {0: int(decided[0]), 50: int(decided[50])})
    counts = stage.neighbors(Run.open(run.uri), k=4)
    assert counts["shards_done"] == 3 and not counts["searched"]
    again, _, voted = lists_of(run)
    np.testing.assert_array_equal(again, lists)
    np.testing.assert_allclose(voted, vote(decided, decided[lists], similarity), atol=1e-6)
    assert (voted != votes).any()


def relabel(run, labels_by_position):
    """Decisions through the command's own code."""
    from pipelines.curation import decide

    path = f"{run.uri}-decisions.csv"
    with open(path, "w") as file:
        file.write("key,decision,label\n")
        file.writelines(f"s{position:06d},relabel,{label}\n" for position, label in labels_by_position.items())
    decide.decide(run, [path], "tester")
    assert any(state is not None for state in decisions.states(run))


def test_stopped_in_the_middle_it_goes_on_from_there(tmp_path, monkeypatch, small_pieces):
    run, _, _ = make_run(tmp_path / "a", sizes=(120, 100, 180))
    real, calls = search.search_group, []

    def dies(group, parts, plan):
        if group == 2:
            raise KeyboardInterrupt
        return real(group, parts, plan)

    monkeypatch.setattr(search, "search_group", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.neighbors(run, k=6, exact_pairs=0)
    monkeypatch.setattr(search, "search_group", real)
    monkeypatch.setattr(search, "_lists", lambda *a, inner=search._lists: calls.append(1) or inner(*a))
    stage.neighbors(run, k=6, exact_pairs=0)
    groups = -(-400 // 130)
    assert len(calls) == groups - 2
    undisturbed, _, _ = make_run(tmp_path / "b", sizes=(120, 100, 180))
    stage.neighbors(undisturbed, k=6, exact_pairs=0)
    np.testing.assert_array_equal(lists_of(run)[0], lists_of(undisturbed)[0])
    assert not list((tmp_path / "a" / "run" / ".parts").glob("neighbors*"))


@pytest.mark.parametrize("sizes", [(1,), (2, 1)])
def test_a_sample_or_three(tmp_path, sizes):
    run, _, _ = make_run(tmp_path, sizes=sizes, labelled=False)
    assert stage.neighbors(run, k=30)["duplicates"] == 0
    positions, _, votes = lists_of(run)
    assert positions.shape == (sum(sizes), sum(sizes) - 1)
    assert np.isnan(votes).all()


def test_another_encoder_is_refused(tmp_path):
    run, other = make_run(tmp_path / "a")[0], make_run(tmp_path / "b", dim=5)[0]
    with pytest.raises(UserError, match="same encoder"):
        stage.neighbors(run, 5, other, "b")
