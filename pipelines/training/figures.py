"""The figure of a training: accuracy, calibration error and log-likelihood by epoch."""

from typing import Any

from matplotlib.figure import Figure


def curves(curve: list[dict[str, Any]], name: str) -> Figure:
    """Metrics of the evaluation `name` (and of its groups) over the epochs of a curve."""
    epochs = range(1, len(curve) + 1)
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), ("accuracy", "ece", "nll")):
        axis.plot(epochs, [epoch[name][metric] for epoch in curve], label=name)
        for number, group in enumerate(curve[-1][name].get("groups", []) if metric in ("accuracy", "ece") else []):
            axis.plot(epochs, [epoch[name]["groups"][number][metric] for epoch in curve], lw=0.8, label=group["name"])
        axis.set(xlabel="epoch", ylabel=metric)
        if len(axis.lines) > 1:
            axis.legend(fontsize=6)
    return figure
