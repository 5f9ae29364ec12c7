"""What other tools read of a run: the same numbers, all rows in order, original bytes."""

import csv
import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from jobs.export import main
from pipelines import export
from pipelines.curation import fit, score, select
from pipelines.curation.decision_files import key_candidates
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.record import Run
from tests.pipelines.predicted import write_predictions
from tests.pipelines.synthetic import make_run, picture


@pytest.fixture(scope="module")
def scored(tmp_path_factory, ray_session):
    """A scored run with the subset `suspects` and predictions `p`; (run, features, labels, logits). Not to be written to."""
    run, features, labels = make_run(tmp_path_factory.mktemp("exported"))
    labels[[3, 50, 99]] = (labels[[3, 50, 99]] + 1) % 3  # mislabelled
    for shard, part in enumerate(np.split(labels, [40, 65])):
        table, facts = (
            column_groups.read(run.uri, "embeddings", shard),
            column_groups.facts(run.uri, "embeddings", shard),
        )
        table = table.set_column(3, columns.LABEL, pa.array(part))
        kept = {name: value for name, value in facts.items() if name not in ("source", "rows")}
        column_groups.write(run.uri, "embeddings", shard, table, facts["source"], **kept)
    fit.fit(run, "none")
    score.score(run, score.Weighting())
    select.select(run, select.Rule("difficulty.margin", 10), "suspects", samples_per_shard=5)
    logits = 3 * np.random.default_rng(5).normal(size=(len(labels), 3))
    write_predictions(run, logits)
    return run, features, labels, logits


def exported(run, to, out, *more):
    assert main(["--run", run.uri, "--to", to, "--out", str(out), *more]) == 0
    return out


def read(path):
    if path.suffix == ".csv":
        return pcsv.read_csv(path)
    return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@pytest.mark.parametrize("suffix", export.TABLE_SUFFIXES)
def test_a_table_is_the_join_of_its_columns(scored, tmp_path, suffix):
    names = ["difficulty.rmd", "predictions/p.confidence"]
    table = read(exported(scored[0], "table", tmp_path / f"t{suffix}", "--columns", *names))
    expected = joins.load(scored[0].uri, names)
    assert table.column_names == expected.column_names == ["key", "shard", "row", "label", *names]
    assert table["key"] == expected["key"]
    np.testing.assert_allclose(table[names[0]].to_numpy(), expected[names[0]].to_numpy(), rtol=1e-6)
    if suffix != ".csv":
        assert columns.about(table.schema.field(names[0]))["direction"] == "larger = harder"


def test_without_columns_a_table_holds_every_score(scored, tmp_path):
    table = read(exported(scored[0], "table", tmp_path / "t.parquet"))
    assert {"difficulty.rmd", "difficulty.label_error"} <= set(table.column_names) and len(table) == 100


