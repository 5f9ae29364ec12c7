"""A run directory: what it was made with, which shards it holds, which stages are finished.

`run.json` is the only state; everything else is derived from the files that are there.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.runs import column_groups, columns, storage

RECORD = "run.json"
# What --overwrite removes: only what stages write, never a folder that merely happens to lie there.
PRODUCTS = (
    columns.EMBEDDINGS, columns.DIFFICULTY, columns.QUARANTINE, "gaussians.npz", "kmeans.npz", "confusion", "correctness",
    "predictions", "trust", "percentiles", "subsets", "report", "evaluation", "models", ".parts",
)  # fmt: skip
LIBRARIES = ("hardset", "ray", "torch", "torchvision", "numpy", "pyarrow", "open_clip_torch", "timm", "webdataset")


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values: the `source` of a file, made of the config and inputs that matter to it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprints(*parts: Any) -> Callable[[Any], str]:
    """`fingerprint(*parts, last)` as a function of `last`, for a million of these: the other parts are hashed once."""
    beginning = hashlib.sha256(json.dumps(parts, sort_keys=True)[:-1].encode())

    def of(last: Any) -> str:
        state = beginning.copy()
        state.update(f", {json.dumps(last, sort_keys=True)}]".encode())
        return state.hexdigest()[:32]

    return of


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard as it was found: `size` in bytes, time of modification in nanoseconds (0 where the store has none)."""

    url: str
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """What cannot be mixed within one run: how images became embeddings and what labelled them."""

    encoder: str
    encoder_fingerprint: str
    width: int
    label: str = "cls"
    class_names: tuple[str, ...] | None = None
    views: int = 1
    normalize: bool = False
    dtype: str = "float32"
    max_pixels: int = 100_000_000

    def identity(self) -> dict[str, Any]:
        """The values that decide whether two configs may share a run; the encoder counts by its weights, not its name."""
        values = dataclasses.asdict(self)
        del values["encoder"]
        return values

    def same_embedding(self, other: "CorpusConfig") -> bool:
        """Whether vectors of the two lie in one space: the same weights, the same length."""
        ours, theirs = ((c.encoder_fingerprint, c.width, c.normalize) for c in (self, other))
        return ours == theirs


