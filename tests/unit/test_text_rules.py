"""What is no text, JSON or YAML that somebody meant, and where it is wrong, to the word."""

from pathlib import Path

import pytest

from support.errors import refusal
from vico.io import text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "A: is empty; the table should be there: fetch it again"),
        (b"\xef\xbb\xbf \n", "A: is empty; the table should be there: fetch it again"),
        (
            b"\xff\xfea\0",
            "A: is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8",
        ),
        (
            b"abc\0d\0",
            "a:1: a NUL byte at offset 3, so this is UTF-16 or UTF-32; save A as UTF-8 "
            "text or fetch it again",
        ),
        (
            b"\0a",
            "a:1: a NUL byte at offset 0, so this is UTF-16 or UTF-32; save A as UTF-8 "
            "text or fetch it again",
        ),
        (b"a\nbc\0", "a:2: a NUL byte at offset 4; save A as UTF-8 text or fetch it again"),
        (b"a\n\nb\xe9c", "a:3: not UTF-8 (byte 0xe9 at offset 4); save A as UTF-8"),
        (b"\xef\xbb\xbfa\n\xe9", "a:2: not UTF-8 (byte 0xe9 at offset 5); save A as UTF-8"),
        (b"\x1f\x8b12", "A: the table is gzip-compressed (4 bytes), not text; unpack it"),
        (
            b"PK\x03\x04 x",
            "A: the table is a zip or workbook archive (6 bytes), not text; unpack it",
        ),
        (
            b"PK\x03\x04 xl/",
            "A: the table is an Excel workbook (8 bytes), not text; save it as UTF-8 text",
        ),
        (b"PAR1", "A: the table is a parquet file (4 bytes), not text; save it as UTF-8 text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert refusal(text.read_text, path, "the table").replace(str(path), "A") == said


@pytest.mark.parametrize(
    ("written", "place", "fault"),
    [
        ('{"a": 1,\n "b": }', "6: column 7", "Expecting value"),
        (
            '{"a": 1,\n',
            "6: column 1",
            "Expecting property name enclosed in double quotes, the text is cut off here",
        ),
        ('{"a": "b', "5: column 7", "Unterminated string starting at, the text is cut off here"),
        ('{"a": NaN}', "5: column 7", "NaN is not JSON"),
        ('{"a": ["NaN"],\n"b": -Infinity}', "6: column 6", "-Infinity is not JSON"),
        ('{"a": 1,\n\n "a" : 2}', "7: column 2", "key 'a' appears twice in one object"),
        (
            '[{"a": {"a": [1]}}, {"a": 1, "b": ["a"], "\\u0061": 1}]',
            "5: column 42",
            "key 'a' appears twice in one object",
        ),
    ],
)
def test_where_json_is_wrong(written: str, place: str, fault: str) -> None:
    line, column = place.split(": ")
    message = refusal(text.parse_json, written, Path("/d/a.json"), 5)
    said = f"a.json:{line}: {column}: {fault}; correct /d/a.json or fetch it again"
    assert message == said


def test_kinds_of_json() -> None:
    values = ({}, [], "", True, None, 1, 2.5)
    kinds = ("an object", "a list", "a text", "a truth value", "null", "a number", "a number")
    assert tuple(map(text.json_kind, values)) == kinds
    said = "a.json:1: column 1: a list where a JSON object is expected; correct /d/a.json"
    assert refusal(text.as_object, [], Path("/d/a.json")) == said


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n[\n{"a": 2}\n')
    records, faults = text.read_json_lines(
        path, "it", lambda line, number: (number, text.parse_json(line, path, number))
    )
    assert records == [(1, {"a": 1}), (5, {"a": 2})]
    (fault,) = map(str, faults)
    assert fault.startswith("a.jsonl:4: column 2: Expecting value, the text is cut off here")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a: 1\nb: 2\na: 3", "P: 'a' appears twice; keep one"),
        ("a:\n- b: {c: 1, c: 2}", "P: 'c' appears twice; keep one"),
        ("a: &x {b: 1}\nc: {<<: *x}", "P: holds a merge ('<<'); write its flags out"),
        ("- 1", "P: must hold lines 'flag: value'"),
        ("a: [", "P: not valid YAML: "),
        (
            "a: " + "x" * 32766,
            "P: 32,769 characters, where at most 32,768 are expected; keep the "
            "lines 'flag: value' alone",
        ),
    ],
    ids=["twice", "twice below", "merge", "list", "open", "long"],
)
def test_what_nobody_means_in_yaml(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(written)
    assert refusal(text.read_yaml_object, path, "it", "P", "flag").startswith(said)


def test_yaml_that_is_meant(tmp_path: Path) -> None:
    """An alias is no second key. What is written is read back, whatever its letters."""
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {b: 1}\nc: [*x, *x]\nd: " + "x" * 32740)
    assert len(path.read_text()) == 32768
    assert text.read_yaml_object(path, "it")["c"] == [{"b": 1}, {"b": 1}]
    values = {"z": "\u0085 \u00e9 'x': #", "a": [1, None], "b": {"c": "1"}}
    for width in (None, 20):
        path.write_text(text.yaml_text(values, width))
        read = text.read_yaml_object(path, "it")
        assert read == values and list(read) == list(values)
    assert text.yaml_text({"b": "\u00e9", "a": 1}) == "b: \u00e9\na: 1\n"
