"""`vico extract`: features of your own videos."""

import argparse
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.flags import CommandLine
from vico.cli.parser import OneLineParser, frame_rate, path_argument, positive_int
from vico.cli.with_world import with_world
from vico.distributed import launcher_env
from vico.distributed.cores import host_cores
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.digest import digest_json

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World
    from vico.video.compare import GivenFeatures
    from vico.video.encoder import Encoder
    from vico.video.extract import Share
    from vico.video.listing import Video
    from vico.video.parts import Parts
    from vico.video.provenance import Provenance

DESCRIPTION = """Make features of your own videos, as the published data sets have them: frames at a
steady rate, shorter side scaled and middle cropped as ffmpeg does, each encoded by CLIP.

  vico extract videos/ --encoder pretrained/clip-vit-large-patch14 --output data/my/features.pth

The video of a question is then its file's name without folder and ending. Use --fps 3 for TVQA.
How long: every frame of a video is decoded, FPS of them a second are encoded. On one core decoding
takes some seconds per minute of 480p, and CLIP ViT-L/14 one or two seconds per frame, so use a GPU
for more than a few videos. A line says every ten seconds how much time is left.
On all GPUs of a node: bash launch/extract.sh FLAGS; torchrun and srun work as for training.

Killed, and started again by the same command, it continues from the videos that were done
(F.pth.parts, removed at the end), and writes the same file. Damaged, missing and silent files are
named with the reason and left out, the others are written, and the exit code is 2. F.pth.parts
stays then: once these files are mended, the same command extracts only them."""
EPILOG = (
    "vico/video/README.md says what a damaged file is, and which ffmpeg command gives the frames."
)
MAX_WORKERS = 8


