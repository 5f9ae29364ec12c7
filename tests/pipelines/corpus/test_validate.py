"""What is found in a shard, task by task, without Ray."""

import pytest

from pipelines.corpus.shards import expand_shards
from pipelines.corpus.validate import EXAMPLES, Check, Findings, kind_of, validate_shard
from pipelines.runs.record import Shard


@pytest.fixture
def look(tmp_path, make_shard):
    """look(samples, check=…, cut=bytes) -> Findings of one shard."""

    def look(samples=(), check=None, cut=0, **options):
        path = tmp_path / "shard.tar"
        make_shard(path, samples, **options)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        return validate_shard(7, expand_shards(str(path))[0], check or Check(decode_every=1))

    return look


def kinds(found):
    return {reason: (count, kind_of(found.examples[reason][0])) for reason, count in found.reasons.items()}


def test_good_samples(look, make_image):
    found = look([(f"k{i}", {"jpg": make_image(i, size=40 + i), "cls": str(i % 2).encode()}) for i in range(5)])
    assert (found.samples, found.left_out, found.decoded, found.undecodable) == (5, 0, 5, 0)
    assert found.labels == {0: 3, 1: 2} and found.formats == {"jpeg": 5} and found.sizes == {64: 5}
    assert found.bytes > found.image_bytes > 0 and not found.reasons


def test_what_is_left_out_and_why(look, make_image):
    good = make_image(0)
    found = look(
        [
            ("a", {"jpg": good, "cls": b"0"}),
            ("b", {"jpg": good}),
            ("c", {"jpg": good, "cls": b"cat"}),
            ("d", {"jpg": good, "cls": b"-1"}),
            ("a", {"jpg": good, "cls": b"0"}),
            ("e", {"cls": b"0"}),
            ("../f", {"jpg": good, "cls": b"0"}),
            ("g", {"jpg": b"no image", "cls": b"1"}),
        ]
    )
    assert (found.samples, found.left_out, found.undecodable) == (8, 6, 1)
    assert sorted(kind for _, kind in kinds(found).values()) == [
        "image",
        "image",
        "key",
        "key",
        "label",
        "label",
        "label",
    ]
    assert found.examples["duplicate key: an earlier sample of this shard has it"][0]["row"] == 4
    assert found.labels == {0: 1, 1: 1}


def test_a_cut_tar(look, make_image):
    found = look([(f"k{i}", {"jpg": make_image(i, size=100), "cls": b"0"}) for i in range(4)], cut=12_000)
    assert found.unreadable == 1 and 0 < found.samples < 4
    [(reason, (count, kind))] = kinds(found).items()
    assert (count, kind) == (1, "tar") and found.examples[reason][0]["row"] is None


def test_only_some_images_are_decoded(look, make_image):
    samples = [(f"k{i}", {"jpg": make_image(i) if i % 4 else b"bad", "cls": b"0"}) for i in range(9)]
    found = look(samples, Check(decode_every=4))
    assert (found.decoded, found.undecodable) == (3, 3)


def test_labels_of_a_json_field_and_names(look, make_image):
    found = look([("a", {"jpg": make_image(0), "json": b'{"y": "dog"}'})], Check("json:y", ("cat", "dog")))
    assert found.labels == {1: 1}


def test_findings_add_up_and_keep_the_first_examples():
    total = Findings()
    for shard in range(5):
        part = Findings(samples=1, left_out=1)
        part.leave_out({"shard": shard, "row": 0, "key": "k", "member": None, "reason": f"label {shard} is odd"})
        total.add(part)
    assert total.samples == 5 and total.reasons == {"label # is odd": 5}
    assert [entry["shard"] for entry in total.examples["label # is odd"]] == list(range(EXAMPLES))


def test_a_shard_that_is_gone_is_the_storages_fault(monkeypatch):
    monkeypatch.setenv("HARDSET_STORAGE_RETRY_S", "0")
    with pytest.raises(OSError, match="not there any more"):
        validate_shard(0, Shard("/nowhere/x.tar", 10, 0), Check())
