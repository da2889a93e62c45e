"""Makes a toy data set and a model to try ViCo on.

It writes simulated videos with questions and captions in NExT-QA's format, a tokenizer, and a tiny
LLaMA that is pretrained here (about 90 seconds on one core).
"""

import argparse
import os
import shutil
from pathlib import Path

from vico.cli.demo_dataset import DOMAIN, write_dataset
from vico.cli.demo_llama import MODEL_NAME, NUM_STEPS, make_llama, make_tokenizer
from vico.cli.parser import OneLineParser, path_argument
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import make_folder, write_json
from vico.io.paths import exists
from vico.io.text import read_json_object

VERSION = 1
# Videos.
SPLITS = {"train": 240, "val": 60, "test": 60}


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="vico demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=path_argument,
        default=Path("demo"),
        help="folder for the data and the model (default: demo)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    make_toy_dataset(flags.output_dir, flags.seed)
    return 0


def make_toy_dataset(
    out: Path, seed: int = 0, steps: int = NUM_STEPS, splits: dict[str, int] | None = None
) -> None:
    """Make pretrained/llama, data/nextqa and data_swapped/nextqa in `out`, unless they are there.

    `steps`: optimizer steps of the pretraining. `splits`: number of videos by split. Each part is
    made under a temporary name and renamed, and the manifest comes last: after a kill, the next
    start makes everything again. Raises UserError.
    """
    settings = {"version": VERSION, "seed": seed, "steps": steps, "splits": splits or SPLITS}
    manifest = out / "world.json"
    if exists(manifest):
        if read_json_object(manifest, "the demo's manifest") != settings:
            raise UserError(
                f"{out}: holds a demo of other settings; remove it, or choose another --output_dir"
            )
        log.info(f"{out}: the demo is there already")
        return
    make_folder(out)
    temporary = out / f".world.tmp-{os.getpid()}"
    try:
        llama = temporary / "pretrained" / "llama"
        (llama / MODEL_NAME).mkdir(parents=True)
        write_dataset(temporary, seed, splits or SPLITS)
        make_tokenizer(llama / "tokenizer.model", seed, DOMAIN)
        make_llama(llama, seed, steps, DOMAIN)
        for name in ("data", "data_swapped", "pretrained"):
            shutil.rmtree(out / name, ignore_errors=True)
            (temporary / name).rename(out / name)
    except OSError as error:
        raise UserError(f"{out}: the demo cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(manifest, settings)
    log.info(f"{out}: the demo is made")


if __name__ == "__main__":  # `python -m vico.cli.demo`, or this file
    from vico.cli.main import console

    console(command="demo")
