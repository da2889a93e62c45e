"""Whether all ranks run the same thing: the same code on the same settings and files. Else they train on, in silence, to nothing.

Hosts differ where a checkout was pulled on one of them only, a flag comes from a host's own file, a data set was copied
half, or the output folder is not shared.
"""

import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from vico.checkpoint import step_folders
from vico.config import RunConfig, is_path
from vico.dist import World
from vico.errors import UserError
from vico.files import require_file

END_BYTES = 1 << 18  # read at each end of a large file: .pth files are zip archives, whose end has the checksums of all of it
DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".pth")
NUM_SHOWN = 3
SECONDS_TO_BE_SEEN, SECONDS_OF_SILENCE = 90.0, 5.0


def require_same_code(world: World, settings: Mapping[str, Any]) -> None:
    """Raises UserError, on every rank, naming the hosts whose code, libraries or settings are not rank 0's."""
    here = Path(__file__).resolve().parent
    code = {f"vico/{path.relative_to(here)}": _digest(path) for path in sorted(here.rglob("*.py"))}
    code |= {name: _version(name) for name in ("torch", "deepspeed", "numpy", "safetensors")} | {"Python": platform.python_version()}
    if "quantize" in settings:
        code["bitsandbytes"] = _version("bitsandbytes")  # another one may pack otherwise
    _require_same(world, "code", code, "bring all hosts to the same checkout and environment")
    _require_same(world, "settings", {f"--{k}": json.dumps(v, default=str) for k, v in settings.items()}, "give every rank the same flags")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def require_same_files(world: World, config: RunConfig) -> None:
    """Raises UserError, on every rank, naming the hosts whose input files, or whose output folder, are not rank 0's."""
    files = {f"{path.parent.name}/{path.name}": _fingerprint(path) for path in _inputs(config)}
    _require_same(world, "files", files, "copy them anew, or name a folder that all hosts share")
    _await_newest(world, config.output_dir)
    stands = {str(config.output_dir): next((folder.name for folder in step_folders(config.output_dir)), "no checkpoint")}
    _require_same(world, "checkpoints", stands, "--output_dir must be a folder that all hosts share")


def _await_newest(world: World, output_dir: Path) -> None:
    """Network file systems remember for up to a minute what a folder held: the newest checkpoint can come into sight late."""

    def seen() -> int:
        return max((int(folder.name.partition("-")[2]) for folder in step_folders(output_dir)), default=-1)

    newest, began, told = world.most(seen()), time.monotonic(), False
    while seen() < newest and (waited := time.monotonic() - began) < SECONDS_TO_BE_SEEN:
        world.doing(f"waiting for {output_dir}/checkpoint-{newest} to come into sight")
        if waited > SECONDS_OF_SILENCE and not told:
            told = True
            what = f"{output_dir}/checkpoint-{newest}, which another host sees, to come into sight on {_host()}"
            print(f"vico: waiting up to {SECONDS_TO_BE_SEEN:.0f} s for {what}", file=sys.stderr, flush=True)
        time.sleep(0.25)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _inputs(config: RunConfig) -> list[Path]:
    folders = (config.dataset_folder, config.llama_model_path / config.model)
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    inputs = [path for path in found if path.suffix in DATA_SUFFIXES or path.parent != config.dataset_folder]
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
    digest = int.from_bytes(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()[:7], "big")
    if world.most(digest) == -world.most(-digest):
        return
    words: list[tuple[str, dict[str, str]] | None] = [None] * world.size
    torch_dist.all_gather_object(words, (_host(), mine), group=world.host_group)
    told = [word for word in words if word is not None]
    (first_host, first), others = told[0], [(rank, *word) for rank, word in enumerate(told) if word[1] != told[0][1]]
    rank, _, theirs = others[0]
    names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
    shown = [f"{name}: {first.get(name, 'none')} -> {theirs.get(name, 'none')}" for name in names[:NUM_SHOWN]]
    raise UserError(
        f"the ranks have different {what}: {', '.join(dict.fromkeys(word[1] for word in others))} ({len(others)} rank(s), the first is {rank}) "
        f"against rank 0 on {first_host}: {'; '.join(shown)}{'; ...' if len(names) > NUM_SHOWN else ''}; {remedy}"
    )
