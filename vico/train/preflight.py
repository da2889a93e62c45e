"""Checks of a run's files, made at every start before anything is built.

`vico check` makes them too, and more. An error ends the run with one line. Whatever is left out,
shortened or suspicious is counted and reported in notes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vico.checkpoint import fingerprint
from vico.data import feature_files, length_stats
from vico.data.datasets import find_dataset, read_questions
from vico.data.features import Features
from vico.data.length_stats import Lengths, QuestionLengths
from vico.data.prompts import Prompts
from vico.data.readers import captions as caption_files
from vico.data.readers.captions import Captions
from vico.data.text_windows import Texts, open_texts, usual_window
from vico.data.tokenizer import ALL_FILES as TOKENIZER_FILES
from vico.data.tokenizer import Tokenizer, find_tokenizer
from vico.data.types import Question
from vico.errors import UserError, fail, show
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.io.input_files import InputFiles
from vico.io.log import ProgressLog
from vico.io.paths import entries, is_folder
from vico.model.quantized_linear import require_shapes
from vico.model.weights.load import Weights, holds_weights, open_weights, weight_files
from vico.train import backbone
from vico.train.config import RunConfig
from vico.train.settings import evaluated_split, has_split

Part = tuple[str, str]  # data set and split


@dataclass(frozen=True)
class BackboneFiles:
    """The tokenizer and weights of the frozen LLaMA, which have been checked against each other."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    weights: Weights
    num_adapted: int  # layers with gates, counted from the top

    @property
    def notes(self) -> list[str]:
        return backbone.notes(self.weights, self.tokenizer, self.tokenizer_path)

    def prompts(self, config: RunConfig, dataset_name: str) -> Prompts:
        dataset = find_dataset(dataset_name, config.folder_of(dataset_name))
        return Prompts(
            self.tokenizer,
            config.max_feats,
            config.max_seq_len,
            config.max_cap_len,
            dialogue=dataset.has_dialogue,
        )


def open_backbone(config: RunConfig) -> BackboneFiles:
    """Open the tokenizer and the weights of --model. Raises UserError."""
    folder = config.model_folder
    if not is_folder(folder):
        models = _models_in(config.llama_model_path)
        hint = "it must hold LLaMA weights of Meta or Hugging Face"
        if models:
            hint = f"--model can be {', '.join(models)}, or the path of a folder"
        raise UserError(f"{folder}: no such folder of weights; {hint}")
    tokenizer_path = find_tokenizer(config.tokenizer_folder, folder)
    tokenizer = Tokenizer(tokenizer_path)
    weights = open_weights(folder, tokenizer.vocab_size)
    backbone.require_window(config, weights.config, folder)
    if config.quantize is not None:
        require_shapes(config.quantize, weights.config)
    num_layers = weights.config.n_layers
    num_adapted = config.adapter_layer or num_layers
    if num_adapted > num_layers:
        raise UserError(
            f"--adapter_layer {num_adapted}: the model has {num_layers} layers; "
            "leave it out to adapt all"
        )
    return BackboneFiles(tokenizer, tokenizer_path, weights, num_adapted)


def read_texts(config: RunConfig, backbone: BackboneFiles) -> Texts:
    """Those of --text, as training measures them. Raises UserError."""
    window = usual_window(backbone.weights.config.sliding_window)
    return open_texts(config.text, backbone.tokenizer, window)


def _models_in(folder: Path) -> list[str]:
    """For a hint: what may not be looked at is left out, and not the error that is reported."""
    models = []
    with contextlib.suppress(UserError):
        for path in entries(folder):
            with contextlib.suppress(UserError):
                if holds_weights(path):
                    models.append(path.name)
    return models


