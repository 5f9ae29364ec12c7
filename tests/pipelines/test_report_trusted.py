"""The section on hard and clean says what the columns say, and names what its numbers are not."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.curation.fit import fit
from pipelines.curation.rules import Rule
from pipelines.curation.score import Weighting, score
from pipelines.curation.select import select
from pipelines.report import trusted
from pipelines.runs import joins
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def values_of(rmd, margin, **more):
    return pa.table({"difficulty.rmd": rmd, "difficulty.margin": margin, **more})


def data_of(run, values, classes):
    doubted = int((np.nan_to_num(values["difficulty.margin"].to_numpy()) > 0).sum())
    found = trusted.collect(run, values, "difficulty.rmd", classes, doubted)
    return {"trusted": found, "main": "difficulty.rmd", "every": 1, "valued": values.num_rows}


def test_tenths_and_error_are_those_of_the_columns(reported):
    table = joins.load(reported.uri, ["difficulty.rmd", "difficulty.margin"])
    table = table.append_column("difficulty.md_loo", table["difficulty.rmd"])  # how it is said that each was left out
    data = data_of(reported, table, {0: 70, 1: 130})
    rmd, doubt = table["difficulty.rmd"].to_numpy(), table["difficulty.margin"].to_numpy() > 0
    order = np.argsort(rmd, kind="stable")
    expected = [doubt[rows].mean() for rows in np.array_split(order, 10)]
    np.testing.assert_allclose([part["error"] for part in data["trusted"]["tenths"]], expected, rtol=1e-4, atol=1e-9)
    assert data["trusted"]["error"] == pytest.approx(doubt.mean(), rel=1e-4)
    text = " ".join(trusted.sentences(reported, data))
    assert "Each left out of the Gaussians" in text and "It is not the number of wrong labels" in text
    assert "Rare classes" not in text


def test_rare_classes_and_older_columns_are_said(tmp_path):
    run, _, _ = make_run(tmp_path)
    margin = np.where(np.arange(50) % 5 == 0, 1.0, -1.0)
    values = values_of(np.arange(50.0), pa.array(margin, mask=np.arange(50) >= 40))
    text = " ".join(trusted.sentences(run, data_of(run, values, {0: 1, 1: 1, 2: 7, 3: 41, -1: 5})))
    assert (
        "Gaussians that it was itself fitted on" in text
        and "20.0 % of the images of those with a margin (80.0 % of all)" in text
    )
    assert "2 classes of 4 with one image" in text and "1 class of 4 with 2 to 9 images" in text


def test_a_subset_says_what_it_was_chosen_among(tmp_path):
    run, _, labels = make_run(tmp_path)

    fit(run)
    score(run, Weighting())
    entry = select(run, Rule("difficulty.rmd", 0.2, where="embeddings.label <> 1"), "zero")
    values = joins.load(run.uri, ["difficulty.rmd", "difficulty.margin"])
    text = trusted.sentences(run, data_of(run, values, dict(enumerate(np.bincount(labels).tolist()))))
    passed = (labels != 1).sum()
    assert f"Subset zero: {entry['samples']} of the {passed} images of 100 where embeddings.label <> 1." in text


def test_without_margins_there_is_no_section(lacking):
    for name in ("unlabelled", "one class"):
        table = joins.load(lacking[name].uri, ["difficulty.md_agn", "difficulty.margin"])
        assert trusted.collect(lacking[name], table, "difficulty.md_agn", {-1: 30}, 0) is None


def test_the_curve_marks_the_amount_that_was_chosen(tmp_path):
    told = {"shrinkage": [0.0, 0.1, 0.5], "log_loss": [None, 0.5, 0.7], "negative_log_likelihood": [None, 1.0, 2.0]}
    curve = trusted._curve({"curve": told, "shrinkage": [0.1, 0.0]})
    assert curve == {"shrinkage": [0.1, 0.5], "log_loss": [0.5, 0.7], "chosen": 0.1}
    assert trusted._shrinkage({"curve": curve}) == (
        "Shrinkage 0.1 within classes: log-loss 0.5 nats an image left out, impossible without."
    )
    assert trusted._curve({"curve": told, "shrinkage": [0.1, 0.0], "from": "other"}) is None
