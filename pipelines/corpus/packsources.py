"""What pack takes: folders of images and Parquet with image bytes, as lists of samples in a fixed order.

A folder per class gives labels by the sorted names of these folders. A flat folder gives labels by a CSV file, or none.
Parquet gives them by a column; names by Hugging Face's ClassLabel, or the sorted words that the column holds.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ops.decoding import format_of
from pipelines.corpus import listing, text
from pipelines.corpus.listing import Found, Tell
from pipelines.corpus.samples import IMAGE_SUFFIXES
from pipelines.runs import storage
from pipelines.runs.errors import UserError

FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "path", "image", "image_path", "id")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "category", "target", "fine_label")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_bytes", "bytes")
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")

_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\:.]")


class Item(NamedTuple):
    """One sample to be packed: where it is read from, its key, its label.

    `place` is a file's URL, or the row group and the row in it of the Parquet file `url`.
    """

    url: str
    key: str
    label: int | None
    place: tuple[int, int] | None = None
    suffix: str = ""
    size: int = 0


class PackSource(NamedTuple):
    """All that a source holds: items in the order in which they are packed, class names, and what was not taken."""

    items: Sequence[Item]
    classes: tuple[str, ...]
    kind: str  # folders, folder or parquet
    columns: tuple[str, ...]  # of Parquet: the image's and the label's, if there is one
    ignored: int
    labelled: bool
    fingerprint: list[Any]  # what the packed bytes depend on


def open_source(source: str, labels: str | None = None, tell: Tell = print) -> PackSource:
    """Look through a source; UserError where it holds nothing that can be packed, or something that is not one corpus.

    Parameters
    ----------
    source : str
        A folder, a Parquet file, a folder of them, or a pattern; local or a URI.
    labels : str, optional
        CSV with the columns `file_name` and `label` (or alike) for a flat folder, whose own one is found without.
    tell : callable
        Gets a sentence for what is passed over.
    """
    found = _files(source, tell)
    parquet = [file for file in found if file.url.endswith(".parquet")]
    if parquet and (len(parquet) == len(found) or not any(_suffix(f.url) in IMAGE_SUFFIXES for f in found)):
        return _parquet_source(parquet, tell)
    return _folder_source(storage.absolute(source), found, labels)


def _files(source: str, tell: Tell) -> list[Found]:
    absolute = storage.absolute(source)
    base, query = storage.split_query(absolute)
    try:
        found = listing.look_at(absolute)
        if found.kind == "folder":
            return listing.match(base, query, "**", tell)
        if found.kind == "file":
            return [found]
        mark = listing.MAGIC.search(base)
        if mark is None:
            raise UserError(f"{source}: there is no such folder or file", "source")
        folder = base[: base.rindex("/", 0, mark.start())] or "/"
        return listing.match(folder, query, base[len(folder.rstrip("/")) + 1 :], tell)
    except (OSError, re.error) as error:
        raise UserError(f"{source}: cannot be listed ({storage.first_line(error)})", "source") from error


def _folder_source(folder: str, found: list[Found], labels: str | None) -> PackSource:
    start = len(storage.split_query(folder)[0].rstrip("/")) + 1
    images = [(storage.split_query(f.url)[0][start:], f) for f in found if _suffix(f.url) in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{folder}: no image there, in it or in folders of it, and no Parquet", "source")
    inside = sum("/" in path for path, _ in images)
    tables = [f.url for f in found if f.url.lower().endswith(".csv") and "/" not in f.url[start:]]
    flat = inside == 0 or labels is not None or len(tables) == 1
    if not flat and inside < len(images):
        raise UserError(
            f"{folder}: {len(images) - inside} images beside and {inside} inside folders of classes; "
            "move the first into a folder of their class, or name one of the folders",
            "source",
        )
    if flat:
        return _flat_source(folder, images, labels or (tables[0] if len(tables) == 1 else None), len(found))
    classes = sorted({path.partition("/")[0] for path, _ in images})
    nested = all(path.count("/") > 1 for path, _ in images)
    if nested and all(name.lower() in SPLITS for name in classes):
        raise UserError(
            f"{folder}: it holds splits ({', '.join(classes)}), not classes; name one of them, such as {folder}/{classes[0]}",
            "source",
        )
    index = {name: label for label, name in enumerate(classes)}
    labelled = [(path, file, index[path.partition("/")[0]]) for path, file in images]
    return _shuffled(labelled, tuple(_shown(name) for name in classes), "folders", len(found) - len(images))


def _flat_source(folder: str, images: list[tuple[str, Found]], table: str | None, found: int) -> PackSource:
    if table is None:
        return _shuffled([(path, file, None) for path, file in images], (), "folder", found - len(images))
    label_of, classes = _labels_of_csv(table)
    by_name = {path.rpartition("/")[2].partition(".")[0]: path for path, _ in images}
    known = {path for path, _ in images}
    taken = {}
    for name, label in label_of.items():
        path = name if name in known else by_name.get(name.rpartition("/")[2].partition(".")[0])
        if path is None:
            raise UserError(f"{table}: it names {name}, and no such image lies in {folder}", "labels")
        taken[path] = label
    labelled = [(path, file, taken.get(path)) for path, file in images]
    return _shuffled(labelled, classes, "folder", found - len(images))


def _labels_of_csv(url: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Label by file name, and class names where the labels are words."""
    try:
        rows = list(csv.DictReader(io.StringIO(text.decode(storage.read_bytes(url)), newline="")))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{url}: cannot be read as CSV ({storage.first_line(error)})", "labels") from None
    names = [name for name in (rows[0] if rows else {}) if name]
    file_column, label_column = (_one_of(wanted, names) for wanted in (FILE_COLUMNS, LABEL_COLUMNS))
    if file_column is None or label_column is None:
        raise UserError(
            f"{url}: expected a column {FILE_COLUMNS[0]} and a column {LABEL_COLUMNS[0]}, found {', '.join(names) or 'none'}",
            "labels",
        )
    pairs = [((row[file_column] or "").strip(), (row[label_column] or "").strip()) for row in rows]
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"{url}: {twice[0]} stands there {sum(n == twice[0] for n, _ in pairs)} times", "labels")
    pairs = [(name, label) for name, label in pairs if name and label]
    labels, classes = _numbered([label for _, label in pairs])
    return dict(zip([name for name, _ in pairs], labels)), classes


