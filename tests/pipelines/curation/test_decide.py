"""Decisions of people: read from tables, checked whole, kept with their history, taken back."""

import pytest

from pipelines.curation.decide import decide, undo
from pipelines.curation.decision_files import key_candidates, read_lines
from pipelines.runs import column_groups, columns
from pipelines.runs import decisions as decided
from pipelines.runs.errors import UserError
from tests.pipelines.synthetic import make_run


@pytest.fixture
def corpus(tmp_path, ray_session):
    """A run of 100 samples in three shards and three classes, and its labels."""
    run, _, labels = make_run(tmp_path)
    return run, labels, tmp_path


def table(folder, text, name="decisions.csv"):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def now(run):
    """(key, decision, label, by) of every decision in force."""
    found = []
    for shard in range(len(run.shards)):
        for entry in decided.in_force(decided.read_history(run.uri, shard)).to_pylist():
            found.append((entry["key"], entry["decision"], entry["label"], entry["by"]))
    return found


def test_decisions_arrive_in_the_shard_of_their_sample(corpus):
    run, labels, folder = corpus
    other = (labels[50] + 1) % 3
    text = f"key,decision,label\ns000000,keep,\ns000050,relabel,{other}\ns000099,drop,\n"
    counts = decide(run, [table(folder, text)], "anna")
    assert [counts[name] for name in ("added", "keep", "relabel", "drop", "conflicts")] == [3, 1, 1, 1, 0]
    assert now(run) == [
        ("s000000", "keep", labels[0], "anna"),
        ("s000050", "relabel", other, "anna"),
        ("s000099", "drop", labels[99], "anna"),
    ]
    assert decided.decided_shards(run) == [0, 1, 2]
    assert column_groups.read(run.uri, columns.DECISIONS, 1)["row"].to_pylist() == [10]


def test_a_label_alone_keeps_or_relabels(corpus):
    run, labels, folder = corpus
    text = f"shard,row,label\n0,0,{labels[0]}\n0,1,{(labels[1] + 1) % 3}\n"
    decide(run, [table(folder, text)], "anna")
    assert [entry[1] for entry in now(run)] == ["keep", "relabel"]


def test_the_same_file_again_changes_nothing(corpus):
    run, labels, folder = corpus
    file = table(folder, f"key,label\ns000001,{(labels[1] + 1) % 3}\n")
    decide(run, [file], "anna")
    before = decided.states(run)
    counts = decide(run, [file], "anna")
    assert (counts["added"], counts["unchanged"]) == (0, 1)
    assert decided.states(run) == before
    assert len(decided.batches(run)) == 1


def test_later_decisions_win_and_undo_brings_back_the_earlier(corpus):
    run, labels, folder = corpus
    start = decided.states(run)
    decide(run, [table(folder, "key,decision\ns000003,drop\n")], "anna")
    dropped = decided.states(run)
    decide(run, [table(folder, f"key,label\ns000003,{(labels[3] + 1) % 3}\ns000060,{labels[60]}\n")], "anna")
    assert [entry[1] for entry in now(run)] == ["relabel", "keep"]
    assert undo(run)["undone"] == 2
    assert now(run) == [("s000003", "drop", labels[3], "anna")]
    assert decided.states(run) == dropped
    assert undo(run)["undone"] == 1
    assert decided.states(run) == start == [None] * 3
    with pytest.raises(UserError, match="nothing was decided"):
        undo(run)


