"""A run directory: what it was made with, which shards it holds, which stages are finished.

`run.json` holds the config, the versions, the shards and the classes; only the command that makes the run or lets it grow
writes it. What a finished stage says of itself is a file of its own, `stages/NAME.json`, so that no command writes over
what another one noted. A command works on the shards of the run as it opened it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.lease import check_idle, lease

RECORD = "run.json"
STAGES = "stages"
RECORD_WAIT_S = 60.0  # run.json is written in a moment, even with a million shards in seconds
# What --overwrite removes: only what stages write, never a folder that merely happens to lie there.
PRODUCTS = (
    STAGES, columns.EMBEDDINGS, columns.DIFFICULTY, columns.QUARANTINE, "gaussians.npz", "kmeans.npz", "confusion", "correctness",
    "predictions", "trust", "percentiles", "subsets", "report", "evaluation", "models", "neighbors", ".parts",
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
    """One shard as it was found: `size` in bytes, time of modification in nanoseconds (0 where the store has none).

    `image` and `exif` are the run's: the suffix of the members that are the images, where it names one, and whether
    pictures are turned as their EXIF data says. Whoever reads the shard heeds them.
    """

    url: str
    size: int
    mtime_ns: int
    image: str | None = None
    exif: str = "ignore"

    def found(self) -> dict[str, Any]:
        """What is recorded of the file itself."""
        return {"url": self.url, "size": self.size, "mtime_ns": self.mtime_ns}


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
    exif: str = "ignore"
    image: str | None = None
    label_member: str | None = None

    def identity(self) -> dict[str, Any]:
        """The values that decide whether two configs may share a run; the encoder counts by its weights, not its name.

        What a run made before there was such an option cannot name is left out where it says what was done then.
        """
        values = dataclasses.asdict(self)
        del values["encoder"]
        for name, before in (("exif", "ignore"), ("image", None), ("label_member", None)):
            if values[name] == before:
                del values[name]
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
    def open(cls, uri: str, field: str = "run") -> "Run":
        """Open an existing run; ValueError, which names `option`, where there is none that can be read."""
        try:
            record = _read_json(storage.join(uri, RECORD))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{uri}: no {RECORD} there; make the run with hardset curate or hardset embed",
                field,
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{uri}: {RECORD} cannot be read ({storage.first_line(error)})", field) from None
        run = cls(uri, record)
        problem = run._problem()
        if problem:
            raise UserError(f"{uri}: its {RECORD} is not one that hardset wrote ({problem})", field)
        return run

    def _problem(self) -> str | None:
        """What is wrong with a record that a stranger may have made; None if nothing is."""
        try:
            _ = [name.encode() for name in (*self.classes, *(self.config.class_names or ()))]
            _ = [entry.items() for entry in self.record.get(STAGES, {}).values()]
            _check_types([self.config])
            _check_types(self.shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Whether a run was started there."""
        return storage.exists(storage.join(uri, RECORD))

    @classmethod
    def create(
        cls,
        uri: str,
        config: CorpusConfig,
        shards: Sequence[Shard],
        overwrite: bool = False,
        moved: Mapping[str, str] | None = None,
    ) -> "Run":
        """Start a run, or open the one that is there and add shards that it lacks.

        `moved` says of shards that lie elsewhere now where: old URL -> listed URL.

        ValueError if the run there was made with another config or holds shards that are no longer listed;
        with `overwrite` its products are removed instead.
        """
        storage.check_writable(uri)
        with lease(uri, RECORD, RECORD_WAIT_S):
            return cls._create(uri, config, shards, overwrite, moved or {})

    @classmethod
    def _create(
        cls, uri: str, config: CorpusConfig, shards: Sequence[Shard], overwrite: bool, moved: Mapping[str, str]
    ) -> "Run":
        if cls.exists(uri):
            run = cls.open(uri)
            if not overwrite:
                run._refuse_mixing(config)
                run._extend(shards, config.encoder, moved)
                return run
            check_idle(uri, but=RECORD)
            for product in PRODUCTS:
                storage.remove_tree(storage.join(uri, product))
        record = {
            "config": dataclasses.asdict(config),
            "shards": [shard.found() for shard in shards],
            "classes": list(config.class_names or ()),
        }
        run = cls(uri, record)
        run.save()
        return run

    def _refuse_mixing(self, config: CorpusConfig) -> None:
        ours, theirs = (
            {"exif": "ignore", "image": None, "label_member": None} | c.identity() for c in (self.config, config)
        )
        # The weights' fingerprint last, and what follows from it: it also differs where vectors are scaled.
        for name in sorted(ours, key=("encoder_fingerprint", "width").__contains__):
            if ours[name] != theirs[name]:
                old, new = ours[name], theirs[name]
                if "encoder" in name and self.config.encoder != config.encoder:
                    name, old, new = "encoder", self.config.encoder, config.encoder
                elif "encoder" in name:  # called the same, but its weights or its code are others
                    name, old, new = "encoder weights or code", old[:12], new[:12]
                raise UserError(
                    f"{self.uri}: made with {name.replace('_', ' ')} {old!r}, asked for {new!r}; "
                    "these cannot be mixed: take another `run`, or `overwrite`",
                    "run",
                )

    def _extend(self, shards: Sequence[Shard], encoder: str, moved: Mapping[str, str]) -> None:
        """Take over the listed shards: known ones keep their position, new ones follow in the order given.

        So is the encoder's name: the same weights may be found elsewhere this time.
        """
        listed = {shard.url: shard for shard in shards}
        urls = [moved.get(shard.url, shard.url) for shard in self.shards]
        missing = [url for url in urls if url not in listed]
        if missing:
            raise UserError(
                f"this run holds {len(self.shards)} shards, {len(missing)} of them not listed now "
                f"(first: {missing[0]}); list them too, or say where they are (`moved` FROM=TO), or take another `run`, or `overwrite`",
                "shards",
            )
        known = set(urls)
        merged = [listed[url] for url in urls] + [s for s in shards if s.url not in known]
        entries = [shard.found() for shard in merged]
        old = STAGES in self.record
        if entries != self.record["shards"] or encoder != self.config.encoder or old:
            self.record["shards"] = entries
            self.record["config"]["encoder"] = encoder
            if old:
                self._move_old_stages()
            self.save()

    def _move_old_stages(self) -> None:
        """Earlier versions kept the entries of stages, and a plan, in run.json: each gets its file."""
        entries = self.record[STAGES]
        if "plan" in self.record:
            entries["plan"] = {"finished": _now(), "plan": self.record["plan"]}
        for name, entry in entries.items():
            if not storage.exists(self._stage_file(name)):
                self._write_stage(name, entry)
        self.record = {name: value for name, value in self.record.items() if name not in (STAGES, "plan")}

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
            image, exif = self.config.image, self.config.exif
            shards = [Shard(**record, image=image, exif=exif) for record in self.record["shards"]]
            self._shards = (self.record["shards"], shards)
        return shards

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into this list. Empty without labels."""
        return self.record["classes"]

    def lease(self, product: str) -> contextlib.AbstractContextManager[None]:
        """The right to write a product, such as `difficulty` or `subsets/hard`; Busy if another command has it."""
        return lease(self.uri, product)

    def path(self, *parts: str) -> str:
        """URI of something inside the run."""
        return storage.join(self.uri, *parts)

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry that a finished stage left, or None. ValueError, which names the file, if it cannot be read."""
        try:
            return _read_entry(self._stage_file(name))
        except (FileNotFoundError, NotADirectoryError):
            return self.record.get(STAGES, {}).get(name)

    def stages(self) -> dict[str, dict[str, Any]]:
        """The entry of every finished stage, by its name, in the order in which they were finished."""
        folder = self.path(STAGES)
        names = [_below(uri, folder) for uri in storage.list_files(folder, ".json")]
        entries = dict(self.record.get(STAGES, {})) | {name: self.stage(name) or {} for name in names}
        return dict(sorted(entries.items(), key=lambda item: str(item[1].get("finished", ""))))

    def finish_stage(self, name: str, **entry: Any) -> None:
        """Note a finished stage: its counts, seconds and the config that mattered to it. Nothing else is written.

        Parameters
        ----------
        name : str
            May contain slashes, as `select/hard`.
        entry
            JSON-able values.
        """
        self._write_stage(name, {"finished": _now(), **entry})

    def forget(self, stage: str, product: str) -> None:
        """Remove what a stage made, so that it is made again."""
        storage.remove_tree(self._stage_file(stage))
        storage.remove_tree(self.path(product))
        if stage in self.record.get(STAGES, {}):
            del self.record[STAGES][stage]
            self._update(lambda record: record.get(STAGES, {}).pop(stage, None) is not None)

    def _stage_file(self, name: str) -> str:
        return self.path(STAGES, *f"{name}.json".split("/"))

    def _write_stage(self, name: str, entry: dict[str, Any]) -> None:
        storage.write_text_atomic(self._stage_file(name), json.dumps(entry, indent=1, ensure_ascii=False) + "\n")

    def require_precision(self, precision: str) -> None:
        """Note in which precision the encoder computes; ValueError if the run's other embeddings have another."""
        if "precision" not in self.record:
            now = self._update(lambda record: record.setdefault("precision", precision) is precision)
            self.record["precision"] = now["precision"]
        before = self.record["precision"]
        if before != precision:
            raise UserError(
                f"{precision}: this run's embeddings were computed in {before}; these cannot be mixed: take {before}, "
                "another `run`, or `overwrite`",
                "precision",
            )

    def settle_classes(self, facts: Sequence[dict[str, Any]]) -> None:
        """Without names of classes there are as many as the highest label says; `facts` are those of all shards."""
        if self.config.class_names is None:
            highest = max((f["max_label"] for f in facts if f["max_label"] is not None), default=-1)
            self.set_classes([str(label) for label in range(highest + 1)])

    def set_classes(self, names: Sequence[str]) -> None:
        """Note the classes. A run that has grown since it was opened keeps those that it has more."""

        def change(record: dict[str, Any]) -> bool:
            grown = len(record["shards"]) > len(self.record["shards"]) and len(record["classes"]) > len(names)
            if grown or record["classes"] == names:
                return False
            record["classes"] = names
            return True

        names = list(names)
        if names != self.classes:
            self._update(change)
            self.record["classes"] = names

    def note_verified(self, verified: dict[str, int]) -> None:
        """Note, by shard, the times of modification with which its bytes were found to be those that were embedded."""

        def change(record: dict[str, Any]) -> bool:
            record["verified"] = record.get("verified", {}) | verified
            return True

        if verified:
            change(self.record)
            self._update(change)

    def _update(self, change: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Change run.json as it is now, which is returned; `change` tells whether it did. This handle stays as it is."""
        with lease(self.uri, RECORD, RECORD_WAIT_S):
            now = self.open(self.uri)
            if change(now.record):
                now.save()
        return now.record

    def save(self) -> None:
        """Write run.json, whole or not at all; for who holds its lease."""
        self.record["versions"] = library_versions()
        with storage.write_atomic(self.path(RECORD)) as file:
            for piece in _encoded(self.record):
                file.write(piece.encode())

    def embedding_facts(self) -> list[dict[str, Any]]:
        """What each shard's embeddings file says of itself. ValueError if a shard has none yet."""
        found = column_groups.all_facts(self.uri, columns.EMBEDDINGS, len(self.shards))
        pending = sum(facts is None for facts in found)
        if pending:
            raise UserError(
                f"{self.uri}: {pending} of {len(found)} shards are not embedded yet; run hardset embed first",
                "run",
            )
        return found


def _check_types(found: Sequence[Shard | CorpusConfig]) -> None:
    """TypeError, which names the value, where one is not of the type that the dataclass declares."""
    hints = typing.get_type_hints(type(found[0])) if found else {}
    for name in set(hints) - {"class_names"}:
        allowed = typing.get_args(hints[name]) or (hints[name],)
        for one in found:
            if type(getattr(one, name)) not in allowed:
                raise TypeError(f"{name} is {str(getattr(one, name))[:80]!r}, not {allowed[0].__name__}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _below(uri: str, folder: str) -> str:
    """The name of a stage whose entry lies at `uri`."""
    start, _ = storage.split_query(folder)
    return storage.split_query(uri)[0].removeprefix(start).strip("/").removesuffix(".json")


def _read_json(uri: str) -> Any:
    """ValueError of one line for what is not JSON, or nested so deep that reading it would exhaust the stack."""
    try:
        return json.loads(storage.read_bytes(uri))
    except RecursionError:
        raise ValueError("nested too deep") from None


def _read_entry(uri: str) -> dict[str, Any]:
    """An entry of a stage. ValueError, which names the file, for anything that is not one."""
    try:
        entry = _read_json(uri)
    except ValueError as error:
        raise UserError(
            f"{uri}: cannot be read ({storage.first_line(error)}); delete it and start that stage again"
        ) from None
    if not isinstance(entry, dict):
        raise UserError(f"{uri}: it is not what a stage writes; delete it and start that stage again")
    return entry


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
