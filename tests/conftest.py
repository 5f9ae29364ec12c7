"""Shared by all tests: one local Ray, a real S3 server, real images and tars."""

import io
import os
import socket
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.session import set_environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Before Ray is imported, whose workers inherit them.
set_environment()
os.environ.update(
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{_free_port()}",
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)


@pytest.fixture(scope="session")
def ray_session():
    """As in a command: a local Ray of 4 logical cores, started by what needs it; small work is done in this process."""
    from jobs.session import start_ray
    from pipelines.runs import cluster

    def start() -> None:
        start_ray(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20)

    with cluster.session(start, 4):
        yield


@pytest.fixture
def work_in_ray(ray_session, monkeypatch):
    """Everything is done by Ray's workers, however small it is; the package `ray`, connected."""
    from pipelines.runs import cluster

    monkeypatch.setattr(cluster, "small_work_stays_here", lambda: False)
    return cluster.connect()


@pytest.fixture(scope="session")
def s3_server():
    """Endpoint of a real S3 protocol server; the environment names it from the start, so Ray's workers know it too."""
    from moto.server import ThreadedMotoServer

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(endpoint.rsplit(":", 1)[1]), verbose=False)
    server.start()
    yield endpoint
    server.stop()


@pytest.fixture
def s3_folder(s3_server, request):
    """`s3://BUCKET/folder` in a fresh bucket."""
    import boto3

    bucket = "bucket-" + os.urandom(6).hex()
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/folder"


@pytest.fixture
def faulty(s3_server, s3_folder):
    """A proxy before the S3 server, and `s3_folder` through it: `faulty.set(rule)` says what goes wrong."""
    from tests.faulty_proxy import FaultyProxy

    proxy = FaultyProxy(s3_server)
    proxy.folder = f"{s3_folder}?scheme=http&endpoint_override={proxy.endpoint.removeprefix('http://')}"
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def make_image():
    """make_image(seed, size=16, format="JPEG") -> the bytes of a small picture that is not uniform."""

    def make(seed: int, size: int = 16, format: str = "JPEG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((size, size)).save(buffer, format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_shard():
    """make_shard(path, samples) -> the path, where a real tar now is; samples: (key, {suffix: bytes}) in order.

    `make_shard(path, members=[(name, bytes), …])` where names don't follow from keys.
    """

    def make(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]] = (), members=(), format=tarfile.PAX_FORMAT):
        members = [*((f"{key}.{suffix}", data) for key, parts in samples for suffix, data in parts.items()), *members]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    return make
