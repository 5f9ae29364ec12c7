"""The command end to end on photographs with planted copies: in the run, against another run, in a subset and in the report."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from jobs.curate import main as curate
from jobs.embed import main as embed
from jobs.neighbors import main as neighbors

pytestmark = pytest.mark.usefixtures("ray_session")

CHANGES = {
    "mirrored": ImageOps.mirror,
    "grey": ImageOps.grayscale,
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "smaller": lambda picture: picture.resize((90, 72)),
}


def encoded(picture: Image.Image, quality: int = 92) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def originals() -> list[Image.Image]:
    """Twelve parts of two photographs, 160 × 128, which do not overlap."""
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    places = [(x, y) for x in (0, 165, 330) for y in (0, 150)]
    parts = [w.crop((x, y, x + 160, y + 128)) for w in whole for x, y in places]
    parts[4], parts[6] = parts[6], parts[4]  # brightened, the fifth would be white
    return parts


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, make_shard):
    """TRAIN: twelve pictures, a byte-for-byte copy of the first and a larger one of the second. TEST: four changed, four new."""
    folder = tmp_path_factory.mktemp("neighbors")
    pictures = originals()
    train = [(f"t{i:02d}", {"jpg": encoded(p), "cls": str(i % 2).encode()}) for i, p in enumerate(pictures[:8])]
    train += [("u00", {"jpg": encoded(pictures[0]), "cls": b"0"})]
    train += [("u01", {"jpg": encoded(pictures[1].resize((320, 256))), "cls": b"1"})]
    test = [
        (name, {"jpg": encoded(change(p)), "cls": b"0"}) for (name, change), p in zip(CHANGES.items(), pictures[2:])
    ]
    test += [(f"new{i}", {"jpg": encoded(p), "cls": b"1"}) for i, p in enumerate(pictures[8:])]
    make_shard(folder / "train" / "a-000000.tar", train[:6])
    make_shard(folder / "train" / "a-000001.tar", train[6:])
    make_shard(folder / "test" / "b-000000.tar", test)
    return folder


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_curate_finds_copies_keeps_one_of_each_and_shows_them(corpora, capsys):
    shards, run = str(corpora / "train"), corpora / "run"
    options = [
        "--shards",
        shards,
        "--run",
        str(run),
        "--encoder",
        "pixels:4",
        "--neighbors",
        "--where",
        "",
        "--top",
        "1.0",
    ]
    assert curate([*options, "--mlflow", "none", "--json"]) == 0
    found = said(capsys)
    assert (
        found["neighbors"]["duplicates"],
        found["neighbors"]["duplicate_groups"],
        found["neighbors"]["identical"],
    ) == (2, 2, 1)
    by_key = {row["key"]: row for row in rows_of(run / "neighbors")}
    # The copy comes after the first; of the second picture the larger one is kept.
    assert (by_key["u00"]["duplicate_of_shard"], by_key["u00"]["duplicate_of_row"]) == (0, 0)
    assert by_key["u00"]["duplicate_kind"] == "identical" and by_key["u00"]["duplicate_similarity"] == 1
    assert (by_key["t01"]["duplicate_of_shard"], by_key["t01"]["duplicate_of_row"]) == (1, 3)
    assert by_key["t01"]["duplicate_kind"] == "same"
    chosen = set(pq.read_table(run / "subsets" / "hard" / "manifest.parquet")["key"].to_pylist())
    assert chosen == by_key.keys() - {"u00", "t01"}
    page = (run / "report" / "index.html").read_text()
    assert 'id="duplicates"' in page and page.count('<div class="copies">') == 2


def test_against_another_run_leaks_are_counted_and_named(corpora, capsys):
    runs = {name: str(corpora / f"{name}-run") for name in ("train", "test")}
    for name, run in runs.items():
        shards = str(corpora / name)
        assert embed(["--shards", shards, "--run", run, "--encoder", "pixels:4", "--mlflow", "none"]) == 0
    capsys.readouterr()
    options = ["--run", runs["test"], "--against", runs["train"], "--k", "5", "--mlflow", "none", "--json"]
    assert neighbors(options) == 0
    found = said(capsys)
    assert found["duplicates"] == 4 and found["recall"] == 1.0 and found["k"] == 5 and found["rows"] == 8
    rows = rows_of(Path(runs["test"], "neighbors", "against", "train-run"))
    leaked = {row["key"]: (row["duplicate_of_shard"], row["duplicate_of_row"]) for row in rows if row["duplicate_kind"]}
    assert leaked == {name: (0, 2 + i) for i, name in enumerate(CHANGES)}
    assert all(row["vote"] is None and len(row["neighbor_row"]) == 5 for row in rows)
    assert np.all([np.diff(row["similarity"]) <= 0 for row in rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--k", "0"], "--k 0"), (["--against", "nowhere"], "--against"), (["--name", "a/b"], "--name")],
)
def test_mistakes_are_named(corpora, capsys, options, message):
    run = str(corpora / "mistakes")
    assert embed(["--shards", str(corpora / "test"), "--run", run, "--encoder", "pixels:4", "--mlflow", "none"]) == 0
    if "--name" in options:
        options = [*options, "--against", run]
    assert neighbors(["--run", run, *options, "--mlflow", "none"]) == 2
    assert message in capsys.readouterr().err
