"""Grouping into samples, labels, and the reason for each sample left out."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.samples import Entry, LabelSource, SampleNumbering, plain_suffix, printable, read_samples
from pipelines.corpus.tarstream import BLOCK, ByteStream, TarStream
from pipelines.runs.errors import UserError


def tar_of(members, kinds=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data, label="cls", names=None, **options):
    if not isinstance(data, bytes):
        data = tar_of(data)
    source = LabelSource(label, names, member=options.pop("label_member", None))
    found = list(read_samples(TarStream(ByteStream(lambda: io.BytesIO(data))), source, **options))
    for entry in found:
        assert entry.image is None or data[entry.offset :].startswith(entry.image)
    return [entry._replace(offset=None) for entry in found]


def good(key, row, label=None, image=b"img", suffix="jpg"):
    return Entry(row, key, label, image, None, f"{key}.{suffix}")


def test_good_samples():
    members = [("a.jpg", b"img"), ("a.cls", b" 3\n"), ("d.x/b.txt", b"-"), ("d.x/b.cls", b"0"), ("d.x/b.PNG", b"img")]
    assert read(members) == [good("a", 0, 3), good("d.x/b", 1, 0, suffix="PNG")]
    assert read(members, "none") == [good("a", 0), good("d.x/b", 1, suffix="PNG")]


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "Jpeg", "png", "webp", "WEBP", "gif", "BMP", "tif", "avif"])
def test_image_suffixes_in_any_case(suffix):
    assert read([(f"a.{suffix}", b"img")], "none") == [good("a", 0, suffix=suffix)]


def test_what_belongs_to_no_sample_is_passed_over():
    members = [("README", b"-"), ("._a.jpg", b"-"), ("d/.hidden", b"-"), ("__index__", b"-"), ("__m__/a.jpg", b"-")]
    numbering = SampleNumbering()
    assert read([*members, ("a.jpg", b"img"), ("d/", b"")], "none", numbering=numbering) == [good("a", 0)]
    assert numbering.ignored == len(members) + 1


A, B = [("a.jpg", b"img"), ("a.cls", b"1")], [("b.jpg", b"img"), ("b.cls", b"2")]


@pytest.mark.parametrize(
    ("bad", "key", "reason", "member"),
    [
        ([("x.cls", b"1")], "x", "missing image", "x.cls"),
        ([("x.b.txt", b"img"), ("x.cls", b"1")], "x", "missing image", "x.b.txt"),
        ([("x.b.jpg", b"1"), ("x.c.png", b"2"), ("x.cls", b"1")], "x", "x.b.jpg and x.c.png (image", "x.c.png"),
        ([("x.jpg", b"1"), ("x.a.cls", b"2"), ("x.b.cls", b"1")], "x", "x.a.cls and x.b.cls (label_", "x.b.cls"),
        ([("x.jpg", b""), ("x.cls", b"1")], "x", "empty image", "x.jpg"),
        ([("x.jpg", b"img"), ("x.png", b"img"), ("x.cls", b"1")], "x", "two image members", "x.png"),
        ([("x.jpg", b"img")], "x", "missing label: no cls member", "x.jpg"),
        ([("x.jpg", b"img"), ("x.cls", b" ")], "x", "missing label: it is empty", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"cat")], "x", "non-integer label 'cat'", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"1.5")], "x", "non-integer label '1.5'", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"1_0")], "x", "non-integer label", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"-1")], "x", "negative label -1", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"1000000")], "x", "label 1000000 is not below 32768", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"9" * 400)], "x", "label of more than 64 bits is not below", "x.cls"),
        ([("x.jpg", b"img"), ("x.cls", b"\xff\xfd")], "x", "label is not UTF-8", "x.cls"),
        ([("../../x.jpg", b"img"), ("../../x.cls", b"1")], "../../x", "key contains ..", "../../x.jpg"),
        ([("d/../x.jpg", b"img")], "d/../x", "key contains ..", "d/../x.jpg"),
        ([("..\\x.jpg", b"img")], None, None, None),
        ([("d\\..\\x.tif.txt", b"img")], "d\\", "missing image", "d\\..\\x.tif.txt"),
        ([("/etc/x.jpg", b"img"), ("/etc/x.cls", b"1")], "/etc/x", "absolute", "/etc/x.jpg"),
        ([("C:\\x.jpg", b"img")], "C:\\x", "absolute", "C:\\x.jpg"),
        ([("x\x1b[2J.jpg", b"img")], "x\\x1b[2J", "control character", "x\\x1b[2J.jpg"),
        ([("x\n.jpg", b"img")], "x\\n", "control character", "x\\n.jpg"),
        ([("x.jpg", b"img"), ("x.t\x7f", b"1")], "x", "control character", "x.t\\x7f"),
        ([("x\udcff.jpg", b"img")], "x\\udcff", "not UTF-8", "x\\udcff.jpg"),
        ([("k" * 5000 + ".jpg", b"img")], "k" * 400 + "…", "key of 5000 characters", "k" * 400 + "…"),
        ([("a.jpg", b"two"), ("a.cls", b"5")], "a", "duplicate key", "a.jpg"),
    ],
)
def test_left_out_with_reason_and_the_rest_goes_on(bad, key, reason, member):
    entries = read([*A, *B, *bad, ("z.jpg", b"img"), ("z.cls", b"3")])
    assert entries[:2] == [good("a", 0, 1), good("b", 1, 2)]
    assert entries[-1] == good("z", 2 if key is None else 3, 3)
    if key is not None:
        (entry,) = entries[2:-1]
        assert entry.row == 2 and entry.key == key and entry.member == member
        assert reason in entry.reason and entry.image is None and entry.label is None
        entry.key.encode(), entry.reason.encode(), entry.member.encode()


def test_contiguous_second_sample_of_a_key_leaves_the_first():
    entries = read([*A, ("a.jpg", b"two"), ("a.cls", b"5"), *B])
    assert entries[0] == good("a", 0, 1) and entries[2] == good("b", 2, 2)
    assert entries[1].row == 1 and "duplicate key" in entries[1].reason


def test_rows_do_not_depend_on_labels_or_contents():
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.cls", b"x"), *B, ("a.json", b"{"), ("c.cls", b"1"), ("d.jpg", b"")]
    rows = [[entry.row for entry in read(members, label)] for label in ("none", "cls", "json:x")]
    assert rows[0] == rows[1] == rows[2] == list(range(len(rows[0])))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_never_followed(kind):
    data = tar_of([("x.jpg", b""), ("x.cls", b"1"), *A], {"x.jpg": kind})
    assert "link" in read(data)[0].reason and read(data)[1] == good("a", 1, 1)


def test_an_absurdly_large_image_is_passed_over_not_read():
    entries = read([("x.jpg", b"i" * 1001), ("x.cls", b"1"), *A], max_image_bytes=1000)
    assert entries[0].reason == "image of 1001 bytes, more than 1000" and entries[1] == good("a", 1, 1)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b'{"y": 4}', 4),
        (b'{"y": "4"}', 4),
        (b'{"y": {"z": 5}}', "non-integer label \\(dict\\)"),
        (b'{"y": true}', "non-integer label True"),
        (b'{"y": 4.0}', 4),
        (b'{"y": "4.0"}', 4),
        (b'\xef\xbb\xbf{"y": 4}', 4),
        ('{"y": 4}'.encode("utf-16"), 4),
        (b'{"y": 4.5}', "non-integer label 4.5"),
        (b'{"y": 1e300}', "label of more than 64 bits is not below"),
        (b'{"y": null}', "missing label"),
        (b'{"x": 4}', "missing label: no field y"),
        (b"[1]", "missing label"),
        (b'{"y": -3}', "negative label -3"),
        (b'{"y": 1e400}', "non-integer label inf"),
        (b'{"y": 1' + b"0" * 5000 + b"}", "malformed json"),
        (b'{"y": 1' + b"0" * 50 + b"}", "is not below"),
        (b'{"y": 4', "malformed json"),
        (b"\xff\xfe\xfd", "malformed json"),
        (b"[" * 100_000, "malformed json"),
        (b"", "malformed json"),
    ],
)
def test_json_labels(record, expected):
    entry = read([("x.jpg", b"img"), ("x.json", record)], "json:y")[0]
    if isinstance(expected, int):
        assert entry == good("x", 0, expected)
    else:
        import re

        assert re.search(expected, entry.reason)


def test_nested_json_field_and_a_field_with_a_dot():
    source = LabelSource("json:meta.label")
    assert source.read(b'{"meta": {"label": 2}}') == 2
    assert source.read(b'{"meta.label": 3, "meta": {"label": 2}}') == 3
    with pytest.raises(ValueError, match="no field"):
        source.read(b'{"meta": [2]}')


def test_class_names():
    source = LabelSource("cls", ["cat", "dog"])
    assert [source.read(text) for text in (b"dog\n", b"cat", b"1")] == [1, 0, 1]
    with pytest.raises(ValueError, match="unknown class 'bird'"):
        source.read(b"bird")
    with pytest.raises(ValueError, match="not below 2"):
        source.read(b"2")
    digits = LabelSource("json:y", ["7", "3"])
    assert digits.read(b'{"y": "3"}') == 1
    with pytest.raises(ValueError, match="unknown class"):
        digits.read(b'{"y": "1"}')
    with pytest.raises(ValueError, match="unknown class"):
        digits.read(b'{"y": 1}')


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("class",), "label"),
        (("json",), "label"),
        (("json:",), "label"),
        (("cls:x",), "label"),
        (("cls", []), "classes"),
    ],
)
def test_label_source_refuses(arguments, field):
    with pytest.raises(UserError) as error:
        LabelSource(*arguments)
    assert error.value.field == field


def test_a_name_that_two_classes_have_is_told_with_its_lines():
    with pytest.raises(UserError, match="'crane' is the name in line 2 and in line 4"):
        LabelSource("cls", ["tench", "crane", "maillot", "crane"])


@pytest.mark.parametrize("text", [b"3", b"3.0", b" 3.\r\n", b"\xef\xbb\xbf3\r\n", "3\n".encode("utf-16"), b"+3.000"])
def test_a_whole_number_however_it_is_written(text):
    assert LabelSource("cls").read(text) == 3


PICTURE, OTHER = b"\xff\xd8image", b"other"


@pytest.mark.parametrize(
    ("members", "options", "image", "label"),
    [
        ([("x.input.jpg", PICTURE), ("x.output.cls", b"1")], {}, PICTURE, 1),  # webdataset's own idiom
        (
            [("x.seg.png", OTHER), ("x.jpg", PICTURE), ("x.cls", b"2")],
            {},
            PICTURE,
            2,
        ),  # a suffix of one part comes before all others
        ([("x.jpg", PICTURE), ("x.seg.png", OTHER), ("x.cls", b"2"), ("x.aux.cls", b"3")], {}, PICTURE, 2),
        ([("x.a.jpg", OTHER), ("x.B.jpg", PICTURE), ("x.cls", b"2")], {"image": plain_suffix(".b.JPG")}, PICTURE, 2),
        (
            [("x.jpg", OTHER), ("x.png", PICTURE), ("x.fine.cls", b"4"), ("x.cls", b"2")],
            {"image": "png", "label_member": "fine.cls"},
            PICTURE,
            4,
        ),
        (
            [("x.a.jpg", OTHER), ("x.b.jpg", OTHER), ("x.png", PICTURE), ("x.cls", b"2")],
            {},
            PICTURE,
            2,
        ),  # the two are no longer asked for
        ([("x.jpg", PICTURE), ("x.class.txt", b"5")], {"label_member": "class.txt"}, PICTURE, 5),
    ],
)
def test_which_members_are_image_and_label(members, options, image, label):
    (entry,) = read(members, **options)
    assert (entry.image, entry.label, entry.reason) == (image, label, None)


def test_members_that_stand_apart_are_told_as_such():
    numbering = SampleNumbering()
    members = [(f"{i}.png", b"img") for i in range(3)] + [(f"{i}.cls", b"1") for i in range(3)]
    entries = read([*members, ("0.png", b"img")], numbering=numbering)
    assert [e.reason.partition(":")[0] for e in entries] == ["missing label"] * 3 + ["members apart"] * 3 + [
        "duplicate key"
    ]
    assert numbering.apart == 3


@pytest.mark.parametrize(("start", "lost"), [(6, 4), (1, 9), (0, None)])
def test_a_rest_is_estimated_in_samples(start, lost):
    data = bytearray(tar_of([(f"{i}.jpg", b"i" * 1000) for i in range(10)]))
    step, size = 3 * BLOCK, 30 * BLOCK  # without what pads the end
    data[start * step : start * step + BLOCK] = b"x" * BLOCK
    numbering = SampleNumbering()
    entries = read(bytes(data), "none", numbering=numbering, size=size)
    assert len(entries) == start + 1 and entries[-1].row is None
    assert numbering.rest.samples == lost and 0 <= numbering.rest.bytes - (size - start * step) < BLOCK


CUT = tar_of([(f"{i:02d}.{s}", d) for i in range(6) for s, d in (("jpg", b"i" * (400 * i + 1)), ("cls", b"%d" % i))])


def ends_of_samples():
    """Byte after the last byte of each sample's last member."""
    with tarfile.open(fileobj=io.BytesIO(CUT)) as tar:
        return [member.offset_data + member.size for member in tar.getmembers()][1::2]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(CUT)), st.sampled_from(["cls", "none"]))
