"""Training: it learns, goes on after a stop as if there had been none, and treats weights and groups as it says."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ops.losses import LOSSES
from ops.models import load_classifier
from pipelines.curation.rules import Rule
from pipelines.curation.select import select
from pipelines.runs import column_groups, joins
from pipelines.runs.errors import StageFailed, UserError
from pipelines.training import loop
from pipelines.training.checkpoints import read_classifier
from pipelines.training.groups import GroupRule
from pipelines.training.loop import Recipe, lr_factor, train_classifier
from pipelines.training.objective import Grouping, LossChoice, Objective
from pipelines.training.plan import Choices, plan_training, write_correctness
from pipelines.training.run import Workers, train
from pipelines.training.source import Source
from tests.pipelines.synthetic import make_run

CE = LossChoice()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with difficulty/ (rmd random, weight = sigmoid of it), and another one over other shards to evaluate on."""
    folder = tmp_path_factory.mktemp("train")
    made = []
    for number in range(2):
        run, _, _ = make_run(folder / str(number), (40, 25, 35), seed=0)
        for shard in range(3):
            table = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
            rmd = np.random.default_rng([number, shard]).normal(size=table.num_rows).astype(np.float32)
            table = table.append_column("rmd", pa.array(rmd)).append_column("weight", pa.array(1 / (1 + np.exp(-rmd))))
            column_groups.write(run.uri, "difficulty", shard, table, "by hand")
        made.append(run)
    return made


@pytest.fixture(scope="module")
def plans(runs, ray_session, tmp_path_factory):
    """plan(name, loss=…, recipe values…, choices={…}) in a folder of that name."""
    root = tmp_path_factory.mktemp("out")

    def plan(name, loss=CE, choices=None, eval_run=None, **recipe):
        recipe = {"epochs": 4, "batch_size": 20, "lr": 0.05} | recipe
        return plan_training(runs[0], str(root / name), loss, Recipe(**recipe), Choices(**(choices or {})), eval_run)

    return plan


def test_a_subset_is_trained_on_by_its_rows(runs, plans, tmp_path):
    run = runs[0]
    select(run, Rule("difficulty.rmd", 30, where="embeddings.label <> 2"), "thirty")
    found = pq.read_table(run.path("subsets", "thirty", "manifest.parquet"))
    plan = plans("subset", choices={"subset": "thirty", "holdout": 0.2}, eval_run=runs[1])
    held = next(e.source for e in plan.evaluations if e.name == "holdout")
    parts = [{(s, r) for s in range(3) for r in source.keys(s)["row"].to_pylist()} for source in (plan.source, held)]
    assert (
        parts[0] | parts[1] == set(zip(found["shard"].to_pylist(), found["row"].to_pylist()))
        and not parts[0] & parts[1]
    )
    assert sum(plan.counts) == len(parts[0]) and sum(plan.evaluations[1].counts) == 100
    assert plan.lineage["subset"]["samples"] == 30 and plan.lineage["subset"]["name"] == "thirty"
    # Another subset of that name is another training; a run without one is the training that it was.
    select(run, Rule("difficulty.rmd", 40), "thirty")
    assert plans("again", choices={"subset": "thirty", "holdout": 0.2}).lineage["source"] != plan.lineage["source"]
    assert "subset" not in plans("whole").lineage["config"]["choices"]
    with pytest.raises(UserError, match="has no subset of that name, it has thirty"):
        plans("none", choices={"subset": "other"})


def test_rows_of_a_shard_that_was_embedded_anew_are_not_taken_for_the_subsets(tmp_path):
    run, _, _ = make_run(tmp_path)
    for shard in range(3):
        keys = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row", "label"])
        scores = pa.array(np.arange(keys.num_rows), pa.float32())
        column_groups.write(run.uri, "toy", shard, keys.append_column("score", scores), "toy")
    select(run, Rule("toy.score", 10), "ten")
    table = column_groups.read(run.uri, "embeddings", 0)
    other = pa.array([f"other{key}" for key in table["key"].to_pylist()])
    column_groups.write(run.uri, "embeddings", 0, table.set_column(0, "key", other), "new", left_out=0, max_label=2)
    with pytest.raises(UserError, match="subset ten was made before shard 0 was embedded anew"):
        Source.of(run, input="embeddings", subset="ten").keys(0)


def weights_of(folder):
    return load_classifier(folder).state_dict()


def assert_same_weights(a, b, **tolerance):
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **tolerance)


