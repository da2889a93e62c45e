"""`vico check`: finds the problems of a run's files without training, as many as possible at once.

It takes the flags of `vico train` and makes the checks of a run's start. It also reads the splits
that the run does not use, the whole feature file and the other data sets, and shows sample prompts.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch

from vico.checkpoint import fingerprint
from vico.checkpoint.format import Checkpoint
from vico.checkpoint.validate import validate_for_model
from vico.cli import check_report, flags
from vico.cli.check_answers import check_answers
from vico.cli.evaluate import on_other_datasets
from vico.data.datasets import find_dataset
from vico.data.features import Features, Scan, common_width
from vico.data.micro_batches import DatasetInputs
from vico.data.prompts import Prompts
from vico.data.readers import captions as caption_files
from vico.data.readers.captions import Captions
from vico.data.text_windows import NO_TEXTS, refuse_repeated
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError, one_line
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.file_cache import FileCache
from vico.io.paths import exists
from vico.model.config import trainable_shapes
from vico.train import input_notes, preflight, reporters, shared_digests, zero_stage
from vico.train.config import RunConfig
from vico.train.eval_captions import captioned
from vico.train.preflight import BackboneFiles, Part
from vico.train.resume import (
    find_start,
    notes_of_uncompared,
    refuse_other_function,
    start_state,
)
from vico.train.settings import evaluated_split, training_splits

CHECK = (
    "Find the problems of a run's files before it starts: the flags of `vico train`, one process, "
    "nothing is trained. All problems are listed, one per line. --expect_world_size N checks the "
    "DeepSpeed config for N ranks."
)
# A feature file above this size is announced, with the time that reading it takes.
MIN_GB_TO_ANNOUNCE, GB_PER_SECOND = 2.0, 1.0
P = ParamSpec("P")
R = TypeVar("R")


def main(argv: list[str]) -> int:
    line = flags.parse(argv, "vico check", CHECK)
    config = line.resolve()
    for note in (*line.notes, *flags.training_notes(config)):
        log.info(f"note: {note}")
    check = Check(config)
    check.run()
    return check.errors[0].exit_code if check.errors else 0


class Check:
    """One pass over a run's files. Problems are printed as they are found, and counted.

    What could not be opened is None or missing, and the checks that need it are skipped.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.errors: list[UserError] = []
        self.num_warnings = 0
        splits = [split for name in config.dataset_names for split in splits_of(config, name)]
        self._files = preflight.input_files(config, tuple(dict.fromkeys(splits)))
        self._cache = FileCache(reread=config.verify)
        self._progress = log.ProgressLog(lambda _: None, is_main=True)
        self._backbone: BackboneFiles | None = None
        self._texts = NO_TEXTS
        # By data set.
        self._prompts: dict[str, Prompts] = {}
        self._features: dict[str, Features] = {}
        self._captions: dict[str, Captions] = {}
        # The questions used, and those dropped because their video has no features.
        self._questions: dict[Part, list[Question]] = {}
        self._dropped: dict[Part, list[Question]] = {}

    def run(self) -> None:
        config, start_time = self.config, time.monotonic()
        # Otherwise DeepSpeed warns that it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        self._try(require_writable, config.output_dir)
        self._try(reporters.chosen, config.report_to)
        self._try(zero_stage.named_ds_config, config, config.expect_world_size or 1)
        self._open_backbone()
        for dataset in config.dataset_names:
            self._check_dataset(dataset)
        self._check_mixture()
        self._try(self._check_eval_captions)
        self._report_all(input_notes.shared_video_notes(config, self._questions))
        self._report_all(check_report.shared_dataset_warnings(config, self._questions))
        for dataset in config.dataset_names:
            self._show_samples(dataset)
        if not self.errors:
            self._try(self._check_start)
        if not self.errors:
            self._try(self._files.check_unchanged)
        if not self.errors:
            self._cache.flush()
        summary = "nothing is wrong"
        if self.errors or self.num_warnings:
            summary = f"{len(self.errors)} error(s), {self.num_warnings} warning(s)"
        self._report(f"vico check: {summary}, in {time.monotonic() - start_time:.1f} s")

    def _report(self, line: str) -> None:
        self.num_warnings += line.startswith("warning: ")
        log.info(one_line(line))

    def _report_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._report(line)

    def _try(self, step: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """What `step` returns; None after a UserError, which is printed and kept."""
        try:
            return step(*args, **kwargs)
        except UserError as error:
            self.errors.append(error)
            log.error(one_line(str(error)))
            return None

    # Opening the files

    def _open_backbone(self) -> None:
        self._backbone = self._try(preflight.open_backbone, self.config)
        if self._backbone is not None:
            for dataset in self.config.dataset_names:
                self._prompts[dataset] = self._backbone.prompts(self.config, dataset)
            self._report(check_report.describe_backbone(self._backbone))
            self._report_all(self._backbone.notes)
            self._open_texts(self._backbone)

    def _open_texts(self, backbone: BackboneFiles) -> None:
        """Each apart, so that all that is wrong is found."""
        self._try(refuse_repeated, self.config.text)
        for path in self.config.text:
            one = replace(self.config, text=(path,))
            texts = self._try(preflight.read_texts, one, backbone) or NO_TEXTS
            self._texts = replace(texts, files=(*self._texts.files, *texts.files))
            for text in texts.files:
                self._report(f"text: {len(text.token_ids):,} tokens of {text.path}")

    def _check_dataset(self, dataset: str) -> None:
        self._read_questions(dataset)
        self._read_captions(dataset)
        if dataset in self._features:
            self._check_features(dataset, self._features[dataset])
        for split in self._splits(dataset):
            self._check_split(dataset, split)
        self._measure_captions(dataset)

    def _splits(self, dataset: str) -> dict[str, list[Question]]:
        """The questions used of a data set, by split."""
        return {split: q for (name, split), q in self._questions.items() if name == dataset}

    def _read_questions(self, dataset: str) -> None:
        """Questions and features, and which questions are used."""
        config = self.config
        for split in splits_of(config, dataset):
            questions = self._try(
                preflight.read_split, config, dataset, split, not config.only_evaluates
            )
            if questions is not None:
                self._questions[dataset, split] = questions
        self._report_all(input_notes.annotation_notes(config, dataset, self._splits(dataset)))
        features = self._try(preflight.open_features, config, dataset)
        if features is not None:
            self._features[dataset] = features
        for split, questions in self._splits(dataset).items():
            part, label = (dataset, split), config.label(dataset, split)
            self._dropped[part] = []
            if features is None:
                continue
            chosen = self._try(preflight.with_features, config, label, questions, features)
            if chosen is not None:
                self._questions[part], self._dropped[part] = chosen

    def _read_captions(self, dataset: str) -> None:
        questions = self._questions.get((dataset, "train"))
        if self.config.cap and questions is not None:
            captions = self._try(
                preflight.read_captions,
                self.config,
                dataset,
                self._splits(dataset),
                questions,
                self._prompts.get(dataset),
            )
            self._captions[dataset] = captions = captions or Captions()
            label = self.config.label(dataset, "train")
            self._report_all(caption_files.notes(label, captions, questions) if captions else ())

    # Checking them

    def _check_mixture(self) -> None:
        self._try(common_width, self._features)
        if all((dataset, "train") in self._questions for dataset in self.config.dataset_names):
            self._report_all(
                self._try(input_notes.mixture_notes, self.config, self._questions) or []
            )

    def _check_eval_captions(self) -> None:
        """Raises UserError where no video of the evaluated split has a caption."""
        num, split = self.config.eval_captions, evaluated_split(self.config)
        if num is None or split is None:
            return
        questions = preflight.joined(self._questions, [split])[split]
        if not questions or self._captions.keys() < set(self.config.dataset_names):
            return  # they could not be read
        num_videos = len(captioned(questions, self._captions, split, num))
        self._report(f"captions of {num_videos} {split} videos with each evaluation")

    def _check_features(self, dataset: str, features: Features) -> None:
        """Reads the whole file, also what no question uses: another split may use it later."""
        key = preflight.scan_key(features)
        scan = self._scan(features, key)
        splits = self._splits(dataset).values()
        used = {q.video for questions in splits for q in questions}
        self._report(check_report.describe_features(features, used))
        self._report_all(features.notes)
        label = self.config.label(dataset, "features")
        used_keys = {features.key(video) or video for video in used}
        self._report_all(check_report.scan_warnings(label, scan, used_keys, features.width))
        for questions in splits:
            self._try(features.refuse_not_finite, questions, scan.not_finite)
        if not scan.not_finite:
            self._cache.put(key, {"odd": scan.malformed, "with_zeros": scan.with_zeros})

    def _scan(self, features: Features, key: str | None) -> Scan:
        """From the cache, which holds only scans without NaN and infinity."""
        known = self._cache.get(key)
        if known is not None:
            return Scan(tuple(known["odd"]), (), tuple(known["with_zeros"]))
        gigabytes = features.num_bytes / 1e9
        if gigabytes > MIN_GB_TO_ANNOUNCE:
            minutes = gigabytes / GB_PER_SECOND / 60
            self._report(
                f"features: reading all {gigabytes:.1f} GB of {features.path}, once: "
                f"about {minutes:.1f} min"
            )
        return features.scan(self._progress)

    def _check_split(self, dataset: str, split: str) -> None:
        config, label = self.config, self.config.label(dataset, split)
        questions, dropped = self._questions[dataset, split], self._dropped[dataset, split]
        self._report(check_report.describe_split(config, dataset, split, questions))
        num_past_end = None
        if dataset in self._features:
            num_past_end = self._try(self._features[dataset].check, questions, self._progress)
        if self._backbone is not None:
            measured = self._try(
                preflight.measure_questions,
                config,
                dataset,
                split,
                questions,
                self._backbone,
                self._prompts[dataset],
                self._cache,
                self._progress,
            )
            if measured is not None:
                self._report(f"{label}: sequences of {measured.lengths.describe()}")
                self._try(
                    check_answers,
                    config,
                    dataset,
                    questions,
                    self._backbone,
                    self._prompts[dataset],
                    self._cache,
                )
                if dropped:
                    self._report(input_notes.usage_note(label, questions, dropped))
                for note in input_notes.problem_notes(
                    config, label, questions, num_past_end or 0, measured
                ):
                    self._report(note)
        self._report_all(check_report.repeated_question_warnings(label, questions))

    def _measure_captions(self, dataset: str) -> None:
        captions = self._captions.get(dataset)
        if not captions or self._backbone is None:
            return
        lengths = self._try(
            preflight.measure_captions,
            self.config,
            captions,
            self._questions[dataset, "train"],
            self._backbone,
            self._prompts[dataset],
            self._cache,
            self._progress,
        )
        if lengths is not None:
            num_used, label = lengths.num_sequences, self.config.label(dataset, "captions")
            self._report(
                f"{label}: {len(captions)}, of which training uses {num_used}; "
                f"whole, sequences of {lengths.describe()}"
            )
            label = self.config.label(dataset, "train")
            self._report_all(input_notes.caption_notes(self.config, label, lengths))

    def _show_samples(self, dataset: str) -> None:
        questions, captions = self._splits(dataset), self._captions.get(dataset, Captions())
        if self._backbone is None or not questions:
            return
        prompts, tokenizer = self._prompts[dataset], self._backbone.tokenizer
        self._report_all(
            check_report.sample_lines(self.config, questions, captions, tokenizer, prompts)
        )

    # Checking where the run starts

    def _check_start(self) -> None:
        """Whether these files continue the run in output_dir, or fit --resume. Raises UserError."""
        config, backbone = self.config, self._backbone
        assert backbone is not None, "there are no errors"
        start = find_start(config)
        recorded = start.checkpoint.fingerprints if start.checkpoint else {}
        fingerprints = self._take_fingerprints(backbone, recorded)
        self._report_all(start.notes)
        if start.checkpoint is None:
            self._report(f"start: a new run in {config.output_dir}")
            return
        num_layers = backbone.weights.config.n_layers
        sizes = (backbone.num_adapted, config.adapter_len, config.max_feats)
        shapes = trainable_shapes(backbone.weights.config, *sizes, common_width(self._features))
        checkpoint = validate_for_model(start.checkpoint, shapes, num_layers)
        self._report_all(checkpoint.notes)
        self._report_all(notes_of_uncompared(checkpoint, fingerprints))
        if config.only_evaluates:
            notes = refuse_other_function(checkpoint, config, fingerprints)
            self._report_all((*notes, *on_other_datasets(checkpoint, config)))
            self._report(f"start: {checkpoint.path} is evaluated on {config.split}")
        else:
            resume = self._describe_resume(checkpoint, fingerprints)
            self._report(f"start: {checkpoint.path}, {resume}")

    def _take_fingerprints(
        self, backbone: BackboneFiles, recorded: Mapping[str, str]
    ) -> dict[str, str]:
        """Reads all weights and features, and compares their checksums. The start then need not."""
        config, own = self.config, training_splits(self.config)
        splits = [config.split] if config.only_evaluates else own
        datasets: dict[str, DatasetInputs] = {}
        for name, features in self._features.items():
            captions = self._captions.get(name, Captions())
            datasets[name] = DatasetInputs(features, self._prompts[name], captions)
        questions = preflight.joined(self._questions, splits)
        sources = fingerprint.Sources(
            backbone.weights, backbone.tokenizer_path, datasets, questions, self._texts.files
        )
        alone = World(0, 1, torch.device("cpu"), None)
        return shared_digests.of_run(
            sources, recorded, self._files, self._cache, alone, config.verify
        )

    def _describe_resume(self, checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> str:
        state = start_state(
            checkpoint, 1, checkpoint.state.questions_per_step, self.config, fingerprints
        )
        if not checkpoint.moments:
            return "a new run from its weights"
        if checkpoint.published_optimizer is not None:
            return f"continues after epoch {checkpoint.published_optimizer.epoch}"
        return f"continues from step {state.step}"


def splits_of(config: RunConfig, dataset: str) -> list[str]:
    """The splits that the run needs, then the others that are present."""
    if config.only_evaluates:
        return [config.split]
    needed = [*training_splits(config), *([config.split] if config.init_eval else [])]
    folder = config.folder_of(dataset)
    annotation_file = find_dataset(dataset, folder).annotation_file
    present = [split for split in check_report.SPLITS if exists(annotation_file(folder, split))]
    return list(dict.fromkeys([*needed, *present]))


if __name__ == "__main__":  # `python -m vico.cli.check`, or this file
    from vico.cli.main import console

    console(command="check")
