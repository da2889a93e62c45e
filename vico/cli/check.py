"""`vico check`: all that can be wrong before training, found without training, and as much of it as possible at once.

It takes the flags of `vico train` and goes through the same gate. Besides, it reads every split that is there, the whole of
the feature file and the other data sets beside this one, and shows what the model will be asked to learn, for the eye.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from vico.checkpoint import fingerprint
from vico.checkpoint.validate import validate_for_model
from vico.cli import flags
from vico.cli.check_report import samples, shared_with_other_sets
from vico.data.datasets import DATASETS, accuracy_groups, read_questions
from vico.data.features import WIDTH, Features, Scan
from vico.data.prompts import Prompts, letter
from vico.data.types import Question
from vico.errors import UserError, fail, one_line, show
from vico.io.atomic import require_writable
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.model.config import trainable_shapes
from vico.train import preflight, zero_stage
from vico.train.config import RunConfig
from vico.train.preflight import BackboneFiles
from vico.train.resume import find_start, start_state

CHECK = (
    "Find what is wrong with a run's files before it starts: the flags of `vico train`, one process, nothing is trained. All problems are "
    "listed, one per line. --expect_world_size N checks the DeepSpeed config for N ranks."
)
GB_TO_ANNOUNCE, GB_PER_SECOND = 2.0, 1.0  # of features: what is said to take long, and how long
P = ParamSpec("P")
R = TypeVar("R")


def main(argv: list[str]) -> int:
    line = flags.parse(argv, "vico check", CHECK)
    config = line.resolve()
    for note in line.notes:
        print(f"note: {note}", flush=True)
    check = Check(config)
    check.run()
    return check.errors[0].exit_code if check.errors else 0


class Check:
    """One pass over the files of a run: what is found is printed as it comes, errors and warnings are counted."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.errors: list[UserError] = []
        self.num_warnings = 0
        self._cache = FileCache()
        self._backbone: BackboneFiles | None = None
        self._prompts: Prompts | None = None
        self._features: Features | None = None
        self._questions: dict[str, list[Question]] = {}  # by split
        self._captions: dict[str, str] = {}

    def run(self) -> None:
        config, start = self.config, time.monotonic()
        os.environ.setdefault(
            "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
        )  # else DeepSpeed warns of its guess
        self._try(require_writable, config.output_dir)
        self._try(zero_stage.named, config, config.expect_world_size or 1)
        self._open_backbone()
        asked = {split: self._try(_read, config, split) for split in splits_of(config)}
        self._features = self._try(Features, config.dataset_folder / "clipvitl14.pth")
        dropped = self._choose_questions(
            {split: found for split, found in asked.items() if found is not None}
        )
        if config.cap and "train" in self._questions:
            self._captions = (
                self._try(preflight.read_captions, config, self._questions["train"], self._prompts)
                or {}
            )
        if self._features is not None:
            self._scan(self._features)
        for split in self._questions:
            self._look_at_split(split, dropped[split])
        self._measure_captions()
        for warning in (
            *preflight.shared_video_notes(self._questions),
            *shared_with_other_sets(config, self._questions),
        ):
            self._say(warning)
        if self._backbone is not None and self._prompts is not None and self._questions:
            for line in samples(
                config, self._questions, self._captions, self._backbone.tokenizer, self._prompts
            ):
                self._say(line)
        if not self.errors:
            self._try(self._look_at_start)
        if not self.errors:
            self._cache.flush()
        found = (
            f"{len(self.errors)} error(s), {self.num_warnings} warning(s)"
            if self.errors or self.num_warnings
            else "nothing is wrong"
        )
        self._say(f"vico check: {found}, in {time.monotonic() - start:.1f} s")

    def _say(self, line: str) -> None:
        self.num_warnings += line.startswith("warning: ")
        print(one_line(line), flush=True)

    def _try(self, step: Callable[P, R], *args: P.args, **named: P.kwargs) -> R | None:
        """What `step` returns; None after an error, which is said and kept."""
        try:
            return step(*args, **named)
        except UserError as error:
            self.errors.append(error)
            print(f"vico: error: {one_line(str(error))}", file=sys.stderr, flush=True)
            return None

    def _open_backbone(self) -> None:
        self._backbone = backbone = self._try(preflight.open_backbone, self.config)
        if backbone is not None:
            self._prompts, shape = backbone.prompts(self.config), backbone.weights.config
            self._say(
                f"model: {backbone.weights.folder}: {shape.n_layers} layers ({backbone.num_adapted} adapted), width {shape.dim}, "
                f"{shape.n_heads} heads; {backbone.tokenizer_path.name} of {backbone.tokenizer.vocab_size} pieces"
            )

    def _choose_questions(self, asked: dict[str, list[Question]]) -> dict[str, list[Question]]:
        """Sets the questions that are used; returns those that are dropped."""
        dropped: dict[str, list[Question]] = {}
        for split, those in asked.items():
            chosen = (those, list[Question]())
            if self._features is not None:
                chosen = (
                    self._try(preflight.with_features, self.config, split, those, self._features)
                    or chosen
                )
            self._questions[split], dropped[split] = chosen
        return dropped

    def _scan(self, features: Features) -> None:
        """All of the feature file, also what no question uses: a later split may."""
        mark = file_stamp(features.path)
        known = self._cache.get(cache_key("scanned", mark))
        if known is None and (gigabytes := features.path.stat().st_size / 1e9) > GB_TO_ANNOUNCE:
            self._say(
                f"features: reading all {gigabytes:.1f} GB of {features.path}, once: about {gigabytes / GB_PER_SECOND / 60:.1f} min"
            )
        scan = (
            features.scan()
            if known is None
            else Scan(tuple(known["odd"]), (), tuple(known["with_zeros"]))
        )
        used = {q.video for asked in self._questions.values() for q in asked}
        self._say(
            f"features: {features.path}: {len(features)} videos, of which the questions use {sum(v in features for v in used)}"
        )
        notes = {
            "hold a frame that is all zeros, of an extraction that failed": scan.with_zeros,
            f"are no floating-point tensor [frames >= 1, {WIDTH}], and no question uses them": [
                v for v in scan.malformed if v not in used
            ],
            "hold NaN or infinite values, and no question uses them": [
                v for v in scan.not_finite if v not in used
            ],
        }
        for what, videos in notes.items():
            if videos:
                self._say(
                    f"warning: features: {len(videos)} videos {what}, e.g. {', '.join(map(show, videos[:3]))}"
                )
        for asked in self._questions.values():
            self._try(features.refuse_not_finite, asked, scan.not_finite)
        if not scan.not_finite:
            self._cache.put(
                cache_key("scanned", mark), {"odd": scan.malformed, "with_zeros": scan.with_zeros}
            )

    def _look_at_split(self, split: str, dropped: list[Question]) -> None:
        config, asked = self.config, self._questions[split]
        groups = accuracy_groups(config.dataset, [q.type for q in asked])
        shown = ", ".join(
            f"{group} {sum(q.type in members for q in asked)}" for group, members in groups.items()
        )
        answers = "" if asked[0].answer is not None else ", without answers"
        self._say(
            f"{split}: {len(asked)} questions about {len({q.video for q in asked})} videos{answers}; {shown}"
        )
        past_end = (
            self._try(self._features.check, asked) if self._features is not None else None
        ) or 0
        measured = None
        if self._backbone is not None and self._prompts is not None:
            measured = self._try(
                preflight.measure_questions,
                config,
                split,
                asked,
                self._backbone,
                self._prompts,
                self._cache,
            )
        if measured is not None:
            self._say(f"{split}: sequences of {measured.describe()}")
            self._try(self._require_answers, asked)
            for note in preflight.split_notes(config, split, asked, dropped, past_end, measured)[
                0 if dropped else 1 :
            ]:
                self._say(note)
        again = Counter((q.video, q.feature_rows, q.question, q.options) for q in asked)
        if repeated := len(asked) - len(again):
            self._say(
                f"warning: {split}: {repeated} questions stand there again, with the same options, under another id"
            )

    def _require_answers(self, asked: list[Question]) -> None:
        """What is to be predicted, read back as text, is the answer's letter: no tokenizer and no limit has lost it."""
        config, backbone, prompts = self.config, self._backbone, self._prompts
        assert backbone is not None and prompts is not None
        follows_from = (
            fingerprint.of_questions(asked),
            file_stamp(backbone.tokenizer_path),
            config.max_feats,
            config.max_seq_len,
        )
        if self._cache.get(key := cache_key("answers", config.dataset, *follows_from)):
            return
        lost = []
        for q in asked:
            answer = letter(q.answer or 0)
            sequence = prompts.vqa(prompts.fit(q, "vqa"), q.answer or 0)
            text = backbone.tokenizer.decode([sequence.tokens[t] for t in sequence.targets[:-1]])
            if text.strip() != answer or sequence.tokens[-1] != backbone.tokenizer.eos:
                lost.append((q.place, answer, text))
        if lost:
            place, answer, text = lost[0]
            fail(
                f"{place}: of {len(lost)} of {len(asked)} questions the targets are not the answer's letter, here {show(text)} for {answer}; "
                f"{backbone.tokenizer_path} is no LLaMA tokenizer: use the one that came with the weights"
            )
        self._cache.put(key, True)

    def _measure_captions(self) -> None:
        if not self._captions or self._backbone is None or self._prompts is None:
            return
        asked = self._questions["train"]
        measured = self._try(
            preflight.measure_captions,
            self.config,
            self._captions,
            asked,
            self._backbone,
            self._prompts,
            self._cache,
        )
        if measured is not None:
            used = sum(measured.counts.values())
            self._say(
                f"captions: {len(self._captions)}, of which training uses {used}; whole, sequences of {measured.describe()}"
            )
            for note in preflight.caption_notes(self.config, measured):
                self._say(note)

    def _look_at_start(self) -> None:
        """Whether the run, or what it resumes, is one that these files continue."""
        config, backbone, features = self.config, self._backbone, self._features
        assert backbone is not None and features is not None, "what is missing is an error"
        found, shape = find_start(config), backbone.weights.config
        for note in found.notes:
            self._say(note)
        if found.checkpoint is None:
            self._say(f"start: a new run in {config.output_dir}")
            return
        shapes = trainable_shapes(shape, backbone.num_adapted, config.adapter_len, config.max_feats)
        start = validate_for_model(found.checkpoint, shapes, shape.n_layers)
        for note in start.notes:
            self._say(note)
        if config.only_evaluates:
            self._say(f"start: {start.path} is evaluated on {config.split}")
            return
        prints = fingerprint.of_run(
            backbone.weights, self._questions, self._captions, features, self._cache
        )
        progress = start_state(start, 1, start.state.questions_per_step, config, prints)
        goes_on = (
            f"goes on from step {progress.step}"
            if start.published_optimizer is None
            else f"goes on after epoch {start.published_optimizer.epoch}"
        )
        self._say(
            f"start: {start.path}, {goes_on if start.moments else 'a new run from its weights'}"
        )


def splits_of(config: RunConfig) -> list[str]:
    """Those that the run needs, and the others that are there."""
    if config.only_evaluates:
        return [config.split]
    there = [
        split
        for split in ("train", "val", "test")
        if os.path.exists(DATASETS[config.dataset].annotation_file(config.dataset_folder, split))
    ]
    return list(
        dict.fromkeys(["train", "val", *([config.split] if config.init_eval else []), *there])
    )


def _read(config: RunConfig, split: str) -> list[Question]:
    return read_questions(config.dataset, config.dataset_folder, split, subtitles=config.sub)
