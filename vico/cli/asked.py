"""What `vico ask`, `vico caption` and vico.api share: the model of a checkpoint, and a video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.flags import CommandLine
from vico.cli.parser import SettingsParser, frame_rate, path_argument
from vico.data.datasets import find_dataset
from vico.errors import UserError
from vico.generation.settings import GenerationSettings
from vico.io.paths import is_file
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.checkpoint.format import Checkpoint
    from vico.data.features import Features
    from vico.distributed.world import World
    from vico.train.asking import AskedModel
    from vico.video.encoder import Encoder
    from vico.video.provenance import Provenance

# Settings of `vico train` that mean something else here: the features that are asked about, the
# seed of what is drawn.
OTHERWISE = ("features", "seed")
GENERATION = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_p")


@dataclass(frozen=True)
class VideoSource:
    """Where a video's features come from, as the flags say it."""

    features: Path | None  # None, without `video`: those of the run's data set
    video_id: str | None
    video: Path | None
    encoder: Path | None
    fps: Fraction | None

    @classmethod
    def of(cls, typed: Mapping[str, Any]) -> "VideoSource":
        """Raises UserError for flags that contradict each other."""
        source = cls(*(typed.get(f) for f in ("features", "video_id", "video", "encoder", "fps")))
        if source.video is None:
            for name in ("encoder", "fps"):
                if name in typed:
                    raise UserError(f"--{name}: is for a video file; name one by --video")
        else:
            for name in ("features", "video_id"):
                if name in typed:
                    raise UserError(
                        f"--{name} and --video: the video is one of a file of features, or a video "
                        "file; leave one of the two out"
                    )
            if source.encoder is None:
                raise UserError(
                    "--encoder is missing: name the folder of the image encoder that made the "
                    "training's features, as for `vico extract`"
                )
            if not is_file(source.video):
                raise UserError(f"--video {source.video}: no such file; name a video")
        return source

    @property
    def id(self) -> str | None:
        """Of the one video that is asked about; None: none is named."""
        if self.video is not None:
            return str(self.video)
        return (self.video_id or "").strip() or None

    def read_for(self, model: "AskedModel") -> "Features":
        """Raises UserError, also for features of another width than the model's."""
        if self.video is not None:
            assert self.encoder is not None
            return encoded(model, self.video, self.encoder, self.fps)
        from vico.data.features import Features
        from vico.train import preflight

        config = model.config
        if self.features is not None:
            features = Features(self.features)
        elif len(config.datasets) == 1:
            features = preflight.open_features(config, config.dataset_names[0])
        else:
            raise UserError(
                "--features is missing: the checkpoint was trained on several data sets; name the "
                "features of the video"
            )
        model.require_width(features)
        return features


def encoded(model: "AskedModel", video: Path, folder: Path, fps: Fraction | None) -> "Features":
    """The features of a video file, by the encoder in `folder`. Raises UserError.

    `fps`: frames per second; None: as many as the features of the run's data set have.
    """
    from vico.data.features import FeaturesInMemory
    from vico.video.features import video_features

    recorded = _recorded(model.config)
    rate = fps if fps is not None else _usual_fps(model.config, recorded)
    encoder = _encoder(folder, model.world.device)
    if encoder.width != model.feature_width:
        raise UserError(
            f"--encoder {folder}: its features are {encoder.width} wide, and "
            f"{model.checkpoint.path} was trained on features {model.feature_width} wide; name the "
            "encoder of those"
        )
    frames_TC = video_features(video, encoder, rate)
    for note in encoder.notes:
        model.world.print_rank0(f"note: {note}")
    model.world.print_rank0(
        f"{video}: {len(frames_TC)} frames at {float(rate):g} per second by {folder}"
        f"{_compared(recorded, encoder.digest, rate)}"
    )
    return FeaturesInMemory({str(video): frames_TC}, str(video))


@lru_cache(maxsize=1)
def _encoder(folder: Path, device: Any) -> "Encoder":
    """Loaded once for all videos that a program asks about. Raises UserError."""
    from vico.video.encoder import load_encoder

    return load_encoder(folder, device)


def _recorded(config: RunConfig) -> "dict[Path, Provenance]":
    """What made the features of the run's data sets, where that is known. Raises UserError."""
    from vico.data import feature_files
    from vico.video import provenance

    recorded = {}
    for name in config.dataset_names:
        try:
            path = feature_files.find(config.folder_of(name), config.features_of(name))
        except UserError:  # they need not be at hand
            continue
        if (made := provenance.read(path)) is not None:
            recorded[path] = made
    return recorded


def _compared(recorded: "Mapping[Path, Provenance]", digest: str, rate: Fraction) -> str:
    """The end of a line: whether encoder and rate are those of the training's features."""
    if not recorded:
        return "; whether the training's features have this encoder and rate is not recorded"
    others = [
        f"{path} is at {float(made.fps):g} per second by {made.encoder} (sha256 {made.digest[:8]})"
        for path, made in recorded.items()
        if (made.digest, made.fps) != (digest, rate)
    ]
    if not others:
        return ", as the training's features"
    return (
        f" (sha256 {digest[:8]})\nwarning: the training's features are others, so expect wrong "
        f"answers: {'; '.join(others)}"
    )


