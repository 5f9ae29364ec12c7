"""Which errors of a storage can pass, how long they are waited for, and what is said of those that cannot.

Every request to an object store goes through `retrying`: `pipelines.runs.storage` opens each filesystem with it. An
outage, a throttled bucket or a broken connection is tried again with exponential, jittered waits; refused credentials,
a missing bucket or a wrong clock end at once, in one line that says what to do.
"""

import contextlib
import errno
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipelines.runs import credentials

RETRY_VARIABLE = "HARDSET_STORAGE_RETRY_S"  # also reaches the workers of a Ray started by the command
RETRY_S = 300.0
FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 0.5, 20.0, 1.0
SAID_AGAIN_S = 60.0  # thirty threads that meet the same outage say it once

Result = TypeVar("Result")

# What no repetition mends, by the words of the S3, GCS and Azure clients below Arrow, and what to do about it.
_LASTING = (
    (
        r"ExpiredToken|TokenRefreshRequired|token (?:has )?expired|invalid_grant",
        "the credentials have expired: renew them (such as aws sso login) and start the same command again",
    ),
    (
        r"REQUEST_TIME_TOO_SKEWED|RequestTimeTooSkewed",
        "this machine's clock differs from the store's: set it (such as by NTP) and start the same command again",
    ),
    (
        r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|InvalidToken"
        r"|UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN_ID|UNAUTHENTICATED|\b401\b",
        "the store does not know these credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or "
        "those of your store",
    ),
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found",
        "there is no such bucket: check its name, and the endpoint and region",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|HTTP status 301",
        "the bucket is in another region: add ?region=NAME to the URI or set AWS_DEFAULT_REGION",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|MISSING_AUTHENTICATION_TOKEN|PERMISSION_DENIED|HTTP status 403|\b403\b",
        "access is refused (403): these credentials may not do that there, or there are none: check the bucket's policy "
        "and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile or the role",
    ),
    (
        r"NoCredentials|could not (?:find|load) (?:default )?credentials",
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or those of your store",
    ),
    (r"INVALID_ARGUMENT|HTTP status 4(?!08|25|29)\d\d", "the store refuses the request"),
)
_PASSING = re.compile(
    r"HTTP status (?:5\d\d|408|425|429)|\b(?:50[0234]|429)\b|SLOW_DOWN|SlowDown|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|"
    r"THROTTL|NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|"
    r"time[d ]?-?out|reset by peer|connection (?:refused|closed|aborted)|temporarily|partial|IncompleteRead|"
    r"Unable to (?:connect|parse)|EndpointConnection|ServerDisconnected|PayloadError|NO_RESPONSE|UNKNOWN",
    re.IGNORECASE,
)
_OF_FILES = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)  # what a caller waits for
_MOUNTED = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EAGAIN)  # of a mounted network file system
_BODILESS = re.compile(r"HTTP status 40[03]|ACCESS_DENIED")


class WrongAnswer(ConnectionError):
    """The storage gave other bytes than the file holds: another reading may give the right ones."""


class StorageError(OSError):
    """The storage failed, not the data: never a reason to leave a sample out. One line; it says what would do."""


def retry_seconds() -> float:
    """How long an outage of a storage is waited for, in seconds: the environment's HARDSET_STORAGE_RETRY_S, else 300."""
    try:
        return max(0.0, float(os.environ.get(RETRY_VARIABLE) or RETRY_S))
    except ValueError:
        return RETRY_S


@contextlib.contextmanager
def waiting_for_storage(seconds: float | None) -> Iterator[None]:
    """While this lasts an outage is waited for so long, here and in the workers of a Ray that starts meanwhile."""
    before = os.environ.get(RETRY_VARIABLE)
    if seconds is not None:
        os.environ[RETRY_VARIABLE] = str(seconds)
    try:
        yield
    finally:
        if seconds is not None:
            os.environ.pop(RETRY_VARIABLE, None)
            if before is not None:
                os.environ[RETRY_VARIABLE] = before


