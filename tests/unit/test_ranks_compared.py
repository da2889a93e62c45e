"""What ranks compare before they train together, and how long they wait for each other's files."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch

from faults.emulated_ranks import EmulatedWorld, Exchange
from vico.checkpoint.format import Checkpoint, TrainState
from vico.distributed.launcher_env import host_name
from vico.io.output_dir import OutputDir
from vico.train import rank_consistency
from vico.train.config import RunConfig
from vico.train.rank_consistency import (
    require_same_code,
    require_same_files,
    require_same_inputs,
    require_same_start,
)


def worlds(size: int) -> list[EmulatedWorld]:
    first = EmulatedWorld(0, size, torch.device("cpu"), None, exchange=Exchange(size))
    return [dataclasses.replace(first, rank=rank) for rank in range(size)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], str]]:
    """(subject, values, remedy) of each comparison, none of which is made."""
    seen: list[tuple[str, dict[str, str], str]] = []
    monkeypatch.setattr(
        rank_consistency, "_require_same", lambda world, *values: seen.append(values)
    )
    return seen


def test_code_libraries_and_settings(compared: list[Any]) -> None:
    """Every module of the package, by its digest; bitsandbytes where it quantizes."""
    (world,) = worlds(1)
    require_same_code(world, {"seed": 1, "lr": None, "resume": Path("/x")})
    (code, own, remedy), flags = compared
    root = rank_consistency.PACKAGE
    modules = {f"vico/{path.relative_to(root)}" for path in root.rglob("*.py")}
    others = {"torch", "deepspeed", "numpy", "safetensors", "Python"}
    assert code == "code" and own.keys() == modules | others and len(modules) > 100
    assert (own["torch"], own["Python"]) == (torch.__version__, platform.python_version())
    digests = [own[name] for name in modules if not name.endswith("__init__.py")]
    assert {len(digest) for digest in digests} == {8} and len({*digests}) == len(digests)
    assert remedy == "bring all hosts to the same checkout and environment"
    values = {"--seed": "1", "--lr": "null", "--resume": '"/x"'}
    assert flags == ("settings", values, "give every rank the same flags")
    require_same_code(world, {"quantize": "nf4"})
    assert compared[2][1].keys() - own.keys() == {"bitsandbytes"}


def test_files_and_output_folders(compared: list[Any], tmp_path: Path) -> None:
    """Each file under its folder's name; the newest checkpoint, and args.json by its content."""
    (world,) = worlds(1)
    data, llama, out = tmp_path / "data", tmp_path / "llama", tmp_path / "out"
    names = ("data/nextqa/a.csv", "data/nextqa/b.txt", "llama/tiny/w.pth", "text.txt", "ds.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (llama / "tiny" / "folder").mkdir()
    config = RunConfig(
        model="tiny",
        llama_model_path=llama,
        data_path=data,
        output_dir=out,
        text=(tmp_path / "text.txt",),
        resume=tmp_path / "a.pth",
        deepspeed=str(tmp_path / "ds.json"),
    )
    require_same_files(world, config)
    (files, inputs, remedy), (checkpoints, outputs, of_outputs) = compared
    assert files == "files" and "use a folder that all hosts share" in remedy
    found = {name for name, said in inputs.items() if said != "No such file or directory"}
    text, recipe = f"{tmp_path.name}/text.txt", f"{tmp_path.name}/ds.json"
    assert found == {"nextqa/a.csv", "tiny/w.pth", text, recipe}
    absent = inputs.keys() - found
    assert f"{tmp_path.name}/a.pth" in absent and "llama/tokenizer.model" in absent
    assert inputs["nextqa/a.csv"].startswith(f"{len(names[0])} bytes, ")
    assert checkpoints == "checkpoints" and outputs == {str(out): "no checkpoint"}
    assert of_outputs == "--output_dir must be a folder that all hosts share"
    for step in (9, 30):
        (out / f"checkpoint-{step}").mkdir(parents=True)
    (out / "args.json").write_text("{}")
    state = rank_consistency._output_state(OutputDir(out))
    assert state == {
        str(out): "checkpoint-30",
        str(out / "args.json"): rank_consistency._fingerprint(out / "args.json"),
    }
    zero_2 = dataclasses.replace(config, deepspeed="auto", text=(), resume=None)
    require_same_files(world, zero_2)
    assert absent - compared[2][1].keys() == {f"{tmp_path.name}/a.pth"}
    assert found - compared[2][1].keys() == {text, recipe}


def test_starting_points(compared: list[Any]) -> None:
    (world,) = worlds(1)
    require_same_start(world, None, ["passed over: x"], {"train": 7})
    checkpoint = Checkpoint(Path("c"), {}, state=TrainState(step=4), digest="0123456789ab")
    require_same_start(world, checkpoint, ["passed over: x", "using c"], {"train": 7, "val": 2})
    require_same_inputs(world, {"backbone": "ab"})
    (start, new, remedy), (_, again, _), inputs = compared
    assert start == "starting points" and "remove or copy again what is damaged" in remedy
    assert new == {"start": "a new run", "train": "7"}
    assert again == {
        "start": "c (step 4, digest 01234567); passed over: x; using c",
        "train": "7",
        "val": "2",
    }
    remedy = "copy the files again, or use a folder that all hosts share"
    assert inputs == ("inputs", {"backbone": "ab"}, remedy)


def wait(configs: list[RunConfig]) -> None:
    with ThreadPoolExecutor(len(configs)) as pool:
        list(pool.map(rank_consistency._wait_until_visible, worlds(len(configs)), configs))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_a_folder_that_stays_invisible(
    tmp_path: Path, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """After a minute and a half the comparison itself refuses; the first such rank warns once."""
    configs = [RunConfig(output_dir=tmp_path / name) for name in ("a", "b", "b")]
    (tmp_path / "a" / "checkpoint-3").mkdir(parents=True)
    wait(configs)
    assert sorted(slept) == [0] * 3 + [1] * 3 * 90
    (warning,) = capsys.readouterr().err.splitlines()
    says = f"{host_name()} (2 of 3 ranks) does not see {tmp_path}/b/checkpoint-3 yet, which "
    assert says in warning and "waiting up to 90 s, as a network file system may lag" in warning


@pytest.mark.parametrize(("seconds", "warns"), [(5, False), (6, True)])
def test_a_short_wait_is_silent(
    seconds: int,
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For --resume too: it is there after so many seconds."""
    path, sleepers = tmp_path / "late.pth", list[int]()
    path.touch()
    look = rank_consistency.exists

    def sees(wanted: Path) -> bool:
        return look(wanted) and (wanted == path or sleepers.count(get_ident()) >= seconds)

    def sleep(duration: float) -> None:
        sleepers.extend([get_ident()] * int(duration))

    monkeypatch.setattr(rank_consistency, "exists", sees)
    monkeypatch.setattr(time, "sleep", sleep)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "late.pth").touch()
    out = tmp_path / "out"
    paths = (path, tmp_path / "b" / "late.pth")
    wait([RunConfig(output_dir=out, resume=resume) for resume in paths])
    assert len(sleepers) == 2 * seconds
    error = capsys.readouterr().err
    assert ("does not see" in error) == warns
    assert f"{paths[1]} yet" in error or not warns


def test_nobody_waits_without_need(tmp_path: Path, slept: list[float]) -> None:
    wait([RunConfig(output_dir=tmp_path)])
    wait([RunConfig(output_dir=tmp_path)] * 2)
    assert slept == []


def test_files_are_waited_for_before_they_are_compared(
    tmp_path: Path, compared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is restarted at once reads what it saved a moment ago."""
    out = tmp_path / "out"

    def sleep(seconds: float) -> None:
        (tmp_path / "other" / "checkpoint-3").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(time, "sleep", sleep)
    (out / "checkpoint-3").mkdir(parents=True)
    configs = [RunConfig(output_dir=path, data_path=out) for path in (out, tmp_path / "other")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(require_same_files, worlds(2), configs))
    states = [values for subject, values, _ in compared if subject == "checkpoints"]
    assert [[*state.values()] for state in states] == [["checkpoint-3"]] * 2


def test_how_much_of_a_file_is_looked_at(tmp_path: Path) -> None:
    """256 KiB at each end, however large it is."""
    end = 256 * 1024
    size, path = 3 * end, tmp_path / "a.pth"

    def look(changed: int) -> str:
        data = bytearray(size)
        data[changed] ^= 1
        path.write_bytes(data)
        return rank_consistency._fingerprint(path)

    unseen = look(size // 2)
    seen: Callable[[int], bool] = lambda place: look(place) != unseen  # noqa: E731
    assert [seen(end - 1), seen(end), seen(size - end - 1), seen(size - end)] == [
        True,
        False,
        False,
        True,
    ]


def test_values_that_json_cannot_hold_are_compared_as_texts(compared: list[Any]) -> None:
    (world,) = worlds(1)
    require_same_code(world, {"text": (Path("a"), Path("b"))})
    assert compared[1][1] == {"--text": json.dumps(["a", "b"])}


def test_files_are_those_of_all_flags(tmp_path: Path) -> None:
    """In the order of data sets, the model, the tokenizer, texts; a recipe by its path alone."""
    for folder in ("nextqa", "star"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.json").touch()
    paths: dict[str, Any] = dict(data_path=tmp_path, llama_model_path=tmp_path / "llama")
    config = RunConfig(**paths, features="f.pth", captions="c.json")
    files = rank_consistency._input_files(config)
    own = [config.captions_of("nextqa"), config.features_of("nextqa")]
    assert None not in own
    assert files[:3] == [tmp_path / "nextqa" / "nextqa.json", *own]
    assert {path.parent for path in files[3:]} == {config.tokenizer_folder}
    both = rank_consistency._input_files(RunConfig(**paths, dataset="nextqa,star"))
    assert tmp_path / "star" / "star.json" in both and len(both) == len(files) - 1
