"""A store that answers with other bytes than it holds: no good sample goes to quarantine for it."""

import hashlib
import json
import os
from pathlib import Path

import boto3
import pytest

from pipelines.corpus.samples import LabelSource
from pipelines.corpus.shards import ShardChanged, expand_shards, read_entries
from pipelines.runs import storage
from pipelines.runs.retries import retrying
from tests.faulty_proxy import Fault


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipelines.runs.retries.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("pipelines.runs.retries.JITTER_S", 0.01)
    monkeypatch.setattr("pipelines.corpus.shards.CHUNK_BYTES", 1 << 14)


@pytest.fixture
def upload(faulty, s3_server, tmp_path, make_image, make_shard):
    """upload(parts=False) -> the only shard of a bucket behind the proxy, and its bytes: put at once, or in parts."""

    def make(parts=False):
        samples = [(f"{i:04d}", {"jpg": make_image(i, size=64), "cls": b"1"}) for i in range(80)]
        data = Path(make_shard(tmp_path / "s.tar", samples)).read_bytes()
        uri = storage.join(faulty.folder, "s.tar")
        if parts:
            with storage.write_atomic(uri) as file:
                file.write(data)
        else:
            bucket, _, key = uri.removeprefix("s3://").partition("?")[0].partition("/")
            boto3.client("s3", endpoint_url=s3_server).put_object(Bucket=bucket, Key=key, Body=data)
        return expand_shards(uri)[0], data

    return make


def read(shard):
    """Good samples, and what the end says; read again where it comes out that bytes were wrong, as the stages do."""
    end = {}
    entries = retrying(shard.url, lambda: list(read_entries(shard, LabelSource("cls"), end)))
    return sum(entry.image is not None for entry in entries), json.dumps(end)


@pytest.mark.parametrize("parts", [False, True])
def test_short_answers_that_agree_with_themselves_lose_no_sample(upload, faulty, parts):
    """Half of what was asked for, under a length and a range that match: Arrow hands out rubbish for the rest."""
    shard, data = upload(parts)
    faulty.set(lambda request: Fault(short=0.5) if request.span and request.number == 3 else None)
    good, end = read(shard)
    assert good == 80 and hashlib.sha256(data).hexdigest() in end


def test_a_flipped_bit_is_seen_where_the_store_has_a_checksum(upload, faulty):
    shard, data = upload()
    assert storage.stored_md5(shard.url) == hashlib.md5(data).hexdigest()
    faulty.set(lambda request: Fault(flip=True) if request.span and request.number == 5 else None)
    good, end = read(shard)
    assert good == 80 and hashlib.sha256(data).hexdigest() in end


def test_an_etag_that_is_no_checksum_costs_one_more_reading_once(upload, faulty, monkeypatch):
    shard, _ = upload()
    monkeypatch.setattr(storage, "stored_md5", lambda url: "0" * 32)
    counts = []
    for _ in range(2):
        faulty.set(lambda request: None)
        assert read(shard)[0] == 80
        counts.append(sum(bool(request.span) for request in faulty.seen))
    assert counts[0] == 2 * counts[1]


def test_real_damage_is_still_quarantine(upload, faulty):
    shard, data = upload()
    at = len(data) // 2 // 512 * 512
    with storage.write_atomic(shard.url) as file:
        file.write(data[:at] + os.urandom(512) + data[at + 512 :])
    good, end = read(shard)
    assert good < 80 and '"left_out": 1' in end


def test_a_shard_that_has_grown_since_is_said_at_once(upload):
    shard, data = upload()
    with storage.write_atomic(shard.url) as file:
        file.write(data + bytes(512))
    with pytest.raises(ShardChanged, match=f"instead of {len(data)}"):
        read(shard)
