"""Batches: every sample on some rank, as often as it should, with its own columns; the same again for the same seed."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.runs import column_groups
from pipelines.training.decode import Augmentation, PictureDecoder, ahead
from pipelines.training.groups import GroupRule, Resampling
from pipelines.training.ingest import Loader, share_of
from pipelines.training.source import Source
from pipelines.training.survey import check_trainable, moments, survey
from tests.pipelines.synthetic import make_run

SIZES = (40, 25, 35)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 100 samples with score/ = (value: its number, rmd) and shard 1's rows 3 and 7 quarantined."""
    run, features, labels = make_run(tmp_path_factory.mktemp("ingest"), SIZES)
    table = column_groups.read(run.uri, "embeddings", 1)
    facts = column_groups.facts(run.uri, "embeddings", 1)
    kept = table.filter(pa.array([row not in (3, 7) for row in range(25)]))
    column_groups.write(run.uri, "embeddings", 1, kept, facts.pop("source"), **facts | {"rows": 23, "left_out": 2})
    first = 0
    for shard, size in enumerate(SIZES):
        numbers = np.arange(first, first + size)
        keys = {"key": [f"s{n:06d}" for n in numbers], "shard": [shard] * size, "row": list(range(size))}
        score = keys | {"value": pa.array(numbers, pa.float32())}
        column_groups.write(run.uri, "score", shard, pa.table(score), "by hand")
        first += size
    return run, np.delete(features, [43, 47], axis=0), np.delete(labels, [43, 47])


def loader(run, input="embeddings", resident=True, **options):
    source = Source.of(run[0], input=input, columns=("score.value",), image_size=8)
    cache = {"cache_bytes": 1 << 30 if resident else 0}
    counts = options.pop("counts", (40, 23, 35))
    return Loader(source, counts, options.pop("batch_size", 16), width=6, **cache, **options)


def indexes(batches):
    return [index for batch in batches for index in batch.index.tolist()]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("input", ["embeddings", "images"])
@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_holds_every_sample_and_ranks_have_equally_many_batches(run, input, resident, world):
    loaders = [loader(run, input, resident, rank=rank, world=world, window=20) for rank in range(world)]
    epochs = [list(each.epoch(0)) for each in loaders]
    assert {len(batches) for batches in epochs} == {loaders[0].steps}
    assert len({tuple(len(b.labels) for b in batches) for batches in epochs}) == 1
    seen = Counter(index for batches in epochs for index in indexes(batches))
    assert set(seen) == set(range(98))
    assert sum(seen.values()) - 98 <= world - 1


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("input", ["embeddings", "images"])
def test_a_sample_comes_with_its_own_label_vector_picture_and_column(run, input, resident):
    _, features, labels = run
    numbers = np.delete(np.arange(100), [43, 47])
    for batch in loader(run, input, resident).epoch(1):
        index = batch.index.numpy()
        assert np.array_equal(batch.labels, labels[index])
        assert np.array_equal(batch.values["score.value"], numbers[index])
        if input == "embeddings":
            assert np.array_equal(batch.inputs, features[index])
        else:  # picture n is of the grey value n
            assert batch.inputs.shape[1:] == (3, 8, 8) and batch.inputs.dtype == torch.uint8
            assert np.array_equal(batch.inputs[:, 0, 0, 0], numbers[index])


