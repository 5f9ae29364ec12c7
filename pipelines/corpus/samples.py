"""From tar members to samples: webdataset's grouping, strictly, and a reason for every sample that is left out."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipelines.corpus.tarstream import Member, TarDamage, TarStream

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp"))
MAX_CLASSES = 32_768  # statistics hold (classes, d) sums; --classes FILE with more names lifts it
MAX_IMAGE_BYTES = 256 << 20
MAX_LABEL_BYTES = 16 << 20
MAX_NAME_LENGTH = 4096

_META = re.compile(r"__[^/]*__($|/)")
_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PARENT = re.compile(r"(^|[/\\])\.\.([/\\]|$)")
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Entry(NamedTuple):
    """One sample of a shard, or one thing left out of it (`reason` given; row and key None for a shard's rest)."""

    row: int | None
    key: str | None
    label: int | None
    image: bytes | None
    reason: str | None
    member: str | None


class LabelSource:
    """Where labels come from, and how bytes become one.

    Parameters
    ----------
    spec : str
        "cls": the text of member `.cls`; "json:FIELD": a field of member `.json`, `a.b` also for one inside another;
        "none": no labels.
    class_names : sequence of str, optional
        Maps a name to its position. A plain integer in range is taken too, unless a name is itself an integer:
        then only names count.
    max_classes : int
        Labels lie in [0, max_classes), or in [0, len(class_names)). A bound on memory: statistics grow with it.

    Raises
    ------
    ValueError
        For a spec that is none of these, or names that are empty or repeated.
    """

    def __init__(self, spec: str, class_names: Sequence[str] | None = None, max_classes: int = MAX_CLASSES):
        kind, _, field = spec.partition(":")
        if spec not in ("none", "cls") and not (kind == "json" and field):
            raise ValueError(f"--label {spec}: expected cls, json:FIELD or none")
        self.spec, self.field = spec, field
        self.suffix = None if spec == "none" else kind
        self._index = {name: label for label, name in enumerate(class_names or ())}
        if class_names is not None and (len(self._index) < len(class_names) or "" in self._index or not class_names):
            raise ValueError(f"--classes: {len(class_names)} names, some of them empty or repeated, or none at all")
        self._limit = len(class_names) if class_names else max_classes
        self._only_names = any(_INTEGER.fullmatch(name) for name in self._index)

    def read(self, data: bytes) -> int:
        """The label in a label member's bytes; ValueError with the reason where there is none."""
        if self.suffix == "cls":
            return self._from_text(_utf8(data, "label"))
        return self._from_value(self._field_of(data))

    def _field_of(self, data: bytes) -> object:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("malformed json") from None
        if isinstance(record, dict) and self.field in record:
            return record[self.field]
        for part in self.field.split("."):
            if not isinstance(record, dict) or part not in record:
                raise ValueError(f"missing label: no field {self.field} in the json")
            record = record[part]
        return record

    def _from_value(self, value: object) -> int:
        if value is None:
            raise ValueError(f"missing label: field {self.field} is null")
        if isinstance(value, str):
            return self._from_text(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"non-integer label {_shown(value)}")
        return self._checked(value)

    def _from_text(self, text: str) -> int:
        text = text.strip()
        if text in self._index:
            return self._index[text]
        if not text:
            raise ValueError("missing label: it is empty")
        if self._only_names or not _INTEGER.fullmatch(text):
            raise ValueError(f"{'unknown class' if self._index else 'non-integer label'} {_shown(text)}")
        return self._checked(int(text))

    def _checked(self, label: int) -> int:
        if self._only_names:
            raise ValueError(f"unknown class {_shown(label)}")
        if label < 0:
            raise ValueError(f"negative label {_shown(label)}")
        if label >= self._limit:
            raise ValueError(f"label {_shown(label)} is not below {self._limit}, the number of classes allowed")
        return label


class Place(NamedTuple):
    """Where a member belongs: its sample's row in the shard, its key, its lower-case suffix."""

    row: int
    key: str
    suffix: str
    duplicate: bool  # an earlier sample of this shard has the key


class SampleNumbering:
    """Groups members into samples as webdataset does and numbers these, good or not.

    The key is the path up to the first dot of the last part, the suffix what follows, in lower case; members of a
    sample stand together. A member whose suffix the sample has already starts another sample of the same key. The
    numbers depend on the members' names alone: not on labels, nor on what is in a member.

    Attributes
    ----------
    ignored : int
        Members so far that belong to no sample.
    """

    def __init__(self):
        self._row = -1
        self._key: str | None = None
        self._suffixes: set[str] = set()
        self._seen: set[str] = set()
        self._duplicate = False
        self.ignored = 0

    def place(self, member: Member) -> Place | None:
        """None for what is in no sample: folders, names without a suffix, hidden names, webdataset's `__meta__`."""
        name = member.name
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        if dot <= start or member.kind == "folder" or (name.startswith("__") and _META.match(name)):
            self.ignored += 1
            return None
        key, suffix = name[:dot], name[dot + 1 :].lower()
        if key != self._key or suffix in self._suffixes:
            self._row += 1
            self._duplicate = key in self._seen
            self._key, self._suffixes = key, set()
            self._seen.add(key)
        self._suffixes.add(suffix)
        return Place(self._row, key, suffix, self._duplicate)


def read_samples(
    tar: TarStream,
    labels: LabelSource,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    numbering: SampleNumbering | None = None,
) -> Iterator[Entry]:
    """The samples of a tar in their order, those left out with the reason, at its damage one entry for the rest.

    A sample that is open where the damage begins stays if all that it needs was read, and is part of the rest if not.

    Parameters
    ----------
    tar : TarStream
        At its start.
    labels : LabelSource
    max_image_bytes : int
        A larger image is passed over, not read.
    numbering : SampleNumbering, optional
        A fresh one, to be asked for its counts afterwards.

    Yields
    ------
    entry : Entry
        Rows count from 0 without a gap. At most one image is in memory.
    """
    numbering, sample = numbering or SampleNumbering(), None
    try:
        while (member := tar.next()) is not None:
            place = numbering.place(member)
            if place is None:
                continue
            if sample is None or place.row != sample.row:
                if sample is not None:
                    yield sample.entry(labels)
                sample = _Sample(place, member)
            taking, sample = sample, None  # damage inside a member takes its sample with it
            taking.take(tar, member, place.suffix, labels, max_image_bytes)
            sample = taking
    except TarDamage as damage:
        if sample is not None and (entry := sample.entry(labels)).reason is None:
            yield entry
        yield Entry(None, None, None, None, str(damage), None)
        return
    if sample is not None:
        yield sample.entry(labels)


class _Sample:
    """A sample whose members are being read."""

    def __init__(self, place: Place, member: Member):
        self.row, self.key, self.first = place.row, place.key, member.name
        self.image: bytes | None = None
        self.label: bytes | None = None
        self.image_member: str | None = None
        self.problem = _name_problem(place.key, member.name)
        self.member = member.name
        if self.problem is None and place.duplicate:
            self.problem = "duplicate key: an earlier sample of this shard has it"

    def take(self, tar: TarStream, member: Member, suffix: str, labels: LabelSource, max_image_bytes: int) -> None:
        """Read a member that matters, pass over any other."""
        is_image = suffix in IMAGE_SUFFIXES
        if self.problem is None and member.name != self.first:
            self._note(_name_problem(self.key, member.name), member)
        if self.problem is None and (is_image or suffix == labels.suffix):
            limit = max_image_bytes if is_image else MAX_LABEL_BYTES
            self._note(self._unfit(member, is_image, limit), member)
            if self.problem is None and is_image:
                self.image, self.image_member = tar.body(), member.name
            elif self.problem is None:
                self.label = tar.body()
        tar.skip()

    def entry(self, labels: LabelSource) -> Entry:
        """The finished sample, or why it is left out."""
        label = None
        if self.problem is None and self.image is None:
            self.problem = "missing image: no jpg, jpeg, png or webp member (a key ends at its first dot)"
        elif self.problem is None and labels.suffix is not None:
            if self.label is None:
                self.problem = f"missing label: no {labels.suffix} member"
            else:
                label = self._read_label(labels)
        if self.problem is not None:
            return Entry(self.row, printable(self.key), None, None, self.problem, printable(self.member))
        return Entry(self.row, self.key, label, self.image, None, self.image_member)

    def _read_label(self, labels: LabelSource) -> int | None:
        try:
            return labels.read(self.label)
        except ValueError as error:
            self.problem, self.member = str(error), f"{self.key}.{labels.suffix}"
            return None

    def _unfit(self, member: Member, is_image: bool, limit: int) -> str | None:
        if member.kind != "file":
            return "link: never followed" if member.kind == "link" else "not a regular file (device, pipe or sparse)"
        if member.size > limit:
            return f"{'image' if is_image else 'label'} of {member.size} bytes, more than {limit}"
        if is_image and self.image_member is not None:
            return f"two image members, the other one is {printable(self.image_member)}"
        if is_image and not member.size:
            return "empty image (0 bytes)"
        return None

    def _note(self, problem: str | None, member: Member) -> None:
        if problem is not None:
            self.problem, self.member, self.image = problem, member.name, None


def printable(name: str) -> str:
    """`name` fit for a terminal and for UTF-8: control characters and stray bytes as backslash escapes, cut if long."""
    name = name if len(name) <= 400 else name[:400] + "…"
    return _SURROGATE.sub(_escape, _CONTROL.sub(_escape, name))


def _escape(found: re.Match) -> str:
    return found.group().encode("unicode_escape").decode()


def _name_problem(key: str, name: str) -> str | None:
    if len(name) > MAX_NAME_LENGTH:
        return f"key of {len(key)} characters, more than {MAX_NAME_LENGTH}"
    if _CONTROL.search(name):
        return "key or suffix contains a control character"
    if not name.isascii() and _SURROGATE.search(name):
        return "key or suffix is not UTF-8"
    if _ABSOLUTE.match(key):
        return "key is an absolute path"
    if ".." in name and _PARENT.search(key):
        return "key contains .."
    return None


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return "of more than 64 bits"
    if isinstance(value, dict | list):
        return f"({type(value).__name__})"
    return printable(str(value)[:40]) if not isinstance(value, str) else printable(repr(value[:40]))