def input_files(config: RunConfig, splits: Sequence[str]) -> InputFiles:
    """The files that a run with these splits reads, as far as they exist, before they are opened.

    Without a split, those of the backbone.
    Subtitles are not among them: there are thousands, and they are read into memory at once.
    """
    paths: list[Path] = []
    for name in config.dataset_names if splits else ():
        paths += _dataset_files(config, name, splits)
    for tokenizer_folder in (config.tokenizer_folder, config.model_folder):
        paths += [tokenizer_folder / name for name in TOKENIZER_FILES]
    paths += weight_files(config.model_folder)
    paths += config.text if "train" in splits else ()
    return InputFiles(paths)


def _dataset_files(config: RunConfig, name: str, splits: Sequence[str]) -> list[Path]:
    folder = config.folder_of(name)
    dataset = find_dataset(name, folder)
    paths = [dataset.annotation_file(folder, split) for split in splits]
    with contextlib.suppress(UserError):  # who reads them says what is wrong
        paths += feature_files.files_of(feature_files.find(folder, config.features_of(name)))
    if config.cap and "train" in splits:
        with contextlib.suppress(UserError):
            paths.append(caption_files.find(folder, config.captions_of(name)))
    return paths


def read_split(
    config: RunConfig, dataset: str, split: str, training: bool = False
) -> list[Question]:
    """The questions of a split of a data set, as its file holds them. Raises UserError.

    `training`: for a run that trains and evaluates its epochs.
    """
    folder = config.folder_of(dataset)
    if split != "train" and not has_split(config, dataset, split):
        _refuse_absent(config, dataset, split, training)
    uses_subtitles = config.sub and find_dataset(dataset, folder).has_dialogue
    questions = read_questions(dataset, folder, split, uses_subtitles, config.missing_subtitles)
    if len(config.datasets) > 1:  # two of them may have a train.csv
        questions[:] = [replace(q, place=f"{dataset}/{q.place}") for q in questions]
    if training and split == "test" == evaluated_split(config) and questions[0].answer is None:
        fail(
            f"{questions[0].place}: the test questions have no answers, so no epoch can be "
            "evaluated on them; train with --no_eval"
        )
    return questions


def _refuse_absent(config: RunConfig, dataset: str, split: str, training: bool) -> None:
    """Raise UserError with what to do about a split that is not there, where there is a way."""
    folder = config.folder_of(dataset)
    path = find_dataset(dataset, folder).annotation_file(folder, split)
    other = "test" if split == "val" else "val"
    if training:
        instead = " or on test (--split test)" if split == "val" else ""
        fail(
            f"{path}: no such file, and each epoch is evaluated on {split}; put it there, or train "
            f"without evaluation (--no_eval){instead}"
        )
    if has_split(config, dataset, other):
        fail(f"{path}: no such file; put it there, or evaluate on {other} (--split {other})")


def open_features(config: RunConfig, dataset: str) -> Features:
    """The features of a data set's videos. Raises UserError."""
    return Features(feature_files.find(config.folder_of(dataset), config.features_of(dataset)))


def read_used(
    config: RunConfig, dataset: str, split: str
) -> tuple[list[Question], list[Question], Features]:
    """(the questions of a split that are used, those that are dropped, their features).

    Raises UserError.
    """
    questions, features = read_split(config, dataset, split), open_features(config, dataset)
    return *with_features(config, config.label(dataset, split), questions, features), features


def with_features(
    config: RunConfig, label: str, questions: list[Question], features: Features
) -> tuple[list[Question], list[Question]]:
    """(questions to use, questions dropped because their video has no features).

    Drops only with --missing_features drop. Raises UserError when that leaves no question.
    """
    if config.missing_features == "error":
        return questions, []
    used = [q for q in questions if q.video in features]
    if not used:
        fail(
            f"{features.path}: holds features of no video of the {len(questions)} {label} "
            f"questions, e.g. {show(questions[0].video)} (the file's ids are like "
            f"{features.example}); fetch the file that belongs to them"
        )
    return used, [q for q in questions if q.video not in features]


def joined(
    parts: Mapping[Part, list[Question]], splits: Sequence[str]
) -> dict[str, list[Question]]:
    """The questions of each split, of one data set after the other."""
    of_splits: dict[str, list[Question]] = {split: [] for split in splits}
    for (_, split), questions in parts.items():
        if split in of_splits:
            of_splits[split] += questions
    return of_splits


