"""The data gate: what is looked at in a run's files before anything is built, at every start and, more of it, by `vico check`.

What is wrong ends the run with one line. What is odd, or was left out or shortened, is counted and said.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vico.checkpoint import fingerprint
from vico.data import length_stats
from vico.data.datasets import DATASETS, count_equal_options
from vico.data.features import Features
from vico.data.length_stats import Lengths
from vico.data.prompts import Prompts
from vico.data.readers import captions as caption_files
from vico.data.tokenizer import Tokenizer, find_tokenizer
from vico.data.types import Question
from vico.errors import UserError, fail
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.model.weights.load import Weights, holds_weights, open_weights
from vico.train.config import RunConfig


@dataclass(frozen=True)
class Backbone:
    """The frozen LLaMA's files, which fit each other."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    weights: Weights
    num_adapted: int  # adapted layers

    def prompts(self, config: RunConfig) -> Prompts:
        dialogue = DATASETS[config.dataset].has_dialogue
        return Prompts(
            self.tokenizer,
            config.max_feats,
            config.max_seq_len,
            config.max_cap_len,
            dialogue=dialogue,
        )


def open_backbone(config: RunConfig) -> Backbone:
    folder = config.llama_model_path / config.model
    if not os.path.isdir(folder):
        there = sorted(p.name for p in config.llama_model_path.glob("*/") if holds_weights(p))
        hint = (
            f"--model can be {', '.join(there)}"
            if there
            else "it must hold LLaMA weights of Meta or Hugging Face"
        )
        raise UserError(f"{folder}: no such folder of weights; {hint}")
    path = find_tokenizer(config.llama_model_path, folder)
    tokenizer = Tokenizer(path)
    weights = open_weights(folder, tokenizer.vocab_size)
    num_adapted = config.adapter_layer or weights.config.n_layers
    if num_adapted > weights.config.n_layers:
        raise UserError(
            f"--adapter_layer {num_adapted}: the model has {weights.config.n_layers} layers; leave it out to adapt all"
        )
    return Backbone(tokenizer, path, weights, num_adapted)


def with_features(
    config: RunConfig, split: str, asked: list[Question], features: Features
) -> tuple[list[Question], list[Question]]:
    """(questions to use, questions dropped because their video has no features). Raises UserError where that is not allowed."""
    if config.missing_features == "error":
        return asked, []
    used = [q for q in asked if q.video in features]
    if not used:
        fail(
            f"{features.path}: holds features of no video of the {len(asked)} {split} questions; fetch the file that belongs to them"
        )
    return used, [q for q in asked if q.video not in features]


def read_captions(
    config: RunConfig, asked: Sequence[Question], prompts: Prompts | None
) -> dict[str, str]:
    """The captions, of each question's video one; without `prompts`, whether they fit is not asked."""
    folder = config.dataset_folder
    captions = caption_files.read(folder, config.captions)
    caption_files.check(captions, asked, caption_files.find(folder, config.captions))
    if prompts is not None:
        prompts.caption(
            captions[asked[0].video]
        )  # a --max_cap_len below any caption is known at once
    return captions


# What is counted. Findings that take long are remembered by what they follow from.


def check_features(
    config: RunConfig,
    asked: Sequence[Question],
    features: Features,
    cache: FileCache,
    rank: int,
    num_ranks: int,
) -> int:
    """All is there, well formed and finite; returns how many clips lie past the end of their video. A rank looks at its share."""
    past_end = features.check(asked)
    mark = file_stamp(features.path)
    key = cache_key("finite", mark, fingerprint.of_questions(asked), config.max_feats)
    if not cache.get(cache_key("scanned", mark)) and not cache.get(key):
        features.check_finite(asked[rank::num_ranks], config.max_feats)
    cache.put(key, True)
    return past_end


def measure_questions(
    config: RunConfig,
    split: str,
    asked: Sequence[Question],
    backbone: Backbone,
    prompts: Prompts,
    cache: FileCache,
) -> Lengths:
    tasks = [task for task in config.tasks if task != "cap"] if split == "train" else ["vqa"]
    follows_from = (
        fingerprint.of_questions(asked),
        file_stamp(backbone.tokenizer_path),
        config.max_feats,
        config.max_seq_len,
        tasks,
    )
    key = cache_key("questions", config.dataset, *follows_from)
    if (known := cache.get(key)) is not None:
        return Lengths.from_json(known)
    found = length_stats.of_questions(asked, prompts, tasks, config.max_seq_len)
    cache.put(key, found.to_json())
    return found


def measure_captions(
    config: RunConfig,
    captions: Mapping[str, str],
    asked: Sequence[Question],
    backbone: Backbone,
    prompts: Prompts,
    cache: FileCache,
) -> Lengths:
    """Of the captions of these questions' videos, one each."""
    used = {video: captions[video] for video in sorted({q.video for q in asked})}
    key = cache_key(
        "captions",
        fingerprint.of_captions(used),
        file_stamp(backbone.tokenizer_path),
        config.max_feats,
    )
    if (known := cache.get(key)) is not None:
        return Lengths.from_json(known)
    found = length_stats.of_captions(used.values(), prompts)
    cache.put(key, found.to_json())
    return found


def split_notes(
    config: RunConfig,
    split: str,
    asked: Sequence[Question],
    dropped: Sequence[Question],
    past_end: int,
    measured: Lengths,
) -> list[str]:
    """What a user should know about a split."""
    total = len(asked) + len(dropped)
    counts = {
        f"shortened to fit --max_seq_len {config.max_seq_len} (dialogue first, then options; answers never)": measured.above(
            config.max_seq_len
        ),
        "about a clip that lies past the end of its video's features: zeros in its slots": past_end,
    }
    warnings = {
        "with two equal options": count_equal_options(asked),
        "with an empty option": sum(not all(option.strip() for option in q.options) for q in asked),
    }
    notes = [f"{split}: {total} questions"]
    if dropped:
        videos = len({q.video for q in dropped})
        notes = [
            f"{split}: {len(asked)} used / {total} total questions: {len(dropped)} dropped, whose {videos} videos have no features "
            "(--missing_features drop)"
        ]
    notes += [f"{split}: {n} of {len(asked)} questions {what}" for what, n in counts.items() if n]
    return notes + [
        f"warning: {split}: {n} of {len(asked)} questions {what}"
        for what, n in warnings.items()
        if n
    ]


def caption_notes(config: RunConfig, measured: Lengths) -> list[str]:
    cut, total = measured.above(config.max_cap_len), sum(measured.counts.values())
    return (
        [
            f"train: {cut} of {total} captions are longer than --max_cap_len {config.max_cap_len} when whole, and are cut"
        ]
        if cut
        else []
    )


def shared_videos(splits: Mapping[str, Sequence[Question]]) -> list[str]:
    """Warnings of videos that stand in two splits: what is learnt of them in one is no measure of the other."""
    videos = {split: {q.video for q in asked} for split, asked in splits.items()}
    names, warnings = list(videos), []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if shared := videos[one] & videos[other]:
                asked = sum(q.video in shared for q in splits[other])
                warnings.append(
                    f"warning: {len(shared)} videos are in {one} and in {other}: {asked} of {len(splits[other])} questions of {other} are about them"
                )
    return warnings
