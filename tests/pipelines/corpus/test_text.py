"""Text that people write: byte order marks, ends of lines, names of classes."""

import pytest

from pipelines.corpus import text
from pipelines.corpus.shards import expand_shards
from pipelines.runs.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_every_encoding_and_end_of_line(tmp_path, encoding, end, last):
    (tmp_path / "classes.txt").write_bytes((end.join(["Kätzchen", "dog \u2028 x"]) + end * last).encode(encoding))
    assert text.read_names(str(tmp_path / "classes.txt")) == ("Kätzchen", "dog \u2028 x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "line 2 is blank"),
        (b"\na\n", "line 1 is blank"),
        (b"a\nb\na\n", "'a' is the name in line 1 and in line 3"),
        (b"\n\n", "holds no class name"),
        (b"", "holds no class name"),
        (b"\xff\xfa", "not UTF-8 text"),
    ],
)
def test_names_that_would_shift_labels_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        text.read_names(str(tmp_path / "classes.txt"))
    assert error.value.field == "classes"


def test_blank_lines_at_the_end_are_no_classes(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"a\nb\n\n \n")
    assert text.read_names(str(tmp_path / "classes.txt")) == ("a", "b")


def test_a_shard_list_as_windows_writes_it(tmp_path, make_shard):
    make_shard(tmp_path / "a.tar", [("k", {"jpg": b"x"})])
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "list.txt").write_bytes(f"{tmp_path}/a.tar\r\n".encode(encoding))
        assert [shard.url for shard in expand_shards(str(tmp_path / "list.txt"))] == [f"{tmp_path}/a.tar"]
