"""The commands of single stages: one shape, and one set of options, so that one YAML file serves curate and each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jobs.command import Command
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, WeightOptions, WorkerOptions
from jobs.session import ray_session, tracked

Body = Callable[[Any, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions], dict[str, Any]]


def stage_command(name: str, summary: str, body: Body, product: str | None = None) -> Command:
    """The command that opens a run, does one stage of it and returns what the stage did.

    Parameters
    ----------
    name : str
        Of the stage and of the command.
    summary : str
        The module's docstring.
    body : callable
        Called in a Ray session with the run and the options of the corpus, workers, Gaussians and weights.
    product : str, optional
        What `--overwrite` forgets; without one it is the whole run that is made anew.
    """

    def stage(
        options: RunOptions,
        corpus: CorpusOptions,
        workers: WorkerOptions,
        gaussians: GaussianOptions,
        weights: WeightOptions,
    ) -> dict[str, Any]:
        from jobs import stages

        whole = dataclasses.replace(corpus, overwrite=corpus.overwrite and product is None)
        run = stages.open_run(options, whole, gaussians)
        if corpus.overwrite and product is not None:
            with run.lease(product):
                run.forget(name, product)
        with tracked(name, options, corpus, workers, gaussians, weights) as tracker, ray_session(options):
            result = {"run": run.uri, name: body(run, corpus, workers, gaussians, weights)}
            tracker.metrics(result)
        return result

    return Command(name, summary, (RunOptions, CorpusOptions, WorkerOptions, GaussianOptions, WeightOptions), stage)
