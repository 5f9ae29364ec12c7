"""How far two runs rank the same samples alike (τ, ρ, overlap of the highest tenth); or trainings side by side.

hardset compare RUN RUN2 --column difficulty.rmd
hardset compare --models RUN/models [--over-seeds]
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command, say
from jobs.options import RunOptions
from jobs.session import tracked
from pipelines.runs import credentials
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.training import trainings


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaybeRunOptions(RunOptions):
    """Where the run is, and how it is told."""

    run: str | None = None
    """run directory: a local path, s3://bucket/path, or what pyarrow.fs or fsspec opens; not with --models"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared. `hardset compare RUN RUN2` is short for --run RUN --other RUN2."""

    models: list[str] = dataclasses.field(default_factory=list)
    """trainings instead of columns: folders of hardset train (its --out), or folders of these such as RUN/models"""
    over_seeds: bool = False
    """with --models: trainings that differ in nothing but --seed in one line, mean ± standard deviation"""

    other: str | None = None
    """the other run (default: the same one)"""
    column: str = "difficulty.rmd"
    """GROUP.COLUMN that ranks the samples"""
    other_column: str | None = None
    """the other run's column (default: the same one)"""
    predictions: str | None = None
    """also tell how the error rate of predictions/NAME rises with the column, in each run that has them"""
    bands: int = 10
    """bands of equal width of that curve"""


def compare(options: MaybeRunOptions, comparison: CompareOptions) -> dict[str, Any]:
    """Print and return the agreement, or the table of trainings; reads only, without Ray."""
    from pipelines.evaluation import compare as comparing  # scipy.stats, which --help does not wait for

    if comparison.models:
        if options.run is not None:
            raise UserError("compares trainings, `run` and `other` columns; one of the two", "models")
        return _compare_trainings(comparison)
    if options.run is None:
        raise UserError("which? two runs whose columns to compare, or `models` DIR DIR …", "run")
    if comparison.over_seeds:
        raise UserError("has a meaning with `models` only", "over_seeds")
    if comparison.bands < 2:
        raise UserError(f"{comparison.bands}: at least 2", "bands")
    run = Run.open(options.run)
    other = run if comparison.other is None else Run.open(comparison.other, "other")
    names = (comparison.column, comparison.other_column or comparison.column)
    with tracked("compare", options, comparison) as tracker:
        found = comparing.compare_columns(run, other, *names)
        result = {"run": run.uri, "other": other.uri, "column": names[0], "other_column": names[1], **found}
        if comparison.predictions is not None:
            result["errors"] = _error_curves((run, other), names, comparison)
        tracker.metrics({name: value for name, value in result.items() if isinstance(value, int | float)})
    _show(result)
    return _without_nan(result)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _error_curves(runs: tuple[Run, Run], names: tuple[str, str], comparison: CompareOptions) -> dict[str, Any]:
    from pipelines.evaluation import compare as comparing

    return {
        f"{run.uri} {name}": comparing.error_curve(run, name, comparison.predictions, comparison.bands)
        for run, name in dict.fromkeys(zip(runs, names))
    }


def _show(result: dict[str, Any]) -> None:
    say(
        f"{result['column']} of {result['run']} against {result['other_column']} of {result['other']}: "
        f"{result['matched']:,} samples in both, {result['only_first']:,} only in the first, "
        f"{result['only_second']:,} only in the second"
        + (f", {result['ambiguous']:,} rows left out as their key is not unique" if result["ambiguous"] else "")
    )
    say(
        f"  Kendall τ-b {result['kendall_tau']:.4f}   Spearman {result['spearman']:.4f}   Pearson {result['pearson']:.4f}   "
        f"of the highest tenth in both {100 * result['top_overlap']:.1f} %"
    )
    for name, curve in result.get("errors", {}).items():
        say(
            f"  {name}: error rate {curve['error_rate_all']:.4f}; by tenths, easiest first: "
            f"{' '.join(f'{rate:.3f}' for rate in curve['tenths'])}; Pearson over {len(curve['centre'])} bands "
            f"{curve['pearson_bands']:.3f}, over samples {curve['pearson_samples']:.3f}"
        )


def _compare_trainings(comparison: CompareOptions) -> dict[str, Any]:
    """A line per training: what sets it apart, its epochs, its metrics."""
    found = trainings.read_trainings(comparison.models)
    if comparison.over_seeds:
        rows = trainings.over_seeds(found)
        apart = trainings.differing([row.trainings[0] for row in rows], but=(trainings.SEED,))
    else:
        rows = [trainings.Row((training,)) for training in found]
        apart = trainings.differing(found)
    table = [["training", *map(_short, apart), "epochs", *trainings.METRICS]]
    table += [_cells(row, apart) for row in rows]
    _show_table(table)
    return {"models": [_record(row, apart) for row in rows]}


def _cells(row: trainings.Row, apart: Sequence[str]) -> list[str]:
    first = row.trainings[0]
    name = first.name if len(row.trainings) == 1 else f"{first.name} ({len(row.trainings)} seeds)"
    epochs = f"{first.epochs}" + ("" if all(t.finished for t in row.trainings) else " (unfinished)")
    settings = ["–" if (value := first.settings.get(setting)) is None else str(value) for setting in apart]
    return [name, *settings, epochs, *(_metric(row, metric) for metric in trainings.METRICS)]


def _metric(row: trainings.Row, metric: str) -> str:
    mean, deviation = row.mean(metric), row.deviation(metric)
    if mean is None:
        return "–"
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _record(row: trainings.Row, apart: Sequence[str]) -> dict[str, Any]:
    metrics = {metric: row.mean(metric) for metric in trainings.METRICS}
    spreads = {f"{metric}_std": row.deviation(metric) for metric in trainings.METRICS}
    return {
        "out": [training.uri for training in row.trainings],
        "settings": {name: row.trainings[0].settings.get(name) for name in apart},
        "epochs": row.trainings[0].epochs,
        "finished": all(training.finished for training in row.trainings),
        **{name: value for name, value in (metrics | spreads).items() if value is not None},
    }


def _short(setting: str) -> str:
    """`loss.params.alpha` -> `alpha`, as it is said on the command line."""
    return "loss" if setting == "loss.name" else setting.rpartition(".")[2]


def _show_table(table: list[list[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


COMMAND = Command("compare", __doc__, (MaybeRunOptions, CompareOptions), compare)


def with_flags(words: Sequence[str]) -> list[str]:
    """`RUN RUN2 --column X` -> `--run RUN --other RUN2 --column X`, wherever the two stand."""
    switches = {"--json", "--over-seeds", "--help", "-h"}
    runs, rest, value_follows, several = [], [], False, False
    for word in words:
        if word.startswith("-"):
            rest.append(word)
            value_follows = word not in switches and "=" not in word
            several = word == "--models"  # takes all up to the next flag
        elif value_follows:
            rest.append(word)
            value_follows = several
        else:
            runs.append(word)
    if len(runs) > 2:
        raise UserError(f"expected RUN RUN2, found {len(runs)} names: {' '.join(runs)}")
    return [part for pair in zip(("--run", "--other"), runs) for part in pair] + rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        words = with_flags(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(credentials.redact(f"hardset compare: error: {error}\n"))
        return 2
    return COMMAND.main(words)


if __name__ == "__main__":
    sys.exit(main())
