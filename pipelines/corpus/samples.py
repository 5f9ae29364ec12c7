"""From tar members to samples: webdataset's grouping, strictly, and a reason for every sample that is left out."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipelines.corpus import text
from pipelines.corpus.tarstream import Member, TarDamage, TarStream
from pipelines.runs.errors import UserError
from pipelines.runs.record import CorpusConfig

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")
)
MAX_CLASSES = 32_768  # statistics hold (classes, d) sums; --classes FILE with more names lifts it
MAX_IMAGE_BYTES = 256 << 20
MAX_LABEL_BYTES = 16 << 20
MAX_NAME_LENGTH = 4096

_META = re.compile(r"__[^/]*__($|/)")
_INTEGER = re.compile(r"([+-]?[0-9]{1,4000})(\.0*)?")  # 3.0 too, as tables of floats write it
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PARENT = re.compile(r"(^|[/\\])\.\.([/\\]|$)")
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


SORTING = (
    "the members of a sample must stand together; sort the tar by name: "
    "mkdir T && tar -xf IN.tar -C T && tar --sort=name -cf OUT.tar -C T ."
)


class Entry(NamedTuple):
    """One sample of a shard, or one thing left out of it (`reason` given; row and key None for a shard's rest).

    `offset` is the byte of the shard at which the image begins, None in a gzip-compressed one.
    """

    row: int | None
    key: str | None
    label: int | None
    image: bytes | None
    reason: str | None
    member: str | None
    offset: int | None = None


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
    member : str, optional
        Suffix of the member that holds the label, where it is not the one named in `spec`.

    Raises
    ------
    UserError
        For a spec that is none of these, or names that are empty or repeated.
    """

    def __init__(
        self,
        spec: str,
        class_names: Sequence[str] | None = None,
        max_classes: int = MAX_CLASSES,
        member: str | None = None,
    ):
        kind, _, field = spec.partition(":")
        if spec not in ("none", "cls") and not (kind == "json" and field):
            raise UserError(f"{spec}: expected cls, json:FIELD or none", "label")
        self.spec, self.field = spec, field
        self.kind = None if spec == "none" else kind
        self.member = None if member is None else plain_suffix(member)
        if class_names is not None:
            if not class_names or "" in class_names:
                raise UserError(f"{len(class_names)} names of classes, none of them may be empty", "classes")
            text.check_unique(tuple(class_names))
        self._index = {name: label for label, name in enumerate(class_names or ())}
        self._limit = len(class_names) if class_names else max_classes
        self._only_names = any(_INTEGER.fullmatch(name) for name in self._index)

    def rank(self, suffix: str) -> int:
        """How much the member with this suffix is the label: as `member_rank`."""
        return 0 if self.kind is None else member_rank(suffix, (self.kind,), self.member)

    def read(self, data: bytes) -> int:
        """The label in a label member's bytes; ValueError with the reason where there is none."""
        if self.kind == "cls":
            return self._from_text(_text_of(data, "label"))
        return self._from_value(self._field_of(data))

    def write(self, data: bytes, label: int) -> bytes:
        """A label member's bytes with another label, in the form of the one that it has: a name, a number, a JSON string."""
        if self.kind == "cls":
            return self._written(_text_of(data, "label").strip(), label).encode()
        record = json.loads(text.decode(data))
        holder, name = record, self.field
        if name not in record:
            *path, name = self.field.split(".")
            for part in path:
                holder = holder[part]
        value = holder[name]
        holder[name] = self._written(value, label) if isinstance(value, str) else label
        return json.dumps(record, ensure_ascii=False).encode()

    def _written(self, before: str, label: int) -> str:
        if self._only_names or before in self._index:
            return list(self._index)[label]
        return str(label)

    def _field_of(self, data: bytes) -> object:
        try:
            record = json.loads(text.decode(data))
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
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"non-integer label {_shown(value)}")
        return self._checked(value)

    def _from_text(self, label: str) -> int:
        label = label.strip()
        if label in self._index:
            return self._index[label]
        if not label:
            raise ValueError("missing label: it is empty")
        number = _INTEGER.fullmatch(label)
        if self._only_names or number is None:
            raise ValueError(f"{'unknown class' if self._index else 'non-integer label'} {_shown(label)}")
        return self._checked(int(number[1]))

    def _checked(self, label: int) -> int:
        if self._only_names:
            raise ValueError(f"unknown class {_shown(label)}")
        if label < 0:
            raise ValueError(f"negative label {_shown(label)}")
        if label >= self._limit:
            raise ValueError(f"label {_shown(label)} is not below {self._limit}, the number of classes allowed")
        return label


