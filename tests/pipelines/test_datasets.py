"""Columns for people who train elsewhere: the right values beside the right samples, in webdataset and in torch."""

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from torch.utils.data import DataLoader

from pipelines.datasets import RunDataset, with_columns
from pipelines.runs import column_groups
from tests.pipelines.synthetic import make_run

SIZES = (20, 15)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """35 samples with score.value = their number; row 4 of shard 0 quarantined."""
    run, features, labels = make_run(tmp_path_factory.mktemp("datasets"), SIZES)
    table, facts = column_groups.read(run.uri, "embeddings", 0), column_groups.facts(run.uri, "embeddings", 0)
    kept = table.filter(pa.array([row != 4 for row in range(20)]))
    column_groups.write(run.uri, "embeddings", 0, kept, facts.pop("source"), **facts | {"rows": 19, "left_out": 1})
    for shard, first in ((0, 0), (1, 20)):
        numbers = np.arange(first, first + SIZES[shard])
        score = {
            "shard": [shard] * len(numbers),
            "row": list(range(len(numbers))),
            "value": pa.array(numbers, pa.float32()),
        }
        column_groups.write(run.uri, "score", shard, pa.table(score), "by hand")
    return run, np.delete(features, 4, axis=0), np.delete(labels, 4)


def test_webdataset_samples_get_their_columns_and_the_quarantined_are_dropped(run):
    urls = [shard.url for shard in run[0].shards]
    stage = with_columns(run[0].uri, ["score.value"])
    data = webdataset.WebDataset(urls, shardshuffle=False).compose(stage).decode("torchrgb8", partial=True)
    seen = {sample["__key__"]: sample for sample in data}
    assert set(seen) == {f"s{n:06d}" for n in range(35) if n != 4}
    for key, sample in seen.items():
        number = int(key[1:])
        assert sample["score.value"] == number and sample["row"] == (number if number < 20 else number - 20)
        assert int(sample["png"][0, 0, 0]) == number


def test_a_shard_of_another_run_is_an_error(run, tmp_path, make_shard):
    url = make_shard(tmp_path / "other.tar", [("a", {"cls": b"0"})])
    data = webdataset.WebDataset(url, shardshuffle=False).compose(with_columns(run[0].uri, ["score.value"]))
    with pytest.raises(ValueError, match="no such shard"):
        list(data)


@pytest.mark.parametrize("size", [None, 8])
def test_a_torch_dataset_gives_every_sample_with_its_own_values(run, size):
    dataset = RunDataset(run[0].uri, ["score.value"], size, window=10)
    numbers = np.delete(np.arange(35), 4)
    seen = []
    for sample in dataset:
        index = int(sample["index"])
        seen.append(index)
        assert sample["score.value"] == numbers[index] and sample["label"] == run[2][index]
        if size:
            assert int(sample["image"][0, 0, 0]) == numbers[index]
        else:
            assert np.array_equal(sample["embedding"], run[1][index])
    assert sorted(seen) == list(range(34))
    dataset.set_epoch(1)
    assert [int(sample["index"]) for sample in dataset] != seen


def test_workers_of_a_data_loader_share_the_samples(run):
    loader = DataLoader(RunDataset(run[0].uri, ["score.value"]), batch_size=4, num_workers=2)
    seen = [int(index) for batch in loader for index in batch["index"]]
    assert set(seen) == set(range(34)) and len(seen) == 34
