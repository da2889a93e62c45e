"""Small files that claim much: refused before they take the memory or the time."""

import contextlib
import io
import os
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.payloads import as_old, as_zip, of_size
from support.errors import refusal
from support.feature_files import save
from support.processes import Processes, base_environment, run_command, start_command
from vico.checkpoint import published
from vico.cli import flags
from vico.cli.main import main
from vico.data.features import Features
from vico.data.readers.rows import read_csv
from vico.io.output_dir import OutputDir
from vico.io.safe_load import load_tensors
from vico.model.config import FEATURE_WIDTH, LlamaConfig
from vico.model.weights.meta import read_llama_config
from vico.train.run_log import Logs, gaps

SECONDS = 5.0  # each takes a fraction of one, and took minutes
HUGE = 6_000_000_000
SIZED = ["builtins.bytearray", "__builtin__.bytearray", "torch.Tensor", "torch.ByteTensor"]
SIZED += ["torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.HalfTensor"]


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """4 GB more than now, and some seconds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), hard))
    started = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("name", SIZED)
def test_pickles_that_ask_for_memory(tmp_path: Path, name: str) -> None:
    """Refused by what they call, also for a size that would fit."""
    path = tmp_path / "a.pth"
    for size in (HUGE, 10):
        for file in (as_zip(of_size(name, size)), as_old(of_size(name, size))):
            path.write_bytes(file)
            message = refusal(load_tensors, path, "the file", allow_old_format=True)
            assert f"the file builds {name} of any size; save it again as plain" in message


@pytest.mark.parametrize("named_before", [False, True])
def test_a_class_that_is_called_from_the_memo(tmp_path: Path, named_before: bool) -> None:
    """Also where the class was named before as torch.save names it, which calls nothing."""
    number = b"\x8a\x08" + HUGE.to_bytes(8, "little")
    start = b"\x80\x02(ctorch.storage\nUntypedStorage\nq\x01X\x01\x00\x00\x000X\x01\x00\x00\x00c"
    naming = b"K\x00tQ" if named_before else b""
    (tmp_path / "a.pth").write_bytes(as_zip(start + naming + b"h\x01" + number + b"\x85R."))
    assert "builds torch.storage.UntypedStorage" in refusal(load_tensors, tmp_path / "a.pth", "it")


def test_tensors_with_attributes(tmp_path: Path) -> None:
    """torch.save names the class Tensor for them, which is not a call either."""
    clips = {name: torch.full((2, FEATURE_WIDTH), i) for i, name in enumerate("abc", 1)}
    clips = {name: clip.float().requires_grad_(name == "c") for name, clip in clips.items()}
    for clip in clips.values():
        clip.fps, clip.video = 25.0, {"size": (1, [2])}  # type: ignore[attr-defined]
    clips["d"] = torch.nn.Parameter(clips["a"])
    features = Features(save(tmp_path / "a.pth", clips))
    for name, value in zip("abcd", (1, 2, 3, 1), strict=True):
        assert features.sample(name, None, 2).unique().tolist() == [value]
    save(tmp_path / "b.pth", clips, _use_new_zipfile_serialization=False)
    loaded = load_tensors(tmp_path / "b.pth", "it", allow_old_format=True)
    assert torch.equal(loaded["b"], clips["b"])


WITH_ATTRIBUTES = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
REBUILD, TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nTensor\n"
NUMBER = b"\x8a\x08" + HUGE.to_bytes(8, "little")


@pytest.mark.parametrize(
    "calls",
    [
        b"(" + TENSOR + TENSOR + NUMBER + b"\x85}tR.",  # the function is the class
        b"(" + REBUILD + TENSOR + NUMBER + b"\x85R}}tR.",  # it is called before the arguments end
        b"(" + REBUILD + TENSOR + b"(" + NUMBER + b"tR}}tR.",
        b"(" + REBUILD + TENSOR + b"q\x01))}t0h\x01" + NUMBER + b"\x85R.",  # and from the memo
        b"(" + REBUILD + TENSOR + NUMBER + b"\x85b))tR.",
    ],
)
def test_the_class_of_tensors_with_attributes_is_not_called(tmp_path: Path, calls: bytes) -> None:
    for file in (as_zip(WITH_ATTRIBUTES + calls), as_old(WITH_ATTRIBUTES + calls)):
        (tmp_path / "a.pth").write_bytes(file)
        message = refusal(load_tensors, tmp_path / "a.pth", "it", allow_old_format=True)
        assert "builds torch.Tensor of any size" in message


def test_an_old_format_too_large_for_memory(tmp_path: Path) -> None:
    """A sparse file. It was called damaged."""
    path = save(tmp_path / "a.pth", {"model": {}}, _use_new_zipfile_serialization=False)
    os.truncate(path, (2 << 30) + 1)
    message = refusal(published.read, path)
    assert "old format, which cannot be memory-mapped, and has 2,147,483,649 bytes" in message
    assert "more than 2,147,483,648; convert it: python -c " in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.bfloat16])
def test_newer_types_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch.save names UntypedStorage for them, which is not a call."""
    values = {name: torch.ones(3, 4).to(dtype) for name in ("a", "bytearray", "Tensor")}
    loaded = load_tensors(save(tmp_path / "a.pth", values), "the file")
    assert all(torch.equal(loaded[name].float(), values[name].float()) for name in values)