def read_captions(
    config: RunConfig,
    dataset: str,
    splits: Mapping[str, Sequence[Question]],
    questions: Sequence[Question],
    prompts: Prompts | None,
) -> Captions:
    """By video. Raises UserError.

    `splits`: all questions that were read; `questions`: those of training that are used;
    `prompts`: also check that --max_cap_len leaves room.
    """
    folder, named = config.folder_of(dataset), config.captions_of(dataset)
    path = find_dataset(dataset, folder).annotation_file(folder, "train")
    captions = caption_files.chosen(splits, path, folder, named)
    captioned = [q for q in questions if q.video in captions]
    if config.missing_captions == "error" or not captioned:
        caption_files.check(captions, questions)
    if prompts is not None:
        prompts.caption(captions[captioned[0].video])
    return captions


# Slow checks: the results are cached by everything they depend on.


def scan_key(features: Features) -> str | None:
    """The cache key of a scan of the whole feature file."""
    return cache_key("scanned", *map(file_stamp, features.paths))


def check_features(
    config: RunConfig,
    questions: Sequence[Question],
    features: Features,
    cache: FileCache,
    rank: int,
    num_ranks: int,
    progress: ProgressLog,
) -> int:
    """Check that the questions' features are present, well formed and finite.

    Each rank reads its share. Returns how many questions are about a clip past the end of its
    video. Raises UserError.
    """
    num_past_end = features.check(questions, progress)
    stamps, questions_digest = map(file_stamp, features.paths), fingerprint.of_questions(questions)
    key = cache_key("finite", *stamps, questions_digest, config.max_feats)
    if not cache.get(scan_key(features)) and not cache.get(key):
        features.check_finite(questions[rank::num_ranks], config.max_feats, progress)
    cache.put(key, True)
    return num_past_end


def measure_questions(
    config: RunConfig,
    dataset: str,
    split: str,
    questions: Sequence[Question],
    backbone: BackboneFiles,
    prompts: Prompts,
    cache: FileCache,
    progress: ProgressLog,
) -> QuestionLengths:
    """Each question's longest sequence over the split's tasks, and what is cut. Raises UserError.

    Goes on where an earlier start was ended.
    """
    tasks = (
        [task for task in config.tasks if task not in ("cap", "keep")]
        if split == "train"
        else ["vqa"]
    )
    label = config.label(dataset, split)
    key = cache_key(
        "questions",
        dataset,
        fingerprint.of_questions(questions),
        file_stamp(backbone.tokenizer_path),
        config.max_feats,
        config.max_seq_len,
        tasks,
    )

    known = cache.get(key)
    measured = None if known is None else QuestionLengths.from_json(known)
    if measured is None or measured.num_measured < len(questions):

        def report(part: QuestionLengths) -> None:
            if progress(f"{label}: measured {part.num_measured} of {len(questions)} questions"):
                cache.save(key, part.to_json())

        measured = length_stats.of_questions(
            questions, prompts, tasks, config.max_seq_len, measured, report
        )
        cache.put(key, measured.to_json())
    return measured


def measure_captions(
    config: RunConfig,
    captions: Mapping[str, str],
    questions: Sequence[Question],
    backbone: BackboneFiles,
    prompts: Prompts,
    cache: FileCache,
    progress: ProgressLog,
) -> Lengths:
    """The caption sequences of the questions' videos, one per video, in tokens."""
    videos = sorted({q.video for q in questions})
    used = {video: captions[video] for video in videos if video in captions}
    key = cache_key(
        "captions",
        fingerprint.of_captions(used),
        file_stamp(backbone.tokenizer_path),
        config.max_feats,
    )
    known = cache.get(key)
    if known is not None:
        return Lengths.from_json(known)
    lengths = length_stats.of_captions(used.values(), prompts, progress)
    cache.put(key, lengths.to_json())
    return lengths
