"""`vico report`: runs as one HTML page."""

import os
from pathlib import Path

from vico.cli.parser import OneLineParser, path_argument, positive_int
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import make_folder, require_writable, write_bytes
from vico.io.paths import open_to_read

DESCRIPTION = (
    "Write one HTML page about runs: curves, accuracy by type with confidence intervals, "
    "differences between the runs, gates, speed, settings, and all predictions to browse. It holds "
    "everything that it shows, and requests nothing from any network."
)
MARK_BYTES = 2048  # of a file's beginning, where a report names its maker


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="vico report", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=path_argument, help="the --output_dir of a run"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=path_argument,
        required=True,
        help="the page; an earlier report there is replaced, any other file is refused",
    )
    parser.add_argument(
        "--videos",
        metavar="DIR",
        type=path_argument,
        help="folder of the videos: shows a few small frames of each (needs the extra video)",
    )
    parser.add_argument(
        "--max_videos",
        metavar="N",
        type=positive_int,
        default=100,
        help="show frames of at most N videos: those of changed, then of wrong answers first "
        "(default: 100; a video takes some 10 kB of the page)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    require_free(flags.output)
    write_report(flags.runs, flags.output, flags.videos, flags.max_videos)
    return 0


def require_free(path: Path) -> None:
    """Raises UserError unless a report may be written to `path`."""
    from vico.report.page import is_report

    require_writable(path.parent, "the folder of --output")
    if not os.path.lexists(path):
        return
    try:
        with open_to_read(path) as file:
            start = file.read(MARK_BYTES)
    except OSError:
        start = b""
    if not is_report(start):
        raise UserError(
            f"{path}: is there already and is no report; name another file, or remove it"
        )


def write_report(paths: list[Path], output: Path, videos: Path | None, max_videos: int) -> None:
    """Write the page and say what is in it. Raises UserError, DiskError."""
    from vico.report.frames import Frames, frames_of
    from vico.report.load import load_runs  # it imports torch
    from vico.report.page import page, plotly_script
    from vico.report.questions import join

    plotly = plotly_script()
    runs = load_runs(paths)
    sets, notes = join(runs)
    frames = frames_of(runs, sets, videos, max_videos) if videos is not None else Frames()
    content = page(runs, sets, notes, frames, plotly)
    make_folder(output.parent)
    write_bytes(output, content)
    num_questions = sum(len(questions.items) for questions in sets)
    log.info(
        f"{output}: {len(runs)} run(s), {num_questions:,} questions, {len(content) / 1e6:.1f} MB; "
        "open it in a browser"
    )


if __name__ == "__main__":  # `python -m vico.cli.report`, or this file
    from vico.cli.main import console

    console(command="report")