@pytest.mark.parametrize("resident", [True, False])
def test_order_follows_from_seed_and_epoch(run, resident):
    def order(seed, epoch):
        return indexes(loader(run, resident=resident, seed=seed, window=20).epoch(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 0) != sorted(order(0, 0))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_each_sample_once_in_order(run, resident, world):
    loaders = [loader(run, resident=resident, rank=rank, world=world, training=False) for rank in range(world)]
    assert [i for each in loaders for i in indexes(each.epoch())] == list(range(98))
    assert [len(list(each.epoch())) for each in loaders] == [each.steps for each in loaders]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_upsampling_repeats_the_upper_group(run, resident, world, ray_session):
    rule = GroupRule.parse("score.value:90")
    resampling = Resampling(rule, (1, 3))
    found = survey(loader(run).source, 3, rule)
    loaders = [
        loader(run, resident=resident, rank=r, world=world, resampling=resampling, expanded=found.expanded(resampling))
        for r in range(world)
    ]
    seen = Counter(i for each in loaders for i in indexes(each.epoch(2)))
    assert sum(seen.values()) == 98 + 2 * 10
    assert all(seen[i] == (3 if i >= 88 else 1) for i in range(98))


@pytest.mark.parametrize("resident", [True, False])
def test_balancing_makes_groups_equally_frequent(run, resident):
    rule = GroupRule.parse("score.value:90")
    resampling = Resampling(rule, (98 / 2 / 88, 98 / 2 / 10))
    each = loader(run, resident=resident, resampling=resampling, window=20)
    epochs = [indexes(each.epoch(e)) for e in range(20)]
    assert all(len(epoch) == 98 for epoch in epochs)
    hard = np.mean([index >= 88 for epoch in epochs for index in epoch])
    assert 0.45 < hard < 0.55


def test_held_out_samples_are_the_others(run):
    def part(name):
        source = Source.of(run[0], input="embeddings", part=name, holdout=0.3, seed=5)
        return {(s, row) for s in range(3) for row in source.keys(s)["row"].to_pylist()}

    assert part("train") | part("holdout") == part("all") and not part("train") & part("holdout")
    assert 15 <= len(part("holdout")) <= 45


def test_survey_counts_classes_groups_and_means(run, ray_session):
    _, features, labels = run
    rule = GroupRule.parse("score.value:q2", by_class=True, num_classes=3).resolve(run[0])
    found = survey(loader(run).source, 3, rule)
    assert found.counts == (40, 23, 35)
    assert np.array_equal(found.class_counts, np.bincount(labels))
    numbers = np.delete(np.arange(100), [43, 47])
    halves = found.group_counts.reshape(2, 3)
    assert halves[0].sum() == 49 and np.array_equal(halves.sum(axis=0), np.bincount(labels))
    assert found.means["score.value"] == pytest.approx(numbers.mean())
    mean, std = moments(loader(run).source, 6)
    np.testing.assert_allclose(mean, features.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(std, features.std(axis=0), atol=1e-5)


def test_what_cannot_be_trained_on_is_said_before(run, ray_session):
    rule = GroupRule.parse("score.value:1000")
    with pytest.raises(ValueError, match="has no samples"):
        check_trainable(survey(loader(run).source, 3, rule), list("abc"), rule)
    for column, problem in (("score.nothing", "no column 'nothing'"), ("absent.x", "no absent/")):
        with pytest.raises(ValueError, match=problem):
            survey(Source.of(run[0], input="embeddings", columns=(column,)), 3)
    column_groups.write(run[0].uri, "partial", 0, column_groups.read(run[0].uri, "score", 0).slice(0, 30), "x")
    column_groups.write(run[0].uri, "partial", 1, column_groups.read(run[0].uri, "score", 1), "x")
    column_groups.write(run[0].uri, "partial", 2, column_groups.read(run[0].uri, "score", 2), "x")
    with pytest.raises(ValueError, match="10 of 98 samples"):
        survey(Source.of(run[0], input="embeddings", columns=("partial.value",)), 3)


@pytest.mark.parametrize(
    "text",
    ["difficulty.rmd", "difficulty.rmd:", "rmd:5", "difficulty.rmd:5,5", "difficulty.rmd:q1", "difficulty.rmd:x"],
)
def test_a_group_rule_that_says_nothing(text):
    with pytest.raises(ValueError):
        GroupRule.parse(text)


@pytest.mark.parametrize("counts, world", [([5, 0, 7], 2), ([1], 3), ([3, 3, 3, 3], 5), ([100, 1], 4)])
def test_shares_cover_all_positions_and_are_equal(counts, world):
    order = list(reversed(range(len(counts))))
    shares = [share_of(counts, order, rank, world) for rank in range(world)]
    taken = [[(p.shard, i) for p in share for i in range(p.start, p.stop)] for share in shares]
    assert {len(part) for part in taken} == {-(-sum(counts) // world)}
    assert set().union(*taken) == {(s, i) for s, n in enumerate(counts) for i in range(n)}


def test_augmentation_is_a_crop_of_the_padded_picture_and_reproducible():
    images = torch.randint(1, 256, (32, 3, 8, 8), dtype=torch.uint8)
    augmentation = Augmentation.named("crop_flip", 8)
    out = augmentation(images, torch.Generator().manual_seed(3))
    assert torch.equal(out, augmentation(images, torch.Generator().manual_seed(3)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for image, source in zip(out, padded):
        crops = [source[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(-1)) for crop in crops)
    assert Augmentation.named("randaugment", 8)(images, torch.Generator().manual_seed(3)).shape == images.shape


def test_an_error_ahead_is_raised_where_the_items_are_taken():
    def items():
        yield 1
        raise OSError("storage")

    with pytest.raises(OSError, match="storage"):
        list(ahead(items()))


def test_a_shard_that_is_gone_is_a_storage_error(tmp_path):
    run, _, _ = make_run(tmp_path, (5, 5))
    (tmp_path / "shards" / "train-000001.tar").unlink()
    source = Source.of(run, input="images", image_size=8)
    with pytest.raises(OSError, match="train-000001"):
        list(Loader(source, (5, 5), 4).epoch(0))


def test_pictures_of_other_shapes_are_cut_square():
    stream = io.BytesIO()
    Image.new("RGB", (60, 20), (10, 200, 30)).save(stream, "PNG")
    picture = PictureDecoder(16, 10_000).decode(stream.getvalue())
    assert picture.shape == (3, 16, 16) and picture[:, 8, 8].tolist() == [10, 200, 30]
