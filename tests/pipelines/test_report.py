"""The numbers in the page are those of the columns, whatever the run has and lacks; what the corpus says stays text."""

import base64
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import kendalltau, spearmanr

from pipelines.corpus.loss import Loss
from pipelines.report import assets, words
from pipelines.report.curves import error_by_difficulty, histogram, wilson
from pipelines.report.data import collect
from pipelines.report.page import json_block, report
from pipelines.report.pictures import pictures
from pipelines.report.scan import Limits
from pipelines.runs import joins, storage
from pipelines.runs.record import Run
from tests.pipelines.predicted import noisy_logits, write_predictions
from tests.pipelines.reported import CLASSES, HOSTILE

pytestmark = pytest.mark.usefixtures("ray_session")


def data_of(run):
    """What the page's script reads."""
    page = storage.read_bytes(run.path("report", "index.html")).decode()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


@pytest.fixture(scope="module")
def made(reported):
    """The run, what `report` said of it, and what the page's script reads."""
    return reported, reported.stage("report"), data_of(reported)


@pytest.fixture
def copied(reported, tmp_path):
    """The run, copied without its report."""
    shutil.copytree(reported.uri, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    return Run.open(str(tmp_path / "run"))


def table_of(run, *names):
    return joins.load(run.uri, names)


def test_the_page_holds_what_the_columns_hold(made):
    run, entry, data = made
    table = table_of(
        run, "difficulty.rmd", "difficulty.margin", "difficulty.nearest_class", "predictions/mine.prediction"
    )
    assert entry["samples"] == len(table) + 3 and entry["bytes"] < 20e6
    at = {(s, r): n for n, (s, r) in enumerate(zip(data["rows"]["shard"], data["rows"]["row"]))}
    assert len(at) == len(table) == len(data["points"])
    order = [at[place] for place in zip(table["shard"].to_pylist(), table["row"].to_pylist())]
    assert [data["rows"]["key"][n] for n in order] == table["key"].to_pylist()
    for name in ("difficulty.rmd", "difficulty.margin"):
        shown = np.array(data["rows"]["scores"][name])[order]
        np.testing.assert_allclose(shown, table[name].to_numpy(), rtol=1e-4, atol=1e-8)
    assert np.array_equal(np.array(data["rows"]["nearest"])[order], table["difficulty.nearest_class"].to_numpy())
    predicted = np.array(data["rows"]["predicted"]["mine"])[order]
    assert np.array_equal(predicted, table["predictions/mine.prediction"].to_numpy())


def test_doubts_are_counted_and_sorted(made):
    run, _, data = made
    table = table_of(run, "difficulty.margin", "difficulty.nearest_class")
    margin, label = table["difficulty.margin"].to_numpy(), table["label"].to_numpy()
    nearest = table["difficulty.nearest_class"].to_numpy()
    assert data["doubted"] == (margin > 0).sum() > 0
    for given, suggested, count in data["pairs"]:
        assert count == ((margin > 0) & (label == given) & (nearest == suggested)).sum()
    assert sum(count for *_, count in data["pairs"]) == data["doubted"]
    shown = [data["rows"]["scores"]["difficulty.margin"][n] for n in data["suspects"]]
    np.testing.assert_allclose(shown, np.sort(margin[margin > 0])[::-1], rtol=1e-4)


def test_classes_and_histograms(made):
    run, _, data = made
    table = table_of(run, "difficulty.rmd")
    rmd, label = table["difficulty.rmd"].to_numpy(), table["label"].to_numpy()
    for entry in data["per_class"]:
        own = rmd[label == entry["class"]]
        assert entry["count"] == len(own)
        np.testing.assert_allclose(entry["box"], np.percentile(own, (5, 25, 50, 75, 95)), rtol=1e-4)
    drawn = next(score for score in data["scores"] if score["name"] == "difficulty.rmd")
    assert sum(drawn["histogram"]["counts"]) == len(rmd)
    assert drawn["histogram"]["percentiles"][52] == pytest.approx(np.median(rmd), rel=1e-4)
    assert "harder" in drawn["direction"] and drawn["meaning"].startswith("md - md_agn")
    assert not any("percentile" in score["name"] for score in data["scores"])


def test_predictions_against_difficulty(made):
    run, _, data = made
    table = table_of(run, "difficulty.rmd", "predictions/mine.prediction")
    rmd, wrong = (
        table["difficulty.rmd"].to_numpy(),
        table["predictions/mine.prediction"].to_numpy() != table["label"].to_numpy(),
    )
    found = data["sets"]["mine"]
    assert found["accuracy"] == pytest.approx(1 - wrong.mean(), rel=1e-4)
    hardest = np.argsort(rmd)[-len(rmd) // 10 :]
    assert found["by_difficulty"][-1]["error"] == pytest.approx(wrong[hardest].mean(), rel=1e-4)
    assert found["risk_coverage"]["risk"][-1] == pytest.approx(wrong.mean(), rel=1e-4)
    assert sum(part["count"] for part in found["reliability"]) == len(rmd)
    trusted = data["trusts"]["oracle"]
    assert trusted["of"] == "mine" and trusted["risk_coverage"]["risk"][-1] == pytest.approx(wrong.mean(), rel=1e-4)
    assert trusted["risk_coverage"]["risk"] != found["risk_coverage"]["risk"]
    stored = json.loads(storage.read_bytes(run.path("evaluation", "mine.json")))
    assert found["ece"] == pytest.approx(stored["ece"], rel=1e-4)
    groups = [part for part in stored["slices"] if part["slice"] == "group"]
    assert [part["accuracy"] for part in data["groups"]] == [part["accuracy"] for part in groups]
    page = storage.read_bytes(run.path("report", "index.html")).decode()
    assert f"{100 * stored['accuracy']:.1f} %" in page


def test_agreement_is_of_ranks(made):
    run, _, data = made
    table = table_of(run, "difficulty.rmd", "predictions/mine.confidence")
    rmd, confidence = table["difficulty.rmd"].to_numpy(), table["predictions/mine.confidence"].to_numpy()
    names = data["agreement"]["names"]
    i, j = names.index("rmd"), names.index("confidence (mine), reversed")
    assert data["agreement"]["spearman"][i][j] == pytest.approx(spearmanr(rmd, -confidence).statistic, rel=1e-3)
    assert data["agreement"]["kendall"][i][j] == pytest.approx(kendalltau(rmd, -confidence).statistic, rel=1e-3)


def test_pictures_are_those_of_their_samples(made):
    _, _, data = made
    for number in data["gallery"][::17]:
        key, picture = data["rows"]["key"][number], data["pictures"][data["rows"]["picture"][number]]
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.size == (8, 8)
        assert abs(image.convert("L").getpixel((3, 3)) - int(key[1:]) % 256) <= 3


def test_what_the_corpus_says_stays_text(made):
    page = storage.read_bytes(made[0].path("report", "index.html")).decode()
    assert HOSTILE not in page and "&lt;/script&gt;&lt;img" in page
    assert json.loads(json_block({"x": HOSTILE})) == {"x": HOSTILE} and "<" not in json_block({"x": HOSTILE})


def test_quarantine_by_reason(made):
    page = storage.read_bytes(made[0].path("report", "index.html")).decode()
    assert 'label # is no class</span><span class="n">2</span>' in page
    assert "label 17 is no class" in page and "3 entries of 203, 1.5 %" in page


def test_it_samples_and_says_so_and_extremes_stay_exact(copied):
    limits = Limits(values=50, points=20, overall=10, per_class=2, pictures=25)
    report(copied, limits=limits)
    data, page = data_of(copied), storage.read_bytes(copied.path("report", "index.html")).decode()
    assert data["every"] == 4 and data["valued"] == 50 and len(data["points"]) == 20
    assert "50 evenly spaced images, every 4th" in page
    rmd = table_of(copied, "difficulty.rmd")["difficulty.rmd"].to_numpy()
    shown = np.array([v for v in data["rows"]["scores"]["difficulty.rmd"] if v is not None])
    np.testing.assert_allclose(np.sort(shown)[-10:], np.sort(rmd)[-10:], rtol=1e-4)
    assert len(data["pictures"]) == 25
    assert sum(entry["count"] for entry in data["per_class"]) == 200


def test_it_is_made_again_only_when_something_changed(copied):
    first = report(copied)
    before = storage.read_bytes(copied.path("report", "index.html"))
    again = report(Run.open(copied.uri))
    assert again["skipped"] and not first["skipped"]
    assert storage.read_bytes(copied.path("report", "index.html")) == before
    labels = table_of(copied, "difficulty.rmd")["label"].to_numpy()
    write_predictions(copied, noisy_logits(labels, CLASSES, seed=9), "other")
    assert not report(Run.open(copied.uri))["skipped"]
    assert set(data_of(copied)["sets"]) == {"mine", "other"}
    assert not report(Run.open(copied.uri), ["ant", "bee", "cat", "dog"])["skipped"]
    assert data_of(copied)["classes"] == ["ant", "bee", "cat", "dog"]
    with pytest.raises(ValueError, match="classes: 2 names"):
        report(Run.open(copied.uri), ["ant", "bee"])


def test_a_group_that_is_not_whole_or_old_is_left_out_and_named(copied):
    pathlib.Path(copied.path("predictions", "mine", "000002.parquet")).unlink()
    report(copied)
    assert not data_of(copied)["sets"]
    assert "predictions/mine/ lacks some shards" in storage.read_bytes(copied.path("report", "index.html")).decode()


def test_a_shard_that_is_gone_costs_its_pictures_only(copied, tmp_path):
    shutil.move(copied.shards[0].url, tmp_path / "away.tar")
    try:
        found, notes = pictures(copied, [(0, 1), (2, 3)], Limits())
    finally:
        shutil.move(tmp_path / "away.tar", copied.shards[0].url)
    assert set(found) == {(2, 3)} and "not there any more" in notes[0]


def test_pictures_keep_to_their_share_of_the_page(copied):
    wanted = [(2, 3), (0, 1), (2, 5)]
    found, _ = pictures(copied, wanted, Limits())
    assert list(found) == wanted
    room = len(found[2, 3]) + len(found[0, 1])
    assert list(pictures(copied, wanted, Limits(picture_chars=room))[0]) == wanted[:2]


def test_text_and_charts_can_be_read_in_both_themes():
    """WCAG 2.2 AA: 4.5:1 for text on every ground, 3:1 for what is drawn on the page and on cards."""
    themes = re.findall(r"^:root.*?{(.*?)^}", assets.asset("page.css"), re.S | re.M)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        grounds = [colors[name] for name in ("ground", "raised", "tint")]
        for name in ("ink", "soft", "faint", "accent"):
            assert min(contrast(colors[name], ground) for ground in grounds) >= 4.5, name
        for name in ("neutral", *(f"series-{n}" for n in range(1, 6))):
            assert min(contrast(colors[name], ground) for ground in grounds[:2]) >= 3, name


def contrast(first, second):
    """Ratio of relative luminances, WCAG 2.2."""
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    parts = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_the_first_screen_says_why_something_is_left_out():
    entries = {
        "label # is no class": (2, "label 17 is no class"),
        "broken PNG (at byte #)": (1, "broken PNG (at byte 9)"),
    }
    quarantine = {
        reason: {"count": n, "example": {"reason": example}, "examples": []} for reason, (n, example) in entries.items()
    }
    found = {"quarantine": quarantine, "left_out": 3, "loss": Loss(3, 0, 0, 0)}
    assert words._quarantine(found)["text"] == "3 entries left out: label # is no class (2), broken PNG (1)."
    assert words._reasons(found, 1) == "label # is no class (2) and 1 more reason"
    cut = words._quarantine(found | {"loss": Loss(2, 1200, 3_400_000, 1)})["text"]
    assert cut.endswith(" 3.4 MB of 1 shard cannot be read: about 1,200 samples more, by estimate.")


def test_no_more_is_read_than_asked(copied):
    found, _ = pictures(copied, [(2, 3), (0, 1), (2, 5)], Limits(read_bytes=copied.shards[2].size))
    assert set(found) == {(2, 3), (2, 5)}


def test_runs_that_lack_things(lacking):
    """A page each, and never a NaN."""
    pages = {}
    for name, run in lacking.items():
        pages[name] = storage.read_bytes(run.path("report", "index.html")).decode()
        body = pages[name].partition("<body>")[2].partition("<script>")[0]
        assert not re.search(r"\b(NaN|nan|None|undefined|inf)\b", body), name
    assert 'id="gallery"' in pages["unlabelled"] and 'id="suspects"' not in pages["unlabelled"]
    assert 'id="classes"' not in pages["one class"] and 'id="map"' not in pages["one class"]
    assert "There are no scores yet" in pages["embedded"] and 'id="scores"' not in pages["embedded"]
    assert "7 entries left out: no image (7)" in pages["empty"] and "100.0 %" in pages["empty"]


def test_histogram_of_outliers_and_of_nothing():
    values = np.concatenate([np.linspace(0, 1, 5000), [1e9, np.nan, np.inf]])
    found = histogram(values)
    assert found["high"] < 2 and sum(found["counts"]) == found["count"] == 5001 and found["clipped"] > 0
    assert histogram(np.full(3, np.nan)) is None
    assert sum(histogram(np.ones(9))["counts"]) == 9


def test_error_by_difficulty_of_few():
    parts = error_by_difficulty(np.array([3.0, 1.0, np.nan, 2.0]), np.array([True, False, True, False]))
    assert [part["error"] for part in parts] == [0, 0, 1] and all(part["count"] == 1 for part in parts)
    low, high = wilson(0.0, 10)
    assert low == 0 and 0.25 < high < 0.31


def test_severities_come_from_the_folders_of_the_shards(tmp_path, made):
    run = made[0]
    record = json.loads(json.dumps(run.record))
    for number, folder in enumerate(("clean", "fog-1", "fog-3")):
        record["shards"][number]["url"] = f"/somewhere/{folder}/test.tar"
    found = collect(Run(run.uri, record), Limits(pictures=0))["data"]["severity"]
    rmd = pq.read_table(f"{run.uri}/difficulty/000002.parquet")["rmd"].to_numpy()
    assert [(part["kind"], part["severity"], part["count"]) for part in found] == [("fog", 3, 130), ("none", 0, 70)]
    assert found[0]["mean"] == pytest.approx(rmd.mean(), rel=1e-4)
