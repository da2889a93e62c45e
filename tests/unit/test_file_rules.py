"""Small rules of files and of what is said about them, as tables: limits, names, and words."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.errors import refusal
from vico.errors import InUseError, TrainingError
from vico.io import failpoints, file_cache, log, paths, streams
from vico.io.input_files import InputFiles
from vico.io.output_dir import LOCK, OutputDir, _owner

# ---- results that are remembered ----------------------------------------------------------------


@pytest.fixture
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vico" / "checked.json"


def test_the_cache_keeps_the_latest_results(cache_file: Path) -> None:
    """200 of them, and one that is made again counts as new."""
    cache = file_cache.FileCache()
    for number in range(200):
        cache.put(str(number), number)
    assert cache.get("7") is None and not cache_file.exists(), "before all ranks agree"
    cache.flush()
    cache.save("0", "again")
    cache.save("200", 200)
    kept = file_cache.FileCache()
    found = [kept.get(name) for name in ("0", "1", "2", "199", "200")]
    assert found == ["again", None, 2, 199, 200]


def test_what_the_cache_passes_over(cache_file: Path) -> None:
    """No key, nothing new, and a file that somebody edited."""
    cache = file_cache.FileCache()
    cache.put(None, 1)
    cache.save(None, 1)
    cache.flush()
    assert cache.get(None) is None and not cache_file.exists()
    cache.put("a", 1)
    cache.flush()
    content = json.loads(cache_file.read_text("utf-8"))
    cache_file.unlink()
    cache.flush()
    assert not cache_file.exists(), "it was written once"
    cache_file.write_text(json.dumps(content), "utf-8")
    assert file_cache.FileCache().get("a") == 1
    assert file_cache.FileCache(reread=True).get("a") is None
    file_cache.FileCache(reread=True).save("b", 2)
    assert file_cache.FileCache().get("a") == 1, "others' results stay"
    cache_file.write_text(json.dumps({**content, "entries": {"a": 2}}), "utf-8")
    assert file_cache.FileCache().get("a") is None


def test_keys_of_results(tmp_path: Path) -> None:
    """Of the name, each part in its order, and nothing that is not known."""
    keys = [
        file_cache.cache_key("a", "b", 1),
        file_cache.cache_key("a", 1, "b"),
        file_cache.cache_key("b", "b", 1),
        file_cache.cache_key("a", "b1"),
        file_cache.cache_key("a"),
    ]
    assert None not in keys and len(set(keys)) == len(keys)
    assert file_cache.cache_key("a", tmp_path, 1) == file_cache.cache_key("a", str(tmp_path), "1")
    assert file_cache.cache_key("a", "b", None) is None


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    for folder, expected in (("/c", "/c"), ("c", "/h/.cache"), ("", "/h/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert file_cache._path() == Path(expected) / "vico" / "checked.json"


def test_young_files_have_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within two seconds a file may be written twice under the same times."""
    path = tmp_path / "a"
    path.write_text("abc")
    status = path.stat()
    written = status.st_ctime_ns / 1e9
    expected = f"{path} 3 {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    for seconds, stamp in ((0.0, None), (1.99, None), (2.0, expected), (2.01, expected)):
        monkeypatch.setattr("time.time", lambda seconds=seconds: written + seconds)
        assert file_cache.file_stamp(path) == stamp
    assert file_cache.file_stamp(tmp_path / "none") is None


# ---- files that change under a run --------------------------------------------------------------


def change(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "longer":
        path.write_text("x" * 1234, "utf-8")
    else:
        other = path.with_name("other")
        other.write_text("xyz")
        other.replace(path)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("gone", "is gone (No such file or directory)"),
        ("longer", "changed during the run, from 3 to 1,234 bytes"),
        ("another", "changed during the run: another file of the same size lies there"),
    ],
)
def test_changed_inputs(tmp_path: Path, how: str, said: str) -> None:
    """What has been read and is watched no more may change."""
    paths_ = [tmp_path / "a", tmp_path / "b"]
    for path in paths_:
        path.write_text("abc")
    files = InputFiles([*paths_, tmp_path / "none"])
    files.compare_by(paths_, lambda _: True)
    assert files.stamp(tmp_path / "none") is None and files.stamp(paths_[0]) is not None
    change(paths_[1], how)
    with pytest.raises(TrainingError) as caught:
        files.check_unchanged()
    assert str(caught.value) == (
        f"{paths_[1]}: {said}; nothing is saved of what came after; put the file back and "
        "start again, and leave the file alone while a run reads it"
    )
    files.watch_only(paths_[:1])
    files.check_unchanged()
    assert files.stamp(paths_[1]) is None