def test_features_of_stride_0(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.pth", {"v": torch.ones(1, FEATURE_WIDTH).expand(2_000_000, FEATURE_WIDTH)}
    )
    assert "holds a tensor [2000000, 768] that repeats fewer numbers" in refusal(Features, path)
    options = {"_use_new_zipfile_serialization": False}
    save(path, {"v": torch.ones(1, FEATURE_WIDTH).expand(2_000_000, FEATURE_WIDTH)}, **options)
    assert "repeats fewer numbers" in refusal(load_tensors, path, "it", allow_old_format=True)


def test_many_views_of_one_tensor(tmp_path: Path) -> None:
    frames = torch.ones(4, FEATURE_WIDTH)
    path = save(tmp_path / "a.pth", {f"{i}": frames[:] for i in range(1000)})
    assert "bytes of numbers and holds 12,288; save copies" in refusal(Features, path)
    save(path, {f"{i}": torch.ones(64, FEATURE_WIDTH)[i : i + 1] for i in range(64)})
    assert len(Features(path)) == 64


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_of_more_than_its_bytes(tmp_path: Path, compression: int) -> None:
    """Deflated, 2 GB take some MB; stored, many parts can be the same bytes."""
    path, buffer = tmp_path / "a.pth", io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(200 << 20))
        if compression == zipfile.ZIP_STORED:
            entry = archive.getinfo("archive/data/0")
            archive.filelist += [entry] * 100
    path.write_bytes(buffer.getvalue())
    expected = "packed again" if compression == zipfile.ZIP_DEFLATED else "claims parts of "
    assert expected in refusal(published.read, path)


RECIPES = {
    "60,000 keys": ("".join(f"key{i}: 1\n" for i in range(60_000)), "where at most 32,768"),
    "a long one": ("lr: 1\n" * 5000, "'lr' appears twice"),
    "merges": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "holds a merge ('<<'); write its flags out",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_take_minutes(tmp_path: Path, name: str) -> None:
    content, part = RECIPES[name]
    (tmp_path / "r.yaml").write_text(content)
    message = refusal(flags.parse, ["--config", str(tmp_path / "r.yaml")], "vico train", "")
    assert part in message


def test_a_table_of_60_000_columns(tmp_path: Path) -> None:
    columns = ",".join(f"c{i}" for i in range(60_000))
    (tmp_path / "a.csv").write_text(f"{columns}\n{columns}\n")
    assert "column 'x' missing" in refusal(read_csv, tmp_path / "a.csv", "it", ["x"], {})
    rows = read_csv(tmp_path / "a.csv", "it", ["c1"], {})
    assert len(rows) == 1


def test_a_model_of_a_million_layers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = f'"dim": {LlamaConfig(64, 1, 1, 1).dim}, "n_heads": 4'
    (tmp_path / "params.json").write_text(f'{{{shape}, "n_layers": 1000000}}')
    message = refusal(read_llama_config, tmp_path / "params.json")
    assert "'n_layers' is 1000000 and must be a whole number from 1 to 1000" in message
    with contextlib.suppress(SystemExit):
        assert main(["plan", "--model", str(tmp_path), "--gpu", "H100"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_logs_of_many_steps(tmp_path: Path) -> None:
    """What a log lacks is counted without a walk over all steps."""
    logs = Logs([{"step": step} for step in (3, 4, 9)], [{"step": 4}])
    lines = gaps(OutputDir(tmp_path), logs, 10**15, False, 4, from_start=False)
    assert "lacks 999999999999995 of 999999999999998 step(s)" in lines[0]
    lines = gaps(OutputDir(tmp_path), logs, 8, False, 4, from_start=True)
    assert "lacks 6 of 8 step(s)" in lines[0] and "lacks 1 of 2 epoch(s)" in lines[1]


# Limits of the process


def test_few_descriptors_are_one_line(tmp_path: Path) -> None:
    def limited(soft: int, hard: int) -> Processes:
        code = "import resource, sys; from vico.cli.main import main; "
        code += f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        code += "c = main(['plan', '--gpu', 'H100']); "
        code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)); sys.exit(c)"
        return run_command([sys.executable, "-c", code], tmp_path, seconds=60)

    few = limited(32, 32)
    (line,) = few.stderrs[0].splitlines()
    assert few.codes == [2] and line.startswith("vico: error: this process may open 32 files at a")
    raised = limited(32, 2000)
    assert raised.codes == [0] and "(1024, 2000)" in raised.stdouts[0]


def test_a_long_tmpdir(tmp_path: Path) -> None:
    """The server of the data workers starts, and its socket is bound where its name fits."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = "from multiprocessing import forkserver as f, util; "
    code += "from vico.data import dataloader as d; d.PRELOADED.clear(); d.start_forkserver(); "
    code += "print(f._forkserver._forkserver_address)"
    environment = base_environment(TMPDIR=str(folder))
    run = start_command([sys.executable, "-c", code], tmp_path, environment)
    assert run.wait(60) == [0], run.output
    assert run.stdouts[0].startswith("/tmp/pymp-")
