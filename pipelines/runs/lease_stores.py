"""How one of several commands gets a lease: by `flock` locally, by a conditional PUT on S3, by claims on other stores.

`flock` ends with its process, whatever ends it. On S3 the lease is created only if it is not there (If-None-Match), and
replaced and deleted only as it was read (If-Match), so that two can't both believe that they hold it. Of other object
stores only strong consistency is asked: each command writes a claim, then looks for others', and gives way if it sees one.
"""

import contextlib
import email.utils
import errno
import fcntl
import os
import random
import time
import urllib.parse
from pathlib import Path
from typing import Any, Protocol

from pipelines.runs import credentials, storage
from pipelines.runs.errors import UserError
from pipelines.runs.holder import Holder, machine
from pipelines.runs.retries import retrying

FOLDER = ".leases"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Held(Protocol):
    """A lease on some store."""

    def beat(self) -> bool:
        """Refresh it; False if another command has taken it over."""

    def release(self) -> None:
        """Give it back."""


def acquire(uri: str, product: str, ours: Holder) -> Held | Holder | None:
    """Try once: the lease, or who holds it (None: one that could not be read)."""
    name = urllib.parse.quote(product, safe="")
    folder = storage.local_path(uri)
    if folder is not None:
        return _acquire_locally(folder / FOLDER / name, ours)
    if storage.scheme_of(uri) == "s3":
        return _S3Lease.acquire(storage.join(uri, FOLDER, name), ours)
    return _Claim.acquire(storage.join(uri, FOLDER, name), ours)


def products(uri: str) -> list[str]:
    """The products of a run that have a lease, held or left by a process that died."""
    found = storage.list_files(storage.join(uri, FOLDER))
    below = (storage.split_query(name)[0].rpartition(f"/{FOLDER}/")[2] for name in found)
    return sorted({urllib.parse.unquote(name.partition("/")[0]) for name in below})


class _LocalLease:
    """A locked file. It is removed before the lock is given up, so whoever locks it looks whether it is still in its place."""

    def __init__(self, path: Path, descriptor: int, ours: Holder):
        self.path, self.descriptor, self.ours = path, descriptor, ours

    def beat(self) -> bool:
        if not _in_place(self.descriptor, self.path) or _read(self.descriptor) != self.ours:
            return False
        os.utime(self.descriptor)
        return True

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # another product's lease is in it
            self.path.parent.rmdir()


def _acquire_locally(path: Path, ours: Holder) -> _LocalLease | Holder | None:
    if path.parent.is_symlink():
        raise UserError(f"{path.parent}: is a link; a run's leases lie in the run")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another command has removed the folder
            continue
        except OSError as error:
            raise UserError(f"{path.parent.parent}: not writable ({storage.first_line(error)})") from None
        locks = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before = _read(descriptor)
            os.close(descriptor)
            return before
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            locks = False
        if not _in_place(descriptor, path):
            os.close(descriptor)
            continue
        before = _read(descriptor)
        # A file system may not carry locks from machine to machine; then the holder's refreshing tells.
        elsewhere = before is not None and (not locks or before.machine != machine())
        if elsewhere and before.alive(time.time() - os.fstat(descriptor).st_mtime):
            os.close(descriptor)
            return before
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, ours.text(), 0)
        return _LocalLease(path, descriptor, ours)


def _read(descriptor: int) -> Holder | None:
    return Holder.read(os.pread(descriptor, 1 << 16, 0))


