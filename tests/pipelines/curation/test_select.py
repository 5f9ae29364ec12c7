"""The distributed selection equals sorting, and what comes out is what went in."""

import hashlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ops.draws import uniform
from ops.ranks import sortable
from pipelines.curation import subsets
from pipelines.curation.rules import Rule
from pipelines.curation.select import NothingPasses, select
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import UserError
from tests.pipelines.synthetic import make_run, picture

pytestmark = pytest.mark.usefixtures("ray_session")


def with_scores(folder, values, **options):
    """A run with a column group `toy` of one score."""
    run, _, labels = make_run(folder, **options)
    start = 0
    for shard in range(len(run.shards)):
        keys = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["key", "shard", "row", "label"])
        part = pa.array(values[start : start + keys.num_rows], pa.float32())
        column_groups.write(
            run.uri, "toy", shard, keys.append_column("score", part), f"toy {hashlib.sha256(values).hexdigest()}"
        )
        start += keys.num_rows
    return run, labels


def manifest(run, name):
    return pq.read_table(run.path("subsets", name, "manifest.parquet"))


def expected_keys(values, count, chosen_from=None):
    """By a stable sort: the highest first, ties in corpus order."""
    order = np.argsort(-values, kind="stable")
    order = [i for i in order if np.isfinite(values[i]) and (chosen_from is None or chosen_from[i])]
    return {f"s{i:06d}" for i in order[:count]}


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_sortable_keeps_the_order(values):
    values = np.array(values, np.float32)
    order = np.argsort(values, kind="stable")
    keys = sortable(values[order]).astype(np.int64)
    assert (np.diff(keys) >= 0).all()
    assert (np.diff(sortable(values[order], lowest=True).astype(np.int64)) <= 0).all()


def test_top_takes_exactly_the_highest_ties_in_shard_order(tmp_path):
    values = np.random.default_rng(0).integers(-3, 4, 100).astype(np.float32)
    values[[7, 60]] = np.nan
    run, _ = with_scores(tmp_path, values)
    assert select(run, Rule("toy.score", 37), "a")["samples"] == 37
    assert set(manifest(run, "a")["key"].to_pylist()) == expected_keys(values, 37)


def test_a_fraction_of_every_class(tmp_path):
    values = np.random.default_rng(1).normal(size=100).astype(np.float32)
    run, labels = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 0.2, per_class=True), "a")
    expected = set().union(*(expected_keys(values, round(0.2 * (labels == c).sum()), labels == c) for c in range(3)))
    assert set(manifest(run, "a")["key"].to_pylist()) == expected


def test_lowest(tmp_path):
    values = np.random.default_rng(2).normal(size=100).astype(np.float32)
    run, _ = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 5, lowest=True), "a")
    assert set(manifest(run, "a")["key"].to_pylist()) == expected_keys(-values, 5)