def test_cleanlabs_columns_from_the_margin(scored, tmp_path, capsys):
    table = read(exported(scored[0], "cleanlab", tmp_path / "issues.parquet", "--json"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    source = joins.load(scored[0].uri, ["difficulty.margin", "difficulty.nearest_class"])
    margin = source["difficulty.margin"].to_numpy()
    issue, quality = table["is_label_issue"].to_numpy(), table["label_score"].to_numpy()
    assert (issue == (margin > 0)).all() and issue.sum() == result["issues"] > 0
    assert (np.argsort(quality, kind="stable") == np.argsort(-margin, kind="stable")).all()
    assert quality.min() >= 0 and quality.max() <= 1
    assert table["given_label"].to_pylist() == scored[2].tolist()
    assert table["predicted_label"].to_pylist() == source["difficulty.nearest_class"].to_pylist()
    # An issue is where the suggestion differs from the label.
    assert (issue == (table["predicted_label"].to_numpy() != scored[2])).all()


def test_cleanlabs_columns_from_predictions_as_csv(scored, tmp_path):
    table = read(exported(scored[0], "cleanlab", tmp_path / "issues.csv", "--predictions", "p"))
    predicted = scored[3].argmax(axis=1)
    assert table["predicted_label"].to_pylist() == predicted.tolist()
    assert table["is_label_issue"].to_pylist() == (predicted != scored[2]).tolist()


def test_named_classes_are_told_by_name_and_samples_without_a_label_are_no_issue():
    table = pa.table(
        {
            "key": ["a", "b"],
            "shard": [0, 0],
            "row": [0, 1],
            "label": pa.array([1, None], pa.int64()),
            "m": pa.array([2.0, None], pa.float32()),
            "n": pa.array([0, 1]),
        }
    )
    rows = export.label_issues(table, "m", "n", ("ant", "bee"), 0.5).to_pylist()
    assert rows[0]["is_label_issue"] and rows[0]["given_label"] == "bee" and rows[0]["predicted_label"] == "ant"
    assert rows[1]["is_label_issue"] is rows[1]["label_score"] is rows[1]["given_label"] is None


def test_embeddings_are_one_array_that_maps_and_metadata_of_the_same_rows(scored, tmp_path):
    more = ("--columns", "embeddings.embedding", "predictions/p.logits", "difficulty.rmd")
    folder = exported(scored[0], "npy", tmp_path / "arrays", *more)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    assert np.array_equal(embeddings, scored[1])
    logits = np.load(folder / "predictions_p.logits.npy", allow_pickle=False)
    assert np.array_equal(logits, scored[3].astype(np.float32))
    metadata = read(folder / "metadata.parquet")
    assert metadata["label"].to_pylist() == scored[2].tolist()
    assert metadata.column_names == ["key", "shard", "row", "label", "difficulty.rmd"]


def test_a_subset_is_its_samples_and_no_others(scored, tmp_path):
    run = scored[0]
    manifest = pq.read_table(run.path("subsets", "suspects", "manifest.parquet"))
    folder = exported(run, "npy", tmp_path / "arrays", "--subset", "suspects")
    assert read(folder / "metadata.parquet")["key"] == manifest["key"]
    rows = [int(key[1:]) for key in manifest["key"].to_pylist()]
    assert np.array_equal(np.load(folder / "embeddings.npy"), scored[1][rows])


def test_fiftyones_folder_holds_the_original_images_and_their_fields(scored, tmp_path):
    folder = exported(scored[0], "fiftyone", tmp_path / "fo", "--subset", "suspects", "--columns", "difficulty.margin")
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and list(rows[0]) == ["filepath", "key", "shard", "row", "label", "difficulty_margin"]
    for row in rows:
        number = int(row["key"][1:])
        assert (folder / "data" / row["filepath"]).read_bytes() == picture(number)
        assert int(row["label"]) == scored[2][number]


def test_uids_are_those_of_the_subset_or_of_its_json_members(scored, tmp_path):
    run = scored[0]
    out = exported(run, "datacomp", tmp_path / "uids.npy", "--subset", "suspects")
    with open(run.path("subsets", "suspects", "uids.npy"), "rb") as file:
        assert out.read_bytes() == file.read()
    copy = Run.open(shutil.copytree(run.uri, tmp_path / "run"))
    uids = [f"{7919 * i:032x}" for i in range(10)]
    for number in range(2):
        tar_name = copy.path("subsets", "suspects", f"suspects-{number:06d}.tar")
        with tarfile.open(tar_name, "w") as tar:
            for i, uid in enumerate(uids[5 * number : 5 * number + 5]):
                data = json.dumps({"uid": uid}).encode()
                info = tarfile.TarInfo(f"k{i}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for stale in sorted((tmp_path / "run/subsets/suspects").glob("*.tar"))[2:]:
        stale.unlink()
    found = np.load(exported(copy, "datacomp", tmp_path / "pool.npy", "--subset", "suspects", "--uid", "json:uid"))
    assert found.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in found.tolist()] == sorted(uids)


@pytest.mark.parametrize(
    ("to", "out", "more", "words"),
    [
        ("table", "t.txt", (), ".parquet, .arrow, .csv"),
        ("table", "t.csv", ("--columns", "embeddings.embedding"), "a CSV file holds no vectors"),
        ("table", "t.csv", ("--columns", "difficulty.fear"), "no column 'fear'"),
        ("table", "t.csv", ("--subset", "nosuch"), "--subset nosuch"),
        ("npy", "d", ("--columns", "difficulty.rmd"), "needs a column of vectors"),
        ("datacomp", "u.npy", (), "add --subset NAME"),
        ("datacomp", "u.npy", ("--subset", "suspects", "--uid", "json:uid"), "0 of 10 samples"),
        ("cleanlab", "t.csv", ("--predictions", "nosuch"), "predictions/nosuch"),
        ("cleanlab", "t.csv", ("--threshold", "2"), "--threshold 2"),
        ("parquet", "t", (), "--to parquet: expected one of"),
    ],
)
def test_mistakes_are_status_2_in_one_line_and_leave_nothing(scored, tmp_path, capsys, to, out, more, words):
    folder = tmp_path / "out"
    folder.mkdir()
    assert main(["--run", scored[0].uri, "--to", to, "--out", str(folder / out), *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and last.startswith("hardset export: error: ")
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_to_and_from_an_object_store(scored, s3_folder, tmp_path):
    exported(scored[0], "npy", f"{s3_folder}/arrays")
    filesystem, path = storage.open_filesystem(f"{s3_folder}/arrays/embeddings.npy")
    assert np.array_equal(np.load(io.BytesIO(filesystem.open_input_stream(path).read())), scored[1])


def test_a_cell_of_csv_is_no_formula(tmp_path):
    keys = ["=1+1", "+1", "-a", "@x", "\ttab", "a=1", "", None, "'=1"]
    table = pa.table({"key": pa.array(keys), "score": pa.array(np.arange(9) - 5.0)})
    export.write_table([table], str(tmp_path / "t.csv"))
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == ["'=1+1", "'+1", "'-a", "'@x", "'\ttab", "a=1", "", "", "'=1"]
    assert [float(row["score"]) for row in rows] == table["score"].to_pylist()
    assert all(key_candidates(row["key"])[-1] == key for row, key in zip(rows, keys[:5]))
    export.write_table([table], str(tmp_path / "t.parquet"))
    assert pq.read_table(tmp_path / "t.parquet")["key"].to_pylist() == keys
