"""How MLflow loads a classifier that `hardset train` logged: `mlflow.pyfunc.load_model` calls `_load_pyfunc` here."""

from typing import Any

import numpy as np
import torch

from ops.models import Classifier, load_classifier


class Logits:
    """A classifier as MLflow calls one."""

    def __init__(self, model: Classifier):
        self.model = model

    def predict(self, inputs: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Logits (n, K) float32 of embeddings (n, d) float32 or of images (n, 3, S, S) uint8."""
        with torch.inference_mode():
            return self.model(torch.from_numpy(np.ascontiguousarray(inputs))).float().numpy()


def _load_pyfunc(path: str) -> Logits:
    """The classifier of a checkpoint folder; MLflow's name for this function."""
    return Logits(load_classifier(path))