def test_the_subset_holds_the_original_bytes_and_webdataset_reads_it(tmp_path):
    values = (np.arange(100) * 37 % 100).astype(np.float32)
    run, labels = with_scores(tmp_path, values)
    entry = select(run, Rule("toy.score", 0.3), "hard", samples_per_shard=10)
    tars = sorted((tmp_path / "run/subsets/hard").glob("*.tar"))
    assert entry["shards"] == len(tars) > 1
    samples = list(webdataset.WebDataset([str(t) for t in tars], shardshuffle=False))
    chosen = np.flatnonzero(values >= 70)
    assert [s["__key__"] for s in samples] == [f"s{index:06d}" for index in chosen]
    for index, sample, row in zip(chosen, samples, manifest(run, "hard").to_pylist(), strict=True):
        assert (sample["png"], sample["txt"]) == (picture(int(index)), b"kept")
        assert int(sample["cls"]) == labels[index] == row["label"]
        assert row["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert (row["score"], row["subset_key"]) == (values[index], sample["__key__"])
    with tarfile.open(tars[0]) as tar:
        assert all(member.mtime == 0 for member in tar)
    uids = np.load(tmp_path / "run/subsets/hard/uids.npy")
    assert uids.dtype == np.dtype("u8,u8") and len(uids) == 30 and (np.sort(uids) == uids).all()
    card = (tmp_path / "run/subsets/hard/README.md").read_text()
    assert "30 samples" in card and "30 % with the highest toy.score" in card


def test_again_it_is_skipped_and_another_rule_replaces_it(tmp_path):
    values = np.arange(100, dtype=np.float32)
    run, _ = with_scores(tmp_path, values)
    assert not select(run, Rule("toy.score", 50), "a", samples_per_shard=5)["skipped"]
    assert select(run, Rule("toy.score", 50), "a", samples_per_shard=5)["skipped"]
    select(run, Rule("toy.score", 3), "a")
    assert len(list((tmp_path / "run/subsets/a").glob("*.tar"))) == 1


def chosen(run, name):
    return set(manifest(run, name)["key"].to_pylist())


def test_a_fraction_is_of_the_samples_that_pass(tmp_path):
    values = np.random.default_rng(3).normal(size=100).astype(np.float32)
    run, labels = with_scores(tmp_path, values)
    passes = (labels != 1) & (values < 0.5)
    entry = select(run, Rule("toy.score", 0.1, where="embeddings.label <> 1 and toy.score < 0.5"), "a")
    assert (entry["scored"], entry["passed"]) == (100, passes.sum())
    assert chosen(run, "a") == expected_keys(values, round(0.1 * passes.sum()), passes)
    select(run, Rule("toy.score", 0.5, per_class=True, where="toy.score < 0.5"), "b")
    expected = set()
    for label in range(3):
        mine = (labels == label) & (values < 0.5)
        expected |= expected_keys(values, round(0.5 * mine.sum()), mine)
    assert chosen(run, "b") == expected


def test_other_subsets_are_left_out(tmp_path):
    values = np.random.default_rng(4).normal(size=100).astype(np.float32)
    run, _ = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 10), "first")
    select(run, Rule("toy.score", 10, lowest=True), "last")
    select(run, Rule("toy.score", 0.25, exclude=("first", "last")), "a")
    order = np.argsort(-values, kind="stable")
    assert chosen(run, "a") == {f"s{i:06d}" for i in order[10:30]}
    with pytest.raises(UserError, match=r"nothing: .* has no subset of that name, it has a, first, last"):
        select(run, Rule("toy.score", 3, exclude=("nothing",)), "b")
    with pytest.raises(UserError, match="its own samples"):
        select(run, Rule("toy.score", 3, exclude=("a",)), "a")


def test_a_random_control_has_the_size_and_the_pool_of_the_rule(tmp_path):
    values = np.random.default_rng(5).normal(size=600).astype(np.float32)
    values[::7] = np.nan
    run, _ = with_scores(tmp_path, values, sizes=(200, 150, 250))
    pool = {f"s{i:06d}" for i in np.flatnonzero(values < 0)}
    drawn = []
    for seed in range(3):
        select(run, Rule("toy.score", 0.3, where="toy.score < 0", random=True, seed=seed), f"r{seed}")
        drawn.append(chosen(run, f"r{seed}"))
        assert drawn[-1] < pool and len(drawn[-1]) == round(0.3 * len(pool))
    assert len(drawn[0] & drawn[1]) < 0.6 * len(drawn[0]) and drawn[1] != drawn[2]
    # The samples that a training of the same seed holds out are another draw.
    numbers = np.concatenate([uniform(0, shard, np.arange(size)) for shard, size in enumerate((200, 150, 250))])
    held = {f"s{i:06d}" for i in np.flatnonzero(numbers < 0.3)}
    assert len(drawn[0] & held) < 0.6 * len(drawn[0])


