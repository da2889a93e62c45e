"""Whether all ranks run the same thing: the same code on the same settings and files. Else they train on, in silence, to nothing.

Hosts differ where a checkout was pulled on one of them only, a flag comes from a host's own file, a data set was copied
half, or the output folder is not shared.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from vico.checkpoint.format import step_folders, step_of
from vico.distributed.launcher_env import host_name
from vico.distributed.world import World
from vico.errors import UserError
from vico.io.atomic import require_file
from vico.train.config import RunConfig, is_path

END_BYTES = (
    1 << 18
)  # read at each end of a large file: .pth files are zip archives, whose end has the checksums of all of it
DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".pth")
NUM_SHOWN = 3
SECONDS_UNTIL_SEEN = 90  # NFS keeps what it knows of a folder for up to 60 (acdirmax)
SECONDS_OF_SILENCE = 5  # then who waits says for what


def require_same_code(world: World, settings: Mapping[str, Any]) -> None:
    """Raises UserError, on every rank, naming the hosts whose code, libraries or settings are not rank 0's."""
    here = Path(__file__).resolve().parents[1]
    code = {f"vico/{path.relative_to(here)}": _digest(path) for path in sorted(here.rglob("*.py"))}
    code |= {name: _version(name) for name in ("torch", "deepspeed", "numpy", "safetensors")} | {
        "Python": platform.python_version()
    }
    if "quantize" in settings:
        code["bitsandbytes"] = _version("bitsandbytes")  # another one may pack otherwise
    _require_same(world, "code", code, "bring all hosts to the same checkout and environment")
    _require_same(
        world,
        "settings",
        {f"--{k}": json.dumps(v, default=str) for k, v in settings.items()},
        "give every rank the same flags",
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def require_same_files(world: World, config: RunConfig) -> None:
    """Raises UserError, on every rank, naming the hosts whose input files, or whose output folder, are not rank 0's."""
    _wait_until_seen(world, config)
    files = {f"{path.parent.name}/{path.name}": _fingerprint(path) for path in _inputs(config)}
    _require_same(world, "files", files, "copy them anew, or name a folder that all hosts share")
    out = config.output_dir
    stands = {str(out): next((folder.name for folder in step_folders(out)), "no checkpoint")}
    if os.path.exists(out / "args.json"):
        stands[str(out / "args.json")] = _fingerprint(out / "args.json")
    _require_same(
        world, "checkpoints", stands, "--output_dir must be a folder that all hosts share"
    )


def _wait_until_seen(world: World, config: RunConfig) -> None:
    """Until every rank sees what any of them sees, or the time is over: a network file system shows a host late what another one
    has renamed, and a run that goes on meets what it saved a moment ago. As many exchanges on every rank."""
    for second in range(SECONDS_UNTIL_SEEN + 1 if world.size > 1 else 0):
        seen_RN = world.gather(torch.tensor(_seen(config)))
        late_R = (seen_RN < seen_RN.amax(dim=0)).any(dim=1)
        if not late_R.any():
            return
        what = " or ".join(_names(config, seen_RN))
        if second == SECONDS_OF_SILENCE and world.rank == int(late_R.nonzero()[0]):
            waits = f"{host_name()} (rank {world.rank}; {int(late_R.sum())} of {world.size} ranks) does not see {what} yet, which another host sees"
            patience = f"waiting up to {SECONDS_UNTIL_SEEN} s, as a network file system may be late"
            print(f"vico: {waits}; {patience}", file=sys.stderr, flush=True)
        world.set_phase(f"waiting until all ranks see {what}")
        time.sleep(min(1, SECONDS_UNTIL_SEEN - second))


def _seen(config: RunConfig) -> list[int]:
    """What this rank sees of that which runs write and go on from: a step, and whether files are there."""
    newest = next(map(step_of, step_folders(config.output_dir)), -1)
    return [
        newest,
        os.path.exists(config.output_dir / "args.json"),
        config.resume is not None and os.path.exists(config.resume),
    ]


def _names(config: RunConfig, seen_RN: torch.Tensor) -> list[str]:
    """The things of `_seen` that not all ranks see alike."""
    most = seen_RN.amax(dim=0)
    names = [
        str(config.output_dir / f"checkpoint-{int(most[0])}"),
        str(config.output_dir / "args.json"),
        str(config.resume),
    ]
    return [
        name
        for name, differs in zip(names, (seen_RN != most).any(dim=0).tolist(), strict=True)
        if differs
    ]


def _inputs(config: RunConfig) -> list[Path]:
    folders = (config.dataset_folder, config.llama_model_path / config.model)
    found = [
        path
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    inputs = [
        path
        for path in found
        if path.suffix in DATA_SUFFIXES or path.parent != config.dataset_folder
    ]
    named = [config.llama_model_path / "tokenizer.model", config.captions, config.resume]
    if is_path(config.deepspeed):
        named.append(Path(config.deepspeed))
    return [*inputs, *(path for path in named if path is not None)]


def _fingerprint(path: Path) -> str:
    """Size and a digest of both ends; what cannot be read is as good as any other difference."""
    try:
        if path.is_dir():
            return "a folder"
        require_file(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(END_BYTES))
            if size > END_BYTES:
                file.seek(max(END_BYTES, size - END_BYTES))
                digest.update(file.read(END_BYTES))
    except OSError as problem:
        return str(problem.strerror)
    return f"{size} bytes, {digest.hexdigest()[:8]}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _require_same(world: World, what: str, mine: dict[str, str], remedy: str) -> None:
    """A short digest travels from every rank; the whole only when two differ."""
    if world.size == 1:
        return
    digest = int.from_bytes(
        hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()[:7], "big"
    )
    if world.max(digest) == -world.max(-digest):
        return
    words: list[tuple[str, dict[str, str]] | None] = [None] * world.size
    torch_dist.all_gather_object(words, (host_name(), mine), group=world.host_group)
    told = [word for word in words if word is not None]
    (first_host, first), others = (
        told[0],
        [(rank, *word) for rank, word in enumerate(told) if word[1] != told[0][1]],
    )
    rank, _, theirs = others[0]
    names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
    shown = [
        f"{name}: {first.get(name, 'none')} -> {theirs.get(name, 'none')}"
        for name in names[:NUM_SHOWN]
    ]
    raise UserError(
        f"the ranks have different {what}: {', '.join(dict.fromkeys(word[1] for word in others))} ({len(others)} rank(s), the first is {rank}) "
        f"against rank 0 on {first_host}: {'; '.join(shown)}{'; ...' if len(names) > NUM_SHOWN else ''}; {remedy}"
    )
