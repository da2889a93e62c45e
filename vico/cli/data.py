"""`vico data`: what is done to the files of a data set."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vico.cli.parser import OneLineParser, path_argument
from vico.data.convert import convert
from vico.data.datasets import find_dataset
from vico.data.pack import pack
from vico.data.readers.spec import SPLITS
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.paths import exists

CONVERT = """Write a data set in the general schema: a line of JSON per question, and dataset.yaml.
Every question is read back and compared. Features and caption files are not copied."""
PACK = """Write features of any kind anew as one file that can be memory-mapped, with the same
numbers. Memory holds one video, and what cannot be mapped of the source; for a .pth file the disk
holds the numbers twice meanwhile."""


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="vico data", description="Work on the files of a data set.", allow_abbrev=False
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=OneLineParser)
    _add_convert(actions)
    _add_pack(actions)
    flags = parser.parse_args(argv)
    code: int = flags.run(flags)
    return code


def _add_convert(actions: Any) -> None:
    parser = _add_action(actions, "convert", CONVERT, _convert)
    parser.add_argument("name", metavar="NAME", help="nextqa, star, tvqa, intentqa or a folder")
    parser.add_argument("--data_path", type=path_argument, default=Path("data"))
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder of the new data set"
    )
    parser.add_argument("--splits", help="train,val,test (default: those that are there)")
    parser.add_argument("--sub", action="store_true", help="TVQA: write the dialogue of each clip")


def _add_pack(actions: Any) -> None:
    parser = _add_action(actions, "pack", PACK, _pack)
    parser.add_argument("source", metavar="SOURCE", type=path_argument, help="a file or a folder")
    parser.add_argument(
        "target", metavar="TARGET", type=path_argument, help="new .safetensors or .pth file"
    )


def _add_action(actions: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        description=text,
        help=text.partition(":")[0].partition(",")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _convert(flags: argparse.Namespace) -> int:
    folder = flags.data_path / flags.name
    splits = _splits(flags.name, folder, flags.splits)
    require_writable(flags.output, "--output")
    for line in convert(flags.name, folder, flags.output, splits, flags.sub):
        log.info(line)
    log.info(f"{flags.output}: features and caption files are not copied: put them there too")
    return 0


def _pack(flags: argparse.Namespace) -> int:
    start = time.monotonic()
    count = pack(flags.source, flags.target)
    log.info(f"{flags.target}: features of {count} videos, in {time.monotonic() - start:.1f} s")
    return 0


def _splits(name: str, folder: Path, given: str | None) -> list[str]:
    """Those that --splits names, else those that are there. Raises UserError."""
    dataset = find_dataset(name, folder)
    if given is None:
        present = [split for split in SPLITS if exists(dataset.annotation_file(folder, split))]
        if not present:
            known = ", ".join(SPLITS)
            raise UserError(f"{folder}: holds no table of {name} for {known}; correct --data_path")
        return present
    splits = [split.strip() for split in given.split(",")]
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"--splits {given}: '{unknown[0]}' is none of {', '.join(SPLITS)}")
    return list(dict.fromkeys(splits))


if __name__ == "__main__":  # `python -m vico.cli.data`, or this file
    from vico.cli.main import console

    console(command="data")
