"""Shared by the benchmarks: heads trained on a run's embeddings, their predictions, and tables of mean ± deviation.

Ray plans the trainings and computes predictions; the trainings themselves are processes of their own, a core each.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from jobs.options import RunOptions
from jobs.session import ray_session
from ops.models import load_classifier
from pipelines.evaluation.predict import predict
from pipelines.runs import column_groups, columns, joins
from pipelines.runs.record import Run
from pipelines.training.loop import Plan, Recipe, train_classifier
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices, plan_training

ALPHA = 0.3  # Cui et al. 2023, for CIFAR
WEIGHT = "difficulty.weight"


@dataclasses.dataclass(frozen=True)
class Head:
    """A training: which folder, which loss, which recipe."""

    folder: str
    loss: LossChoice
    recipe: Recipe
    choices: Choices


def add_head_options(parser: argparse.ArgumentParser, epochs: int) -> None:
    """What scripts that train heads have in common."""
    parser.add_argument("--model", default="mlp:512")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="heads trained at a time")


def train_heads(run: Run, heads: Iterable[Head], processes: int = 1) -> list[dict]:
    """Train heads, so many at a time; what is finished in its folder is not trained again."""
    with ray_session(RunOptions(run=run.uri)):
        plans = [plan_training(run, head.folder, head.loss, head.recipe, head.choices) for head in heads]
    if processes == 1:
        return list(map(_train, plans))
    # Spawned: Ray and torch have started threads here, which a fork would not carry over.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(_train, plans))


def _train(plan: Plan) -> dict:
    torch.set_num_threads(1)
    summary = train_classifier(plan)
    last = {name: found for name, found in summary["curve"][-1].items() if isinstance(found, dict)}
    shown = {name: {m: round(found[m], 4) for m in ("accuracy", "ece", "nll")} for name, found in last.items()}
    print(plan.out, shown, flush=True)
    return summary


def predict_last(run: Run, folder: str, name: str) -> None:
    """Predictions of the last epoch's weights."""
    checkpoint = str(Path(folder).resolve() / "last")
    predict(run, load_classifier(checkpoint), name, checkpoint=checkpoint)


def difficulty_losses(run: Run) -> dict[str, tuple[LossChoice, str | None]]:
    """CE, entropy regularisation, that at the mean strength of eq. 9 on a scored run, and eq. 9; each with its weights."""
    mean = float(joins.load(run.uri, [WEIGHT])[WEIGHT].to_numpy().mean())
    plain = "entropy_regularized"
    return {
        "CE": (LossChoice(), None),
        f"ER, α {ALPHA}": (LossChoice(plain, {"alpha": ALPHA}), None),
        f"ER, α {ALPHA * mean:.3f}": (LossChoice(plain, {"alpha": round(ALPHA * mean, 3)}), None),
        f"difficulty-aware, α {ALPHA}": (LossChoice("difficulty_entropy", {"alpha": ALPHA}), WEIGHT),
    }


def encoder_of(run: Run) -> str:
    """The run's encoder for a table: a file by its name, not by its folder."""
    return re.sub(r"[^:@]*/(?=[^/:@]+\.\w+(:|$))", "", run.config.encoder)


def arrays(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, d) float32 and labels (n,) of a run, in memory."""
    run, features, labels = Run.open(uri), [], []
    for shard in range(len(run.shards)):
        part = column_groups.read(uri, columns.EMBEDDINGS, shard, ["label", "embedding"])
        features.append(columns.vectors(part["embedding"]).astype(np.float32))
        labels.append(columns.labels_or_minus_one(part["label"]))
    return np.concatenate(features), np.concatenate(labels)


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