def _numbered(words: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Whole numbers as they are, without names; other words by their place among the sorted ones."""
    if all(re.fullmatch(r"[0-9]{1,9}(\.0*)?", word) for word in words):
        return [int(word.partition(".")[0]) for word in words], ()
    classes = sorted(set(words))
    index = {name: label for label, name in enumerate(classes)}
    return [index[word] for word in words], tuple(classes)


def _shuffled(
    images: list[tuple[str, Found, int | None]], classes: tuple[str, ...], kind: str, ignored: int
) -> PackSource:
    """Items in a fixed order that mixes the classes, so that any few shards are like all."""
    order = np.random.default_rng(0).permutation(len(images))
    used: set[str] = set()
    keys = [_key(path, used) for path, _, _ in images]
    items = []
    for place in order.tolist():
        path, file, label = images[place]
        items.append(Item(file.url, keys[place], label, None, _suffix(path), file.size))
    noted = [[path, file.size, file.mtime_ns, label] for path, file, label in images]
    return PackSource(items, classes, kind, (), ignored, any(i.label is not None for i in items), [noted, classes])


def _key(path: str, used: set[str]) -> str:
    """The path without its suffix as a key: no dot, at which a key ends, nothing that the reader refuses, no other's."""
    stem = path[: -len(_suffix(path)) - 1]
    key = "/".join(_UNFIT.sub("_", part) or "_" for part in stem.split("/"))
    key = re.sub(r"^__", "_", key)
    unique, count = key, 1
    while unique in used:
        count += 1
        unique = f"{key}-{count}"
    used.add(unique)
    return unique


def _parquet_source(files: list[Found], tell: Tell) -> PackSource:
    first = _open(files[0].url)
    schema = first.schema_arrow
    features = _features(schema)
    image, label = _image_column(files[0].url, schema), _one_of(LABEL_COLUMNS, schema.names)
    for name, feature in features.items():
        if label is None and isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            label = name
    names = (features.get(label) or {}).get("names") if label is not None else None
    raw: list[Any] = []
    items = []
    for number, file in enumerate(files):
        opened = _open(file.url)
        missing = {image, *([label] if label else [])} - set(opened.schema_arrow.names)
        if missing:
            raise UserError(f"{file.url}: it has no column {missing.pop()}, which {files[0].url} has", "source")
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if label is not None:
                raw += opened.read_row_group(group, columns=[label])[label].to_pylist()
            items += [Item(file.url, f"{number:05d}/{group:05d}-{row:06d}", None, (group, row)) for row in range(rows)]
    if not items:
        raise UserError(f"{files[0].url}: no row there", "source")
    labels, classes = _labels_of_column(label, raw, names)
    if labels:
        items = [item._replace(label=value) for item, value in zip(items, labels)]
    tell(f"Parquet: images from column {image}, " + (f"labels from column {label}" if label else "no labels"))
    noted = [[file.url, file.size, file.mtime_ns] for file in files]
    chosen = (image,) if label is None else (image, label)
    return PackSource(items, classes, "parquet", chosen, 0, label is not None, [noted, classes, chosen])


def _labels_of_column(
    label: str | None, raw: list[Any], names: Sequence[str] | None
) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels and class names; null, and Hugging Face's −1 of unlabelled rows, is none."""
    if label is None:
        return [], ()
    if names is not None:
        return [value if value is not None and value >= 0 else None for value in raw], tuple(names)
    known = [str(value) for value in raw if value is not None]
    if any(isinstance(value, float) and not value.is_integer() for value in raw):
        raise UserError(f"column {label}: it holds fractions, not labels of classes", "source")
    numbers, classes = _numbered(known)
    following = iter(numbers)
    return [None if value is None else next(following) for value in raw], classes


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns, where the file has one."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _image_column(url: str, schema: pa.Schema) -> str:
    """The column of image bytes: a struct with `bytes`, as Hugging Face writes, or plain binary."""
    fit = [field.name for field in schema if _holds_bytes(field.type)]
    named = _one_of(IMAGE_COLUMNS, fit)
    if named is None and len(fit) != 1:
        found = ", ".join(fit) or "none"
        raise UserError(f"{url}: expected one column of image bytes, found {found}", "source")
    return named or fit[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _open(url: str) -> pq.ParquetFile:
    filesystem, path = storage.open_filesystem(url)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{url}: cannot be read as Parquet ({storage.first_line(error)})", "source") from None


def read_items(items: Sequence[Item], columns: Sequence[str]) -> Iterator[tuple[Item, bytes | None]]:
    """The encoded bytes of each item, in order; None where a row of Parquet holds none."""
    if not columns:
        for item in items:
            yield item, storage.read_bytes(item.url)
        return
    group, values, opened = None, [], None
    for item in items:
        if group is None or (item.url, item.place[0]) != group:
            opened = _open(item.url) if group is None or item.url != group[0] else opened
            group = (item.url, item.place[0])
            values = opened.read_row_group(item.place[0], columns=[columns[0]])[columns[0]]
        value = values[item.place[1]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        yield item._replace(suffix=_suffix_of(data, value)), data


def _suffix_of(data: bytes | None, value: object) -> str:
    """By content; what is no known image keeps the suffix of its path, and goes to quarantine when it is embedded."""
    kind = format_of(data) if data else "other"
    path = value.get("path") if isinstance(value, dict) else None
    return kind if kind != "other" else (_suffix(path) if path and _suffix(path) in IMAGE_SUFFIXES else "jpg")


def _one_of(wanted: Iterable[str], names: Sequence[str]) -> str | None:
    lower = {name.lower().strip(): name for name in names}
    return next((lower[name] for name in wanted if name in lower), None)


def _suffix(path: str) -> str:
    return storage.split_query(path)[0].rpartition("/")[2].rpartition(".")[2].lower()


def _shown(name: str) -> str:
    return _UNFIT.sub(lambda m: m[0] if m[0] in ".:\\" else "_", name)