def plain_suffix(suffix: str) -> str:
    """A suffix as a person may write it (`.Input.JPG`) as members are compared by: lower case, no dot in front."""
    return suffix.strip().lstrip(".").lower()


def member_rank(suffix: str, kinds: Sequence[str] | frozenset[str], asked: str | None = None) -> int:
    """How much a sample's member is the one of some kind: 2 it is, 1 it is if no other member is of that kind, 0 not.

    Parameters
    ----------
    suffix : str
        What follows the key's first dot, in lower case; several parts as in `input.jpg` too.
    kinds : collection of str
        Last parts that make the kind: those of images, or "cls".
    asked : str, optional
        The only suffix that counts.
    """
    if asked is not None:
        return 2 * (suffix == asked)
    return 2 if suffix in kinds else int(suffix.rpartition(".")[2] in kinds)


def label_source(config: CorpusConfig) -> LabelSource:
    """The labels of a run's samples."""
    return LabelSource(config.label, config.class_names, member=config.label_member)


class Place(NamedTuple):
    """Where a member belongs: its sample's row in the shard, its key, its lower-case suffix."""

    row: int
    key: str
    suffix: str
    duplicate: bool  # an earlier sample of this shard has the key
    apart: bool  # a duplicate with a member that the earlier one lacks: one sample, whose members don't stand together


class SampleNumbering:
    """Groups members into samples as webdataset does and numbers these, good or not.

    The key is the path up to the first dot of the last part, the suffix what follows, in lower case; members of a
    sample stand together. A member whose suffix the sample has already starts another sample of the same key. The
    numbers depend on the members' names alone: not on labels, nor on what is in a member.

    Attributes
    ----------
    ignored : int
        Members so far that belong to no sample.
    apart : int
        Samples so far that are a part of an earlier one which the tar does not keep together.
    rest : Rest or None
        What could not be read, noted by `read_samples`.
    """

    def __init__(self):
        self._row = -1
        self._key: str | None = None
        self._suffixes: set[str] = set()
        self._seen: dict[str, frozenset[str]] = {}
        self._kinds: dict[frozenset[str], frozenset[str]] = {}  # samples share few sets of suffixes
        self._duplicate = self._apart = False
        self.ignored = self.apart = 0
        self.rest: Rest | None = None

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
            self._begin(key, suffix)
        self._suffixes.add(suffix)
        return Place(self._row, key, suffix, self._duplicate, self._apart)

    def _begin(self, key: str, suffix: str) -> None:
        if self._key is not None:
            suffixes = frozenset(self._suffixes | self._seen.get(self._key, frozenset()))
            self._seen[self._key] = self._kinds.setdefault(suffixes, suffixes)
        self._row += 1
        self._duplicate = key in self._seen
        self._apart = self._duplicate and suffix not in self._seen[key]
        self.apart += self._apart
        self._key, self._suffixes = key, set()


class Rest(NamedTuple):
    """The unreadable rest of a shard: bytes, and about how many samples (None: none was read, so nothing tells)."""

    bytes: int
    samples: int | None

    @classmethod
    def of(cls, size: int, position: int, samples: int) -> "Rest":
        """What lies behind `position` of a shard of `size` bytes, whose first `samples` samples end there."""
        lost = max(0, size - position)
        return cls(lost, max(1, round(lost * samples / position)) if samples and position else None)


