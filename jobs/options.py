"""Options that several commands share, each a flag, a YAML key and a line of --help."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeVar

from pipelines.curation.weighting import Weighting
from pipelines.runs.errors import UserError

Settings = TypeVar("Settings")


def at_least(options: object, low: float, names: Iterable[str]) -> None:
    """ValueError, which becomes status 2, if one of these options is set and below `low`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError(f"{value}: must be at least {low}", name)


def part(options: object, kind: type[Settings]) -> Settings:
    """The settings that a pipeline takes, out of options that are declared as these and more."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def named(options: object, names: Iterable[str]) -> None:
    """ValueError if one of these options is an empty path, which would mean the working directory or a root."""
    for name in names:
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise UserError("'': expected a path or a URI", name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Ray, and how the result is told."""

    json: bool = False
    """print one JSON object as the last line: counts, seconds, paths, metrics"""
    ray_address: str = "auto"
    """a cluster's address, local for a Ray of its own, or auto: RAY_ADDRESS where it is set (as in a Ray job), else local"""
    ray_cpus: int | None = None
    """CPU cores of a local Ray (default: all)"""
    storage_retry_s: float | None = None
    """how long an object store that fails is waited for, in seconds (default: HARDSET_STORAGE_RETRY_S, else 300)"""

    def __post_init__(self) -> None:
        at_least(self, 0, ("storage_retry_s",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(SessionOptions):
    """Where the run is, and how it is told."""

    run: str
    """run directory: a local path, s3://bucket/path, or what pyarrow.fs or fsspec opens"""
    mlflow: str | None = None
    """MLflow tracking URI, or none (default: MLFLOW_TRACKING_URI, else sqlite in ./mlflow.db)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        named(self, ("run",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Which images, their labels, and the encoder. A run that is there remembers them."""

    shards: str | None = None
    """webdataset shards: quoted braces, globs, a folder, s3://…, a text file of URLs, '::' between sources"""
    moved: list[str] = dataclasses.field(default_factory=list)
    """FROM=TO: shards of the run that lay below FROM lie below TO now; nothing is embedded again"""
    encoder: str | None = None
    """of a new run (default open_clip:ViT-B-32/laion2b_s34b_b79k):
    open_clip:MODEL/TAG, open_clip:MODEL@FILE, timm:NAME, timm:NAME@FILE, pixels:SIZE, module:FILE.py:FACTORY or
    module:package.module:FACTORY"""
    label: str | None = None
    """cls (the default), json:FIELD, or none for images without labels"""
    classes: str | None = None
    """text file of class names, one a line, in the order of the labels; then cls may hold names"""
    image: str | None = None
    """suffix of the member that is the image, such as input.jpg, where samples have several (default: the only one)"""
    label_member: str | None = None
    """suffix of the member that holds the label, such as output.cls (default: the only one of the kind that label names)"""
    exif: Literal["ignore", "apply"] | None = None
    """whether a picture is turned as its EXIF data says (default ignore, as the loaders of open_clip and webdataset do)"""
    views: int | None = None
    """views per image that the Gaussians are fitted on: the plain one and views - 1 augmented (default 1; the paper: 5)"""
    normalize: bool = False
    """scale each embedding to unit length"""
    dtype: Literal["float16", "float32"] | None = None
    """precision of stored embeddings (default float32)"""
    max_pixels: int | None = None
    """an image of more pixels than this goes to quarantine undecoded (default 100,000,000)"""
    overwrite: bool = False
    """remove what the run holds and start afresh; fit and score: only what they make"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("views", "max_pixels"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where it is computed. Of these only the precision changes a result by more than rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one and says so; cuda waits for the GPUs of an autoscaling cluster"""
    workers: int | None = None
    """embedding actors (default: one per GPU, or one per CPU core)"""
    decode_threads: int | None = None
    """threads that decode for each embedding actor, and cores that it takes (default: a GPU's share of its node's cores
    less one; 1 on a CPU)"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the encoder: auto is bfloat16 on a GPU and float32 on a CPU; a run keeps to one"""
    batch_size: int = 64
    """images per forward pass; halved by itself when GPU memory does not suffice"""
    sample_limit: float = 120.0
    """seconds after which a sample that the encoder gives no answer for goes to quarantine"""
    max_bad_fraction: float = 0.01
    """fraction of samples in quarantine, in [0, 1], above which the run ends with status 1"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("workers", "batch_size", "decode_threads"))
        if not self.sample_limit > 0:
            raise UserError(f"{self.sample_limit}: must be above 0", "sample_limit")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"{self.max_bad_fraction}: expected a fraction in [0, 1]", "max_bad_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianOptions:
    """The Gaussians."""

    gaussians: str | None = None
    """score with the Gaussians of this other run, fit nothing"""
    shrinkage: str | float = "auto"
    """none, oas, a number in [0, 1], or auto: towards the diagonal, by what best predicts samples left out"""
    labels: Literal["decided", "original"] = "decided"
    """decided: the labels after hardset decide; original: those of the corpus, whatever was decided since"""

    def __post_init__(self) -> None:
        self.amount()

    def amount(self) -> str | float:
        """The shrinkage as `GaussianStats.fit` takes it."""
        if self.shrinkage in ("auto", "none", "oas"):
            return self.shrinkage
        try:
            value = float(self.shrinkage)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"{self.shrinkage}: expected auto, none, oas, or a number in [0, 1]", "shrinkage")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOptions(Weighting):
    """The difficulty columns."""

    kmeans: int | None = None
    """also write the distance to the nearest of this many k-means centres (a number of clusters)"""
    seed: int = 0
    """seed of k-means, and of curate's --stratify and --random"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, ("kmeans",))
        at_least(self, 0, ("seed",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """The subset."""

    by: str = "difficulty.rmd"
    """GROUP.COLUMN that ranks the samples"""
    top: int | float | None = None
    """the highest: a fraction in (0, 1], such as 0.1, of the samples that pass, or a number of samples such as 500 (default 0.1)"""
    bottom: int | float | None = None
    """the lowest instead"""
    per_class: bool = False
    """take that fraction or number of every class"""
    where: str | None = None
    """condition on a sample's columns, in SQL: "difficulty.margin < 0 and embeddings.label <> 3"; null counts as no. curate's
    subset has "difficulty.margin < 0" where there are margins and --by is of difficulty/; '' turns that off"""
    stratify: str | None = None
    """COLUMN:N: as many of each of N equally full intervals of this column, drawn at random by --seed, not by --by"""
    exclude: list[str] = dataclasses.field(default_factory=list)
    """leave out the samples of these subsets of the run"""
    random: bool = False
    """draw that fraction or number at random by --seed: a control of the same size"""
    name: str = "hard"
    """folder under subsets/"""
    samples_per_shard: int = 1000
    """samples per subset shard, about"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("samples_per_shard",))
        if self.top is not None and self.bottom is not None:
            raise UserError("one of `top` and `bottom`, not both")
        amount = self.amount
        if amount <= 0 or (isinstance(amount, float) and amount > 1):
            raise UserError(
                f"{amount}: expected a fraction in (0, 1] such as 0.1, or a whole number of samples such as 500",
                "top" if self.bottom is None else "bottom",
            )
        self.intervals()

    @property
    def amount(self) -> int | float:
        """How many: a fraction if it is a float."""
        return next((value for value in (self.top, self.bottom) if value is not None), 0.1)

    def intervals(self) -> tuple[str, int] | None:
        """Column and number of --stratify."""
        if self.stratify is None:
            return None
        column, colon, number = self.stratify.rpartition(":")
        if not colon or not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"{self.stratify}: expected COLUMN:N with a number of intervals, such as difficulty.rmd:20",
                "stratify",
            )
        return column, int(number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectOptions(SubsetOptions):
    """The subset."""

    seed: int = 0
    """of --stratify and --random"""
    labels: Literal["decided", "original"] = "decided"
    """decided: the labels after hardset decide, without dropped samples; original: those of the corpus"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, ("seed",))