# ---- the folder of a run ------------------------------------------------------------------------


def test_names_of_results() -> None:
    out = OutputDir(Path("o"))
    names = [out.predictions("val"), out.predictions("test", ["a", "b"]), out.captions("val")]
    expected = ["predictions_val.jsonl", "predictions_a+b_test.jsonl", "captions_val.jsonl"]
    assert [path.name for path in names] == expected
    assert out.checkpoint(12) == Path("o/checkpoint-12") and str(out) == "o"


@pytest.mark.parametrize(
    ("written", "step"),
    [
        ('{"step": 7}', 7),
        ('{"step": true}', None),
        ('{"step": "7"}', None),
        ("{}", None),
        ("[7]", None),
        ("", None),
        (None, None),
    ],
)
def test_the_hint_of_the_latest_step(tmp_path: Path, written: str | None, step: int | None) -> None:
    if written is not None:
        (tmp_path / "latest.json").write_text(written)
    assert OutputDir(tmp_path).latest_step() == step


def test_only_folders_are_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-", "checkpoint-3b", "a-checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("")
    names = [folder.name for folder in OutputDir(tmp_path).step_checkpoints()]
    assert names == ["checkpoint-10", "checkpoint-2"]


def test_which_run_a_folder_holds(tmp_path: Path) -> None:
    out = OutputDir(tmp_path)
    assert not out.has_run()
    for saved in ({"run": "a", "resume": None}, {"run": None}, {"lr": 1}):
        out.args.write_text(json.dumps(saved))
        assert out.has_run() and out.read_args() == saved
    for name in ("run", "resume"):
        out.args.write_text(json.dumps({name: 7}))
        said = f"{out.args}: '{name}' is 7, not a text; correct it, or choose another --output_dir"
        assert refusal(out.read_args) == f"{said}: it is unknown which run this folder holds"


def test_the_owner_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"process {os.getpid()} on \S+ {since}\n", _owner())
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert re.fullmatch(rf"process {os.getpid()} on \S+ {since}, SLURM job 41\n", _owner())


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and the run goes on."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    out = OutputDir(tmp_path / "out")
    said = "cannot be locked (No locks available); make sure that no second run uses it"
    assert out.lock() == [f"{out}: {said}"]
    assert out.lock() == [] and (tmp_path / "out" / LOCK).read_bytes() == b""


@pytest.mark.parametrize("owner", ["", "process 7 on h", "x" * 300])
def test_a_folder_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    """By the one who has written its name, of which 200 letters are shown."""
    (tmp_path / LOCK).write_text(owner)

    def refuse(*_: int) -> None:
        raise BlockingIOError(errno.EAGAIN, "locked")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.lockf", refuse)
        with pytest.raises(InUseError) as caught:
            OutputDir(tmp_path).claim()
    by = owner[:200] or "another run"
    remedy = "wait for it, or choose another --output_dir"
    assert str(caught.value) == f"{tmp_path}: in use by {by}; {remedy}"
    (tmp_path / ".a.vico-tmp").mkdir()
    notes = OutputDir(tmp_path).claim()
    assert notes == [f"{tmp_path}: a run was killed while it wrote; .a.vico-tmp removed"]
    assert OutputDir(tmp_path).claim() == []
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert paths.read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, where at most 4 are expected"):
        paths.read_bytes(tmp_path / "a", 4)
    paths.append_text(tmp_path / "a", "6\u00e9")
    assert (tmp_path / "a").read_bytes() == b"123456\xc3\xa9"
    assert paths.exists(tmp_path / "a") and paths.is_file(tmp_path / "a")
    assert not paths.is_folder(tmp_path / "a") and not paths.exists(tmp_path / ("x" * 300))
    names = [path.name for path in paths.entries(tmp_path)]
    assert names == ["a"] and paths.entries(tmp_path, "b*") == paths.entries(tmp_path / "a") == []