def main(argv: Sequence[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    flags = parse(argv)
    given = {name: str(value) for name, value in vars(flags).items() if value is not None}
    if flags.expect_world_size is not None:
        given |= {"expect_world_size": flags.expect_world_size}
    return with_world(CommandLine(given, (), flags.debug), partial(run, flags))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for flags that are wrong or contradict each other."""
    flags = _parser().parse_args(argv)
    if (flags.videos is None) == (flags.frames_dir is None):
        raise UserError("name VIDEOS or --frames_dir, one of the two; see vico extract --help")
    if (flags.frames_fps is None) != (flags.frames_dir is None):
        raise UserError("--frames_dir and --frames_fps, the rate of its pictures, go together")
    _require_output(flags.output)
    return flags


def run(flags: argparse.Namespace, world: "World") -> None:
    """Extract on all ranks. A collective. Raises UserError, also where videos were left out."""
    from vico.video.compare import GivenFeatures
    from vico.video.encoder import load_encoder
    from vico.video.extract import Extraction, extract
    from vico.video.frames import require_av
    from vico.video.listing import find_frames, find_videos
    from vico.video.parts import Parts
    from vico.video.provenance import Provenance

    with world.raise_together():
        require_av()
        found = find_videos(flags.videos) if flags.videos else find_frames(flags.frames_dir)
        given = GivenFeatures(flags.compare) if flags.compare else None
        encoder = load_encoder(flags.encoder, _device(flags.device, world), flags.precision)
    videos, notes = found
    _require_same_videos(videos, world)
    for note in (*notes, *encoder.notes):
        world.print_rank0(f"note: {note}")
    how = Extraction(
        flags.fps, flags.frames_fps, flags.batch_size, _workers(flags), flags.keep_damaged
    )
    parts = Parts(flags.output)
    todo = _missing(videos, parts, _settings(flags, encoder), world)
    start = time.monotonic()
    with world.raise_together():
        share = extract(todo[world.rank :: world.size], encoder, how, parts, world)
    shares = world.gather_objects(share)
    with world.raise_together():
        if world.is_main:
            _report(len(todo), shares, time.monotonic() - start)
            made = Provenance(flags.encoder.resolve().name, encoder.digest, flags.fps)
            _write(videos, shares, parts, given, made)
    _end(videos, shares, parts)


def _device(name: str | None, world: "World") -> Any:
    """Raises UserError for a GPU that is not there."""
    if name == "cuda" and world.device.type != "cuda":
        raise UserError("--device cuda: torch finds no GPU; leave the flag out")
    return "cpu" if name == "cpu" else world.device


def _workers(flags: argparse.Namespace) -> int:
    if flags.num_workers is not None:
        return int(flags.num_workers)
    num_ranks = launcher_env.local_world_size() or 1
    return max(1, min(host_cores() // num_ranks, MAX_WORKERS))


def _settings(flags: argparse.Namespace, encoder: "Encoder") -> dict[str, Any]:
    """What the features depend on, besides the videos."""
    rates = {"fps": str(flags.fps), "frames_fps": str(flags.frames_fps)}
    return {"encoder": encoder.digest, "precision": flags.precision, **rates}


def _require_same_videos(videos: Sequence["Video"], world: "World") -> None:
    """Raises UserError where a rank sees other files than rank 0."""
    digests = world.gather_objects(digest_json([[v.id, v.stamp] for v in videos]))
    if len(set(digests)) > 1:
        error = UserError("the ranks see different videos; mount the same folder on every host")
        error.of_all_ranks = True
        raise error


def _missing(
    videos: Sequence["Video"], parts: "Parts", settings: dict[str, Any], world: "World"
) -> list["Video"]:
    """The videos without a part, as rank 0 sees them, the largest first. A collective."""
    todo, notes = list[str](), list[str]()
    with world.raise_together():
        if world.is_main:
            notes = parts.begin(settings)
            todo = [video.id for video in parts.missing(videos)]
    wanted = set(world.gather_objects(todo)[0])
    for note in notes:
        world.print_rank0(f"note: {note}")
    if num_done := len(videos) - len(wanted):
        world.print_rank0(f"{parts.folder}: {num_done} of {len(videos)} videos are done already")
    missing = [video for video in videos if video.id in wanted]
    return sorted(missing, key=lambda video: -video.num_bytes)


def _write(
    videos: Sequence["Video"],
    shares: Sequence["Share"],
    parts: "Parts",
    given: "GivenFeatures | None",
    made: "Provenance",
) -> None:
    from vico.io.failpoints import reached
    from vico.video import provenance
    from vico.video.compare import compare

    left_out, damaged = _joined(shares, "left_out"), _joined(shares, "damaged")
    kept = [video for video in videos if video.id not in left_out]
    if not kept:
        parts.remove()
        return
    reached("extract:assemble")
    parts.assemble(kept, damaged)
    provenance.write(parts.output, made)
    reached("extract:assembled")
    if not left_out:
        parts.remove()
    for video in kept:
        if video.id in damaged:
            log.warning(f"{video.path}: {damaged[video.id]}; kept")
    if given is not None:
        for line in compare(parts.output, [video.id for video in kept], given):
            log.info(line)
    ending = f"; {len(left_out)} left out" if left_out else ""
    log.info(f"{parts.output}: features of {len(kept)} of {len(videos)} videos{ending}")


def _report(num_videos: int, shares: Sequence["Share"], seconds: float) -> None:
    num_frames = sum(share.num_frames for share in shares)
    if not num_frames:
        return
    decoding = max(share.decoding_seconds for share in shares)
    log.info(
        f"{num_frames:,} frames of {num_videos:,} videos in {log.duration(seconds)}: "
        f"{num_frames / seconds:.1f} frames/s; decoding alone takes {decoding:.1f} s, "
        f"{num_frames / max(decoding, 1e-3):.1f} frames/s"
    )


def _joined(shares: Sequence["Share"], name: str) -> dict[str, str]:
    joined: dict[str, str] = {}
    for share in shares:
        joined |= getattr(share, name)
    return joined


def _end(videos: Sequence["Video"], shares: Sequence["Share"], parts: "Parts") -> None:
    """Raises UserError, the same on every rank, if videos were left out."""
    left_out = _joined(shares, "left_out")
    if not left_out:
        return
    bad = [video for video in videos if video.id in left_out]
    num_kept = len(videos) - len(bad)
    if len(videos) == 1:
        error = UserError(f"{bad[0].path}: {left_out[bad[0].id]}; nothing is written")
    else:
        written = (
            f"the other {num_kept} are in {parts.output}; mend them and start the same command "
            f"again, or remove {parts.folder}"
            if num_kept
            else "nothing is written"
        )
        table = [(str(video.path), left_out[video.id]) for video in bad]
        error = UserError(f"{len(bad)} of {len(videos)} videos are left out: {written}", table)
    error.of_all_ranks = True
    raise error


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vico extract",
        usage="vico extract VIDEOS --encoder CLIP_DIR --output F.pth [--fps 1] [FLAGS]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "a folder (and those below it), a list with a path per line, or one video"
    add("videos", metavar="VIDEOS", nargs="?", type=path_argument, help=text)
    text = "folder of the image encoder as on Hugging Face's hub: CLIP or SigLIP, safetensors"
    add("--encoder", type=path_argument, metavar="DIR", required=True, help=text)
    text = "new .pth or .safetensors file, or folder with a .npy per video (default: features.pth)"
    add("--output", type=path_argument, metavar="PATH", default=Path("features.pth"), help=text)
    text = "frames per second, as 3, 0.5 or 30000/1001 (default: 1)"
    add("--fps", type=frame_rate, metavar="RATE", default=Fraction(1), help=text)
    text = "instead of VIDEOS: a folder of .jpg or .png per video, sorted as 2 before 10"
    add("--frames_dir", type=path_argument, metavar="DIR", help=text)
    text = "of --frames_dir: the pictures per second of video"
    add("--frames_fps", type=frame_rate, metavar="RATE", help=text)
    text = "print cosine and number of frames per video beside these features"
    add("--compare", type=path_argument, metavar="GIVEN", help=text)
    text = "of a damaged video take the frames that can be decoded (default: leave it out)"
    add("--keep_damaged", action="store_true", help=text)
    text = "of the encoder's arithmetic (default: fp32); features are fp16 always"
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help=text)
    text = "frames per forward, of one video (default: 32)"
    add("--batch_size", type=positive_int, metavar="N", default=32, help=text)
    text = f"threads that decode, per rank (default: its cores, at most {MAX_WORKERS})"
    add("--num_workers", type=positive_int, metavar="N", help=text)
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    text = "number of ranks: refuse any other"
    add("--expect_world_size", type=positive_int, metavar="N", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _require_output(path: Path) -> None:
    """Raises UserError for a name of another kind of file, or a folder that cannot be written."""
    if path.suffix in (".pt", ".h5", ".hdf5", ".npy", ".npz", ".mp4"):
        raise UserError(f"--output {path}: .pth, .safetensors, or the name of a folder")
    if path.name in ("", ".."):
        raise UserError(f"--output {path}: name a file or a new folder")
    require_writable(path.parent, "the folder of --output")


if __name__ == "__main__":  # `python -m vico.cli.extract`, or this file
    from vico.cli.main import console

    console(command="extract")
