"""The review page: which samples stand in its queues, and what a person does with it in a real Chromium, from disk."""

import csv
import io
import pathlib
import shutil

import numpy as np
import pytest

from ops.review import stratified_rate
from pipelines.curation.decide import decide
from pipelines.curation.decision_files import read_lines
from pipelines.curation.fit import fit
from pipelines.curation.score import Weighting, score
from pipelines.report import review, review_page
from pipelines.report.review import ReviewLimits
from pipelines.runs import joins
from tests.pipelines.reported import mislabel
from tests.pipelines.synthetic import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMITS = ReviewLimits(each=30, random=40)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, ray_session):
    """A scored run with wrong labels, and all its columns as one table."""
    run, _, labels = make_run(tmp_path_factory.mktemp("review"), (70, 0, 130), 4)
    mislabel(run, labels)
    fit(run)
    score(run, Weighting())
    return run, joins.load(run.uri, ["difficulty.label_error", "difficulty.margin", "difficulty.rmd"])


def queue_of(found, name):
    return next(queue for queue in found["queues"] if queue["name"] == name)


def test_suspects_and_hard_images_are_the_extremes_of_the_whole_run(scored):
    run, table = scored
    found = review.collect(run, LIMITS)
    keys = np.array(found["table"]["key"].to_pylist())
    values = table.to_pandas()
    suspects = values.nlargest(30, "difficulty.label_error")
    assert list(keys[queue_of(found, "suspects")["ids"]]) == suspects["key"].tolist()
    hard = values[~(values["difficulty.margin"] > 0)].nlargest(30, "difficulty.rmd")
    assert list(keys[queue_of(found, "hard")["ids"]]) == hard["key"].tolist()


def test_the_random_sample_is_drawn_within_ranges_of_label_error(scored):
    run, table = scored
    queue = queue_of(review.collect(run, LIMITS), "random")
    found = review.collect(run, LIMITS)["table"]
    ranges = np.digitize(table["difficulty.label_error"].to_numpy(), review.EDGES)
    assert queue["sizes"] == np.bincount(ranges, minlength=9).tolist()
    assert len(queue["ids"]) == 40 == len(set(queue["ids"]))
    drawn = found["difficulty.label_error"].to_numpy()[queue["ids"]]
    assert np.digitize(drawn, review.EDGES).tolist() == queue["strata"]


def test_each_sample_of_a_range_is_drawn_equally_often(scored):
    run, table = scored
    ranges = np.digitize(table["difficulty.label_error"].to_numpy(), review.EDGES)
    drawn = dict.fromkeys(table["key"].to_pylist(), 0)
    looks = np.zeros(9)
    for seed in range(150):
        found = review.collect(run, ReviewLimits(each=1, random=40, seed=seed))
        queue = queue_of(found, "random")
        looks += np.bincount(queue["strata"], minlength=9)
        for key in np.array(found["table"]["key"].to_pylist())[queue["ids"]]:
            drawn[key] += 1
    for number in np.unique(ranges):
        times = np.array([drawn[key] for key, at in zip(drawn, ranges) if at == number])
        share = looks[number] / len(times) / 150
        deviation = np.sqrt(150 * share * (1 - share))
        assert np.abs(times - 150 * share).max() <= 4.5 * deviation + 1e-9


def test_what_was_decided_is_not_asked_again(tmp_path, ray_session):
    run, _, labels = make_run(tmp_path, (40, 30))
    fit(run)
    score(run, Weighting())
    before = review.collect(run, LIMITS)
    first = before["table"]["key"].to_pylist()[queue_of(before, "suspects")["ids"][0]]
    (tmp_path / "d.csv").write_text(f"key,decision\n{first},drop\n")
    decide(run, [str(tmp_path / "d.csv")], "anna")
    after = review.collect(run, LIMITS)
    assert first not in after["table"]["key"].to_pylist()
    assert sum(queue_of(after, "random")["sizes"]) == len(labels) - 1


def test_a_run_without_scores_has_nothing_to_review(tmp_path, ray_session):
    run, _, _ = make_run(tmp_path, (10,))
    assert review.collect(run, LIMITS) is None
    assert review_page.render(run, run.classes) is None


# ---- in the browser ----


@pytest.fixture(scope="module")
def page_file(scored):
    run, _ = scored
    made = review_page.render(run, ["cat", "dog", "eel <b>", "fox"], LIMITS)
    assert made.notes == []
    path = pathlib.Path(run.path("report", "review.html"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(made.html)
    return path


@pytest.fixture
def visit(page_file):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)

        def open_page(width=1280):
            page = context.new_page()
            page.set_viewport_size({"width": width, "height": 800})
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(page_file.as_uri())
            page.wait_for_selector("html[data-ready]")
            return page

        yield open_page
        browser.close()
    assert not problems


def saved(page):
    with page.expect_download() as waiting:
        page.keyboard.press("s")
    return pathlib.Path(waiting.value.path()).read_text()


def test_twenty_decisions_by_keyboard_survive_a_reload_and_reach_the_run(visit, scored):
    run, _ = scored
    page = visit()
    keys = ["k", "Enter", "d", "k", "Space"]
    for number in range(25):
        page.keyboard.press(keys[number % 5])
    assert "20 of 30 in this queue" in page.inner_text("#done")
    page.keyboard.press("u")
    page.keyboard.press("k")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert "20 of 30 in this queue" in page.inner_text("#done")
    text = saved(page)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 20
    assert {row["decision"] for row in rows} == {"keep", "relabel", "drop"}
    (pathlib.Path(run.uri).parent / "decisions.csv").write_text(text)
    counts = decide(run, [str(pathlib.Path(run.uri).parent / "decisions.csv")], "anna")
    assert counts["added"] == 20
    assert counts["keep"] == sum(row["decision"] == "keep" for row in rows)


def test_another_class_is_found_by_typing(visit):
    page = visit()
    own = page.inner_text("#label")
    wanted = "fox" if own != "fox" else "cat"
    page.keyboard.press("c")
    page.keyboard.type(wanted)
    page.keyboard.press("Enter")
    line = read_lines("x", saved(page).encode())[0]
    assert (line.decision, line.label) == ("relabel", str(["cat", "dog", "eel <b>", "fox"].index(wanted)))


def test_the_page_estimates_what_python_does(visit):
    page = visit()
    sizes, errors, looked = [100, 50, 850], [9, 1, 0], [10, 10, 0]
    found = page.evaluate("([s, e, l]) => Object.values(stratified(s, e, l))", [sizes, errors, looked])
    assert found == pytest.approx(stratified_rate(sizes, errors, looked), abs=1e-9)


def test_the_random_queue_says_an_estimate_and_the_suspects_a_precision(visit):
    page = visit()
    page.keyboard.press("d")
    page.keyboard.press("k")
    assert "Of the first 2 suspects 1 have a wrong label" in page.inner_text("#meaning")
    while page.locator("[data-queue=random]").get_attribute("aria-selected") != "true":
        page.keyboard.press("q")
    for _ in range(40):
        page.keyboard.press("k")
    assert "from 40 looks" in page.inner_text("#meaning") or "from 39 looks" in page.inner_text("#meaning")


def test_it_fits_a_phone_and_shows_names_as_text(visit):
    page = visit(390)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".actions button").first.is_visible()
    assert page.locator("b").count() == 0


def test_a_key_that_a_spreadsheet_would_run_is_left_out(visit):
    page = visit()
    page.evaluate("samples.forEach((sample) => { sample.key = '=1+1'; })")
    page.keyboard.press("k")
    line = read_lines("x", saved(page).encode())[0]
    assert line.key is None
    assert line.place is not None
