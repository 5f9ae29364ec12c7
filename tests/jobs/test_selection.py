"""What curate and select choose, and what they say of it, on a run that is scored already."""

import json

import pytest

from jobs import stages
from jobs.options import SubsetOptions
from jobs.select import main
from pipelines.curation import fit, score, subsets
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def scored(folder, **options):
    run, _, _ = make_run(folder, **options)
    fit.fit(run)
    score.score(run, score.Weighting())
    return Run.open(run.uri)


def chosen(run, name):
    return subsets.facts_of(run.uri, name)["told"]


def test_curates_subset_is_hard_and_trusted_unless_that_is_turned_off(tmp_path, capsys):
    run = scored(tmp_path)
    stages.select_hard(run, SubsetOptions(), 0)
    assert chosen(run, "hard")["where"] == stages.TRUSTED
    for where, told in (("", None), ("embeddings.label = 1", "embeddings.label = 1")):
        stages.select_hard(run, SubsetOptions(where=where), 0)
        assert chosen(run, "hard").get("where") == told
    with pytest.raises(UserError, match="none of the 100 samples"):
        stages.select_hard(run, SubsetOptions(where="difficulty.rmd > 1e30"), 0)
    assert "alone" not in capsys.readouterr().out


@pytest.mark.parametrize("lacking", [{"labelled": False}, {"classes": 1}])
def test_without_margins_that_is_said_and_the_subset_is_ranked_as_it_is(tmp_path, capsys, lacking):
    run = scored(tmp_path, **lacking)
    stages.select_hard(run, SubsetOptions(), 0)
    assert chosen(run, "hard") == {"by": "difficulty.md_agn", "count": 0.1, "lowest": False}
    assert "no sample has a margin, so by difficulty.md_agn alone" in capsys.readouterr().out


def test_mistakes_are_found_before_any_work(tmp_path):
    run, _, _ = make_run(tmp_path)
    for where, match in (
        ("difficulty.margin <", "syntax error"),
        ("neighbours.vote < 0", "the run has no neighbours/"),
    ):
        options = SubsetOptions(where=where)
        with pytest.raises(UserError, match=match):
            stages.check_selection(options)
            stages.check_selected_groups(run, options)
    stages.check_selected_groups(run, SubsetOptions(where="difficulty.margin < 0"))  # curate makes that itself


def test_select_says_what_a_rule_took(tmp_path, capsys):
    run = scored(tmp_path)
    words = ["--run", run.uri, "--mlflow", "none", "--json", "--by", "difficulty.rmd"]

    def result(*more):
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["select"]

    assert result("--top", "0.5", "--stratify", "difficulty.rmd:3", "--seed", "2", "--name", "spread")["samples"] == 50
    assert result("--top", "0.5", "--exclude", "spread", "--random", "--name", "other")["samples"] == 25
    assert (
        result("--top", "7", "--where", "difficulty.margin < 0", "--name", "few")["told"]["where"]
        == "difficulty.margin < 0"
    )
    wrong = (
        ["--stratify", "difficulty.rmd"],
        ["--stratify", "difficulty.nothing:3"],
        ["--exclude", "nothing"],
        ["--random", "--stratify", "difficulty.rmd:3"],
        ["--where", "difficulty.margin < "],
    )
    for more in wrong:
        assert main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert more[0].removeprefix("--") in said and len(said.splitlines()) == 1
