"""Every column name and schema of a run directory, and what each score column says of itself."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.runs.errors import UserError

EMBEDDINGS, DIFFICULTY, QUARANTINE, DECISIONS = "embeddings", "difficulty", "quarantine", "decisions"

KEYS = (pa.field("key", pa.string()), pa.field("shard", pa.int32()), pa.field("row", pa.int64()))

LABEL = pa.field("label", pa.int64())

KEYS_AND_LABEL = (*(field.name for field in KEYS), LABEL.name)


class Score(NamedTuple):
    """What a score column's Arrow field metadata says of it."""

    meaning: str
    direction: str
    unit: str
    source: str


_CUI, _SQUARED = "Cui et al. 2023", "squared distance, dimensionless"

_MEMBERS = "Albiero et al. 2023"

# Every score column.
SCORES = {
    "difficulty.md": Score(
        "squared Mahalanobis distance to the labelled class", "larger = harder", _SQUARED, f"{_CUI}, eq. 6"
    ),
    "difficulty.md_agn": Score(
        "squared Mahalanobis distance to the class-agnostic Gaussian", "larger = harder", _SQUARED, f"{_CUI}, eq. 7"
    ),
    "difficulty.rmd": Score(
        "md - md_agn; without a label, of the nearest class", "larger = harder", _SQUARED, f"{_CUI}, eq. 5"
    ),
    "difficulty.weight": Score("weight of eq. 10", "larger = harder", "fraction in [0, 1]", f"{_CUI}, eq. 10"),
    "difficulty.nearest_md": Score(
        "squared Mahalanobis distance to the nearest class, the sample left out",
        "larger = harder",
        _SQUARED,
        f"{_CUI}, eq. 6",
    ),
    "difficulty.margin": Score(
        "md_loo - the smallest md of another class, the sample left out",
        "larger = more suspicious label; above 0 = nearer another class",
        _SQUARED,
        "hardset",
    ),
    "difficulty.md_loo": Score(
        "md, the sample left out of its class mean and of the covariance", "larger = harder", _SQUARED, "hardset"
    ),
    "difficulty.rmd_loo": Score("rmd, the sample left out of both Gaussians", "larger = harder", _SQUARED, "hardset"),
    "difficulty.label_error": Score(
        "mean of the percentile ranks of margin and, where there are neighbours, of their vote",
        "larger = more suspicious label",
        "fraction in [0, 1]",
        "hardset",
    ),
    "difficulty.kmeans": Score(
        "Euclidean distance to the nearest k-means centre", "larger = harder", "distance in the embedding", "hardset"
    ),
    "neighbors.vote": Score(
        "similarity-weighted share of the commonest other label among the nearest, less the share of the sample's own",
        "larger = more suspicious label; above 0 = the nearest have another one",
        "difference of fractions, in [-1, 1]",
        "hardset",
    ),
    "neighbors.density": Score(
        "mean similarity of the nearest", "larger = more typical; smaller = an outlier", "cosine in [-1, 1]", "hardset"
    ),
    "neighbors.duplicate_similarity": Score(
        "correlation of the picture's details with the nearest picture of its group",
        "larger = more alike; 1 = the same bytes",
        "correlation in [0, 1]",
        "hardset",
    ),
    "confusion.confusion": Score(
        "entropy of the members' mean probabilities, mean over epochs",
        "larger = harder",
        "bits",
        f"{_MEMBERS}, eq. 1-3",
    ),
    "confusion.entropy_std": Score(
        "standard deviation over the epochs of the entropy", "larger = less settled", "bits", "hardset"
    ),
    "predictions.confidence": Score(
        "largest softmax probability", "larger = safer", "probability in [1/K, 1]", "Hendrycks and Gimpel 2017"
    ),
    "trust.trust": Score(
        "the oracle's z: a signed distance or a logit; sigmoid(z) is the confidence",
        "larger = safer; above 0 = trusted",
        "logit",
        "Luo et al. 2021",
    ),
    "correctness.correctness": Score(
        "share of the training epochs in which the sample was right", "larger = easier", "fraction in [0, 1]", "hardset"
    ),
}


def score_field(column: str) -> pa.Field:
    """A float32 column of `SCORES`, with what it is, in which direction it points, its unit and source as metadata."""
    return pa.field(column.rpartition(".")[2], pa.float32(), metadata=SCORES[column]._asdict())


def known_field(group: str, field: pa.Field) -> pa.Field:
    """The field with today's metadata, where it is a score of ours: files of an older version may say less."""
    column = f"{group}.{field.name}"
    return score_field(column) if column in SCORES else field