def test_two_people_who_disagree_are_reported(corpus):
    run, labels, folder = corpus
    decide(run, [table(folder, "key,decision\ns000003,drop\ns000004,keep\n")], "anna")
    counts = decide(run, [table(folder, "key,decision\ns000003,keep\ns000004,keep\n")], "ben")
    assert counts["conflicts"] == 1
    assert counts["examples"] == ["s000003 (shard 0, row 3): anna said drop, ben says keep"]
    assert now(run)[0][1:] == ("keep", labels[3], "ben")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key,decision\ns000000,keep\nnowhere,keep\n", "line 3.*no sample with the key 'nowhere'"),
        ("shard,row,decision\n0,40,keep\n", "line 2.*no sample in shard 0, row 40"),
        ("shard,row,decision\n9,0,keep\n", "line 2.*no sample in shard 9"),
        ("key,shard,row,decision\ns000001,0,0,keep\n", "line 2.*holds 's000000'"),
        ("key,label\ns000000,cat\n", "line 2: no class 'cat'.*0, 1, 2"),
        ("key,label\ns000000,3\n", "line 2: no class '3'"),
        ("key,decision\ns000000,perhaps\n", "line 2: decision 'perhaps'"),
        ("key,decision,label\ns000000,relabel,\n", "line 2: relabel without a label"),
        ("key,decision\ns000000,keep\ns000000,drop\n", "line 3: another decision about 's000000' than line 2"),
        ("key,decision\ns000000,keep,0\n", "line 2: 3 cells"),
        ("key,decision\n,keep\n", "line 2: it names no sample"),
        ("name,decision\ns000000,keep\n", "line 1: expected a column key"),
        ("key,remark\ns000000,keep\n", "line 1: expected a column decision or label"),
        ("key,key,label\na,b,c\n", "line 1: two columns are named key"),
        ("", "line 1: expected a column key"),
        (b"key,decision\n\xff\xfe,keep\n", "not a text file in UTF-8"),
        ('key,decision\n"s000000,keep\n', "line .*not a table in CSV"),
        ("key,decision,when\ns000000,keep,yesterday\n", "line 2: time 'yesterday'"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(corpus, text, said):
    run, _, folder = corpus
    with pytest.raises(UserError, match=said):
        decide(run, [table(folder, text)], "anna")
    assert decided.states(run) == [None] * 3


def test_keep_with_another_label_is_a_mistake(corpus):
    run, labels, folder = corpus
    with pytest.raises(UserError, match="line 2: keep, but with another label"):
        decide(run, [table(folder, f"key,decision,label\ns000000,keep,{(labels[0] + 1) % 3}\n")], "anna")


def test_keep_confirms_the_label_that_was_decided_before(corpus):
    run, labels, folder = corpus
    other = (labels[0] + 1) % 3
    decide(run, [table(folder, f"key,label\ns000000,{other}\n")], "anna")
    decide(run, [table(folder, f"key,decision,label\ns000000,keep,{other}\n")], "anna")
    assert now(run) == [("s000000", "keep", other, "anna")]


def test_two_files_at_once_must_agree(corpus):
    run, _, folder = corpus
    files = [
        table(folder, "key,decision\ns000000,keep\n", "a.csv"),
        table(folder, "key,decision\ns000000,drop\n", "b.csv"),
    ]
    with pytest.raises(UserError, match=r"b.csv line 2: another decision about 's000000' than .*a.csv line 2"):
        decide(run, files, "anna")


def test_a_decision_about_a_sample_that_was_replaced_is_not_its_successors(corpus):
    run, _, folder = corpus
    decide(run, [table(folder, "key,decision\ns000000,drop\n")], "anna")
    embedded = column_groups.read(run.uri, columns.EMBEDDINGS, 0)
    keys = ["other", *embedded["key"].to_pylist()[1:]]
    replaced = embedded.set_column(0, embedded.schema.field("key"), [keys])
    column_groups.write(run.uri, columns.EMBEDDINGS, 0, replaced, "another", left_out=0, max_label=2)
    counts = decide(run, [table(folder, "key,decision\nother,keep\n")], "ben")
    assert counts["conflicts"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffkey,decision\r\na,keep\r\n", [(2, "a", "keep", None)]),
        ("key\tdecision\na b,c\tdrop\n", [(2, "a b,c", "drop", None)]),
        ("Key,Label\na,3.0\n\nb,\n", [(2, "a", None, "3.0")]),
        ("key,is_label_issue,given_label,predicted_label\na,True,0,2\nb,False,1,2\n", [(2, "a", None, "2")]),
        ('filepath,tags\n/d/a.jpg,"[\'drop\', \'blurred\']"\n/d/b.jpg,"blurred,dark"\n', [(2, "/d/a.jpg", "drop", None)]),
        ("annotator,choice,id,image\n7,cat,1,/up/1/0a1b2c3d-a.jpg\n", [(2, "/up/1/0a1b2c3d-a.jpg", None, "cat")]),
    ],
)  # fmt: skip
def test_tables_of_other_tools(text, expected):
    found = read_lines("x.csv", text.encode())
    assert [(line.number, line.key, line.decision, line.label) for line in found] == expected


@pytest.mark.parametrize(
    "text", ["a/b/0001", "/data/a/b/0001.jpg", "s3://bucket/0001.input.png", "up/1/0a1b2c3d-0001.jpg"]
)
def test_a_path_leads_to_its_key(text):
    assert {"a/b/0001", "0001", "0001.input"} & set(key_candidates(text))