class Run:
    """An open run directory. `Run.open` reads one, `Run.create` starts one."""

    def __init__(self, uri: str, record: dict[str, Any]):
        self.uri, self.record = storage.absolute(uri), record
        self._shards: tuple[list | None, list[Shard]] = (None, [])

    @classmethod
    def open(cls, uri: str, option: str = "--run") -> "Run":
        """Open an existing run; ValueError, which names `option`, where there is none that can be read."""
        try:
            record = json.loads(storage.read_bytes(storage.join(uri, RECORD)))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{option} {uri}: no {RECORD} there; make the run with hardset curate or hardset embed"
            ) from None
        except (IsADirectoryError, PermissionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{option} {uri}: {RECORD} cannot be read ({storage.first_line(error)})") from None
        run = cls(uri, record)
        try:
            shapes = (run.config, run.shards, run.classes, record["stages"].items())
        except (AttributeError, KeyError, TypeError) as error:
            shapes, why = None, f"{type(error).__name__}: {error}"
        if shapes is None:
            raise ValueError(f"{option} {uri}: its {RECORD} is not one that hardset wrote ({why})")
        return run

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Whether a run was started there."""
        return storage.exists(storage.join(uri, RECORD))

    @classmethod
    def create(cls, uri: str, config: CorpusConfig, shards: Sequence[Shard], overwrite: bool = False) -> "Run":
        """Start a run, or open the one that is there and add shards that it lacks.

        ValueError if the run there was made with another config or holds shards that are no longer listed;
        with `overwrite` its products are removed instead.
        """
        storage.check_writable(uri)
        if cls.exists(uri):
            run = cls.open(uri)
            if not overwrite:
                run._refuse_mixing(config)
                if run.config.encoder != config.encoder:  # the same weights, found elsewhere this time
                    run.record["config"]["encoder"] = config.encoder
                    run.save()
                run._extend(shards)
                return run
            for product in PRODUCTS:
                storage.remove_tree(storage.join(uri, product))
        record = {
            "config": dataclasses.asdict(config),
            "shards": [dataclasses.asdict(shard) for shard in shards],
            "classes": list(config.class_names or ()),
            "stages": {},
        }
        run = cls(uri, record)
        run.save()
        return run

    def _refuse_mixing(self, config: CorpusConfig) -> None:
        ours, theirs = self.config.identity(), config.identity()
        # The weights' fingerprint last, and what follows from it: it also differs where vectors are scaled.
        for name in sorted(ours, key=("encoder_fingerprint", "width").__contains__):
            if ours[name] != theirs[name]:
                old, new = ours[name], theirs[name]
                if "encoder" in name and self.config.encoder != config.encoder:
                    name, old, new = "encoder", self.config.encoder, config.encoder
                elif "encoder" in name:  # called the same, but its weights or its code are others
                    name, old, new = "encoder weights or code", old[:12], new[:12]
                raise ValueError(
                    f"--run {self.uri}: made with {name.replace('_', ' ')} {old!r}, asked for {new!r}; "
                    "these cannot be mixed: take another --run, or --overwrite"
                )

    def _extend(self, shards: Sequence[Shard]) -> None:
        """Take over the listed shards: known ones keep their position, new ones follow in the order given."""
        listed = {shard.url: shard for shard in shards}
        missing = [shard.url for shard in self.shards if shard.url not in listed]
        if missing:
            raise ValueError(
                f"--shards: this run holds {len(self.shards)} shards, {len(missing)} of them not listed now "
                f"(first: {missing[0]}); list them too, or take another --run, or --overwrite"
            )
        known = {shard.url for shard in self.shards}
        merged = [listed[shard.url] for shard in self.shards] + [s for s in shards if s.url not in known]
        if merged != self.shards:
            self.record["shards"] = [dataclasses.asdict(shard) for shard in merged]
            self.save()

    @property
    def config(self) -> CorpusConfig:
        """How the run's embeddings were made."""
        values = dict(self.record["config"])
        names = values["class_names"]
        return CorpusConfig(**values | {"class_names": None if names is None else tuple(names)})

    @property
    def shards(self) -> list[Shard]:
        """The run's shards; a shard's position here is its number in every column group. Not to be changed."""
        made_of, shards = self._shards
        if made_of is not self.record["shards"]:
            shards = [Shard(**record) for record in self.record["shards"]]
            self._shards = (self.record["shards"], shards)
        return shards

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into this list. Empty without labels."""
        return self.record["classes"]

    def path(self, *parts: str) -> str:
        """URI of something inside the run."""
        return storage.join(self.uri, *parts)

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry that a finished stage left, or None."""
        return self.record["stages"].get(name)

    def finish_stage(self, name: str, **entry: Any) -> None:
        """Note a finished stage: its counts, seconds and the config that mattered to it.

        Entries that another command has noted meanwhile stay.
        """
        if self.exists(self.uri):
            self.record["stages"] = self.open(self.uri).record["stages"]
        self.record["stages"][name] = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **entry}
        self.save()

    def forget(self, stage: str, product: str) -> None:
        """Remove what a stage made, so that it is made again."""
        storage.remove_tree(self.path(product))
        if self.record["stages"].pop(stage, None) is not None:
            self.save()

    def require_precision(self, precision: str) -> None:
        """Note in which precision the encoder computes; ValueError if the run's other embeddings have another."""
        before = self.record.setdefault("precision", precision)
        if before != precision:
            raise ValueError(
                f"--device: this run's embeddings were computed in {before}, this device computes in {precision}; "
                "these cannot be mixed: take the device of before, another --run, or --overwrite"
            )

    def settle_classes(self, facts: Sequence[dict[str, Any]]) -> None:
        """Without names of classes there are as many as the highest label says."""
        if self.config.class_names is None:
            highest = max((f["max_label"] for f in facts if f["max_label"] is not None), default=-1)
            self.record["classes"] = [str(label) for label in range(highest + 1)]

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        self.record["versions"] = library_versions()
        with storage.write_atomic(self.path(RECORD)) as file:
            for piece in _encoded(self.record):
                file.write(piece.encode())

    def embedding_facts(self) -> list[dict[str, Any]]:
        """What each shard's embeddings file says of itself. ValueError if a shard has none yet."""
        found = column_groups.all_facts(self.uri, columns.EMBEDDINGS, len(self.shards))
        pending = sum(facts is None for facts in found)
        if pending:
            raise ValueError(
                f"--run {self.uri}: {pending} of {len(found)} shards are not embedded yet; run hardset embed first"
            )
        return found


def _encoded(record: dict[str, Any]) -> Iterator[str]:
    """run.json in pieces: a line per shard, so that a million of them are quick to write and to read by eye."""
    shards = record["shards"]
    rest = json.dumps({name: value for name, value in record.items() if name != "shards"}, indent=1, ensure_ascii=False)
    encode = json.JSONEncoder(ensure_ascii=False).encode
    yield rest.removesuffix("\n}") + ',\n "shards": ['
    for start in range(0, len(shards), 1000):
        yield (",\n" if start else "\n") + ",\n".join("  " + encode(shard) for shard in shards[start : start + 1000])
    yield "\n ]\n}\n"


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