def _usual_fps(config: RunConfig, recorded: "Mapping[Path, Provenance]") -> Fraction:
    """As recorded, else as the data sets count. Raises UserError where they differ."""
    known = {made.fps for made in recorded.values()}
    if len(known) == 1 and len(recorded) == len(config.dataset_names):
        return known.pop()
    sets = [find_dataset(name, config.folder_of(name)) for name in config.dataset_names]
    rates = {dataset.frames_per_second for dataset in sets}
    if len(rates) > 1:
        raise UserError("--fps is missing: the features of the run's data sets differ in it")
    return Fraction(rates.pop()).limit_denominator(10**6)


def open_model(
    line: CommandLine, world: "World", otherwise: Sequence[str] = OTHERWISE
) -> "AskedModel":
    """The checkpoint of --resume, checked against its files; says what a user should know.

    `otherwise`: flags that are no settings of the run here. A collective; the weights are not
    loaded yet. Raises UserError.
    """
    from vico.cli.evaluate import settings_of
    from vico.train.asking import AskedModel
    from vico.train.rank_consistency import require_same_files
    from vico.train.saved_run import read_for_evaluation

    with world.raise_together():
        checkpoint = read_for_evaluation(line.given["resume"])
        given = {name: value for name, value in line.given.items() if name not in otherwise}
        asked = replace(line, given=given)
        checkpoint, absent = without_absent_datasets(checkpoint, asked)
        config, notes = settings_of(checkpoint, asked)
    require_same_files(world, config)
    for note in (*absent, *notes):
        world.print_rank0(note)
    model = AskedModel(config, checkpoint, world)
    for note in model.notes:
        world.print_rank0(note)
    return model


def without_absent_datasets(
    checkpoint: "Checkpoint", line: CommandLine
) -> tuple["Checkpoint", list[str]]:
    """(the checkpoint, notes): without its data sets where their folders are not at hand.

    A question about a video needs none of them. Raises UserError for one that a flag names.
    """
    values = {**checkpoint.settings, **line.given}
    known = {name: values[name] for name in ("dataset", "data_path") if name in values}
    config = RunConfig(**known)
    try:
        for name in config.dataset_names:
            find_dataset(name, config.folder_of(name))
    except UserError:
        if "dataset" in line.given:
            raise
        of_dataset = ("dataset", "sub", "features")
        settings = {k: v for k, v in checkpoint.settings.items() if k not in of_dataset}
        note = (
            f"note: {config.data_path}: does not hold {config.dataset}, on which the checkpoint "
            "was trained; prompts are those without a dialogue"
        )
        return replace(checkpoint, settings=settings), [note]
    return checkpoint, []


def add_video_flags(group: Any) -> None:
    """--features is a flag of every command already."""
    group.add_argument(
        "--video_id",
        metavar="ID",
        help="the video, as --features calls it (without --features: as the run's own do)",
    )
    group.add_argument(
        "--video",
        type=path_argument,
        metavar="FILE",
        help="a video file in place of features; with --encoder",
    )
    group.add_argument(
        "--encoder",
        type=path_argument,
        metavar="FOLDER",
        help="of --video: the folder of the CLIP or SigLIP model that made the training's features",
    )
    group.add_argument(
        "--fps",
        type=frame_rate,
        metavar="RATE",
        help="of --video: frames per second (default: what the run's data set counts in, mostly 1)",
    )


def add_generation_flags(parser: SettingsParser) -> None:
    """--seed is a flag of every command already."""
    group = parser.add_argument_group(
        "generation", "How a text is written. --seed (default 0) decides what is drawn."
    )
    add = group.add_argument
    text = "the most tokens of a text; a longer one is cut, and is_cut says so (default: 128)"
    add("--max_new_tokens", type=int, metavar="INT", help=text)
    text = "beam search with so many beams (default: 1, none)"
    add("--num_beams", type=int, metavar="INT", help=text)
    text = "of beams: scores are divided by length ** FLOAT (default: 1)"
    add("--length_penalty", type=float, metavar="FLOAT", help=text)
    text = "draw tokens from softmax(logits / FLOAT) (default: take the likeliest)"
    add("--temperature", type=float, metavar="FLOAT", help=text)
    text = "draw among the likeliest tokens that together have this probability (default: 1)"
    add("--top_p", type=float, metavar="FLOAT", help=text)


def generation_settings(typed: Mapping[str, Any]) -> GenerationSettings:
    """Of the flags that are given. Raises UserError for a value out of range."""
    names = (*GENERATION, "seed")
    return GenerationSettings(**{name: typed[name] for name in names if name in typed})
