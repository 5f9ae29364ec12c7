"""Credentials in URIs: taken out before anything is stored or said, put back where a store is opened.

`s3://KEY:SECRET@bucket/x` and `https://host/x.tar?token=…` work, and what a run remembers, prints and logs is
`s3://bucket/x` and `https://host/x.tar`. What was taken out stays in the environment of this process and of the Ray that
it starts (`HARDSET_CREDENTIALS`), nowhere else: a later command, and a cluster's nodes, need it again, or credentials of
their own (a role, a profile, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), which are the better way.
"""

import json
import os
import re
import urllib.parse

from pipelines.runs.errors import UserError

VARIABLE = "HARDSET_CREDENTIALS"
MOST_BYTES = 64 << 10  # of the environment variable: Linux allows 128 KiB
HIDDEN = "***"

# A secret key may hold slashes; names of buckets hold no colon, so that up to the @ all is credentials.
_IN_BUCKET = re.compile(r"\b((?:s3|gs|gcs)://)([^/@\s:]+:[^@\s]*?)@([^/?\s:@]+)", re.IGNORECASE)
_IN_HOST = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^/@\s]*:[^/@\s]*)@([^/?\s@]+)")
_QUERY = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://(?:(?!::)[^\s?'\"])+)\?((?:(?!::)[^\s'\"])+)")
_SECRET_NAME = re.compile(
    r"token|secret|passw|pwd|signature|credential|(^|[-_])(sig|key|auth)($|[-_])|api[-_]?key|access[-_]?key|x-(amz|goog)-",
    re.IGNORECASE,
)


def strip(text: str) -> str:
    """A URI, or several in one text, without credentials, which this process and its workers remember.

    Raises
    ------
    UserError
        If there are more credentials than an environment holds.
    """
    found: dict[str, str] = {}

    def from_host(match: re.Match[str]) -> str:
        found[match[1] + match[3]] = match[2]
        return match[1] + match[3]

    def from_query(match: re.Match[str]) -> str:
        kept, secret = _parted(match[2])
        bare = match[1] + ("?" + "&".join(kept) if kept else "")
        if secret:  # also for what a pattern expands to
            found[f"{bare}?"] = found[f"{_place(bare)}?"] = "&".join(secret)
        return bare

    bare = _QUERY.sub(from_query, _IN_HOST.sub(from_host, _IN_BUCKET.sub(from_host, text)))
    if found:
        _remember(found)
    return bare


def complete(uri: str) -> str:
    """A URI with the credentials that were taken out of it, or of another one of the same bucket or host."""
    known = _known()
    if not known or "://" not in uri:
        return uri
    place, rest = _place(uri), uri.partition("://")[2]
    query, user = known.get(f"{uri}?", known.get(f"{place}?")), known.get(place)
    if query is not None:
        rest += ("&" if "?" in rest else "?") + query
    if user is not None and "@" not in place:
        rest = f"{urllib.parse.quote(user, safe=':%')}@{rest}"
    return f"{uri.partition('://')[0]}://{rest}"


def redact(text: str) -> str:
    """A text that is to be said or stored, its credentials replaced by ***: those in URIs, and those that were stripped."""
    text = _IN_BUCKET.sub(rf"\1{HIDDEN}@\3", text)
    text = _IN_HOST.sub(rf"\1{HIDDEN}@\3", text)
    text = _QUERY.sub(lambda match: f"{match[1]}?{_hidden(match[2])}", text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _place(uri: str) -> str:
    """`scheme://host` of a URI."""
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.split(r"[/?]", rest, maxsplit=1)[0]


def _parted(query: str) -> tuple[list[str], list[str]]:
    """The parameters of a query that may be told, and those that may not."""
    kept: list[str] = []
    secret: list[str] = []
    for part in query.split("&"):
        name, equals, _ = part.partition("=")
        (secret if equals and _SECRET_NAME.search(name) else kept).append(part)
    return kept, secret


def _hidden(query: str) -> str:
    kept, secret = _parted(query)
    return "&".join([*kept, *(f"{part.partition('=')[0]}={HIDDEN}" for part in secret)])


def _known() -> dict[str, str]:
    return json.loads(os.environ.get(VARIABLE) or "{}")


def _remember(found: dict[str, str]) -> None:
    text = json.dumps(_known() | found)
    if len(text) > MOST_BYTES:
        raise UserError(
            "too many URIs with credentials of their own; give them by the environment, a profile or a role"
        )
    os.environ[VARIABLE] = text


def _secrets() -> list[str]:
    """What was stripped, as it was typed and percent-decoded; the long ones, which are no words, first."""
    found: set[str] = set()
    for place, value in _known().items():
        parts = [p.partition("=")[2] for p in value.split("&")] if place.endswith("?") else value.split(":", 1)
        found |= {form for part in parts for form in (part, urllib.parse.unquote(part)) if len(form) >= 8}
    return sorted(found, key=len, reverse=True)