def test_a_head_learns_and_says_how_well(plans, runs):
    lines = []
    plan = plans(
        "learn", eval_run=runs[1], choices={"holdout": 0.0, "bins": GroupRule.parse("difficulty.rmd:q2")}, epochs=15
    )
    result = train_classifier(plan, after_epoch=lambda entry, done: lines.append((done, entry)))
    last = result["curve"][-1]["eval"]
    assert last["accuracy"] > 0.8 > result["curve"][0]["train_accuracy"] and last["nll"] < 0.7
    assert [step for step, _ in lines] == list(range(1, 16)) and lines[-1][1]["eval"]["accuracy"] == last["accuracy"]
    assert sum(part["samples"] for part in last["bins"]) == last["samples"] == 100
    best = load_classifier(plan.out)
    assert best.extra["epoch"] == result["best"] and best.spec.encoder_fingerprint == "0"
    assert torch.equal(read_classifier(plan.out + "/best").last.weight, best.last.weight)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer": "sgd", "schedule": "cosine", "ema": 0.9},
        {"choices": {"groups": GroupRule.parse("difficulty.rmd:0")}},
    ],
)
def test_going_on_after_a_stop_gives_the_same_weights(plans, values, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    plans_ = [plans(f"{name}{len(str(values))}", **values) for name in ("whole", "parts")]
    train_classifier(plans_[0])

    class Stop(Exception):
        pass

    def stop(metrics, epoch):
        if epoch in (1, 2):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            train_classifier(plans_[1], after_epoch=stop)
    result = train_classifier(plans_[1])
    assert len(result["curve"]) == 4
    assert_same_weights(plans_[0].out + "/last", plans_[1].out + "/last", atol=0)


def test_accumulation_does_not_change_the_step(plans):
    for name, pieces in (("one", 1), ("four", 4)):
        train_classifier(plans(name, accumulate=pieces))
    last = [plans(name).out + "/last" for name in ("one", "four")]
    assert_same_weights(*last, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if len(name) > 4])
def test_every_loss_trains(plans, name):
    choice = LossChoice.parse(name, [])
    weights = {"weights": "difficulty.weight"} if choice.argument == "weight" else {}
    result = train_classifier(plans(f"loss-{name}", choice, weights, epochs=2))
    assert np.isfinite(result["curve"][-1]["train_loss"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("nothing", []),
        ("focal", ["alpha=1"]),
        ("focal", ["gamma=-1"]),
        ("focal", ["gamma=x"]),
        ("focal", ["gamma"]),
        ("aurc", ["csf=odd"]),
    ],
)
def test_a_loss_or_parameter_that_is_not_known(name, words):
    with pytest.raises(ValueError, match=r"^loss"):
        LossChoice.parse(name, words)


def test_weights_multiply_other_losses_with_mean_one():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.randint(0, 3, (6,))
    weight = torch.tensor([0.0, 1, 2, 3, 4, 5])
    weighted = Objective(CE, "w", weight_mean=2.5)(logits, labels, {"w": weight})
    naive = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weight / 2.5).mean()
    np.testing.assert_allclose(weighted.item(), naive.item(), rtol=1e-6)
    own = Objective(LossChoice("difficulty_entropy", {"alpha": 0.5}), "w", 2.5)(logits, labels, {"w": weight})
    direct = LOSSES["difficulty_entropy"](logits, labels, weight, 0.5).mean()
    np.testing.assert_allclose(own.item(), direct.item(), rtol=1e-6)


def test_reweighting_counts_groups_equally():
    rule = GroupRule("x.y", (0.0,))
    logits, labels = torch.randn(10, 3), torch.randint(0, 3, (10,))
    values = {"x.y": torch.tensor([-1.0] * 8 + [1.0] * 2)}
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    mine = Objective(CE, grouping=Grouping(rule, (8, 2), "reweight"))(logits, labels, values)
    np.testing.assert_allclose(mine, (losses[:8].mean() + losses[8:].mean()) / 2, rtol=1e-5)


def test_correctness_is_the_frequency_of_being_right(plans, runs):
    plan = plans("history", choices={"holdout": 0.3}, epochs=3)
    result = train_classifier(plan)
    write_correctness(runs[0], plan, result["history"])
    table = pa.concat_tables(
        [joins.join(runs[0].uri, s, ["correctness.correctness", "correctness.epochs"]) for s in range(3)]
    )
    seen = table["correctness.epochs"].to_numpy()
    assert (
        table.num_rows == 100
        and set(seen) == {0, 3}
        and table["correctness.correctness"].null_count == (seen == 0).sum()
    )
    trained = table["correctness.correctness"].drop_null().to_numpy()
    mean = np.mean([epoch["train_accuracy"] for epoch in result["curve"]])
    np.testing.assert_allclose(trained.mean(), mean, atol=1e-6)


def test_images_train(plans):
    choices = {"input": "images", "model": "cifar_resnet8", "image_size": 8}
    plan = plans("images", choices=choices, epochs=1, augment="crop_flip", schedule="one_cycle", clip=1.0)
    result = train_classifier(plan)
    assert result["curve"][0]["holdout"]["samples"] + int(result["history"][1].sum()) == 100
    assert plan.spec.image_size == 8 and load_classifier(plan.out).input == "images"