def lasting(error: BaseException) -> str | None:
    """What to do about an error that no repetition mends; None for one that can pass."""
    text = str(error)
    return next((advice for words, advice in _LASTING if re.search(words, text)), None)


def can_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (StorageError, *_OF_FILES)):
        return False  # a StorageError has been through here already
    if lasting(error):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in _MOUNTED:
        return True
    # The clients of fsspec's filesystems have exceptions of their own, not all of them OSErrors.
    ours = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "gcsfs")
    return ours and _PASSING.search(f"{type(error).__name__} {error}") is not None


def retrying(
    uri: str, work: Callable[[], Result], explain: Callable[[BaseException], str | None] | None = None
) -> Result:
    """`work()`, tried again while what it meets can pass and the time for that is not over.

    Parameters
    ----------
    uri : str
        What is said to be waited for. Without credentials.
    work : callable
        One request, or several that may be done twice.
    explain : callable, optional
        Asked for the store's reason where an answer came without one.

    Raises
    ------
    StorageError
        Of one line, if the time is over or the error cannot pass.
    FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError
        As `work` raises them.
    """
    started = time.monotonic()
    try:
        return work()
    except _OF_FILES:
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        advice = _advice(error, explain)
        if advice is not None:
            raise StorageError(f"{uri}: {advice} ({_short(error)})") from error
        said = _waits.told(uri, _short(error), retry_seconds())
    try:
        result = _tried_again(work)
    except _OF_FILES:
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        advice = _advice(error, explain) or (
            f"the storage did not answer well for {time.monotonic() - started:.0f} s; start the same command again when "
            "it does, or give it longer with --storage-retry-s"
        )
        raise StorageError(f"{uri}: {advice} ({_short(error)})") from error
    if said:
        _say(f"{uri}: the storage answers again after {time.monotonic() - started:.0f} s")
    return result


def _tried_again(work: Callable[[], Result]) -> Result:
    """After a first failure: wait and try, until it succeeds, cannot pass, or the time is over."""
    import tenacity  # with asyncio below it: only once something has failed

    wait = tenacity.wait_exponential_jitter(initial=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=JITTER_S)
    time.sleep(FIRST_WAIT_S + random.uniform(0, JITTER_S))
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(can_pass),
        wait=wait,
        stop=tenacity.stop_after_delay(retry_seconds()),
        reraise=True,
    )(work)


def _is_of_storage(error: BaseException) -> bool:
    """A client's error to be told in a line; not one that was told already, and no bug."""
    return (
        can_pass(error)
        or lasting(error) is not None
        or (isinstance(error, OSError) and not isinstance(error, StorageError))
    )


def _advice(error: BaseException, explain: Callable[[BaseException], str | None] | None) -> str | None:
    # A HEAD request is answered without a body, and so without the store's reason: another request brings it.
    if explain is not None and _BODILESS.search(str(error)) and "No response body" in str(error):
        told = explain(error)
        if told is not None:
            return told
    if can_pass(error):
        return None
    return lasting(error) or "the storage refuses it"


class _Waits:
    """When this process last said that it waits for the storage."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), -SAID_AGAIN_S

    def told(self, uri: str, what: str, limit: float) -> bool:
        with self._lock:
            now = time.monotonic()
            if now - self._last < SAID_AGAIN_S:
                return False
            self._last = now
        _say(f"{uri}: the storage fails ({what}); trying again for up to {limit:.0f} s")
        return True


_waits = _Waits()


def _say(text: str) -> None:
    print(f"hardset: {credentials.redact(text)}", file=sys.stderr, flush=True)


def _short(error: BaseException | None) -> str:
    """The core of a client's message in one line, without the request's identifiers."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"AWS Error (.*?) during (\w+) operation: (.*)", text)
    if found:
        text = f"{found[1]}, {found[2]}: {found[3]}"
    return re.sub(r"\(Request ID: [^)]*\)|Unable to parse ExceptionName: ", "", text).strip()[:200]
