"""Detection: trust sets against what was right and wrong, and confidences against samples of another distribution."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit, softmax

from ops.arrays import to_numpy
from ops.bootstrap import bootstrap_interval, joint_bootstrap_intervals
from ops.checks import UndefinedMetricError
from ops.gaussian import Gaussians
from ops.selective import confidence, detection_metrics, true_rates
from pipelines.curation.fit import GAUSSIANS, load_gaussians
from pipelines.evaluation.evaluate import (
    METRICS,
    RANKING,
    Evaluation,
    bootstrap_intervals,
    defined,
    separation,
    undefined_notes,
)
from pipelines.evaluation.outcomes import PredictionSet, check_rows, load_outcomes, shard_logits
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.labels import labels_of
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order

TRUST = "trust"
OUTSIDE = ("fpr95", "auroc", "aupr_in", "aupr_out")


def trust_schema() -> pa.Schema:
    """Schema of `trust/NAME`."""
    return pa.schema([*columns.KEYS, columns.score_field("trust.trust"), pa.field("trusted", pa.bool_())])


def trust_facts(run: Run, name: str) -> dict[str, Any]:
    """What a trust set says of itself; ValueError where shards lack it. Empty for one not written by hardset."""
    columns.check_name("trust", name)
    group = f"{TRUST}/{name}"
    missing = column_groups.missing(run.uri, group, len(run.shards))
    if missing:
        raise UserError(
            f"{name}: {run.uri} has no {group} for {len(missing)} of its {len(run.shards)} shards; "
            f"run hardset trust `name` {name}",
            "trust",
        )
    column_groups.check_group_fresh(group, run.embedding_facts(), run.uri)
    return column_groups.facts(run.uri, group, 0) or {}


def evaluate_trust(run: Run, name: str, predictions: PredictionSet, replicates: int = 200, seed: int = 0) -> Evaluation:
    """How well a trust set tells the right predictions of a prediction set from the wrong ones.

    Parameters
    ----------
    run : Run
    name : str
        Trust set of the run.
    predictions : PredictionSet
        Of the classifier that the oracle watches.
    replicates, seed : int
        Of the bootstrap; 0 leaves the intervals out.

    Returns
    -------
    Evaluation
        Metrics of sigmoid(z): those of failure detection, `tpr` and `tnr` (confidence above, below 0.5; for an oracle
        trained with TCP below 1/K), kl and bhattacharyya.

    Raises
    ------
    ValueError
        If a shard, a row or a value is missing.
    """
    facts = trust_facts(run, name)
    outcomes = load_outcomes(predictions)
    z = _trust_values(run, name, predictions.shards)
    sure, correct = expit(z), outcomes.correct
    # Ranked by z itself: far from 0 the sigmoid makes ties.
    metrics: dict[str, Any] = {"samples": len(z), "errors": int((~correct).sum())}
    metrics |= {key: defined(metric, sure if "ece" in key else z, correct) for key, metric in METRICS.items()}
    low = 1 / predictions.num_classes if facts.get("loss") == "tcp" else 0.5
    metrics |= {key: defined(metric, sure, correct) for key, metric in _rates(low).items()}
    metrics |= separation(sure, correct)
    intervals = bootstrap_intervals((z, correct), {}, replicates, seed, ("accuracy", *RANKING))
    intervals |= _rate_intervals(sure, correct, low, replicates, seed)
    notes = undefined_notes(correct)
    figures = {"confidences": {"trust": sure}, "correct": correct}
    return Evaluation(name, metrics, intervals, {}, [], notes, figures)


def _rates(low: float) -> dict[str, Any]:
    return {"tpr": functools.partial(_rate, "tpr", 0.5), "tnr": functools.partial(_rate, "tnr", low)}


def _rate(name: str, threshold: float, confidence: np.ndarray, correct: np.ndarray) -> float:
    return getattr(true_rates(confidence, correct, threshold), name)


def _rate_intervals(
    sure: np.ndarray, correct: np.ndarray, low: float, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    found = {}
    for name, metric in _rates(low).items():
        try:
            if replicates:
                found[name] = tuple(bootstrap_interval(metric, sure, correct, replicates=replicates, seed=seed))
        except UndefinedMetricError:
            continue
    return found


def _trust_values(run: Run, name: str, shards: Sequence[int]) -> np.ndarray:
    """z of every labelled sample, float64, in shard order."""
    return np.concatenate(list(in_order(_shard_trust, [(shard,) for shard in shards], run.uri, name)))


def _shard_trust(shard: int, run_uri: str, name: str) -> np.ndarray:
    truth = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row"])
    found = column_groups.read(run_uri, f"{TRUST}/{name}", shard, ["row", "trust"])
    check_rows("trust", name, shard, truth["row"].to_numpy(), found["row"].to_numpy())
    z = found["trust"].cast(pa.float64()).fill_null(np.nan).to_numpy()
    if np.isnan(z).any():
        raise UserError(f"{name}: shard {shard}: {int(np.isnan(z).sum())} of {len(z)} values are NaN or null", "trust")
    return z[labels_of(run_uri, shard).kept >= 0]


def out_of_distribution(
    run: Run, predictions: PredictionSet, other: Run, others: PredictionSet, replicates: int = 0, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """How well confidences tell a run's samples from those of another run, all of which count as outside.

    Parameters
    ----------
    run, predictions
        In distribution, its samples being the positives.
    other, others
        Out of distribution: another run and the same classifier's predictions on it. Labels aren't looked at.
    replicates, seed : int
        Of the bootstrap over the samples of both; 0 leaves the intervals out.

    Returns
    -------
    metrics : dict
        For msp, entropy, max_logit and, where the encoders agree and `run` has Gaussians, rmd (minus the relative
        distance to the nearest class, of `run`'s Gaussians): fpr95, auroc, aupr_in, aupr_out, each in [0, 1], and
        with replicates `intervals`, the 95 % interval of each.
    notes : list of str
        Why a score is left out.
    """
    if predictions.num_classes != others.num_classes:
        raise UserError(
            f"{other.uri}: its predictions {others.name} have {others.num_classes} classes, those of {run.uri} "
            f"{predictions.num_classes}: not of one classifier",
            "ood",
        )
    inside, outside = _confidences(predictions), _confidences(others)
    notes = [reason] if (reason := _no_rmd(run, other)) else []
    if not notes:
        gaussians = load_gaussians(run)
        inside["rmd"], outside["rmd"] = (-_nearest_rmd(p, gaussians) for p in (predictions, others))
    values = {name: np.concatenate([inside[name], outside[name]]) for name in inside}
    is_inside = np.arange(len(values["msp"])) < len(inside["msp"])
    found = in_order(_detection, [(values[name],) for name in values], is_inside, replicates, seed)
    return dict(zip(values, found)), notes


def _detection(values: np.ndarray, is_inside: np.ndarray, replicates: int, seed: int) -> dict[str, Any]:
    """Ray task: the metrics of one score, with intervals if there are replicates."""
    found: dict[str, Any] = dict(zip(OUTSIDE, detection_metrics(values, is_inside)))
    if replicates:
        intervals = joint_bootstrap_intervals(detection_metrics, values, is_inside, replicates=replicates, seed=seed)
        found["intervals"] = dict(zip(OUTSIDE, map(tuple, intervals)))
    return found


def _no_rmd(run: Run, other: Run) -> str | None:
    if not storage.exists(run.path(GAUSSIANS)) or not run.stage("fit")["classes"]:
        return f"no rmd: {run.uri} has no class Gaussians; run hardset fit, or score it with another run's Gaussians"
    if not run.config.same_embedding(other.config):
        return f"no rmd: {run.uri} and {other.uri} were embedded by different encoders"
    return None


def _confidences(predictions: PredictionSet) -> dict[str, np.ndarray]:
    parts = list(in_order(_shard_confidences, [(shard,) for shard in predictions.shards], predictions))
    return {name: np.concatenate([part[name] for part in parts if len(part[name])]) for name in parts[0]}


def _shard_confidences(shard: int, predictions: PredictionSet) -> dict[str, np.ndarray]:
    logits = shard_logits(predictions, shard)[0].astype(np.float64)
    if not len(logits):
        return dict.fromkeys(("msp", "entropy", "max_logit"), np.zeros(0))
    probs = softmax(logits, axis=1)
    return {"msp": confidence(probs), "entropy": confidence(probs, "entropy"), "max_logit": logits.max(axis=1)}


def _nearest_rmd(predictions: PredictionSet, gaussians: Gaussians) -> np.ndarray:
    """Relative distance of every sample to its nearest class, (n,)."""
    items = [(shard,) for shard in predictions.shards]
    return np.concatenate(list(in_order(_shard_nearest_rmd, items, predictions.run_uri, gaussians)))


def _shard_nearest_rmd(shard: int, run_uri: str, gaussians: Gaussians) -> np.ndarray:
    found = [np.zeros(0)]
    for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, ["embedding"]):
        scores = gaussians.scores(columns.vectors(batch["embedding"]))
        found.append(to_numpy(scores.nearest_md) - to_numpy(scores.md_agn))
    return np.concatenate(found)
