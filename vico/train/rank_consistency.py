"""Whether all ranks use the same code, settings and files: if not, training is silently wrong.

Hosts differ where a checkout was updated on one of them only, a flag comes from a file of the host,
a dataset was copied partly, or the output folder is not shared.
"""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vico.checkpoint.format import Checkpoint
from vico.data.tokenizer import ALL_FILES as TOKENIZER_FILES
from vico.distributed.launcher_env import host_name
from vico.distributed.world import World
from vico.errors import UserError
from vico.io import log
from vico.io.digest import SHORT_LENGTH, digest_chunks, digest_files, digest_json
from vico.io.output_dir import OutputDir, step_of
from vico.io.paths import entries, exists, is_file, open_to_read
from vico.train.bounds import is_path
from vico.train.config import RunConfig

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "deepspeed", "numpy", "safetensors")
DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".pth")
# Read at each end of a large file. The end of a .pth file, a zip archive, has checksums of it all.
END_BYTES = 1 << 18
MAX_DIFFERENCES_SHOWN = 3
VISIBILITY_SECONDS = 90  # an NFS client may cache a folder for 60 s (acdirmax)
SILENT_SECONDS = 5  # a rank that waits longer logs for what it waits


def require_same_code(world: World, settings: Mapping[str, Any]) -> None:
    """Compare code, library versions and settings over the ranks. A collective of all ranks.

    Raises UserError, the same on every rank, naming the hosts that differ from rank 0's.
    """
    code = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        code[f"vico/{path.relative_to(PACKAGE)}"] = digest_files([path], SHORT_LENGTH)
    libraries = [*LIBRARIES]
    if "quantize" in settings:
        libraries.append("bitsandbytes")  # another version may quantize differently
    versions = {name: _installed_version(name) for name in libraries}
    versions["Python"] = platform.python_version()
    remedy = "bring all hosts to the same checkout and environment"
    _require_same(world, "code", {**code, **versions}, remedy)
    flags = {f"--{key}": json.dumps(value, default=str) for key, value in settings.items()}
    _require_same(world, "settings", flags, "give every rank the same flags")


def _installed_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def require_same_files(world: World, config: RunConfig) -> None:
    """Compare the input files and the output folder over the ranks. A collective of all ranks.

    Raises UserError, the same on every rank, naming the hosts that differ from rank 0's.
    """
    _wait_until_visible(world, config)
    with world.raise_together():
        files = _input_files(config)
        outputs = _output_state(OutputDir(config.output_dir))
    inputs = {f"{path.parent.name}/{path.name}": _fingerprint(path) for path in files}
    _require_same(world, "files", inputs, "copy them again, or use a folder that all hosts share")
    remedy = "--output_dir must be a folder that all hosts share"
    _require_same(world, "checkpoints", outputs, remedy)


def require_same_start(
    world: World, checkpoint: Checkpoint | None, notes: Sequence[str], counts: Mapping[str, int]
) -> None:
    """Compare what each rank has decided from the files it sees. A collective of all ranks.

    Where a rank finds the newest checkpoint damaged, it would go on from an older one, and the
    others would not know. `notes`: why a rank passed over others; `counts`: of questions, by name.
    Raises UserError, the same on every rank, naming the hosts that differ from rank 0's.
    """
    start = "a new run"
    if checkpoint is not None:
        position = f"step {checkpoint.state.step}, digest {checkpoint.digest[:SHORT_LENGTH]}"
        start = "; ".join([f"{checkpoint.path} ({position})", *notes])
    own = {"start": start, **{name: str(count) for name, count in counts.items()}}
    remedy = (
        "all ranks must read the same checkpoint and questions: use folders that all hosts share, "
        "and remove or copy again what is damaged"
    )
    _require_same(world, "starting points", own, remedy)


def require_same_inputs(world: World, fingerprints: Mapping[str, str]) -> None:
    """Compare all that each rank has read, whole. A collective of all ranks.

    Raises UserError, the same on every rank, naming the hosts that differ from rank 0's.
    """
    remedy = "copy the files again, or use a folder that all hosts share"
    _require_same(world, "inputs", dict(fingerprints), remedy)


def _output_state(output_dir: OutputDir) -> dict[str, str]:
    folders = output_dir.step_checkpoints()
    state = {str(output_dir): folders[0].name if folders else "no checkpoint"}
    if output_dir.has_run():
        state[str(output_dir.args)] = _fingerprint(output_dir.args)
    return state


