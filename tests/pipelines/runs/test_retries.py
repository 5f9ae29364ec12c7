"""What a storage does on a bad day: what passes is waited for, what lasts ends at once in a line that says what to do."""

import itertools
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runs import storage
from pipelines.runs.retries import RETRY_VARIABLE, StorageError, can_pass, retry_seconds
from tests.faulty_proxy import Fault, error

DATA = os.urandom(3 << 20)
OPERATIONS = {
    "look-up": lambda uri: storage.exists(uri),
    "listing": lambda uri: storage.list_files(storage.join(uri, "..").replace("/..", "")),
    "reading": lambda uri: storage.read_bytes(uri) == DATA,
    "writing": lambda uri: write(uri, DATA),
    "deleting": lambda uri: storage.remove_tree(uri),
    "footer": lambda uri: footer(uri),
}
PASSING = {
    "503": error(503, "SlowDown"),
    "500": error(500, "InternalError"),
    "429": error(429, "TooManyRequests"),
    "reset": Fault(reset=True),
    "truncated": Fault(keep=0.5),
    "slow": Fault(pause=0.3),
}
LASTING = {
    "403": (error(403, "AccessDenied"), "access is refused"),
    "expired": (error(400, "ExpiredToken"), "credentials have expired"),
    "clock": (error(403, "RequestTimeTooSkewed"), "clock differs"),
    "key": (error(403, "InvalidAccessKeyId"), "does not know these credentials"),
    "signature": (error(403, "SignatureDoesNotMatch"), "does not know these credentials"),
}


def write(uri, data):
    with storage.write_atomic(uri) as file:
        file.write(data)


def footer(uri):
    filesystem, path = storage.open_filesystem(
        storage.join(os.path.dirname(uri.partition("?")[0]), "t.parquet") + query(uri)
    )
    return pq.read_schema(path, filesystem=filesystem)


def query(uri):
    return "?" + uri.partition("?")[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits, and no tries of the client's own, before the proxy's filesystem is opened."""
    monkeypatch.setattr("pipelines.runs.retries.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("pipelines.runs.retries.JITTER_S", 0.01)
    monkeypatch.setattr("pipelines.runs.retries._waits._last", -1e9)
    monkeypatch.setattr("pipelines.runs.storage.S3_TRIES", 1)
    monkeypatch.setenv(RETRY_VARIABLE, "30")


@pytest.fixture
def uri(quick, faulty):
    """An object of 3 MiB behind the proxy, and a Parquet file beside it."""
    storage.write_parquet_atomic(pa.table({"a": [1]}), storage.join(faulty.folder, "t.parquet"))
    place = storage.join(faulty.folder, "x")
    write(place, DATA)
    return place


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(faulty, uri, operation, fault, capfd):
    faulty.set(lambda request: PASSING[fault] if request.number < 3 else None)
    OPERATIONS[operation](uri)
    faulty.set(lambda request: None)
    if operation == "deleting":
        assert not storage.exists(uri)
    else:
        assert storage.read_bytes(uri) == DATA
    if fault in ("503", "500", "429", "reset"):
        assert "trying again for up to 30 s" in capfd.readouterr().err


@pytest.mark.parametrize("operation", ["look-up", "listing", "reading", "writing", "footer"])
@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_ends_at_once_and_says_what_to_do(faulty, uri, operation, fault, capfd):
    faulty.set(lambda request: LASTING[fault][0])
    started = time.monotonic()
    with pytest.raises(StorageError, match=LASTING[fault][1]) as caught:
        OPERATIONS[operation](uri)
    assert time.monotonic() - started < 3
    assert "\n" not in str(caught.value) and "s3://" in str(caught.value)
    assert "trying again" not in capfd.readouterr().err


@pytest.mark.parametrize("operation", ["look-up", "listing", "writing"])
def test_a_missing_bucket_is_not_a_missing_file(faulty, operation):
    uri = "s3://no-such-bucket-anywhere/folder/x" + query(faulty.folder)
    with pytest.raises(StorageError, match="there is no such bucket"):
        OPERATIONS[operation](uri)


def test_the_time_is_an_option_and_ends(faulty, uri, monkeypatch):
    monkeypatch.setenv(RETRY_VARIABLE, "2")
    assert retry_seconds() == 2
    faulty.set(lambda request: error(503, "SlowDown"))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"did not answer well for \d+ s") as caught:
        storage.read_bytes(uri)
    assert 1 < time.monotonic() - started < 8
    assert "\n" not in str(caught.value)


def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(faulty, uri):
    filesystem, path = storage.open_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        assert file.read(1 << 20) == DATA[: 1 << 20]
        write(uri, os.urandom(3 << 20))
        faulty.set(lambda request: Fault(reset=True) if request.number < 9 and request.span else None)
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read(1 << 20)


def test_reading_goes_on_where_the_connection_broke(faulty, uri):
    """Every second answer is cut in half, at whatever place: the bytes are the file's."""
    filesystem, path = storage.open_filesystem(uri)
    answers = itertools.count()
    faulty.set(lambda request: Fault(keep=0.5) if request.span and next(answers) % 2 == 0 else None)
    with filesystem.open_input_stream(path, compression=None) as stream:
        pieces = []
        while piece := stream.read(1 << 20):
            pieces.append(piece)
    assert b"".join(pieces) == DATA


def test_an_aborted_upload_leaves_nothing(faulty, uri, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    faulty.set(lambda request: error(403, "AccessDenied") if request.method in ("PUT", "POST") else None)
    with pytest.raises(StorageError):
        write(uri, b"new")
    faulty.set(lambda request: None)
    assert storage.read_bytes(uri) == DATA
    assert os.listdir(tmp_path) == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (OSError("AWS Error SLOW_DOWN during ListObjectsV2 operation: Please reduce your request rate."), True),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during X operation: ExceptionName: ExpiredToken"), False),
        (OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"), True),
        (OSError("google::cloud::Status(PERMISSION_DENIED: caller does not have access) error 403"), False),
        (FileNotFoundError("gone"), False),
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("503"), False),
    ],
)
def test_which_errors_can_pass(found, passes):
    assert can_pass(found) is passes


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [10, 60])
def test_an_outage(faulty, uri, seconds, monkeypatch, capfd):
    monkeypatch.setenv(RETRY_VARIABLE, "300")
    faulty.set(lambda request: error(503, "SlowDown") if request.age < seconds else None)
    assert storage.read_bytes(uri) == DATA
    write(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    said = capfd.readouterr().err
    assert said.count("trying again") == 1 and "answers again after" in said
