"""`vico convert`: LLaMA weights between two layouts, adapters between two checkpoint formats."""

import argparse
import os
import time
from pathlib import Path

from vico.checkpoint import format
from vico.checkpoint.convert import convert_adapter
from vico.cli.parser import OneLineParser, path_argument
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.paths import exists, is_folder
from vico.model.weights import folders
from vico.model.weights.convert import Layout, convert_weights
from vico.model.weights.load import holds_weights
from vico.train.saved_run import read_for_evaluation

HELP = """Convert SOURCE, by what it is:
  LLaMA weights of Meta (consolidated.*.pth)    -> a folder of Hugging Face's (config.json,
                                                   safetensors)
  LLaMA weights of Hugging Face                 -> a folder of Meta's (params.json,
                                                   consolidated.*.pth)
  a checkpoint of ViCo's (folder, .safetensors) -> a .pth of the published code: {"model", "args"}
  a .pth of the published code                  -> .safetensors, for --resume
Memory holds one file of the target at a time. The tokenizer is not copied."""


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="vico convert",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=path_argument, help="of weights also: as --model of train"
    )
    parser.add_argument("target", metavar="TARGET", type=path_argument, help="must not exist yet")
    parser.add_argument(
        "--to", choices=("hf", "meta"), help="of weights: the layout (default: the other one)"
    )
    parser.add_argument(
        "--shards", type=int, help="of weights in Meta's layout: number of files (default: 1)"
    )
    parser.add_argument(
        "--llama_model_path",
        type=path_argument,
        default=folders.DEFAULT,
        help=f"folder with one folder per model (default: {folders.DEFAULT})",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    start = time.monotonic()
    folder = folders.model_folder(flags.llama_model_path, str(flags.source))
    source = folder if is_folder(folder) else flags.source
    description = convert(source, flags.target, flags.to, flags.shards)
    log.info(f"{flags.target}: {description}, in {time.monotonic() - start:.1f} s")
    return 0


def convert(source: Path, target: Path, to: Layout | None = None, shards: int | None = None) -> str:
    """Write `source`, converted, to `target`, which must not exist.

    `to` and `shards` are for LLaMA weights. Returns a description of what was done. Raises
    UserError or DiskError.
    """
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; name another target, or remove it")
    require_writable(target.parent, "the target's folder")
    if not exists(source):
        raise UserError(f"{source}: no such file or folder to convert")
    is_checkpoint = exists(source / format.STATE)
    if is_folder(source) and not is_checkpoint and holds_weights(source):
        return convert_weights(source, target, to, shards)
    if to is not None or shards is not None:
        raise UserError(f"{source}: holds no LLaMA weights, and --to and --shards are for those")
    checkpoint = read_for_evaluation(source)
    for note in checkpoint.notes:
        log.info(note)
    return convert_adapter(checkpoint, target)


if __name__ == "__main__":  # `python -m vico.cli.convert`, or this file
    from vico.cli.main import console

    console(command="convert")
