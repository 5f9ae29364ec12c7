"""What a condition may say, that it says the same as numpy, and where a wrong one is wrong."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.curation.conditions import columns_of, condition
from pipelines.runs import column_groups, columns, joins
from pipelines.runs.errors import UserError
from tests.pipelines.synthetic import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a score of its own, and predictions that have a value for every other sample."""
    run, _, _ = make_run(tmp_path_factory.mktemp("conditions"), sizes=(40,))
    keys = column_groups.read(run.uri, columns.EMBEDDINGS, 0, ["key", "shard", "row", "label"])
    scores = pa.array(np.arange(40) - 20, pa.float32())
    column_groups.write(run.uri, "toy", 0, keys.append_column("score", scores), "toy")
    some = pa.array(np.linspace(0, 1, 40), pa.float32(), mask=np.arange(40) % 2 == 1)
    column_groups.write(run.uri, "predictions/a b", 0, keys.append_column("confidence", some), "p")
    return run


def passing(run, text):
    """Rows that pass, and the table of the columns."""
    found = condition(run, text)
    table = joins.join(run.uri, 0, found.names)
    return np.flatnonzero(found.holds(table)).tolist()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("toy.score < 0", range(20)),
        ("toy.score < -18 or toy.score >= 19", [0, 1, 39]),
        ('"predictions/a b".confidence is null and toy.score > 15', [37, 39]),
        ('"predictions/a b".confidence > 0.98', []),  # null is no
        ('not ("predictions/a b".confidence <= 0.9) -- why', [36, 38]),
        ("toy.score between -2 and 2 and toy.key like 's%9'", [19]),
        ("case when toy.score > 0 then toy.score::int % 10 = 0 else false end", [30]),
        ("abs(toy.score) = 20 and embeddings.embedding[1] is not null", [0]),
        ("true", range(40)),
        ("null", []),
    ],
)
def test_a_condition_says_what_sql_says(run, text, expected):
    assert passing(run, text) == list(expected)


def test_labels_are_those_of_the_group(run):
    labels = column_groups.read(run.uri, "toy", 0, ["label"])["label"].to_numpy()
    assert passing(run, "toy.label in (0, 2)") == np.flatnonzero(np.isin(labels, [0, 2])).tolist()


WRONG = {
    "toy.score < < 0": "character 13: syntax error",
    "toy.score < 0; drop table x": "Only SELECT",
    "toy.score < 0) or (true": "character 14",
    "toy.score < 0 limit 3": "one boolean expression",
    "toy.score < 0 union select true": "one boolean expression",
    "": "syntax error",
    "toy.score": "expected a condition",
    "score < 0": "character 1: score: expected GROUP.COLUMN",
    "a.b.score < 0": "expected GROUP.COLUMN",
    "toy.nothing < 0": "toy/ has no column 'nothing', it has key, shard, row, label, score",
    "'é' = toy.key and nothing.x < 0": "character 19: the run has no nothing/, it has embeddings, predictions/a b, toy",
    '"../run/toy".score < 0': "the run has no",
    "quarantine.row < 0": "the run has no",
    "toy.score < 'abc'": "Could not convert",
    "toy.score > (select 3)": "a query within it",
    "exists (from samples)": "a query within it",
    "avg(toy.score) > 0": "avg\\(\\) is no function of a sample's own columns",
    "rank() over () = 1": "a window",
    "random() < 0.5": "random\\(\\) is no function",
    "toy.score < 0 or current_setting('threads') = '1'": "character 18: current_setting\\(\\) is no function",
    "read_csv('/etc/passwd') is null": "read_csv\\(\\) is no function",
    "getvariable('x') = 1": "no function",
    "* > 0": r"\* may not be used|syntax error",
    "columns('score') > 0": r"\* may not be used",
    "$1 > 0": "one boolean expression",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_condition_is_one_line_with_its_place(run, text):
    with pytest.raises(UserError, match=WRONG[text]) as error:
        condition(run, text)
    assert error.value.field == "where" and "\n" not in str(error.value) and repr(text) in str(error.value)


def test_values_that_cannot_be_computed_are_the_users_mistake(run):
    found = condition(run, "toy.key::int > 3")
    with pytest.raises(UserError, match="Could not convert string 's000000'"):
        found.holds(joins.join(run.uri, 0, found.names))


def test_the_columns_are_known_without_a_run():
    assert list(columns_of('difficulty.margin < 0 and "trust/x".trust > 1')) == [
        ("difficulty", "margin"),
        ("trust/x", "trust"),
    ]
