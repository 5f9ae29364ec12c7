"""How far two runs rank the same samples alike: Kendall's τ, Spearman's ρ, the overlap of the highest tenth.

hardset compare RUN RUN2 --column difficulty.rmd
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command, say
from jobs.options import RunOptions
from jobs.session import tracked
from pipelines import compare as comparing
from pipelines.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared. `hardset compare RUN RUN2` is short for --run RUN --other RUN2."""

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


def compare(options: RunOptions, comparison: CompareOptions) -> dict[str, Any]:
    """Print and return the agreement; reads only, without Ray."""
    if comparison.bands < 2:
        raise ValueError(f"--bands {comparison.bands}: at least 2")
    run = Run.open(options.run)
    other = run if comparison.other is None else Run.open(comparison.other)
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


COMMAND = Command("compare", __doc__, (RunOptions, CompareOptions), compare)


def with_flags(words: Sequence[str]) -> list[str]:
    """`RUN RUN2 --column X` -> `--run RUN --other RUN2 --column X`, wherever the two stand."""
    switches = {"--json", "--help", "-h"}
    runs, rest, value_follows = [], [], False
    for word in words:
        if word.startswith("-"):
            rest.append(word)
            value_follows = word not in switches and "=" not in word
        elif value_follows:
            rest.append(word)
            value_follows = False
        else:
            runs.append(word)
    if len(runs) > 2:
        raise ValueError(f"expected RUN RUN2, found {len(runs)} names: {' '.join(runs)}")
    return [part for pair in zip(("--run", "--other"), runs) for part in pair] + rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        words = with_flags(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(f"hardset compare: error: {error}\n")
        return 2
    return COMMAND.main(words)


if __name__ == "__main__":
    sys.exit(main())
