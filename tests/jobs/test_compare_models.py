"""hardset compare --models: trainings side by side, from what `hardset train` left in their folders."""

import json

import numpy as np
import pyarrow as pa
import pytest

from jobs import compare, train
from pipelines.runs import column_groups
from pipelines.training import trainings
from tests.pipelines.synthetic import make_run


@pytest.fixture(scope="module")
def models(tmp_path_factory, ray_session):
    """Folder of three trainings: one by `hardset train`, two that are its files with another seed, and another loss."""
    folder = tmp_path_factory.mktemp("compare-models")
    run, _, _ = make_run(folder / "run", (40, 25))
    for shard in range(2):
        table = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
        rmd = np.random.default_rng(shard).normal(size=table.num_rows).astype(np.float32)
        column_groups.write(run.uri, "difficulty", shard, table.append_column("rmd", pa.array(rmd)), "by hand")
    argv = ["--run", run.uri, "--eval-run", run.uri, "--epochs", "2", "--mlflow", "none", "--correctness", "none"]
    argv += ["--loss", "focal", "--loss-params", "gamma=2", "--groups", "difficulty.rmd:0"]
    real = folder / "models" / "focal-0"
    assert train.main([*argv, "--out", str(real)]) == 0
    vary(real, real.with_name("focal-1"), lambda config: config["recipe"].update(seed=1), nll=1.25)
    vary(
        real,
        real.with_name("plain"),
        lambda config: config.update(loss={"name": "cross_entropy", "params": {}}),
        accuracy=0.25,
    )
    config = json.loads((folder / "models" / "plain" / "train.json").read_text())["config"]
    assert config["recipe"]["seed"] == 0 and config["choices"]["groups"]["column"] == "difficulty.rmd"
    return folder / "models"


def vary(real, folder, change, **metrics):
    """A folder as a training with another config than that in `real` would have left it."""
    folder.mkdir()
    record, result = (json.loads((real / file).read_text()) for file in ("train.json", "result.json"))
    change(record["config"])
    (folder / "train.json").write_text(json.dumps(record))
    (folder / "result.json").write_text(json.dumps(result | metrics))


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def compared(capsys, *words):
    """(the table's lines as cells, the JSON)."""
    assert compare.main([*map(str, words), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell for cell in line.split("  ") if cell] for line in lines[:-1]], json.loads(lines[-1])["models"]


def test_the_table_says_what_differs_and_the_metrics_of_each_result(models, capsys):
    table, found = compared(capsys, "--models", models)
    assert [cell.strip() for cell in table[0]][:4] == ["training", "loss", "gamma", "seed"]
    assert "batch_size" not in table[0]
    assert [[cell.strip() for cell in line][:4] for line in table[1:]] == [
        ["focal-0", "focal", "2.0", "0"],
        ["focal-1", "focal", "2.0", "1"],
        ["plain", "cross_entropy", "–", "0"],
    ]
    for name, record in zip(("focal-0", "focal-1", "plain"), found):
        expected = result_of(models / name)
        assert {key: record[key] for key in ("accuracy", "ece", "ece_mass", "nll")} == {
            key: expected[key] for key in ("accuracy", "ece", "ece_mass", "nll")
        }
        assert record["finished"] and record["epochs"] == 2 and record["out"] == [str(models / name)]
    assert 0 <= found[0]["worst_group_accuracy"] <= found[0]["accuracy"]
    assert found[1]["nll"] == 1.25 and found[2]["accuracy"] == 0.25


def test_seeds_come_together_with_their_mean_and_deviation(models, capsys):
    table, found = compared(capsys, "--models", models, "--over-seeds")
    assert len(table) == 3 and table[1][0].strip() == "focal-0 (2 seeds)" and "seed" not in table[0]
    values = [result_of(models / name)["nll"] for name in ("focal-0", "focal-1")]
    assert found[0]["nll"] == pytest.approx(np.mean(values))
    assert found[0]["nll_std"] == pytest.approx(np.std(values, ddof=1))
    assert "nll_std" not in found[1]


def test_folders_can_be_named_one_by_one_and_one_that_was_stopped_says_so(models, tmp_path, capsys):
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for name in ("train.json", "curve.json"):
        (stopped / name).write_bytes((models / "focal-0" / name).read_bytes())
    table, found = compared(capsys, "--models", models / "focal-0", stopped)
    assert table[2][1].strip() == "2 (unfinished)" and [record["finished"] for record in found] == [True, False]
    last = json.loads((stopped / "curve.json").read_text())[-1]["eval"]
    assert found[1]["nll"] == last["nll"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--models", "/nowhere"), "--models /nowhere: no training there"),
        (("--models", "MODELS", "--run", "RUN"), "one of the two"),
        ((), "--run: which?"),
        (("RUN", "--over-seeds"), "--over-seeds"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(models, capsys, words, told):
    words = [{"MODELS": str(models), "RUN": str(models.parent / "run")}.get(word, word) for word in words]
    assert compare.main([*words, "--mlflow", "none"]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_training_without_an_epoch_is_refused_alone_and_passed_over_in_a_folder(models, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "train.json").write_bytes((models / "focal-0" / "train.json").read_bytes())
    with pytest.raises(ValueError, match="not finished an epoch"):
        trainings.read_trainings([str(begun)])
    with pytest.raises(ValueError, match="no training there"):
        trainings.read_trainings([str(tmp_path)])


def test_a_rule_for_groups_is_shown_as_it_was_given(models, tmp_path):
    vary(models / "focal-0", tmp_path / "all", lambda config: config["choices"].update(groups=None))
    found = trainings.read_trainings([str(models / "focal-0"), str(tmp_path / "all")])
    assert trainings.differing(found) == ["choices.groups"]
    assert [training.settings["choices.groups"] for training in found] == ["difficulty.rmd:0", None]
