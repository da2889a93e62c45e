"""Numbers in torch files: numpy's, those of the old format, shared and damaged ones."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.errors import refusal
from vico.io import old_torch_format, safe_load
from vico.io.numpy_arrays import ALLOWED_CLASSES, NUMBERS, Array
from vico.io.numpy_scalars import DType, scalar

# ---- numpy's numbers in torch files -------------------------------------------------------------

VALUES = {"b": [True, False, True, True], "f": [0.5, -2.0, 3.0, 4.0], "i": [1, -2, 3, 100]}


@pytest.mark.parametrize("code", NUMBERS)
@pytest.mark.parametrize("order", "<>")
def test_numpy_numbers(tmp_path: Path, code: str, order: str) -> None:
    """Arrays of both layouts and single numbers, of every kind and byte order."""
    values = VALUES.get(code[0], [1, 2, 3, 200])
    rows = np.array(values, order + code).reshape(2, 2)
    saved = {"rows": rows, "columns": np.asfortranarray(rows), "one": rows[1, 1]}
    torch.save(saved, tmp_path / "a.pth")
    content = safe_load.load_tensors(tmp_path / "a.pth", "it", ALLOWED_CLASSES)
    for name in ("rows", "columns"):
        tensor = content[name].tensor()
        assert tensor.tolist() == [values[:2], values[2:]]
        assert tensor.dtype == torch.from_numpy(rows.astype(code)).dtype
    assert content["one"] == values[3] and type(content["one"]) is type(values[3])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([1j]), "a numpy array of type 'c16'"),
        (np.array(["abc"]), "a numpy array of type 'U3'"),
        (np.array([None, 1]), "a numpy array of type 'O8'"),
    ],
)
def test_numpy_arrays_of_other_kinds(tmp_path: Path, array: Any, said: str) -> None:
    torch.save({"a": array}, tmp_path / "a.pth")
    (found,) = safe_load.load_tensors(tmp_path / "a.pth", "it", ALLOWED_CLASSES).values()
    assert found.tensor() is None and str(found) == said


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ((1, (2, 2), DType("f4"), False, bytes(15)), "of another size than it has numbers"),
        ((1, (2, 2), DType("f4"), False, bytes(17)), "of another size than it has numbers"),
        ((1, (-2, -2), DType("f4"), False, bytes(16)), "of another size than it has numbers"),
        ((1, (True, 4), DType("f4"), False, bytes(16)), "of another size than it has numbers"),
        ((1, (4,), DType("x" * 99), False, bytes(16)), f"of type '{'x' * 20}'"),
        ((1, (4,), DType(7), False, bytes(16)), "of type '7'"),
        ((1, (4,), "f4", False, bytes(16)), "damaged"),
        ((1, (4,), DType("f4"), False), "damaged"),
        (None, "damaged"),
    ],
)
def test_damaged_numpy_arrays(state: Any, said: str) -> None:
    array = Array()
    array.__setstate__(state)
    assert array.tensor() is None
    assert str(array) == ("a damaged numpy array" if said == "damaged" else f"a numpy array {said}")


def test_an_empty_numpy_array() -> None:
    array = Array()
    array.__setstate__((1, (0, 3), DType("f4"), False, b""))
    assert array.tensor().shape == (0, 3)


def test_numpy_scalars_of_other_kinds() -> None:
    """A text or a date is none; a number of too few or too many bytes is damage."""
    assert scalar(DType("f8"), bytes(8)) == 0.0
    for code in ("M8", "S3", "O8", "c16", 7):
        assert scalar(DType(code), bytes(8)) is None
    assert scalar("f8", bytes(8)) is None and scalar(DType("f8"), "x") is None
    for size in (7, 9):
        with pytest.raises(ValueError, match=f"a number of 8 bytes has {size}"):
            scalar(DType("f8"), bytes(size))
    dtype = DType("i2")
    dtype.__setstate__((3, ">"))
    assert scalar(dtype, b"\x01\x02") == 0x102
    dtype = DType("i2")
    for state in (None, (3,), (3, "<"), (3, "|"), (3, "=")):
        dtype.__setstate__(state)
        assert scalar(dtype, b"\x01\x02") == 0x201


# ---- torch files --------------------------------------------------------------------------------


def test_the_old_format_holds_what_it_claims(tmp_path: Path) -> None:
    """Up to the last byte of the numbers; views share theirs."""
    path, numbers = tmp_path / "a.pth", torch.arange(100, dtype=torch.uint8)
    saved = {"a": numbers, "view": numbers[3:5], "b": torch.zeros(7, dtype=torch.uint8)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert old_torch_format.find_fault(data) is None
    lengths = 2 * 8  # of the storages, before their numbers
    assert old_torch_format.find_fault(data[:-lengths]) is None, "torch says that it is cut off"
    said = "claims 107 numbers that are not all among its 106 bytes of them; fetch or copy it again"
    assert old_torch_format.find_fault(data[: -lengths - 1]) == said


def test_downloads_that_went_wrong() -> None:
    """By how they begin, in either case and behind blanks or a byte order mark."""
    page = "an HTML page (5,000 bytes), most likely a failed download; fetch it again"
    for head in (b"<!DOCTYPE html>", b"\xef\xbb\xbf \n<HTML lang", b"<head>", b"<?xml version"):
        assert safe_load.failed_download(head, 5000) == page
    pointer = "a git-lfs pointer (131 bytes), not the file itself; run 'git lfs pull' or fetch it"
    assert safe_load.failed_download(b"version https://git-lfs.github.com/", 131) == pointer
    for head in (b"", b"PK\x03\x04", b"{}", b"x <html", b"version 2"):
        assert safe_load.failed_download(head, 5000) is None


def test_numbers_are_shared_up_to_a_limit(tmp_path: Path) -> None:
    """Sixteen tensors of the same numbers are tied weights; more are a claim on memory."""
    numbers, path = torch.arange(100.0), tmp_path / "a.pth"
    torch.save([numbers[:] for _ in range(16)], path)
    assert len(safe_load.load_tensors(path, "it")) == 16
    torch.save([numbers[:] for _ in range(17)], path)
    said = "claims 6,800 bytes of numbers and holds 400; save copies of the tensors"
    assert refusal(safe_load.load_tensors, path, "it") == f"{path}: it {said}"


def test_a_changed_number_is_seen(tmp_path: Path) -> None:
    """By the sum that torch.save wrote; each storage is read once."""
    path, saved = tmp_path / "a.pth", {"a": torch.arange(500.0), "b": torch.ones(9)}
    torch.save({**saved, "view": saved["a"][7:]}, path)
    content = safe_load.load_tensors(path, "it")
    sums = safe_load.StoredChecksums(path, "it")
    for name, tensor in content.items():
        sums.verify(name, tensor)
    content["b"].fill_(2)
    sums.verify("b", content["b"])  # it is known
    sums = safe_load.StoredChecksums(path, "it")
    sums.verify("a", content["a"])
    damaged = "is cut off or damaged; fetch or copy it again and compare the sizes"
    message = refusal(sums.verify, "tensor b", content["b"])
    assert message == f"{path}: it {damaged} (wrong checksum of tensor b)"
    data = path.read_bytes()
    place = data.index(saved["a"].numpy().tobytes())
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    assert safe_load.load_tensors(path, "it")["a"][0] != 0
    message = refusal(safe_load.load_tensors, path, "it", verify_checksums=True)
    assert re.search(r"compare the sizes \(wrong checksum of its part 'a/data/\d'\)$", message)


def test_files_without_checksums_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(500.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    content = safe_load.load_tensors(path, "it")
    safe_load.StoredChecksums(path, "it").verify("a", content["a"] + 1)


def test_which_tensors_hold_numbers() -> None:
    numbers = torch.ones(2, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert safe_load.is_float_tensor(numbers.to(dtype))
    others = [numbers.to(torch.float8_e4m3fn), numbers.int(), numbers.bool(), numbers.to_sparse()]
    for value in (*others, numbers.to("meta"), [1.0], None, numbers.numpy()):
        assert not safe_load.is_float_tensor(value)
