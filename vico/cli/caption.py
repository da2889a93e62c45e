"""`vico caption`: write captions, of a video or of all videos of a split."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vico.cli.asked import (
    OTHERWISE,
    VideoSource,
    add_generation_flags,
    add_video_flags,
    generation_settings,
    open_model,
)
from vico.cli.flags import make_parser, read_flags, require_resume
from vico.cli.parser import SettingsParser, path_argument
from vico.cli.with_world import with_world
from vico.errors import UserError
from vico.generation.caption_metrics import metrics_of, require_package
from vico.io import log
from vico.io.atomic import make_folder, require_writable, write_lines
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World
    from vico.generation.generate import Generated
    from vico.train.asking import AskedModel
    from vico.train.captioning import SplitVideo

USAGE = "--resume CHECKPOINT (--features F --video_id ID | --split SPLIT [--metrics]) [FLAGS]"
DESCRIPTION = (
    "Write captions by a checkpoint (--resume). Settings come from the checkpoint, as for `vico "
    "eval`; a flag that is given wins. Of one video: --features F --video_id ID, or --video X.mp4 "
    "--encoder CLIP_FOLDER; the last line printed is a JSON object with caption. Without a video: "
    "of each video of --split (val), once; the captions go to captions_SPLIT.jsonl beside the "
    "checkpoint, or to --output, with the data set's own captions as references. --metrics "
    "compares them: BLEU, ROUGE-L, CIDEr, and METEOR where Java is; the last line then holds n "
    "and these."
)
NUM_SHOWN = 3


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    parser = make_parser("vico caption", DESCRIPTION, prints=False, usage=USAGE, add_own=_add_own)
    line, typed = read_flags(parser, argv)
    require_resume(line, "to write captions with")
    source, settings = VideoSource.of(typed), generation_settings(typed)
    _check(typed, source)

    def work(world: "World") -> None:
        from vico.train import captioning

        if source.id is None:
            model = open_model(line, world, otherwise=("seed",))
            with world.raise_together():
                videos = captioning.videos_of_split(model)
            opening = _opening(model, typed)
            captions = model.caption([(v.features, v.video) for v in videos], settings, opening)
            with world.raise_together():
                if world.is_main:
                    _report(model.config, videos, captions, typed)
            return
        model = open_model(line, world, OTHERWISE)
        with world.raise_together():
            features = source.read_for(model)
        opening = _opening(model, typed)
        (caption,) = model.caption([(features, source.id)], settings, opening)
        world.print_rank0(f"{source.id}: {caption.text}")
        record = {"video": source.id, "caption": caption.text, "is_cut": caption.is_cut}
        world.print_rank0(json.dumps(record))

    return with_world(line, work)


def _add_own(parser: SettingsParser) -> None:
    group = parser.add_argument_group("captioning")
    add_video_flags(group)
    group.add_argument(
        "--metrics",
        action="store_true",
        help="of a split: compare the captions with the data set's (needs the extra 'captions')",
    )
    group.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="of a split: where the captions go, a JSON object per line",
    )
    group.add_argument(
        "--opening",
        metavar="TEXT",
        help="the words with which every caption begins: training gives a caption's first three "
        "tokens and teaches none (default: those of most training captions; '': none)",
    )
    add_generation_flags(parser)


def _check(typed: Mapping[str, Any], source: VideoSource) -> None:
    """Raises UserError for flags that contradict each other."""
    for name in ("split", "metrics", "output"):
        if source.id is not None and name in typed:
            raise UserError(f"--{name}: is for the videos of a split, and one video is named")
    if "metrics" in typed:
        require_package()
    if "output" in typed:
        require_writable(typed["output"].parent, "the folder of --output")


def _opening(model: "AskedModel", typed: Mapping[str, Any]) -> tuple[int, ...]:
    from vico.train.captioning import opening_of

    opening, note = opening_of(model, typed.get("opening"))
    model.world.print_rank0(note)
    return opening


def _report(
    config: RunConfig,
    videos: Sequence["SplitVideo"],
    captions: Sequence["Generated"],
    typed: Mapping[str, Any],
) -> None:
    """Write the captions; print some, and the metrics. Raises UserError, DiskError."""
    output = typed.get("output") or OutputDir(config.output_dir).captions(config.split)
    pairs = list(zip(videos, captions, strict=True))
    records = [video.record(caption) for video, caption in pairs]
    make_folder(output.parent)
    write_lines(output, records)
    for video, caption in pairs[:NUM_SHOWN]:
        log.info(f"{video.video}: {caption.text}")
        log.info(f"  reference: {' / '.join(video.references) or 'none'}")
    num_cut = sum(caption.is_cut for caption in captions)
    log.info(f"{output}: {len(pairs)} captions, {num_cut} of them cut at --max_new_tokens")
    result: dict[str, Any] = {"split": config.split, "n": len(pairs), "output": str(output)}
    if "metrics" in typed:
        result |= _compared(records)
    log.info(json.dumps(result))


def _compared(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of the captions that have a reference; n_compared is their number.

    Raises UserError.
    """
    compared = [record for record in records if record["references"]]
    if not compared:
        raise UserError(
            "--metrics: no video of the split has a caption to compare with; name the file by "
            "--captions"
        )
    metrics = metrics_of(compared)
    return {"n_compared": metrics.pop("n"), **metrics}


if __name__ == "__main__":  # `python -m vico.cli.caption`, or this file
    from vico.cli.main import console

    console(command="caption")
