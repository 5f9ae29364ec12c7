"""Folders and Parquet as shards: original bytes, labels, names, the same bytes each time, read by others too."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import packed
from pipelines.corpus.pack import pack
from pipelines.corpus.samples import LabelSource
from pipelines.corpus.shards import expand_shards, read_entries
from pipelines.runs.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_session")  # lazy: so little work stays in this process


@pytest.fixture
def folders(tmp_path, make_image):
    """Three classes, suffixes in any case, names that a tar's key cannot hold, and files that are no images."""
    for name, data in {
        "photos/cat/a.jpg": make_image(0),
        "photos/cat/a.png": make_image(1, format="PNG"),
        "photos/cat/v1.2 x.JPEG": make_image(2),
        "photos/dög/deep/a.jpg": make_image(3),
        "photos/dög/b.gif": make_image(4, format="GIF"),
        "photos/emu/ç:d.webp": make_image(5, format="WEBP"),
        "photos/emu/notes.txt": b"-",
        "photos/README.md": b"-",
        "photos/emu/.hidden.jpg": b"-",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path / "photos"


def samples(out, label="cls"):
    """{image bytes: label} of all samples; each must be good."""
    found = {}
    for shard in expand_shards(str(out)):
        for entry in read_entries(shard, LabelSource(label), {}):
            assert entry.reason is None
            found[entry.image] = entry.label
    return found


def quiet(text):
    pass


def test_a_folder_per_class(folders, tmp_path):
    counts = pack(str(folders), str(tmp_path / "out"), 4, tell=quiet)
    assert (counts["samples"], counts["labelled"], counts["shards"], counts["ignored"]) == (6, 6, 2, 2)
    labels = {"cat": 0, "dög": 1, "emu": 2}
    expected = {
        path.read_bytes(): labels[path.relative_to(folders).parts[0]]
        for path in folders.rglob("*")
        if path.suffix.lower() in (".jpg", ".png", ".jpeg", ".gif", ".webp") and not path.name.startswith(".")
    }
    assert samples(tmp_path / "out") == expected and len(expected) == 6
    urls = [shard.url for shard in expand_shards(str(tmp_path / "out"))]
    assert packed.names_beside(urls) == ("cat", "dög", "emu") and packed.labelled_beside(urls)
    with tarfile.open(urls[0]) as tar:  # and as others read it
        assert all(member.isfile() for member in tar)


def test_the_same_bytes_each_time_and_nothing_is_written_twice(folders, tmp_path):
    pack(str(folders), str(tmp_path / "out"), 2, tell=quiet)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pack(str(folders), str(tmp_path / "again"), 2, tell=quiet)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first
    (tmp_path / "out/shard-000001.tar").unlink()
    record = json.loads((tmp_path / "out/pack.json").read_text())
    (tmp_path / "out/pack.json").write_text(json.dumps(record | {"complete": False}))  # as a kill leaves it
    counts = pack(str(folders), str(tmp_path / "out"), 2, tell=quiet)
    assert (counts["shards_done"], counts["shards_skipped"]) == (1, 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_another_source_is_not_mixed_in(folders, tmp_path, make_shard):
    pack(str(folders), str(tmp_path / "out"), 2, tell=quiet)
    for size in (2, 3):
        (folders / "cat/more.jpg").write_bytes(b"x" * (3 - size))
        if size == 3:
            (folders / "cat/more.jpg").unlink()
        with pytest.raises(UserError, match="a pack of something else"):
            pack(str(folders), str(tmp_path / "out"), size, tell=quiet)
    make_shard(tmp_path / "theirs/a.tar", [])
    with pytest.raises(UserError, match="pack did not write"):
        pack(str(folders), str(tmp_path / "theirs"), tell=quiet)


def test_flat_folders(tmp_path, make_image):
    flat = tmp_path / "flat"
    flat.mkdir()
    images = {f"{i}.jpg": make_image(i) for i in range(4)}
    for name, data in images.items():
        (flat / name).write_bytes(data)
    counts = pack(str(flat), str(tmp_path / "none"), tell=quiet)
    assert counts["labelled"] == 0 and samples(tmp_path / "none", "none") == dict.fromkeys(images.values())
    urls = [shard.url for shard in expand_shards(str(tmp_path / "none"))]
    assert packed.labelled_beside(urls) is False and packed.names_beside(urls) is None
    (flat / "labels.csv").write_bytes("\ufefffile_name,label\r\n0.jpg,dog\r\n1,cat\r\n2.jpg,dog\r\n".encode())
    pack(str(flat), str(tmp_path / "words"), tell=quiet)
    (flat / "labels.csv").write_text("id,class\n0,7\n1,3\n2,3.0\n3.jpg,0\n")
    pack(str(flat), str(tmp_path / "numbers"), tell=quiet)
    assert samples(tmp_path / "numbers") == dict(zip(images.values(), (7, 3, 3, 0)))
    words = [shard.url for shard in expand_shards(str(tmp_path / "words"))]
    assert packed.names_beside(words) == ("cat", "dog")
    entries = list(read_entries(expand_shards(str(tmp_path / "words"))[0], LabelSource("cls"), {}))
    assert {entry.key: entry.label for entry in entries} == {"0": 1, "1": 0, "2": 1, "3": None}
    assert [entry.reason for entry in entries if entry.key == "3"] == ["missing label: no cls member"]


def parquet(path, images, labels, features=None, **options):
    column = pa.array(
        [None if data is None else {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": column} | ({} if labels is None else {"label": labels}))
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def test_parquet_as_hugging_face_writes_it(tmp_path, make_image):
    images = [make_image(i, format=("JPEG", "PNG")[i % 2]) for i in range(7)]
    names = {"label": {"names": ["b", "a"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    parquet(tmp_path / "data/train-0.parquet", images[:5], [0, 1, 1, 0, 1], names, row_group_size=2)
    parquet(tmp_path / "data/train-1.parquet", images[5:], [1, 0], names)
    counts = pack(str(tmp_path / "data"), str(tmp_path / "out"), 3, tell=quiet)
    assert (counts["samples"], counts["shards"], counts["classes"]) == (7, 3, ["b", "a"])
    assert samples(tmp_path / "out") == dict(zip(images, [0, 1, 1, 0, 1, 1, 0]))
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert {n.rpartition(".")[2] for n in tar.getnames()} == {"jpg", "png", "cls"}


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (["x", "a", None], [1, 0, None], ["a", "x"]),
        ([4, 9, -0], [4, 9, 0], []),
        (["4", "9", "0"], [4, 9, 0], []),
        (None, [None] * 3, []),
    ],
)
def test_labels_of_parquet_columns(tmp_path, make_image, labels, expected, classes):
    images = [make_image(i) for i in range(3)]
    parquet(tmp_path / "t.parquet", images, labels)
    counts = pack(str(tmp_path / "t.parquet"), str(tmp_path / "out"), tell=quiet)
    assert counts["classes"] == classes
    entries = read_entries(expand_shards(str(tmp_path / "out"))[0], LabelSource("none"), {})
    assert [entry.image for entry in entries] == images
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        found = {n.partition(".")[0]: int(tar.extractfile(n).read()) for n in tar.getnames() if n.endswith(".cls")}
    assert list(found.values()) == [label for label in expected if label is not None]


def test_a_row_without_bytes_is_told_and_ends_in_quarantine(tmp_path, make_image):
    parquet(tmp_path / "t.parquet", [make_image(0), None], [1, 0])
    counts = pack(str(tmp_path / "t.parquet"), str(tmp_path / "out"), tell=quiet)
    assert counts["without_bytes"] == 1
    entries = read_entries(expand_shards(str(tmp_path / "out"))[0], LabelSource("cls"), {})
    assert [(entry.reason or "good").partition(":")[0] for entry in entries] == ["good", "missing image"]


def test_what_cannot_be_packed_is_named(tmp_path, folders, make_image):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed/cat").mkdir(parents=True)
    for name in ("mixed/a.jpg", "mixed/cat/b.jpg", "splits/train/cat/a.jpg", "splits/val/cat/a.jpg", "bad/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_image(0))
    (tmp_path / "bad/labels.csv").write_text("name,kind\na,b\n")
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    for source, message in [
        ("empty", "no image there"),
        ("nothing", "no such folder"),
        ("mixed", "1 images beside and 1 inside"),
        ("splits", "holds splits"),
        ("bad", "expected a column file_name"),
        ("no.parquet", "cannot be read as Parquet"),
        ("x.parquet", "expected one column of image bytes"),
    ]:
        with pytest.raises(UserError, match=message):
            pack(str(tmp_path / source), str(tmp_path / "out"), tell=quiet)
    assert not (tmp_path / "out").exists()


def test_shards_of_a_folder_of_images_names_the_command_that_is_missing(folders, tmp_path):
    for folder in (folders, folders / "cat"):
        with pytest.raises(UserError, match=f"hardset pack {folder} --out {folder}-shards"):
            expand_shards(str(folder))
    stream = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), stream)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.parquet").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="Parquet; make shards of it first: hardset pack"):
        expand_shards(str(tmp_path / "tables"))


def test_to_and_from_an_object_store(s3_folder, tmp_path, make_image):
    parquet(tmp_path / "t.parquet", [make_image(0), make_image(1)], [1, 0])
    from pipelines.runs import storage

    with storage.write_atomic(f"{s3_folder}/in/t.parquet") as stream:
        stream.write((tmp_path / "t.parquet").read_bytes())
    counts = pack(f"{s3_folder}/in", f"{s3_folder}/out", tell=quiet)
    assert counts["samples"] == 2 and sorted(samples(f"{s3_folder}/out").values()) == [0, 1]
    assert pack(f"{s3_folder}/in", f"{s3_folder}/out", tell=quiet)["shards_skipped"] == 1