def _in_place(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class _S3Lease:
    """An object that is written under conditions, which pyarrow's S3 has no words for."""

    def __init__(self, client: Any, where: dict[str, str], ours: Holder, tag: str):
        self.client, self.where, self.ours, self.tag, self.beats = client, where, ours, tag, 0

    @classmethod
    def acquire(cls, uri: str, ours: Holder) -> "_S3Lease | Holder | None":
        client, where = _s3(uri)
        condition = {"IfNoneMatch": "*"}
        for _ in range(5):
            done = _unless_changed(client.put_object, **where, Body=ours.text(), **condition)
            if done:
                return cls(client, where, ours, done["ETag"])
            found = _unless_changed(client.get_object, **where)
            if not found:  # given back meanwhile
                condition = {"IfNoneMatch": "*"}
                continue
            before = Holder.read(found["Body"])
            if before == ours:  # our first try, whose answer was lost
                return cls(client, where, ours, found["ETag"])
            # Both times are the store's.
            now = email.utils.parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            if before is not None and before.alive((now - found["LastModified"]).total_seconds()):
                return before
            condition = {"IfMatch": found["ETag"]}
        return None

    def beat(self) -> bool:
        self.beats += 1
        done = _unless_changed(self.client.put_object, **self.where, Body=self.ours.text(self.beats), IfMatch=self.tag)
        if not done:  # or it was written, and the answer was lost
            done = _unless_changed(self.client.get_object, **self.where)
            if not done or Holder.read(done["Body"]) != self.ours:
                return False
        self.tag = done["ETag"]
        return True

    def release(self) -> None:
        _unless_changed(self.client.delete_object, **self.where, IfMatch=self.tag)


def _s3(uri: str) -> tuple[Any, dict[str, str]]:
    """boto3's client for an S3 URI, with the settings that the URI and the environment give, and the object's name."""
    import boto3

    base, query = storage.split_query(credentials.complete(uri))
    place = urllib.parse.urlsplit(base)
    user, _, host = place.netloc.rpartition("@")
    key, _, secret = user.partition(":")
    options = dict(urllib.parse.parse_qsl(query.removeprefix("?")))
    settings = {"region_name": options.get("region")}
    if "endpoint_override" in options:
        settings["endpoint_url"] = f"{options.get('scheme', 'https')}://{options['endpoint_override']}"
    if user:
        settings |= {
            "aws_access_key_id": urllib.parse.unquote(key),
            "aws_secret_access_key": urllib.parse.unquote(secret),
        }
    path = base.partition("://")[2].partition("/")[2]
    return boto3.client("s3", **settings), {"Bucket": host, "Key": path}


def _unless_changed(call: Any, **arguments: Any) -> dict[str, Any] | None:
    """The answer, its body read; None where the object is not as the condition asks, or not there."""
    from botocore.exceptions import BotoCoreError, ClientError

    def ask() -> dict[str, Any] | None:
        try:
            answer = call(**arguments)
            return answer | {"Body": answer["Body"].read()} if "Body" in answer else answer
        except ClientError as error:
            # 409: another conditional request on it is under way.
            changed = error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412)
            if changed and error.response["Error"]["Code"] != "NoSuchBucket":
                return None
            raise OSError(storage.first_line(error)) from error
        except BotoCoreError as error:
            raise OSError(storage.first_line(error)) from error

    return retrying(f"s3://{arguments['Bucket']}/{arguments['Key']}", ask)


class _Claim:
    """One of the objects below a lease's name; only one of them is of a command that goes on."""

    def __init__(self, uri: str, ours: Holder):
        self.uri, self.ours, self.beats = uri, ours, 0

    @classmethod
    def acquire(cls, folder: str, ours: Holder) -> "_Claim | Holder | None":
        claim, seen = cls(storage.join(folder, ours.token), ours), None
        for _ in range(3):  # two that claim at the same moment see each other, and both give way
            seen = _other(folder, ours)
            if seen is None:
                claim._write()
                seen = _other(folder, ours)
                if seen is None:
                    return claim
                claim.release()
            time.sleep(random.uniform(0.05, 0.5))
        return seen

    def _write(self) -> None:
        storage.write_text_atomic(self.uri, self.ours.text(self.beats).decode())

    def beat(self) -> bool:
        if not storage.exists(self.uri):
            return False
        self.beats += 1
        self._write()
        return True

    def release(self) -> None:
        storage.remove_tree(self.uri)


def _other(folder: str, ours: Holder) -> Holder | None:
    """Another command's claim that counts; one of a process that is gone is removed."""
    for uri, info in storage.list_infos(folder):
        try:
            found = Holder.read(storage.read_bytes(uri))
        except FileNotFoundError:
            continue
        age = time.time() - info.mtime.timestamp() if info.mtime else 0.0
        if found is not None and found.token == ours.token:
            continue
        if found is not None and found.alive(age):
            return found
        storage.remove_tree(uri)
    return None
