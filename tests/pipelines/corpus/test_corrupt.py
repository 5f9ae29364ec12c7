"""Corrupted shards: the same samples, labels and order, other pixels; nothing is done twice."""

import tarfile

import numpy as np
import pytest
import torch

from ops.corruptions import corrupt
from ops.decoding import decode_image
from pipelines.corpus.corrupt import FAMILIES, corrupt_shards, named_kinds, output_names
from pipelines.corpus.shards import expand_shards
from pipelines.runs.record import Shard

pytestmark = pytest.mark.usefixtures("ray_session")


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


@pytest.fixture
def shards(tmp_path, make_image, make_shard):
    for number in range(2):
        samples = [
            (f"{number}_{i}", {"jpg": make_image(10 * number + i), "cls": str(i % 3).encode(), "json": b"{}"})
            for i in range(5)
        ]
        make_shard(tmp_path / "in" / f"s-{number}.tar", samples)
    return expand_shards(str(tmp_path / "in"))


def test_images_are_corrupted_and_all_else_is_kept(shards, tmp_path):
    out = tmp_path / "out"
    counts = corrupt_shards(shards, str(out), ["gaussian_noise"], [1, 4], seed=3)
    assert (counts["samples"], counts["left_out"], counts["shards_done"]) == (20, 0, 4)
    original, found = members(shards[1].url), members(out / "gaussian_noise-4" / "s-1.tar")
    assert list(found) == [name.replace(".jpg", ".png") for name in original]
    assert found["1_2.cls"] == original["1_2.cls"] and found["1_2.json"] == b"{}"
    expected = corrupt(decode_image(original["1_2.jpg"]), "gaussian_noise", 4, (3, 1, 2))
    assert torch.equal(decode_image(found["1_2.png"]), expected)
    mild, strong = (
        np.mean([
            (decode_image(members(out / f"gaussian_noise-{s}" / "s-0.tar")[f"0_{i}.png"]).float()
             - decode_image(members(shards[0].url)[f"0_{i}.jpg"]).float()).abs().mean().item()
            for i in range(5)
        ])
        for s in (1, 4)
    )  # fmt: skip
    assert strong > mild > 0


def test_again_nothing_is_written_another_seed_writes_all(shards, tmp_path):
    out = tmp_path / "out"
    corrupt_shards(shards, str(out), ["fog"], [2])
    before = {path: path.read_bytes() for path in out.rglob("*.tar")}
    assert corrupt_shards(shards, str(out), ["fog"], [2])["shards_skipped"] == 2
    assert before == {path: path.read_bytes() for path in out.rglob("*.tar")}
    assert corrupt_shards(shards, str(out), ["fog"], [2], seed=1)["shards_done"] == 2


def test_bad_samples_are_left_out_and_a_cut_shard_keeps_what_is_whole(tmp_path, make_image, make_shard):
    samples = [
        ("a", {"jpg": make_image(1)}),
        ("b", {"jpg": b"no image"}),
        ("c", {"cls": b"1"}),
        ("d", {"jpg": make_image(2)}),
    ]
    make_shard(tmp_path / "in" / "s.tar", samples, members=[("../e.jpg", make_image(3))])
    make_shard(tmp_path / "in" / "t.tar", [(f"k{i}", {"jpg": make_image(i)}) for i in range(4)])
    cut = tmp_path / "in" / "t.tar"
    cut.write_bytes(cut.read_bytes()[:2600])
    counts = corrupt_shards(expand_shards(str(tmp_path / "in")), str(tmp_path / "out"), ["brightness"], [3])
    assert list(members(tmp_path / "out" / "brightness-3" / "s.tar")) == ["a.png", "d.png"]
    kept = members(tmp_path / "out" / "brightness-3" / "t.tar")
    assert list(kept) == ["k0.png", "k1.png"][: len(kept)] and len(kept) >= 1
    assert counts["left_out"] == 1


def test_families_and_names():
    assert named_kinds(["noise", "fog", "fog"]) == (*FAMILIES["noise"], "fog")
    assert len(named_kinds(["all"])) == 15
    with pytest.raises(ValueError, match="kinds rain: "):
        named_kinds(["rain"])
    shards = [Shard("/a/x.tar", 1, 1), Shard("/b/x.tar", 1, 1), Shard("s3://b/y.tar?region=z", 1, 1)]
    assert output_names(shards) == ["000000-x.tar", "000001-x.tar", "y.tar"]


@pytest.mark.parametrize(
    ("kinds", "severities", "message"), [(["fog"], [0], "severities 0"), ([], [1], "at least one")]
)
def test_what_cannot_be_is_refused_before_any_work(shards, tmp_path, kinds, severities, message):
    with pytest.raises(ValueError, match=message):
        corrupt_shards(shards, str(tmp_path / "out"), kinds, severities)
    assert not (tmp_path / "out").exists()