def test_strata_are_equally_full_and_give_equally_many(tmp_path):
    values = np.random.default_rng(6).exponential(size=300).astype(np.float32)
    run, labels = with_scores(tmp_path, values, sizes=(100, 120, 80))
    select(run, Rule("toy.score", 60, stratify=("toy.score", 6)), "a")
    rank = np.argsort(np.argsort(values))
    taken = np.array([int(key[1:]) for key in chosen(run, "a")])
    assert np.bincount(rank[taken] // 50).tolist() == [10] * 6
    select(run, Rule("toy.score", 60, stratify=("toy.score", 6), seed=1), "b")
    assert len(chosen(run, "a") & chosen(run, "b")) < 40
    select(run, Rule("toy.score", 9, stratify=("toy.score", 3), per_class=True), "c")
    taken = np.array([int(key[1:]) for key in chosen(run, "c")])
    for label in range(3):
        mine = np.flatnonzero(labels == label)
        edges = np.sort(values[mine])[[len(mine) // 3 - 1, 2 * len(mine) // 3 - 1]]
        found = values[taken[labels[taken] == label]]
        assert np.bincount(np.searchsorted(edges, found)).tolist() == [3, 3, 3]


def test_strata_of_a_score_with_ties_give_what_they_have(tmp_path):
    values = np.repeat(np.float32([0, 1, 2]), [90, 6, 4])
    run, _ = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 30, stratify=("toy.score", 10)), "a")
    found = np.bincount([int(row["score"]) for row in manifest(run, "a").to_pylist()])
    assert found.sum() == 30 and found[1] + found[2] == 10  # 4 and 6 share the interval above the ties


def test_nothing_left_is_the_users_mistake_and_leaves_what_was_there(tmp_path):
    run, _ = with_scores(tmp_path, np.arange(100, dtype=np.float32))
    select(run, Rule("toy.score", 7), "a")
    with pytest.raises(NothingPasses, match=r"where 'toy.score < 0': none of the 100 samples"):
        select(run, Rule("toy.score", 0.5, where="toy.score < 0"), "a")
    assert len(chosen(run, "a")) == 7


def test_the_manifest_says_what_the_subset_is(tmp_path):
    run, _ = with_scores(tmp_path, np.arange(100, dtype=np.float32))
    rule = Rule("toy.score", 0.5, where="toy.score > 10 and toy.label < 9")
    entry = select(run, rule, "a")
    told = subsets.facts_of(run.uri, "a")
    assert told["source"] == entry["source"] and told["told"]["where"] == rule.where and told["samples"] == 44
    card = (tmp_path / "run/subsets/a/README.md").read_text()
    assert str(rule) in card and rule.where in card
    # Only the manifest is believed, not the record of the stage.
    (tmp_path / "run/subsets/a/manifest.parquet").unlink()
    assert subsets.facts_of(run.uri, "a") is None
    assert not select(run, rule, "a")["skipped"]
    next((tmp_path / "run/subsets/a").glob("*.tar")).unlink()
    assert not select(run, rule, "a")["skipped"] and select(run, rule, "a")["skipped"]


def test_a_column_of_the_condition_that_changed_makes_the_subset_anew(tmp_path):
    values = np.arange(100, dtype=np.float32)
    run, _ = with_scores(tmp_path, values)
    rule = Rule("toy.score", 5, where='"other/x".flag')
    for source, flags in (("1", values < 50), ("2", values < 40)):
        for shard, start in enumerate((0, 40, 65)):
            keys = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["key", "shard", "row", "label"])
            part = pa.array(flags[start : start + keys.num_rows])
            column_groups.write(run.uri, "other/x", shard, keys.append_column("flag", part), source)
        assert not select(run, rule, "a")["skipped"]
        assert chosen(run, "a") == expected_keys(values, 5, flags)


def test_a_subset_is_replaced_whole_or_not_at_all(tmp_path):
    run, _ = with_scores(tmp_path, np.arange(100, dtype=np.float32))
    select(run, Rule("toy.score", 7), "a")
    (tmp_path / "shards/train-000002.tar").unlink()  # the storage fails in the middle
    with pytest.raises(OSError, match="not there any more"):
        select(run, Rule("toy.score", 80), "a", samples_per_shard=5)
    assert len(chosen(run, "a")) == 7 and len(list((tmp_path / "run/subsets").iterdir())) == 1


@pytest.mark.parametrize("link", ["subsets", "subsets/a"])
def test_no_link_leads_out_of_the_run(tmp_path, link):
    run, _ = with_scores(tmp_path, np.arange(100, dtype=np.float32))
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / "a" / "precious").write_text("mine")
    (tmp_path / "run" / link).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / link).symlink_to(outside if link == "subsets" else outside / "a")
    with pytest.raises(UserError, match="is a link"):
        select(run, Rule("toy.score", 7), "a")
    assert [p.name for p in outside.rglob("*")] == ["a", "precious"]


def test_a_name_is_no_markup_in_the_card(tmp_path):
    run, _ = with_scores(tmp_path, np.arange(100, dtype=np.float32))
    name = "x](http:) <b>`|*_{a,b}"
    name = name.replace("/", "").replace(":", "")
    select(run, Rule("toy.score", 3, where="toy.key <> '`x`'"), name)
    card = (tmp_path / "run/subsets" / name / "README.md").read_text()
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title == r"# x\]\(http\) \<b\>\`\|\*\_\{a,b\}: 3 samples"
    assert "``3 with the highest toy.score, where toy.key <> '`x`'``" in card


@pytest.mark.parametrize("by", ["toy.nothing", "nothing.score", "score"])
def test_a_column_that_is_not_there_is_named(tmp_path, by):
    run, _ = with_scores(tmp_path, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match=by):
        select(run, Rule(by, 3), "a")


@pytest.mark.parametrize("count", [0, -1, 1.5, 0.0])
def test_a_count_that_cannot_be(count):
    with pytest.raises(ValueError, match="a fraction in"):
        Rule("toy.score", count)


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".."])
def test_a_name_stays_inside_the_run(tmp_path, name):
    run, _ = with_scores(tmp_path, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match=r"^name "):
        select(run, Rule("toy.score", 3), name)
