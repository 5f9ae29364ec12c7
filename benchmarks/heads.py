"""Shared by the benchmarks: heads trained on a run's embeddings, their predictions, and tables of mean ± deviation."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ops.models import load_classifier
from pipelines.loop import Recipe, train_classifier
from pipelines.objective import LossChoice
from pipelines.predict import predict
from pipelines.run import Run
from pipelines.tasks import in_order
from pipelines.train import Choices, plan_training


@dataclasses.dataclass(frozen=True)
class Head:
    """A training: which folder, which loss, which recipe."""

    folder: str
    loss: LossChoice
    recipe: Recipe
    choices: Choices


def train_heads(run: Run, heads: Iterable[Head]) -> list[dict]:
    """Train heads side by side, a core each; what is finished in its folder is not trained again."""
    plans = [plan_training(run, head.folder, head.loss, head.recipe, head.choices) for head in heads]
    return list(in_order(train_classifier, [(plan,) for plan in plans]))


def predict_last(run: Run, folder: str, name: str) -> None:
    """Predictions of the last epoch's weights."""
    checkpoint = str(Path(folder).resolve() / "last")
    predict(run, load_classifier(checkpoint), name, checkpoint=checkpoint)


def spread(values: Sequence[float | None], scale: float = 100.0, digits: int = 2) -> str:
    """`12.34 ± 0.05`, mean and standard deviation over seeds; a dash where a value is undefined."""
    if any(value is None for value in values):
        return "–"
    found = scale * np.asarray(values, float)
    deviation = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{deviation}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of a section of a Markdown file, or at its end; words around it stay."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before = path.read_text() if path.exists() else ""
    body = f"{start}{text}{end}"
    if start in before:
        head, _, rest = before.partition(start)
        path.write_text(head + body + rest.partition(end)[2])
    else:
        path.write_text(before + ("\n" if before else "") + body)
