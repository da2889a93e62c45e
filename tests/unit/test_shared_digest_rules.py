"""How ranks divide the reading of large files, in which rounds, and what is not read again."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from faults.emulated_ranks import ALONE, EmulatedWorld, Exchange
from vico.checkpoint.fingerprint import TensorSet
from vico.errors import UserError
from vico.io.input_files import InputFiles
from vico.train import shared_digests
from vico.train.shared_digests import _digest_in_rounds, _share

SIZES = st.lists(st.integers(0, 50), max_size=12)


def tensors_of(count: int, paths: Sequence[Path] = (), verify: Any = None) -> TensorSet:
    """t0, t1, ... of one number each, in one group."""
    names = [f"t{i}" for i in range(count)]

    def read(name: str) -> list[Tensor]:
        return [torch.tensor([float(name[1:])])]

    check = verify or (lambda name: None)
    num_bytes = dict.fromkeys(names, 4)
    return TensorSet("weights", [*paths], num_bytes, read, check, {"group": names})


# ---- shares --------------------------------------------------------------------------------------


@given(sizes=SIZES, num_readers=st.integers(1, 6))
def test_shares_are_neighbours_of_about_equal_size(sizes: list[int], num_readers: int) -> None:
    """Each tensor is read once, and no reader takes more than its part and one tensor."""
    num_bytes = {f"t{i}": size for i, size in enumerate(sizes)}
    shares = [_share(num_bytes, position, num_readers) for position in range(num_readers)]
    some = [name for share in shares for name in share]
    empty = [name for name, size in num_bytes.items() if size == 0]
    assert [name for name in some if name not in empty] == [
        name for name in num_bytes if name not in empty
    ]
    part = sum(sizes) / num_readers
    for share in shares:
        assert sum(num_bytes[name] for name in share) < part + max(sizes, default=0) + 1


def test_shares_by_hand() -> None:
    """A tensor is read by whom its first byte belongs to."""
    num_bytes = {"a": 4, "b": 2, "c": 2, "d": 4}
    assert [_share(num_bytes, i, 3) for i in range(3)] == [["a"], ["b", "c"], ["d"]]
    assert [_share(num_bytes, i, 2) for i in range(2)] == [["a", "b"], ["c", "d"]]
    assert _share(num_bytes, 0, 1) == ["a", "b", "c", "d"]
    assert _share({}, 0, 2) == []


# ---- rounds --------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds four seconds more; one tensor at a time."""
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(shared_digests, "BATCH_BYTES", 4)


def test_rounds_end_after_ten_seconds(ticking: None) -> None:
    """What is known comes first, then what three looks at the clock allow, then the rest."""
    tensors = tensors_of(8)
    names = [f"t{i}" for i in range(8)]
    rounds = list(_digest_in_rounds(tensors, names, {"t1": "known", "x": "other"}, 1))
    assert rounds[0] == {"t1": "known"}
    assert [[*new] for new in rounds[1:]] == [["t0", "t2", "t3"], ["t4", "t5", "t6"], ["t7"]]
    digests = {name: digest for new in rounds for name, digest in new.items()}
    assert digests == {name: tensors.digest(name) for name in names} | {"t1": "known"}


def test_rounds_of_a_reader_without_a_share(ticking: None) -> None:
    assert list(_digest_in_rounds(tensors_of(2), [], {"t0": "known"}, 1)) == []
    all_known = _digest_in_rounds(tensors_of(1), ["t0"], {"t0": "known"}, 1)
    assert list(all_known) == [{"t0": "known"}]
    assert shared_digests.ROUND_SECONDS == 10.0 and shared_digests.MAX_THREADS == 8


# ---- what is kept and what is read ---------------------------------------------------------------


class Cache:
    """Of one host; counts its writes to the disk."""

    def __init__(self) -> None:
        self.entries: dict[Any, Any] = {}
        self.flushes = 0

    def get(self, key: Any) -> Any:
        return self.entries.get(key)

    def put(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_digests, "cache_key", lambda *_: "key")
    monkeypatch.setattr(shared_digests, "file_stamp", lambda path: None)


def take(
    caches: list[Cache], paths: list[Path], read: list[tuple[int, str]], verify: bool = False
) -> list[dict[str, str]]:
    """What each of several ranks gets; `read` notes which rank reads what. Rank r has paths[r]."""
    size = len(caches)
    first = EmulatedWorld(0, size, torch.device("cpu"), None, exchange=Exchange(size))

    def work(rank: int) -> dict[str, str]:
        note: Callable[[str], None] = lambda name: read.append((rank, name))  # noqa: E731
        tensors = tensors_of(4, [paths[rank]], note)
        files = InputFiles([paths[rank]])
        world = replace(first, rank=rank)
        return shared_digests.take([tensors], files, cast(Any, caches[rank]), world, verify)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files that are not the same one."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    return [tmp_path / "a", tmp_path / "b"]