def about(field: pa.Field) -> dict[str, str]:
    """The metadata of a column as text: `meaning`, `direction`, `unit`, `source`."""
    return {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}


# Of each embedded sample: its picture's size in pixels; where the encoded image lies in its shard (`offset` is null in a
# gzip-compressed one) and its length in bytes; the first half of the SHA-256 of these bytes. Files of older runs lack them.
IMAGE_FIELDS = (
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("offset", pa.int64()),
    pa.field("bytes", pa.int64()),
    pa.field("sha256", pa.binary(16)),
)
IMAGE_NAMES = tuple(field.name for field in IMAGE_FIELDS)


def embeddings_schema(width: int, dtype: str, views: int) -> pa.Schema:
    """Schema of `embeddings/`: `embedding` of the plain image, `augmented` its other views - 1 views end to end; IMAGE_FIELDS."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    fields = [*KEYS, LABEL, pa.field("embedding", pa.list_(value, width))]
    if views > 1:
        fields.append(pa.field("augmented", pa.list_(value, width * (views - 1))))
    return pa.schema([*fields, *IMAGE_FIELDS])


DIFFICULTY_SCHEMA = pa.schema(
    [
        *KEYS,
        LABEL,
        *(score_field(f"difficulty.{name}") for name in ("md", "md_agn", "rmd", "weight")),
        pa.field("nearest_class", pa.int64()),
        *(score_field(f"difficulty.{name}") for name in ("nearest_md", "margin", "md_loo", "rmd_loo", "label_error")),
    ]
)

KMEANS = score_field("difficulty.kmeans")

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("member", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
    ]
)


DECISIONS_SCHEMA = pa.schema(
    [
        *KEYS,
        pa.field(
            "decision", pa.string(), metadata={"meaning": "keep, relabel or drop; the last one of a sample counts"}
        ),
        pa.field("label", pa.int64(), metadata={"meaning": "the right label; for drop the label of before"}),
        pa.field("by", pa.string(), metadata={"meaning": "who decided"}),
        pa.field("when", pa.timestamp("us", tz="UTC")),
        pa.field(
            "source", pa.string(), metadata={"meaning": "the file, its digest, and the time at which it was read"}
        ),
    ]
)


def nullable(values: np.ndarray) -> pa.Array:
    """Floats (n,), of which NaN means that there is no value, or indices (n,), of which -1 does: null in Arrow."""
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return pa.array(values, mask=missing)


def check_name(field: str, name: str) -> None:
    """A prediction set, a trust set or a subset is called as a folder can be; ValueError otherwise."""
    if not name or name != name.strip(". ") or any(c in name for c in "/\\:") or not name.isprintable():
        raise UserError(f"{name!r}: expected a plain folder name", field)
    if column_in_path(name):
        raise UserError(f"{name!r}: DuckDB and others would take it for the column {name.partition('=')[0]}", field)


def column_in_path(path: str) -> str | None:
    """The folder of a path, such as `label=3`, that query engines take for a column that every group has; None without."""
    found = (part for part in path.split("/") if "=" in part and part.partition("=")[0] in KEYS_AND_LABEL)
    return next(found, None)


def split_name(column: str, field: str | None = None) -> tuple[str, str]:
    """'difficulty.rmd' -> ('difficulty', 'rmd'); a prediction set's column is 'predictions/NAME.confidence'."""
    group, dot, name = column.rpartition(".")
    if not dot or not group or not name:
        raise UserError(f"{column}: expected GROUP.COLUMN, such as difficulty.rmd", field)
    return group, name


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type orders samples."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def how_to_make(group: str) -> str:
    """`run hardset score first`, for a group that is not there."""
    makers = {DIFFICULTY: "score", "correctness": "train", "predictions": "predict", EMBEDDINGS: "embed"}
    kind = group.partition("/")[0]
    return f"run hardset {makers.get(kind, kind)} first"


def vectors(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as an array of shape (rows, width), without a copy where it is contiguous."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def vector_array(values: np.ndarray, value_type: pa.DataType) -> pa.FixedSizeListArray:
    """An array of shape (rows, width) as a fixed-size-list column."""
    flat = pa.array(np.ascontiguousarray(values, dtype=value_type.to_pandas_dtype()).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def labels_or_minus_one(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The label column as int64, -1 where there is none."""
    filled = column.fill_null(-1)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def concat(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Tables under one schema, also where there are none."""
    return pa.concat_tables([schema.empty_table(), *tables]).cast(schema)
