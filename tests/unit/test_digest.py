"""Digests: the values that checkpoints and caches store."""

from pathlib import Path

from vico.io.digest import digest_bytes, digest_chunks, digest_files, digest_json, digest_text

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_one_value_for_one_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "bc").write_bytes(b"bc")
    assert digest_bytes(b"abc") == digest_text("abc") == ABC
    assert digest_chunks([b"a", memoryview(b"bc")]) == ABC
    assert digest_files([tmp_path / "a", tmp_path / "bc"]) == ABC
    assert digest_bytes(b"abc", length=8) == ABC[:8]


def test_json_keys_are_sorted() -> None:
    assert digest_json({"b": 1, "a": [2]}) == digest_text('{"a": [2], "b": 1}')
    assert digest_json({"b": 1, "a": 2}, sort_keys=False) == digest_text('{"b": 1, "a": 2}')
