"""The confusion score over shards equals eqs. 1-3 on the whole array; members, epochs and shards that are done are kept."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from ops.confusion import ConfusionScore
from pipelines.confusion import heads
from pipelines.confusion import score as confusion
from pipelines.confusion.heads import HeadScorer
from pipelines.confusion.members import Member, Placement, commit_epoch, find_member, load_epoch, plan_members
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")
PLAN = Placement(workers=1, cpus_per_worker=0.5)
SIZES = (120, 80, 100)


def trained(run, seeds=(0, 1), epochs=2, **options):
    training = heads.HeadTraining(batch_size=32, **options)
    return heads.train(run, members_of(run, training, seeds), training, epochs, PLAN)


def members_of(run, training, seeds):
    return plan_members(run, training.form, training.identity(1), seeds)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, ray_session):
    """A run with two linear members of two epochs and their scores; (run, features, members). Not to be written to."""
    run, features, _ = make_run(tmp_path_factory.mktemp("scored"), SIZES)
    members = trained(run)
    confusion.score(run, run, members, 2, HeadScorer, PLAN)
    return run, features, members


def column(run, name="confusion.confusion"):
    return joins.load(run.uri, [name])[name].to_numpy()


def naive_entropies(run, members, epochs, features):
    """Eqs. 1-2 in float64, one member and one epoch at a time: (n, T) in bits."""
    found = []
    for epoch in range(1, epochs + 1):
        probs = []
        for member in members:
            state = {name: tensor.double().numpy() for name, tensor in load_epoch(run.uri, member, epoch).items()}
            x = (features - state["mean"]) / state["scale"] @ state["0.weight"].T + state["0.bias"]
            if "1.weight" in state:
                x = np.maximum(x, 0) @ state["1.weight"].T + state["1.bias"]
            e = np.exp(x - x.max(axis=1, keepdims=True))
            probs.append(e / e.sum(axis=1, keepdims=True))
        mean = np.mean(probs, axis=0)
        found.append(-(mean * np.log2(mean)).sum(axis=1))
    return np.stack(found, axis=1)


def test_scores_are_those_of_the_whole_array(scored):
    run, features, members = scored
    expected = naive_entropies(run, members, 2, features)
    np.testing.assert_allclose(column(run), expected.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(column(run, "confusion.entropy_std"), expected.std(axis=1), atol=1e-5)
    table = column_groups.read(run.uri, "confusion", 1)
    assert table.schema.names == ["key", "shard", "row", "confusion", "epochs", "seeds", "entropy_std"]
    assert table["key"].to_pylist() == [f"s{index:06d}" for index in range(120, 200)]
    assert set(table["epochs"].to_pylist()) == {2} and set(table["seeds"].to_pylist()) == {2}


def test_scores_equal_the_operator_on_the_same_probabilities(scored):
    run, features, members = scored
    whole = ConfusionScore(len(features))
    for epoch in (1, 2):
        states = [load_epoch(run.uri, m, epoch) for m in members]
        x = [(torch.from_numpy(features) - s["mean"]) / s["scale"] @ s["0.weight"].T + s["0.bias"] for s in states]
        whole.update(torch.softmax(torch.stack(x), dim=2).numpy(), np.arange(len(features)))
    np.testing.assert_allclose(column(run), whole.score(), atol=1e-5)
    np.testing.assert_allclose(column(run, "confusion.entropy_std"), whole.spread(), atol=1e-5)


def test_workers_batches_and_the_cut_into_shards_do_not_matter(scored, tmp_path):
    run, _, members = scored
    recut = make_run(tmp_path, (1, 99, 70, 130))[0]
    plan = Placement(workers=4, cpus_per_worker=0.5, batch_rows=7)
    confusion.score(recut, run, members, 2, HeadScorer, plan)
    np.testing.assert_allclose(column(recut), column(run), atol=1e-5)


def test_again_nothing_is_redone_and_no_byte_changes(scored, tmp_path):
    run, _, members = scored
    before = {name: storage.read_bytes(name) for name in storage.list_files(run.uri)}
    again = Run.open(run.uri)
    assert [m.epochs for m in trained(again)] == [2, 2]
    counts = confusion.score(again, again, members, 2, HeadScorer, PLAN)
    assert (counts["shards_done"], counts["shards_skipped"]) == (0, 3)
    assert before == {name: storage.read_bytes(name) for name in storage.list_files(run.uri)}


def test_without_labels_the_scores_are_the_same_and_only_a_missing_shard_is_scored_again(scored, tmp_path):
    run, _, members = scored
    unlabelled = make_run(tmp_path, SIZES, labelled=False)[0]
    for missing, done in (([0, 1, 2], 3), ([1], 1)):
        for shard in missing:
            storage.remove_tree(unlabelled.path(f"confusion/{shard:06d}.parquet"))
        counts = confusion.score(unlabelled, run, members, 2, HeadScorer, PLAN)
        assert (counts["shards_done"], counts["shards_skipped"]) == (done, 3 - done)
        np.testing.assert_array_equal(column(unlabelled), column(run))


def test_growth_scores_the_new_shards_only(scored, tmp_path):
    run, _, members = scored
    grown = make_run(tmp_path, SIZES)[0]
    shards = grown.record["shards"]
    grown.record["shards"] = shards[:2]
    confusion.score(grown, run, members, 2, HeadScorer, PLAN)
    young = storage.read_bytes(grown.path(column_groups.file_name("confusion", 0)))
    grown.record["shards"] = list(shards)
    assert confusion.score(grown, run, members, 2, HeadScorer, PLAN)["shards_done"] == 1
    assert storage.read_bytes(grown.path(column_groups.file_name("confusion", 0))) == young
    np.testing.assert_array_equal(column(grown), column(run))


@pytest.mark.parametrize("model", ["linear", "mlp:8"])
def test_training_in_two_sittings_is_training_in_one(tmp_path, model):
    run = make_run(tmp_path / "two", SIZES)[0]
    trained(run, epochs=1, model=model)
    kept = storage.read_bytes(
        run.path(f"models/confusion/embeddings-{model.replace(':', '-')}/seed-0000/epoch-0001.safetensors")
    )
    two = trained(run, epochs=3, model=model)
    once = make_run(tmp_path / "one", SIZES)[0]
    one = trained(once, epochs=3, model=model)
    assert kept == storage.read_bytes(run.path(two[0].folder, "epoch-0001.safetensors"))
    for a, b in zip(two, one):
        for name, tensor in load_epoch(run.uri, a, 3).items():
            torch.testing.assert_close(tensor, load_epoch(once.uri, b, 3)[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([e["loss"] for e in two[0].history], [e["loss"] for e in one[0].history], rtol=1e-5)


def test_a_member_does_not_depend_on_who_trains_beside_it(tmp_path):
    run, other = make_run(tmp_path / "a", SIZES)[0], make_run(tmp_path / "b", SIZES)[0]
    many, alone = trained(run, seeds=(0, 1, 2)), trained(other, seeds=(1,))
    for name, tensor in load_epoch(run.uri, many[1], 2).items():
        torch.testing.assert_close(tensor, load_epoch(other.uri, alone[0], 2)[name], rtol=1e-4, atol=1e-5)
    weights = [load_epoch(run.uri, member, 2)["0.weight"] for member in many]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_a_kill_between_the_files_of_an_epoch_costs_that_epoch_only(tmp_path):
    run = make_run(tmp_path, SIZES)[0]
    members = trained(run, epochs=2)
    folder = tmp_path / "run" / members[0].folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(before) == [
        "epoch-0001.safetensors",
        "epoch-0002.safetensors",
        "member.json",
        "resume-0002.safetensors",
    ]
    # The third epoch was written, its record was not.
    (folder / "epoch-0003.safetensors").write_bytes(b"half")
    assert [m.epochs for m in trained(run, epochs=3)] == [3, 3]
    safetensors.torch.load((folder / "epoch-0003.safetensors").read_bytes())
    assert (folder / "epoch-0002.safetensors").read_bytes() == before["epoch-0002.safetensors"]


def test_windows_hold_every_labelled_row_once_in_another_order_each_epoch(tmp_path):
    run, features, labels = make_run(tmp_path, SIZES)
    corpus = heads.measure(run)
    windows = heads.Windows(run.uri, corpus, [0, 1], False, window_bytes=4 * 6 * 100)
    epochs = []
    for epoch in range(4):
        parts = list(windows.epoch(epoch))
        assert len(parts) > 1
        epochs.append(np.concatenate([part[0].numpy() for part in parts]))
        np.testing.assert_array_equal(np.bincount(np.concatenate([part[1] for part in parts])), np.bincount(labels))
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    for found in epochs:
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(standard, axis=0), atol=1e-4)
    assert any(not np.allclose(epochs[0], found) for found in epochs[1:])


def test_bootstrap_counts_are_poisson_and_the_members_own(tmp_path):
    run = make_run(tmp_path, (400,))[0]
    ((_, _, counts),) = heads.Windows(run.uri, heads.measure(run), [0, 1], True, 1 << 20).epoch(0)
    assert counts.shape == (2, 400) and not torch.equal(counts[0], counts[1])
    np.testing.assert_allclose(counts.mean(dim=1), 1, atol=0.2)
    np.testing.assert_allclose(counts.var(dim=1), 1, atol=0.35)


def test_another_training_is_another_member_and_more_shards_train_it_again(tmp_path):
    run = make_run(tmp_path, (40, 30))[0]
    sources = {
        members_of(run, training, [0])[0].source
        for training in (
            heads.HeadTraining(),
            heads.HeadTraining(learning_rate=0.1),
            heads.HeadTraining(bootstrap=True),
        )
    }
    assert len(sources) == 3
    trained(run, seeds=(0,), epochs=1)
    column_groups.write(run.uri, "embeddings", 1, column_groups.read(run.uri, "embeddings", 1), "changed")
    assert members_of(run, heads.HeadTraining(batch_size=32), [0])[0].epochs == 0
    assert [m.epochs for m in trained(run, seeds=(0,), epochs=1)] == [1]


def test_members_that_diverged_are_reported_and_can_be_left_out():
    def member(seed, losses, accuracy):
        return Member("f", seed, "s", tuple({"loss": loss, "accuracy": accuracy} for loss in losses))

    good, lost, chance = member(0, (1.0, 0.9), 0.8), member(1, (1.0, float("nan")), 0.1), member(2, (2.0, 2.0), 0.3)
    kept, why = confusion.usable([good, chance], 2, 0.34, drop=False)
    assert [m.seed for m in kept] == [0, 2] and set(why) == {2}
    with pytest.raises(StageFailed, match=r"seed 1: loss nan in epoch 2.*`drop_diverged`"):
        confusion.usable([good, lost], 2, 0.34, drop=False)
    assert confusion.usable([good, lost], 1, 0.05, drop=False) == ([good, lost], {})
    assert [m.seed for m in confusion.usable([good, lost, chance], 2, 0.34, drop=True)[0]] == [0]
    with pytest.raises(StageFailed, match="all 2 members diverged"):
        confusion.usable([lost, chance], 2, 0.34, drop=True)


def test_a_loss_that_is_not_a_number_survives_the_way_to_the_file_and_back(tmp_path):
    weights = {"0.weight": torch.zeros(2, 3)}
    commit_epoch(str(tmp_path), Member("f", 0, "s"), {"loss": float("nan"), "accuracy": 0.5}, weights, {})
    found = find_member(str(tmp_path), "f", 0, "s")
    assert found.epochs == 1 and found.diverged(1, 0.0).startswith("loss nan")
    assert find_member(str(tmp_path), "f", 0, "made from something else").epochs == 0


def test_heads_of_another_encoder_are_refused(scored, tmp_path):
    run = scored[0]
    other = make_run(tmp_path, (10,))[0]
    other.record["config"]["encoder_fingerprint"] = "1"
    with pytest.raises(ValueError, match=r"score_run .*same encoder"):
        confusion.check_same_encoder(run, other)


def test_a_run_without_labels_cannot_train(tmp_path):
    with pytest.raises(ValueError, match=r"labels of at least 2.*`score_run`"):
        heads.measure(make_run(tmp_path, (10,), labelled=False)[0])


@pytest.mark.parametrize("model", ["resnet18", "mlp", "mlp:0", "mlp:x", "mlp:-3"])
def test_unknown_heads_are_refused(model):
    with pytest.raises(ValueError, match=r"^model "):
        heads.HeadTraining(model=model)


def test_a_constant_feature_and_one_far_from_zero_are_standardised(tmp_path):
    run, features, _ = make_run(tmp_path, (50,), dim=3)
    table = column_groups.read(run.uri, "embeddings", 0)
    features[:, 0], features[:, 1] = 7.0, 1e4 + features[:, 1]
    moved = columns.vector_array(features, table["embedding"].type.value_type)
    table = table.set_column(table.schema.get_field_index("embedding"), "embedding", moved)
    column_groups.write(run.uri, "embeddings", 0, table, "moved", left_out=0)
    standard = heads.measure(run).standardization
    assert standard.scale[0] == 1
    np.testing.assert_allclose(standard(features).numpy().std(axis=0), [0, 1, 1], atol=1e-3)


def test_memory_of_scoring_is_one_batch_whatever_the_shard(scored):
    run, _, members = scored
    scorer = HeadScorer(run.uri, members, 2, dataclasses.replace(PLAN, batch_rows=16))
    (product,), sizes = scorer.entropies.products, []
    whole = product.logits
    product.logits = lambda x: sizes.append(len(x)) or whole(x)
    assert sum(len(found) for _, found in scorer.shard(run.uri, 0)) == 120
    assert max(sizes) == 16