def _wait_until_visible(world: World, config: RunConfig) -> None:
    """Wait until every rank sees the output files that any rank sees, or the time is over.

    A network file system shows a rename to other hosts late, and a run that is restarted at once
    reads what it saved a moment ago. Every rank takes part in the same number of exchanges.
    """
    if world.size == 1:
        return
    for second in range(VISIBILITY_SECONDS + 1):
        with world.raise_together():
            visible_N = torch.tensor(_visible_outputs(config))
        visible_RN = world.gather(visible_N)
        is_late_R = (visible_RN < visible_RN.amax(dim=0)).any(dim=1)
        if not is_late_R.any():
            return
        names = " or ".join(_late_outputs(config, visible_RN))
        first_late_rank = int(is_late_R.nonzero()[0])
        if second == SILENT_SECONDS and world.rank == first_late_rank:
            late = f"{host_name()} ({int(is_late_R.sum())} of {world.size} ranks)"
            log.warning(
                f"{late} does not see {names} yet, which another host sees; waiting up to "
                f"{VISIBILITY_SECONDS} s, as a network file system may lag"
            )
        world.set_phase(f"waiting until all ranks see {names}")
        time.sleep(min(1, VISIBILITY_SECONDS - second))


def _visible_outputs(config: RunConfig) -> list[int]:
    """What this rank sees of the files that a run resumes from.

    The newest step (-1: none), whether args.json exists, and whether --resume's path exists.
    """
    output_dir = OutputDir(config.output_dir)
    folders = output_dir.step_checkpoints()
    newest = step_of(folders[0]) if folders else None
    return [
        -1 if newest is None else newest,
        output_dir.has_run(),
        config.resume is not None and exists(config.resume),
    ]


def _late_outputs(config: RunConfig, visible_RN: torch.Tensor) -> list[str]:
    """The paths behind `_visible_outputs` that only some ranks see."""
    newest_N = visible_RN.amax(dim=0)
    output_dir = OutputDir(config.output_dir)
    paths = [output_dir.checkpoint(int(newest_N[0])), output_dir.args, config.resume]
    is_late_N = (visible_RN != newest_N).any(dim=0)
    return [str(path) for path, is_late in zip(paths, is_late_N.tolist(), strict=True) if is_late]


def _input_files(config: RunConfig) -> list[Path]:
    """The files that training reads, as far as they exist: a first look, before they are opened.

    `require_same_inputs` and `require_same_start` compare all that was read, whole.
    """
    files: list[Path | None] = []
    for name in config.dataset_names:
        found = entries(config.folder_of(name))
        files += [path for path in found if path.suffix in DATA_SUFFIXES and is_file(path)]
        files += [config.captions_of(name), config.features_of(name)]
    files += [path for path in entries(config.model_folder) if is_file(path)]
    files += [config.tokenizer_folder / name for name in TOKENIZER_FILES]
    files += [*config.text, config.resume]
    if is_path(config.deepspeed):
        files.append(Path(config.deepspeed))
    return [path for path in files if path is not None]


def _fingerprint(path: Path) -> str:
    """Size and digest of both ends; for an unreadable file, why it cannot be read."""
    try:
        if path.is_dir():
            return "a folder"
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            ends = [file.read(END_BYTES)]
            if size > END_BYTES:
                file.seek(max(END_BYTES, size - END_BYTES))
                ends.append(file.read(END_BYTES))
    except OSError as error:
        return str(error.strerror)
    return f"{size} bytes, {digest_chunks(ends, SHORT_LENGTH)}"


def _require_same(world: World, subject: str, own: dict[str, str], remedy: str) -> None:
    """Raises UserError where `own` is not the same on all ranks, on every rank."""
    if world.size == 1:
        return
    # 56 bits fit an int64. Only the digests are exchanged unless two of them differ.
    digest = int(digest_json(own, length=14), 16)
    largest, smallest = world.max(digest), -world.max(-digest)
    if largest == smallest:
        return
    reports: list[tuple[str, dict[str, str]]] = world.gather_objects((host_name(), own))
    host_of_rank_0, values_of_rank_0 = reports[0]
    differing = [rank for rank, (_, values) in enumerate(reports) if values != values_of_rank_0]
    hosts = dict.fromkeys(reports[rank][0] for rank in differing)
    _, values = reports[differing[0]]
    error = UserError(
        f"the ranks have different {subject}: {', '.join(hosts)} ({len(differing)} rank(s), "
        f"the first is {differing[0]}) against rank 0 on {host_of_rank_0}: "
        f"{_describe_differences(values_of_rank_0, values)}; {remedy}"
    )
    error.of_all_ranks = True
    raise error


def _describe_differences(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """For example "--seed: 0 -> 1; --lr: none -> 0.1"."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    shown = [
        f"{name}: {first.get(name, 'none')} -> {second.get(name, 'none')}"
        for name in names[:MAX_DIFFERENCES_SHOWN]
    ]
    if len(names) > MAX_DIFFERENCES_SHOWN:
        shown.append("...")
    return "; ".join(shown)