def test_early_stop(plans):
    result = train_classifier(plans("patience", epochs=50, patience=2, lr=1e-9))
    assert len(result["curve"]) == 3 and result["best"] == 0


def test_divergence_is_said(plans):
    with pytest.raises(StageFailed, match="not finite"):
        train_classifier(plans("diverge", epochs=30, optimizer="sgd", lr=1e38))


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "one_cycle"])
def test_schedules_stay_within_their_peak(schedule):
    factors = [lr_factor(Recipe(schedule=schedule, warmup=0.1), p) for p in np.linspace(0, 0.999, 200)]
    assert min(factors) >= 0 and max(factors) == pytest.approx(1, abs=0.02)
    assert schedule == "constant" or factors[-1] < 0.02


def test_bad_choices_are_found_before_any_work(plans, runs, tmp_path):
    other, _, _ = make_run(tmp_path / "a", (12, 8), dim=4, seed=3)
    single, _, _ = make_run(tmp_path / "b", (12,), classes=1)
    bad = {
        "column": {"choices": {"weights": "difficulty.nothing"}},
        "no confusion/": {"choices": {"groups": GroupRule.parse("confusion.confusion:5")}},
        "no samples": {"choices": {"groups": GroupRule.parse("difficulty.rmd:1000")}},
        "same encoder": {"eval_run": other},
        "^model ": {"choices": {"model": "resnet18"}},
        "^lr ": {"lr": 0.0},
        "^sampler ": {"choices": {"sampler": "upsample"}},
        "^weights": {"loss": LossChoice("difficulty_entropy")},
        "^holdout ": {"choices": {"holdout": 0.0}},
    }
    for message, values in bad.items():
        with pytest.raises(ValueError, match=message):
            plans("bad", **values)
    with pytest.raises(ValueError, match="one class only"):
        plan_training(single, str(tmp_path), CE, Recipe(), Choices())


def test_ray_trains_like_the_plain_loop(plans, ray_session):
    rule = {"groups": GroupRule.parse("difficulty.rmd:0")}
    plain, shared = plans("plain", choices=rule, epochs=3), plans("shared", choices=rule, epochs=3)
    train_classifier(plain)
    seen = []
    result = train(shared, Workers(2, max_failures=0), watch=seen.append)
    assert [entry["epoch"] for entry in seen] == [0, 1, 2]
    # The order of the samples differs, so the numbers do, by noise.
    assert result["curve"][-1]["group_weights"] == pytest.approx(
        train_classifier(plain)["curve"][-1]["group_weights"], abs=0.05
    )
    assert int(result["history"][1].min()) == 3


def test_one_worker_trains_here_as_it_does_under_ray_train(plans, ray_session):
    here, there = plans("here", epochs=3, ema=0.9), plans("there", epochs=3, ema=0.9)
    assert Workers().here and not Workers(max_failures=0).here and not Workers(2).here
    seen: dict[str, list] = {"here": [], "there": []}
    results = [train(here, Workers(), seen["here"].append), train(there, Workers(max_failures=0), seen["there"].append)]
    assert_same_weights(here.out + "/best", there.out + "/best", atol=0)
    assert_same_weights(here.out + "/last", there.out + "/last", atol=0)
    times = ("lr", "seconds", "seconds_to_first_step", "samples_per_second")
    curves = [[{k: v for k, v in entry.items() if k not in times} for entry in seen[name]] for name in seen]
    assert curves[0] == curves[1] and [entry["epoch"] for entry in curves[0]] == [0, 1, 2]
    assert results[0]["best"] == results[1]["best"]
    assert torch.equal(results[0]["history"], results[1]["history"])


def test_short_epochs_are_saved_once_at_the_end_and_the_best_is_kept(plans, monkeypatch):
    written, write = [], loop.write_classifier

    def noted(model, uri, **extra):
        written.append((uri[-4:], extra["epoch"]))
        write(model, uri, **extra)

    monkeypatch.setattr(loop, "write_classifier", noted)
    plan = plans("short", epochs=6, lr=2.0)
    result = train_classifier(plan)
    assert written == [("best", result["best"]), ("last", 5)] and result["best"] < 5
    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    often = plans("often", epochs=6, lr=2.0)
    train_classifier(often)
    assert_same_weights(plan.out + "/best", often.out + "/best", atol=0)


def test_bfloat16_learns_nearly_the_same(plans):
    if not torch.cpu._is_avx512_bf16_supported():
        with pytest.raises(UserError, match="no instructions"):
            train_classifier(plans("half", precision="bfloat16"))
        return
    rough, exact = (train_classifier(plans(name, precision=name, epochs=6)) for name in ("bfloat16", "float32"))
    ours, theirs = (found["curve"][-1]["holdout"] for found in (rough, exact))
    assert ours["nll"] != theirs["nll"] and abs(ours["nll"] - theirs["nll"]) < 0.05
    # Runs of before the choice keep their name.
    assert "precision" not in plans("auto").lineage["config"]["recipe"]
