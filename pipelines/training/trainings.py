"""Finished and unfinished trainings side by side: what differs between them, and how good they came out. Reads only."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pipelines.runs import storage
from pipelines.runs.errors import UserError
from pipelines.runs.nested import flatten
from pipelines.training.documents import read_json

METRICS = ("accuracy", "ece", "ece_mass", "nll", "worst_group_accuracy")
SEED = "recipe.seed"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training's folder, read.

    Attributes
    ----------
    settings : dict
        Its config, flat (`loss.params.alpha`), with `run` and `eval_run`.
    metrics : dict
        Those of METRICS that it has, after its best epoch: fractions in [0, 1], nll in nats.
    epochs : int
        Epochs done.
    finished : bool
        False: metrics are those of the last epoch that was saved.
    """

    uri: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    epochs: int
    finished: bool

    @property
    def name(self) -> str:
        return PurePath(self.uri).name


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a comparison: trainings that differ in nothing but their seed, or a single one."""

    trainings: tuple[Trained, ...]

    def mean(self, metric: str) -> float | None:
        """Over the trainings; None unless all have the metric."""
        values = [training.metrics.get(metric) for training in self.trainings]
        return None if None in values else statistics.fmean(values)

    def deviation(self, metric: str) -> float | None:
        """Standard deviation (n - 1); None of a single training."""
        values = [training.metrics.get(metric) for training in self.trainings]
        return None if None in values or len(values) < 2 else statistics.stdev(values)


def read_trainings(places: Iterable[str], field: str = "models") -> list[Trained]:
    """The trainings at some places: each the folder of one, or a folder of such folders (a run's `models`).

    Raises
    ------
    ValueError
        For a place that holds no training, or whose training has not finished an epoch.
    """
    found = []
    for place in places:
        uri = storage.absolute(place)
        single = _read(uri)
        several = [] if single else [t for t in map(_read, _folders(uri)) if t is not None and t.epochs]
        if single is not None and not single.epochs:
            raise UserError(f"{place}: its training has not finished an epoch yet", field)
        if single is None and not several:
            raise UserError(
                f"{place}: no training there (train.json of hardset train), nor in a folder below",
                field,
            )
        found += [single] if single else several
    return found


def differing(trainings: Sequence[Trained], but: Sequence[str] = ()) -> list[str]:
    """Names of the settings that are not the same in all trainings, in the order of their first appearance."""
    names = dict.fromkeys(name for training in trainings for name in training.settings if name not in but)
    return [name for name in names if len({repr(training.settings.get(name)) for training in trainings}) > 1]


def over_seeds(trainings: Sequence[Trained]) -> list[Row]:
    """Trainings that differ in nothing but their seed, in one row; rows in the order of their first training."""
    rows: dict[tuple, list[Trained]] = {}
    for training in trainings:
        key = tuple((k, repr(v)) for k, v in sorted(training.settings.items()) if k != SEED)
        rows.setdefault(key, []).append(training)
    return [Row(tuple(row)) for row in rows.values()]


def _read(uri: str) -> Trained | None:
    record = read_json(storage.join(uri, "train.json"))
    if record is None:
        return None
    settings = flatten(record["config"], leaf=_rule) | {name: record.get(name) for name in ("run", "eval_run")}
    result = read_json(storage.join(uri, "result.json"))
    curve = [] if result else read_json(storage.join(uri, "curve.json")) or []
    numbers = result or (next((curve[-1][n] for n in ("eval", "holdout") if n in curve[-1]), {}) if curve else {})
    metrics = {name: numbers[name] for name in METRICS if name in numbers}
    return Trained(uri, settings, metrics, result["epochs"] if result else len(curve), result is not None)


def _folders(uri: str) -> list[str]:
    """The folders right below that hold a train.json; members of an ensemble lie deeper."""
    folders = [name.rpartition("/")[0] for name in storage.list_files(uri, "/train.json")]
    return [folder for folder in folders if folder.rpartition("/")[0] == uri.rstrip("/")]


def _rule(rule: Mapping[str, Any]) -> str | None:
    """A rule for groups as the text that it was given as; None for other settings."""
    if "quantiles" not in rule:
        return None
    cut = f"q{rule['quantiles']}" if rule["quantiles"] else ",".join(f"{edge:g}" for edge in rule["edges"])
    return f"{rule['column']}:{cut}" + (" by class" if rule["by_class"] else "")