def test_a_cut_at_any_byte_keeps_what_was_whole(cut, label):
    entries = read(CUT[:cut], label)
    rows, rest = [e for e in entries if e.reason is None], [e for e in entries if e.reason is not None]
    ends = ends_of_samples()
    whole = sum(end <= cut for end in ends)
    # Without labels a sample whose image alone was read may stay: what else it had cannot be known.
    assert len(rows) == whole or (label == "none" and len(rows) == whole + 1)
    assert [e.row for e in rows] == list(range(len(rows)))
    with tarfile.open(fileobj=io.BytesIO(CUT)) as tar:
        between = {
            -(-(m.offset_data + m.size) // BLOCK) * BLOCK for m in tar.getmembers()
        }  # as written without an end mark
    if cut in between or cut > max(between):
        assert all(e.reason.startswith("missing label") for e in rest)
    else:
        (entry,) = rest
        assert entry.row is None and entry.key is None and "byte" in entry.reason


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(CUT) - 1), st.binary(min_size=1, max_size=600))
def test_any_bytes_anywhere_never_raise(start, junk):
    entries = read(CUT[:start] + junk + CUT[start + len(junk) :])
    numbered = [e.row for e in entries if e.row is not None]
    assert numbered == list(range(len(numbered)))
    assert sum(e.row is None for e in entries) <= 1


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1))
def test_printable_is_utf8_without_control_characters(text):
    shown = printable(text)
    assert shown.encode().decode() == shown and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