def read_samples(
    tar: TarStream,
    labels: LabelSource,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    numbering: SampleNumbering | None = None,
    image: str | None = None,
    size: int = 0,
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
    image : str, optional
        Suffix of the member that is the image, where a sample has several images.
    size : int
        Bytes of the shard, 0 if not known: what a rest that cannot be read is measured by.

    Yields
    ------
    entry : Entry
        Rows count from 0 without a gap. At most one image is in memory.
    """
    numbering, sample = numbering or SampleNumbering(), None
    count = begun = end = 0  # samples read; where the open one begins; where the last member that was read whole ends
    try:
        while (member := tar.next()) is not None:
            place = numbering.place(member)
            if place is None:
                continue
            if sample is None or place.row != sample.row:
                if sample is not None:
                    yield sample.entry(labels)
                    count += 1
                sample, begun = _Sample(place, member), end
            taking, sample = sample, None  # damage inside a member takes its sample with it
            taking.take(tar, member, place.suffix, labels, max_image_bytes, image)
            sample, end = taking, tar.position
    except TarDamage as damage:
        whole = sample is not None and sample.entry(labels).reason is None
        if whole:
            yield sample.entry(labels)
        numbering.rest = Rest.of(size, end if whole else begun, count + whole)
        yield Entry(None, None, None, None, f"{damage}{_told(numbering.rest, size)}", None)
        return
    if sample is not None:
        yield sample.entry(labels)


def _told(rest: Rest, size: int) -> str:
    if not size:
        return ""
    about = "none before it was read" if rest.samples is None else f"about {rest.samples} samples"
    return f"; the rest is {rest.bytes} bytes, {about}"


class _Pick:
    """The member of a sample that is its image, or its label: the one of the highest rank."""

    def __init__(self, what: str, limit: int):
        self.what, self.limit, self.rank = what, limit, 0
        self.names: list[str] = []
        self.data: bytes | None = None
        self.problem: str | None = None
        self.offset: int | None = None

    def offer(self, rank: int, tar: TarStream, member: Member) -> None:
        """Take the member if no better one was taken; two of one rank are a problem unless a better one follows."""
        if rank == 0 or rank < self.rank:
            return
        if rank > self.rank:
            self.rank, self.names = rank, []
        self.names.append(member.name)
        self.data, self.problem, self.offset = None, self._unfit(member), member.offset
        if self.problem is None:
            self.data = tar.body()

    def _unfit(self, member: Member) -> str | None:
        if len(self.names) > 1:
            first, second = (printable(name) for name in self.names[:2])
            option = "image" if self.what == "image" else "label_member"
            return f"two {self.what} members, {first} and {second} ({option} SUFFIX says which)"
        if member.kind != "file":
            return "link: never followed" if member.kind == "link" else "not a regular file (device, pipe or sparse)"
        if member.size > self.limit:
            return f"{self.what} of {member.size} bytes, more than {self.limit}"
        if self.what == "image" and not member.size:
            return "empty image (0 bytes)"
        return None


class _Sample:
    """A sample whose members are being read."""

    def __init__(self, place: Place, member: Member):
        self.row, self.key, self.first = place.row, place.key, member.name
        self.image, self.label = _Pick("image", MAX_IMAGE_BYTES), _Pick("label", MAX_LABEL_BYTES)
        self.problem = _name_problem(place.key, member.name)
        self.member = member.name
        if self.problem is None and place.apart:
            self.problem = (
                "members apart: earlier members of this sample do not stand beside these; sort the tar by name"
            )
        elif self.problem is None and place.duplicate:
            self.problem = "duplicate key: an earlier sample of this shard has it"

    def take(
        self,
        tar: TarStream,
        member: Member,
        suffix: str,
        labels: LabelSource,
        max_image_bytes: int,
        image: str | None,
    ) -> None:
        """Read a member that matters, pass over any other."""
        if self.problem is None and member.name != self.first:
            self.problem = _name_problem(self.key, member.name)
            self.member = member.name
        if self.problem is None:
            self.image.limit = max_image_bytes
            is_image = member_rank(suffix, IMAGE_SUFFIXES, image)
            self.image.offer(is_image, tar, member)
            if not is_image:
                self.label.offer(labels.rank(suffix), tar, member)
        else:
            self.image.data = None
        tar.skip()

    def entry(self, labels: LabelSource) -> Entry:
        """The finished sample, or why it is left out."""
        label = None
        problem, member = self._problem(labels)
        if problem is None and labels.kind is not None:
            try:
                label = labels.read(self.label.data)
            except ValueError as error:
                problem, member = str(error), self.label.names[0]
        if problem is not None:
            return Entry(self.row, printable(self.key), None, None, problem, printable(member))
        return Entry(self.row, self.key, label, self.image.data, None, self.image.names[0], self.image.offset)

    def _problem(self, labels: LabelSource) -> tuple[str | None, str]:
        if self.problem is not None:
            return self.problem, self.member
        if not self.image.rank:
            return "missing image: no member with the suffix of one (a key ends at its first dot)", self.first
        if self.image.problem is not None:
            return self.image.problem, self.image.names[-1]
        if labels.kind is not None and not self.label.rank:
            return f"missing label: no {labels.member or labels.kind} member", self.first
        return self.label.problem, (self.label.names or [""])[-1]


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


def _text_of(data: bytes, what: str) -> str:
    try:
        return text.decode(data)
    except ValueError as error:
        raise ValueError(f"{what} is {error}") from None


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return "of more than 64 bits"
    if isinstance(value, dict | list):
        return f"({type(value).__name__})"
    return printable(str(value)[:40]) if not isinstance(value, str) else printable(repr(value[:40]))