# ---- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (12059, "3 h 20 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert log.duration(seconds) == words


def test_lines_of_the_log(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks above 0 name themselves where something is wrong."""
    for rank in ("0", "2"):
        monkeypatch.setenv("RANK", rank)
        for say in (log.info, log.warning, log.error):
            say("100 %s")
    log.fields({"a": 1, "b": "two\n  lines"})
    written = capfd.readouterr()
    assert written.out == "100 %s\n100 %s\na: 1\nb: two\n  lines\n"
    lines = ["100 %s", "error: 100 %s", "[rank 2] 100 %s", "error: 100 %s"]
    assert written.err == "".join(f"vico: {line}\n" for line in lines)


def test_progress_is_printed_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ten seconds, on the main rank; the watchdog hears each."""
    now, phases = [100.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    main, other = (log.ProgressLog(phases.append, is_main) for is_main in (True, False))
    said = []
    for now[0] in (105.0, 109.9, 110.0, 119.9, 120.0, 125.0):
        said.append((now[0], main(f"at {now[0]}"), other("x")))
    assert [time for time, printed, _ in said if printed] == [110.0, 120.0]
    assert not any(also for _, _, also in said) and phases.count("x") == 6
    assert phases[::2] == [f"at {time}" for time, _, _ in said]
    assert capfd.readouterr().out == "at 110.0\nat 120.0\n"


# ---- output that is lost ------------------------------------------------------------------------


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> streams._LostOutput:
    fresh = streams._LostOutput()
    monkeypatch.setattr(streams, "_lost", fresh)
    return fresh


def test_the_end_of_what_is_lost_is_kept(lost: streams._LostOutput, tmp_path: Path) -> None:
    """64 KiB before there is a folder."""
    lost.add(b"ab" + b"x" * 65_530)
    lost.add(b"12345")
    streams.keep_lost_output(tmp_path / "output.txt")
    assert (tmp_path / "output.txt").read_bytes() == b"b" + b"x" * 65_530 + b"12345"


def test_a_loss_is_what_no_file_has(lost: streams._LostOutput, tmp_path: Path) -> None:
    """A reader that has gone wanted no more."""
    assert streams.loss() is None
    lost.reason = OSError(errno.EPIPE, "Broken pipe")
    assert streams.loss() is None
    lost.reason = OSError(errno.ENOSPC, "No space left on device")
    assert streams.loss() == "No space left on device"
    streams.keep_lost_output(tmp_path / "output.txt")
    assert streams.loss() is None
    assert streams.descriptor_for_stacks() == 2 and not streams.is_lost(None)


def test_only_the_process_streams_are_replaced() -> None:
    with open(os.devnull, "w", encoding="utf-8") as other:
        assert streams._guarded(other, 1) is other
    made = streams._guarded(None, 2)
    assert (made.encoding, made.errors, made.line_buffering) == ("utf-8", "backslashreplace", True)
    assert made.fileno() == 2 and not streams.is_lost(made)


# ---- failpoints ---------------------------------------------------------------------------------


@pytest.fixture
def armed() -> Iterator[Callable[[str | None], None]]:
    yield failpoints.arm
    failpoints.arm(None)


def test_failpoints(
    armed: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At the second time that rank 1 is there, and not again."""
    armed("a:b@2#1=raise OSError")
    for rank, point, acts in (
        ("0", "a:b", False),
        ("1", "a:b", False),
        ("1", "a", False),
        ("1", "a:b", True),
        ("1", "a:b", False),
    ):
        monkeypatch.setenv("RANK", rank)
        if acts:
            with pytest.raises(OSError, match=r"^failpoint a:b$"):
                failpoints.reached(point)
        else:
            failpoints.reached(point)
    assert capfd.readouterr().err == "vico: failpoint a:b\n"
    slept = list[float]()
    monkeypatch.setattr("time.sleep", slept.append)
    armed("c=sleep 2.5")
    failpoints.reached("c")
    armed(None)
    failpoints.reached("c")
    assert slept == [2.5]
