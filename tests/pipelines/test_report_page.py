"""The report in a real Chromium, from disk: what a person does with it."""

import pathlib
import re
import shutil

import pytest

from tests.pipelines.reported import HOSTILE, NAMES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, reported):
    """visit(width=1280, run=…, **context) -> a report's page; the test fails on an error in it or a look at the network."""
    problems, contexts = [], []

    def open_page(width=1280, run=reported, **options):
        address = pathlib.Path(run.path("report", "index.html")).as_uri()
        context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else problems.append(r.url))
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def draw_all(page):
    """Scroll every chart into sight, and wait for it."""
    charts = page.locator("figure.chart:not([hidden])")
    for number in range(charts.count()):
        if charts.nth(number).is_visible():  # one that has nothing to show hides itself
            charts.nth(number).scroll_into_view_if_needed()
            charts.nth(number).locator("svg").first.wait_for(state="attached")


def values(page, score):
    """That score of the images in the gallery, in their order."""
    script = (
        "score => [...document.querySelectorAll('#gallery .shot')].map(e => report.rows.scores[score][e.dataset.id])"
    )
    return page.evaluate(script, score)


def test_every_chart_is_drawn_and_no_text_is_broken(visit):
    page = visit()
    assert not page.evaluate("window.Plotly")  # reading it in would hold up the first click
    draw_all(page)
    assert page.locator("figure.chart .main-svg").count() >= 10
    assert not re.search(r"NaN|undefined|Infinity|null", page.locator("body").inner_text())
    assert page.title() == "run · hardset"


def test_the_gallery_filters_and_sorts(visit):
    page = visit()
    hardest = values(page, "difficulty.rmd")
    assert hardest == sorted(hardest, reverse=True) and hardest[0] == page.evaluate(
        "Math.max(...report.rows.scores['difficulty.rmd'])"
    )
    page.select_option("#gallery [name=order]", "low")
    easiest = values(page, "difficulty.rmd")
    assert easiest == sorted(easiest) and easiest[0] < hardest[-1]
    page.select_option("#gallery [name=score]", "difficulty.margin")
    margins = values(page, "difficulty.margin")
    assert margins == sorted(margins)
    page.select_option("#gallery [name=class]", label="class 2")
    assert set(page.locator("#gallery .shot .name").all_inner_texts()) == {"class 2"}
    page.select_option("#gallery [name=labels]", "doubt")
    assert min(values(page, "difficulty.margin")) > 0
    before = page.locator("#gallery .shot").count()
    page.select_option("#gallery [name=class]", "")
    page.select_option("#gallery [name=labels]", "")
    page.locator("#gallery .more").click()
    assert page.locator("#gallery .shot").count() > before


def test_a_click_opens_the_row_and_the_keyboard_goes_on(visit):
    page = visit()
    tiles, dialog = page.locator("#suspects .shot"), page.locator("dialog#row")
    first, second = (tiles.nth(n).get_attribute("aria-label").partition(",")[0] for n in (0, 1))
    tiles.first.click()
    assert dialog.is_visible() and dialog.locator("h2").inner_text() == first
    rows = dict(
        zip(dialog.locator("tbody th").all_inner_texts(), dialog.locator("tbody tr td:nth-child(2)").all_inner_texts())
    )
    assert {"rmd", "margin", "md", "weight", "prediction (mine)"} <= set(rows)
    assert "train-000000.tar" in dialog.locator("dl").inner_text()
    shown = page.evaluate("short(report.rows.scores['difficulty.margin'][report.suspects[0]])")
    assert rows["margin"] == shown
    page.keyboard.press("ArrowRight")
    assert dialog.locator("h2").inner_text() == second
    page.keyboard.press("ArrowLeft")
    assert dialog.locator("h2").inner_text() == first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(first)


def test_the_gallery_by_keyboard_alone(visit):
    page = visit()
    page.locator("#gallery [name=labels]").focus()
    page.keyboard.press("Tab")
    tile = "document.activeElement.dataset.id"
    first = page.evaluate(tile)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(tile) not in (None, first)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "more"  # a grid is one stop
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(tile) not in (None, first)
    page.keyboard.press("Enter")
    assert page.locator("dialog#row").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog#row").is_visible()


def test_a_pair_of_classes_is_shown_alone(visit):
    page = visit()
    chip = page.locator("#suspects .pairs button").first
    given, nearest = chip.get_attribute("data-given"), chip.get_attribute("data-nearest")
    chip.click()
    found = page.evaluate(
        "[...document.querySelectorAll('#suspects .shot')].map(e => [rows.label[e.dataset.id], rows.nearest[e.dataset.id]])"
    )
    assert found and all(pair == [int(given), int(nearest)] for pair in found)
    assert chip.get_attribute("aria-pressed") == "true"
    chip.click()
    assert page.locator("#suspects .shot").count() > len(found)