def test_ranks_with_one_file_divide_it(paths: list[Path], fixed_key: None) -> None:
    """And both keep the result. Where one has it already, nobody reads."""
    a, _ = paths
    caches, read = [Cache(), Cache()], list[tuple[int, str]]()
    results = take(caches, [a, a], read)
    assert results == [tensors_of(4).fingerprints(digests_of(4))] * 2
    assert sorted(read) == [(0, "t0"), (0, "t1"), (1, "t2"), (1, "t3")]
    kept = {"key": {"fingerprints": results[0], "digests": {}}}
    assert caches[0].entries == caches[1].entries == kept
    read.clear()
    assert take([Cache(), caches[1]], [a, a], read) == results and read == []


def test_ranks_with_other_files_read_their_own(paths: list[Path], fixed_key: None) -> None:
    """What one has kept of its file says nothing about the other's."""
    caches, read = [Cache(), Cache()], list[tuple[int, str]]()
    results = take(caches, paths, read)
    assert len(read) == 8 and results[0] == results[1]
    read.clear()
    assert take([caches[0], Cache()], paths, read) == results
    assert sorted(read) == [(1, f"t{i}") for i in range(4)]


def digests_of(count: int) -> dict[str, str]:
    tensors = tensors_of(count)
    return {name: tensors.digest(name) for name in tensors.num_bytes}


def test_what_a_round_has_read_is_kept(
    paths: list[Path], fixed_key: None, ticking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk, by the first rank of a host, when a later round fails."""
    cache = Cache()

    def cut(name: str) -> None:
        if name == "t3":
            raise UserError("wrong checksum")

    monkeypatch.setattr(shared_digests, "_num_threads", lambda world: 1)
    tensors = tensors_of(4, [paths[0]], cut)
    files = InputFiles([paths[0]])
    with pytest.raises(UserError, match="wrong checksum"):
        shared_digests.take([tensors], files, cast(Any, cache), ALONE, False)
    digests = digests_of(4)
    del digests["t3"]
    assert cache.entries == {"key": {"fingerprints": None, "digests": digests}}
    assert cache.flushes == 2, "of what was known, nothing, and of the first round"
    read: list[str] = []
    again = tensors_of(4, [paths[0]], read.append)
    found = shared_digests.take([again], files, cast(Any, cache), ALONE, False)
    assert read == ["t3"] and found == again.fingerprints(digests_of(4))


# ---- a file whose entry has changed --------------------------------------------------------------


class Watched(EmulatedWorld):
    """A world whose phase is remembered."""

    phases: ClassVar[list[str]] = ["training"]

    @property
    def phase(self) -> str:
        return self.phases[-1]

    def set_phase(self, phase: str) -> None:
        self.phases.append(phase)


def test_tensors_are_compared_again(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, on this rank; the run goes on where they are the same, with its phase."""
    world = Watched(0, 1, torch.device("cpu"), None)
    world.phases[:] = ["training"]
    tensors, path = tensors_of(3), Path("/data/f.pth")
    expected = {"other": "x", **tensors.fingerprints(digests_of(3))}
    assert shared_digests._are_as_digested([tensors], expected, world, path)
    assert capsys.readouterr().out == (
        "/data/f.pth: its entry changed during the run (chmod, ln), and its content did not; the "
        "run goes on\n"
    )
    assert world.phases[1:] == [
        "comparing the weights again: 0 tensors",
        "comparing the weights again: 3 tensors",
        "training",
    ]
    assert not shared_digests._are_as_digested([tensors], {"group": "0"}, world, path)
    assert not shared_digests._are_as_digested([tensors, tensors_of(2)], expected, world, path)

    def wrong(name: str) -> None:
        raise UserError("wrong checksum")

    damaged = tensors_of(3, verify=wrong)
    assert not shared_digests._are_as_digested([damaged], expected, world, path)
    assert capsys.readouterr().out == ""


def test_progress_is_shown_by_rank_0_of_much(capsys: pytest.CaptureFixture[str]) -> None:
    """From two gigabytes on."""
    for size, shown in ((1_999_999_999, False), (2_000_000_000, True)):
        tensors = cast(TensorSet, SimpleNamespace(num_bytes={"a": size}, what="backbone"))
        shared_digests._ProgressLines(tensors, ALONE, 1).show({"a": "x"})
        assert ("2.0 of 2.0 GB read in 0.0 min" in capsys.readouterr().out) == shown
