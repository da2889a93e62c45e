"""Which checkpoint a run starts from: none, --resume, or the newest of its own output_dir.

A run never starts anew where a checkpoint exists, and never continues from a checkpoint with other
settings, data or weights, unless the user asks for it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vico.checkpoint.fingerprint import TEXT, data_prefix
from vico.checkpoint.format import WEIGHTS, Checkpoint, TrainState
from vico.data.mixture import dataset_names
from vico.errors import CheckpointError, UserError
from vico.io.output_dir import OutputDir, step_of
from vico.io.paths import exists
from vico.train.bounds import plain, unless_off
from vico.train.config import RunConfig, tasks_of
from vico.train.identity import NOT_IDENTITY
from vico.train.saved_run import (
    Start,
    is_run,
    newest_of,
    newest_usable,
    read_checkpoint,
    read_for_evaluation,
)


def find_start(config: RunConfig) -> Start:
    """The newest checkpoint of this run in output_dir, else --resume, else none.

    Raises UserError when output_dir belongs to a run with other settings, CheckpointError when
    none of its checkpoints can be used.
    """
    output_dir = OutputDir(config.output_dir)
    if config.only_evaluates:
        assert config.resume is not None
        return Start(read_for_evaluation(config.resume))
    if not output_dir.has_run():
        _refuse_foreign_files(output_dir, config.save_legacy)
        return _start_from(config.resume)
    saved = output_dir.read_args()
    own = output_dir.step_checkpoints()
    step = step_of(own[0]) if own else None
    refuse_changes(
        f"{output_dir}: holds a run with other settings",
        differences(saved, config, prolonged=_prolongs(config, saved, step)),
        "choose another --output_dir",
    )
    return _resume_own(config, output_dir, saved)


def keep_max_tokens(config: RunConfig, found: Start, on_gpu: bool) -> RunConfig:
    """`config` with the --max_tokens that its run began with, where the flag is not given.

    Another division into micro-batches adds the same gradients in another order, so that the last
    bits change. A run that began without one goes on by --batch_size; on a GPU the planner would
    choose otherwise.
    """
    output_dir = OutputDir(config.output_dir)
    if config.max_tokens is not None:
        return config
    if output_dir.has_run():
        settings: Mapping[str, Any] = output_dir.read_args()
    elif found.checkpoint is not None and found.checkpoint.moments is not None:
        settings = found.checkpoint.settings
    else:
        return config
    recorded, by_batch_size = settings.get("max_tokens"), 0 if on_gpu else None
    return replace(config, max_tokens=recorded if isinstance(recorded, int) else by_batch_size)


def _start_from(path: Path | None, **fields: Any) -> Start:
    if path is None or not is_run(path):
        return Start(None if path is None else read_checkpoint(path), **fields)
    found = newest_of(path)
    return Start(found.checkpoint, found.notes, **fields)


def _resume_own(config: RunConfig, output_dir: OutputDir, saved: Mapping[str, Any]) -> Start:
    """Continue the run of output_dir, whose args.json is `saved`."""
    run_id = run_id_of(saved)
    own, latest, named = output_dir.step_checkpoints(), output_dir.latest_step(), config.resume
    if named == output_dir.path:  # the folder itself: as without --resume
        named = None
    if not own and latest is not None:
        raise CheckpointError(
            f"{output_dir}: its checkpoints are gone, up to checkpoint-{latest}, which was saved "
            "last; put one back, or choose another --output_dir, or remove "
            f"{output_dir.args} and the logs beside it to start anew"
        )
    if not own:  # the run ended before its first save
        return _start_from(named, run_id=run_id)
    if named is not None and named not in own[:1] and str(named) != saved.get("resume"):
        raise UserError(
            f"{output_dir}: holds a run with {own[0].name} that did not start from --resume "
            f"{named}; leave --resume out to continue that run, or choose another --output_dir"
        )
    if named == own[0]:
        start = Start(read_checkpoint(own[0], run_id), run_id=run_id)
    else:
        start = newest_usable(own, output_dir, run_id)
    return _note_lost_best(start, output_dir)


def _note_lost_best(start: Start, output_dir: OutputDir) -> Start:
    best = output_dir.best_checkpoint
    accuracy = start.checkpoint.state.best_accuracy if start.checkpoint else None
    if accuracy is None or exists(best):
        return start
    note = (
        f"{best}: is gone; the best epoch so far had {accuracy:.2%}, "
        "and only a better one is saved there again"
    )
    return replace(start, notes=(*start.notes, note))


def _refuse_foreign_files(output_dir: OutputDir, save_legacy: bool) -> None:
    """Raises UserError for a folder without args.json that holds a run's files all the same.

    They would be overwritten.
    """
    candidates = [output_dir.epochs, output_dir.steps, output_dir.best_checkpoint]
    if save_legacy:
        candidates.append(output_dir.best_published)
    foreign = [path for path in candidates if os.path.lexists(path)]
    foreign += output_dir.step_checkpoints()
    if foreign:
        raise UserError(
            f"{foreign[0]}: is of another program or run (there is no args.json beside it); "
            "put that back, or choose another --output_dir"
        )


def run_id_of(saved: Mapping[str, Any]) -> str:
    """The id of the run that an args.json describes; empty where it has none."""
    return str(saved.get("run") or "")


def start_state(
    start: Checkpoint | None,
    steps_per_epoch: int,
    questions_per_step: int,
    config: RunConfig,
    fingerprints: Mapping[str, str],
) -> TrainState:
    """The training state to start from. Raises UserError when `start` is of a different run.

    `fingerprints`: of all inputs as they are now. They must be those of the run that wrote `start`.
    """
    fresh = with_empty_sums(TrainState(questions_per_step=questions_per_step), config)
    if start is None:
        return fresh
    if start.published_optimizer is not None:
        step = (start.published_optimizer.epoch + 1) * steps_per_epoch
        return replace(fresh, step=step, num_updates=start.state.num_updates)
    if start.moments is None:
        return fresh
    _refuse_changed_run(start, config, fingerprints, steps_per_epoch)
    if start.state.questions_per_step != questions_per_step:
        raise UserError(
            f"{start.path}: was written with {start.state.questions_per_step} questions per step, "
            f"and this run would have {questions_per_step}; choose ranks, --batch_size and "
            "--accum_iter with the same product"
        )
    state = _with_sums_of(config, start, steps_per_epoch)
    before, now = _evaluated(start.fingerprints), _evaluated(fingerprints)
    if before and now and before != now:  # its best accuracy is of other questions
        state = replace(state, best_accuracy=None)
    if config.output_dir not in start.path.parents:  # another run's best is not this one's
        return replace(state, best_accuracy=None)
    return state


def _with_sums_of(config: RunConfig, start: Checkpoint, steps_per_epoch: int) -> TrainState:
    """The state of `start` with a loss sum for each task of `config`.

    --allow_change may change the tasks, but not inside an epoch: the log has one line for all of
    its steps. Raises UserError there.
    """
    state = start.state
    before = tasks_of(start.settings)
    if before == config.tasks:
        return state
    if state.step % steps_per_epoch == 0 and not state.evaluation_due:
        return with_empty_sums(state, config)
    raise UserError(
        f"{start.path}: is inside an epoch with {len(before)} task(s), and this run has "
        f"{len(config.tasks)}; {', '.join(before)} -> {', '.join(config.tasks)}: change the tasks "
        "from a checkpoint at the end of an epoch"
    )


def with_empty_sums(state: TrainState, config: RunConfig) -> TrainState:
    """`state` at the beginning of an epoch."""
    num_tasks = len(config.tasks)
    return replace(state, epoch_loss_sums=[0.0] * num_tasks, epoch_target_counts=[0] * num_tasks)


# Fingerprints that each checkpoint has had since there are any. Later ones may be missing.
RECORDED_FIRST = (
    "backbone",
    "data train questions",
    "data val questions",
    "data captions",
    "data features",
)
# How the fingerprints end that depend on the splits; the words before say of which.
OF_SPLITS = (" questions", " features", " captions")
OF_TRAINED_CAPTIONS = " train captions"
Change = tuple[str, str, str]  # (name of the setting or file, what it was, what it is)


def _refuse_changed_run(
    start: Checkpoint, config: RunConfig, fingerprints: Mapping[str, str], steps_per_epoch: int
) -> None:
    saved = {name: plain(value) for name, value in start.settings.items()}
    run = {**saved, "steps_per_epoch": steps_per_epoch}
    prolonged = _prolongs(config, run, start.state.step)
    compared = _of_training(start, fingerprints)
    changes = differences(saved, config, prolonged) + _changed_files(start, config, compared)
    refuse_changes(
        f"{start.path}: was written by a run with other settings or files",
        changes,
        f"give the same, or start a new run from its weights by --resume {start.path / WEIGHTS}",
    )


def _of_training(start: Checkpoint, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """What of `fingerprints` to compare: where `start` was evaluated on another split, or where one
    of both runs is not evaluated, all but what belongs to evaluated splits.
    """
    compared = dict(fingerprints)
    are_recorded = any(name.endswith(" train features") for name in start.fingerprints)
    if are_recorded and _evaluated(start.fingerprints) != _evaluated(fingerprints):
        for name in fingerprints:
            if name.endswith(OF_SPLITS) and " train " not in name:
                del compared[name]
    return compared


def _evaluated(fingerprints: Mapping[str, str]) -> set[str]:
    """The splits of a training run besides train."""
    words = [name.split() for name in fingerprints if name.endswith(" questions")]
    return {split for *_, split, _ in words} - {"train"}


def _changed_files(
    start: Checkpoint, config: RunConfig, fingerprints: Mapping[str, str]
) -> list[Change]:
    """What `start` recorded otherwise, and --allow_change does not permit."""
    uncompared = _uncompared(start, fingerprints)
    if bool(start.settings.get("cap")) != bool(config.cap):
        # They are read on one side only.
        uncompared += [name for name in fingerprints if name.endswith(" captions")]
    return [
        (name, start.fingerprints.get(name, "none"), now)
        for name, now in fingerprints.items()
        if name not in uncompared
        and start.fingerprints.get(name) != now
        and name.split()[0] not in config.allowed_changes
    ]


def _uncompared(start: Checkpoint, fingerprints: Mapping[str, str]) -> list[str]:
    """What earlier versions did not record. The first did not know several data sets (a colon)."""
    recorded = {*start.fingerprints, *RECORDED_FIRST}
    unknown = () if _has_trained_captions(start) else OF_TRAINED_CAPTIONS
    return [
        name
        for name in fingerprints
        if name not in recorded and (":" not in name or name.endswith(unknown))
    ]


def _has_trained_captions(start: Checkpoint) -> bool:
    return any(name.endswith(OF_TRAINED_CAPTIONS) for name in start.fingerprints)


def with_text_of(start: Checkpoint | None, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """`fingerprints`, and that of the texts of the run that goes on where none are read now.

    A start without --text would otherwise let the next one measure others under the same curve.
    """
    before = start.fingerprints if start is not None and start.moments is not None else {}
    return {**({TEXT: before[TEXT]} if TEXT in before else {}), **fingerprints}


def notes_of_uncompared(start: Checkpoint, fingerprints: Mapping[str, str]) -> list[str]:
    """Notes where a checkpoint of this program lacks what is compared today."""
    names = _uncompared(start, fingerprints) if start.fingerprints else []
    functional = [name for name in names if not name.startswith("data")]
    notes = []
    if functional:
        notes.append(
            f"note: {start.path}: an earlier version wrote it and did not record "
            f"{', '.join(functional)}: these are not compared"
        )
    trains = any(name.endswith(" train questions") for name in fingerprints)
    if trains and start.fingerprints and _of_training(start, fingerprints) != fingerprints:
        before, now = (
            ", ".join(sorted(_evaluated(of))) or "no split"
            for of in (start.fingerprints, fingerprints)
        )
        compared = (
            "questions, their features and captions are compared"
            if _has_trained_captions(start)
            else "questions and their features are compared, and captions are not"
        )
        notes.append(
            f"note: {start.path}: epochs were evaluated on {before}, and are on {now} now: of the "
            f"data, training {compared}"
        )
    return notes


def refuse_other_function(
    start: Checkpoint, config: RunConfig, fingerprints: Mapping[str, str]
) -> list[str]:
    """Refuse to evaluate `start` with another backbone, tokenizer or features than it has seen.

    Other questions may be asked: that is noted where they are of the split that its own run
    evaluated. Raises UserError; --allow_change permits it. `fingerprints`: of the evaluated split,
    or of the backbone alone.
    """
    if not start.fingerprints:  # it is a file that records none
        return []
    compared = {name: v for name, v in fingerprints.items() if not name.startswith("data")}
    own_names, notes = dataset_names(start.settings.get("dataset") or config.dataset), []
    for name in config.dataset_names:
        own = f"{data_prefix(name, len(own_names))} {config.split}"  # of the run that wrote it
        now = f"{data_prefix(name, len(config.datasets))} {config.split}"
        is_known = name in own_names and f"{own} questions" in start.fingerprints
        if not is_known or f"{now} questions" not in fingerprints:
            continue
        if start.fingerprints[f"{own} questions"] == fingerprints[f"{now} questions"]:
            compared[f"{own} features"] = fingerprints[f"{now} features"]
        else:
            notes.append(
                f"note: the {config.label(name, config.split)} questions are not those of the run "
                f"that wrote {start.path}: its accuracies are of others"
            )
    refuse_changes(
        f"{start.path}: was trained with other files",
        _changed_files(start, config, compared),
        "evaluate it with those",
    )
    return notes


def _prolongs(config: RunConfig, saved: Mapping[str, Any], step: int | None) -> bool:
    """Whether `config` has more epochs than a run of `saved` settings that has done all of its own.

    `saved` has the run's steps_per_epoch, as args.json does. `step`: of its newest checkpoint.
    """
    epochs, per_epoch = saved.get("epochs"), saved.get("steps_per_epoch")
    if step is None or not isinstance(epochs, int) or not isinstance(per_epoch, int):
        return False
    return config.epochs > epochs and step >= epochs * per_epoch


def differences(
    saved: Mapping[str, Any], config: RunConfig, prolonged: bool = False
) -> list[Change]:
    """Every setting that defines a run, has changed, and is not allowed to by --allow_change.

    `prolonged`: the run is complete, and is to have more epochs.
    """
    may_differ = {*NOT_IDENTITY, *config.allowed_changes, *(["epochs"] if prolonged else [])}
    before = {name: unless_off(name, value) for name, value in saved.items()}
    return [
        (name, json.dumps(before.get(name)), json.dumps(value))
        for name, value in config.to_json().items()
        if name not in may_differ and before.get(name) != value
    ]


def refuse_changes(where: str, changes: Sequence[Change], remedy: str) -> None:
    """Raises UserError with a table of `changes`, if there are any."""
    if changes:
        names = list(dict.fromkeys(name.split()[0] for name, _, _ in changes))
        raise UserError(
            f"{where} ({', '.join(names)}; table below); {remedy}, "
            f"or allow it by --allow_change {','.join(names)}",
            [("changed", "was", "is"), *changes],
        )
