"""`vico data`: what is done to the files of a data set."""

import argparse
from pathlib import Path

from vico.cli.parser import OneLineParser, path_argument
from vico.data.convert import convert
from vico.data.datasets import find_dataset
from vico.data.readers.spec import SPLITS
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.paths import exists

HELP = """Write a data set in the general schema: a line of JSON per question, and dataset.yaml.
Every question is read back and compared. Features and captions are not copied."""


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="vico data",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("convert",))
    parser.add_argument("name", metavar="NAME", help="nextqa, star, tvqa, intentqa or a folder")
    parser.add_argument("--data_path", type=path_argument, default=Path("data"))
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder of the new data set"
    )
    parser.add_argument("--splits", help="train,val,test (default: those that are there)")
    parser.add_argument("--sub", action="store_true", help="TVQA: write the dialogue of each clip")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    folder = flags.data_path / flags.name
    splits = _splits(flags.name, folder, flags.splits)
    require_writable(flags.output, "--output")
    for line in convert(flags.name, folder, flags.output, splits, flags.sub):
        log.info(line)
    log.info(f"{flags.output}: features and captions are not copied: put them there too")
    return 0


def _splits(name: str, folder: Path, given: str | None) -> list[str]:
    """Those that --splits names, else those that are there. Raises UserError."""
    dataset = find_dataset(name, folder)
    if given is None:
        present = [split for split in SPLITS if exists(dataset.annotation_file(folder, split))]
        if not present:
            raise UserError(f"{folder}: holds no table of {name} for {', '.join(SPLITS)}")
        return present
    splits = [split.strip() for split in given.split(",")]
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"--splits {given}: '{unknown[0]}' is none of {', '.join(SPLITS)}")
    return list(dict.fromkeys(splits))


if __name__ == "__main__":  # `python -m vico.cli.data`, or this file
    from vico.cli.main import console

    console(command="data")
