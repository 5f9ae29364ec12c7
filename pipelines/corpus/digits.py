"""The demo's corpus: scikit-learn's handwritten digits as webdataset shards, with known faults put in.

1,797 real pictures of 8 × 8 grey values (Alpaydin and Kaynak, UCI 1998) that ship with scikit-learn. What was done to which
sample is returned, never written into the shards, so that nothing that scores them can see the answers.
"""

import dataclasses
import io
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from pipelines.runs import columns, storage

SEVERITIES = (1, 2, 3, 4, 5)
NOISE = (0.08, 0.16, 0.24, 0.32, 0.40)  # standard deviation at severity 1 … 5, of grey values in [0, 1]


@dataclasses.dataclass(frozen=True)
class Faults:
    """What was done to the corpus: arrays of shape (samples,) in corpus order, and the broken files by key."""

    keys: np.ndarray
    true_label: np.ndarray
    given_label: np.ndarray
    severity: np.ndarray  # 0 = the picture as it was
    broken: dict[str, str]


def write_digits(
    folder: str, seed: int = 0, flipped: float = 0.05, corrupted: float = 0.25, per_shard: int = 300
) -> Faults:
    """Write the digits as shards `digits-{000000..}.tar` under `folder`; returns what was done to them.

    Parameters
    ----------
    flipped, corrupted : float
        Fractions of the samples whose label is changed to another class, and whose picture gets noise of
        severity 1 … 5. The two sets are disjoint. Six more samples are broken files.
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    count = len(digits.images)
    order = rng.permutation(count)
    pictures, true = digits.images[order] / 16.0, digits.target[order].astype(np.int64)
    shuffled = rng.permutation(count)
    flips, noisy = np.split(shuffled[: int((flipped + corrupted) * count)], [int(flipped * count)])
    given, severity = true.copy(), np.zeros(count, np.int64)
    given[flips] = (true[flips] + rng.integers(1, 10, len(flips))) % 10
    severity[noisy] = 1 + np.arange(len(noisy)) % len(SEVERITIES)
    sigma = np.concatenate([[0.0], NOISE])[severity]
    pictures = np.clip(pictures + sigma[:, None, None] * rng.normal(size=pictures.shape), 0, 1)
    keys = np.array([f"digit{index:05d}" for index in range(count)])
    samples = [
        [(f"{key}.png", _png(picture)), (f"{key}.cls", str(label).encode())]
        for key, picture, label in zip(keys, pictures, given)
    ]
    broken = _broken_samples(samples[0])
    for at, (_, sample) in zip(np.linspace(5, count, len(broken), dtype=int)[::-1], broken.values()):
        samples.insert(at, sample)
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        _write_tar(storage.join(folder, f"digits-{shard:06d}.tar"), samples[start : start + per_shard])
    return Faults(keys, true, given, severity, {key: reason for key, (reason, _) in broken.items()})


def _broken_samples(good: list[tuple[str, bytes]]) -> dict[str, tuple[str, list[tuple[str, bytes]]]]:
    """Six samples that must end up in quarantine: key -> (what is wrong with it, its members)."""
    picture = good[0][1]
    return {
        "cut": ("half a PNG", [("cut.png", picture[: len(picture) // 2]), ("cut.cls", b"3")]),
        "text": ("a web page called .jpg", [("text.jpg", b"<!DOCTYPE html>"), ("text.cls", b"1")]),
        "empty": ("zero bytes", [("empty.png", b""), ("empty.cls", b"2")]),
        "word": ("a word for a label", [("word.png", picture), ("word.cls", b"seven")]),
        "negative": ("a negative label", [("negative.png", picture), ("negative.cls", b"-1")]),
        "blind": ("no picture", [("blind.cls", b"4")]),
    }


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _write_tar(uri: str, samples: list[list[tuple[str, bytes]]]) -> None:
    with (
        storage.write_atomic(uri) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for sample in samples:
            for name, data in sample:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def findings(table: pa.Table, faults: Faults) -> dict[str, Any]:
    """How well the difficulty columns found the faults.

    Returns
    -------
    findings : dict
        auroc of flipped labels by each score; mean rmd by severity (0 = untouched, right label); error fraction of a
        5-fold cross-validated logistic regression, against the true label, from the hardest to the easiest tenth.
    """
    at = {key: index for index, key in enumerate(faults.keys)}
    index = np.array([at[key] for key in table["key"].to_pylist()])
    scores = {n: table[f"difficulty.{n}"].to_numpy().astype(float) for n in ("rmd", "margin", "md")}
    flipped = (faults.true_label != faults.given_label)[index]
    severity = faults.severity[index]
    features = columns.vectors(table["embeddings.embedding"])
    guess = cross_val_predict(LogisticRegression(C=0.1, max_iter=2000), features, faults.given_label[index], cv=5)
    wrong = guess != faults.true_label[index]
    hardest_first = np.argsort(-scores["rmd"], kind="stable")
    return {
        "auroc_flipped": {name: float(roc_auc_score(flipped, values)) for name, values in scores.items()},
        "mean_rmd_by_severity": [float(scores["rmd"][(severity == s) & ~flipped].mean()) for s in (0, *SEVERITIES)],
        "error_by_tenth": [float(wrong[part].mean()) for part in np.array_split(hardest_first, 10)],
    }