def test_a_click_in_the_map_opens_that_image(visit):
    page = visit()
    page.locator("#map figure").scroll_into_view_if_needed()
    page.wait_for_selector("#map figure .main-svg")
    page.wait_for_timeout(300)
    place = """() => {
      const chart = document.querySelector("#map figure"), id = report.suspects[0], { xaxis, yaxis } = chart._fullLayout;
      const { left, top } = chart.getBoundingClientRect(), { scores } = rows;
      const x = left + xaxis._offset + xaxis.d2p(scores["difficulty.margin"][id]);
      return { id, x, y: top + yaxis._offset + yaxis.d2p(scores["difficulty.rmd"][id]) };
    }"""
    at = page.evaluate(place)
    page.mouse.move(at["x"] - 3, at["y"])
    page.mouse.move(at["x"], at["y"], steps=3)
    page.wait_for_timeout(150)
    page.mouse.click(at["x"], at["y"])
    page.wait_for_selector("dialog#row[open]")
    assert page.locator("dialog#row h2").inner_text() == page.evaluate("id => rows.key[id]", at["id"])


def test_light_and_dark_and_remembered(visit):
    page = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").click()
    light = page.evaluate(ground)
    brightness = [sum(map(int, color[4:-1].split(","))) for color in (dark, light)]
    assert brightness[0] < 150 < 600 < brightness[1]
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_nothing_beside_the_page(visit, scheme):
    page = visit(390, color_scheme=scheme, is_mobile=True, has_touch=True)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#gallery .shot").first.click()
    box = page.locator("dialog#row").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('dialog#row'))")
    names = page.locator("dialog#row tbody th", has_text=re.compile(r"^\w+$"))
    lines = "e => { const all = document.createRange(); all.selectNodeContents(e); return all.getClientRects().length }"
    assert names.count() > 5 and all(names.nth(n).evaluate(lines) == 1 for n in range(names.count()))


@pytest.mark.parametrize("width, density", [(1440, 1), (390, 2)])
def test_small_pictures_show_their_pixels_whole(visit, width, density):
    page = visit(width, device_scale_factor=density)
    page.wait_for_selector("#gallery img.small")
    times = page.evaluate(
        "[...document.querySelectorAll('#gallery img.small')].map(e => e.clientWidth * devicePixelRatio / e.naturalWidth)"
    )
    assert all(value == round(value) >= 14 for value in times), times


def test_the_first_screen_shows_what_to_look_at(visit):
    page = visit()
    strips = page.locator("#strips figure")
    assert strips.count() == 3 and "in doubt" in strips.nth(0).inner_text()
    margin = (
        "selector => [...document.querySelectorAll(selector)].map(e => rows.scores['difficulty.margin'][e.dataset.id])"
    )
    assert min(page.evaluate(margin, "#strips figure:nth-child(1) .shot")) > 0
    assert max(page.evaluate(margin, "#strips figure:nth-child(2) .shot")) <= 0


def test_agreement_is_a_table(visit):
    page = visit()
    names = page.locator("#agreement tbody th").all_inner_texts()
    row = page.locator("#agreement tbody tr").nth(names.index("margin")).locator("td")
    expected = page.evaluate("report.agreement.spearman[report.agreement.names.indexOf('margin')][0].toFixed(2)")
    assert names[0] == "rmd" and row.nth(0).inner_text().replace("−", "-") == expected


def test_names_that_would_break_the_page(visit, hostile):
    page = visit(390, run=hostile)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("img:not([src^='data:'])").count() == 0 and page.locator("script[src]").count() == 0
    assert page.title() == "run · hardset" and "49" not in page.locator("#gallery [name=class]").inner_text()
    options = page.locator("#gallery [name=class] option").evaluate_all("all => all.map(e => e.text)")
    assert options[1:] == [*NAMES[:4], "class 4", NAMES[5], NAMES[6].replace("\u202e", "\ufffd")]
    assert "\u202e" not in page.locator("#start").inner_text()
    assert NAMES[1] in page.locator("#quarantine").inner_text()
    page.locator("#gallery .shot").first.click()
    assert page.locator("dialog#row h2").inner_text().startswith(HOSTILE)
    assert page.locator("dialog#row").bounding_box()["width"] <= 390


@pytest.mark.parametrize(
    "what, pictures", [("unlabelled", 12), ("one class", 12), ("embedded", 6), ("all but one", 1), ("empty", 0)]
)
def test_runs_that_lack_things(visit, lacking, what, pictures):
    page = visit(390, run=lacking[what])
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tiles = page.locator("#start .shot")
    assert tiles.count() == pictures
    if tiles.count():
        tiles.first.click()
        assert page.locator("dialog#row").is_visible()
    assert not re.search(r"NaN|undefined|Infinity|null", page.locator("body").inner_text())
