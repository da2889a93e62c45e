"""Where a run starts: from nothing, from --resume, or from what its own output_dir holds; and whether it still is that run."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vico.checkpoint import format, published
from vico.checkpoint import read as checkpoints
from vico.checkpoint.format import Checkpoint, TrainState
from vico.errors import CheckpointError, UserError, fail, show
from vico.io.text import read_json_object
from vico.train.config import NOT_IDENTITY, RunConfig


@dataclass(frozen=True)
class Start:
    """`checkpoint`: None starts anew. `notes`: what the user should know, of checkpoints that were passed over for one."""

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    run: str = field(
        default_factory=lambda: uuid.uuid4().hex[:12]
    )  # which run this is, for its checkpoints to say


def find_start(config: RunConfig) -> Start:
    """The checkpoint to start from: of this very run where output_dir holds one, else --resume, else none.

    Raises UserError when output_dir belongs to a run with other settings, CheckpointError when none of its checkpoints can be
    used: a run never starts from zero unasked.
    """
    named = config.resume
    if config.init_eval and named is not None:
        return Start(checkpoints.read(named))
    output_dir = config.output_dir
    if not os.path.exists(output_dir / "args.json"):
        _refuse_foreign(output_dir, config.save_legacy)
        return Start() if named is None else Start(checkpoints.read(named))
    saved = read_args(output_dir / "args.json")
    refuse_changes(
        f"{output_dir}: holds a run with other settings",
        differences(saved, config),
        "choose another --output_dir",
    )
    run = run_of(saved)
    own, latest = format.step_folders(output_dir), format.latest_step(output_dir)
    if not own and latest is not None:
        raise CheckpointError(
            f"{output_dir}: its checkpoints are gone, up to checkpoint-{latest}, which was saved last; put one back, or choose another "
            f"--output_dir, or remove {output_dir / 'args.json'} and the logs beside it to start anew"
        )
    if not own:  # ended before its first save
        return Start(None if named is None else checkpoints.read(named), run=run)
    if named is not None and named not in own[:1] and str(named) != saved.get("resume"):
        raise UserError(
            f"{output_dir}: holds a run that stands at {own[0].name} and did not start from --resume {named}; leave --resume out to go on "
            "there, or choose another --output_dir"
        )
    found = (
        Start(checkpoints.read(own[0], run), run=run)
        if named == own[0]
        else newest_usable(own, output_dir, run)
    )
    best, accuracy = (
        output_dir / "checkpoint_best",
        found.checkpoint.progress.best_accuracy if found.checkpoint else None,
    )
    if accuracy is None or os.path.exists(best):
        return found
    gone = f"{best}: is gone; the best epoch so far had {accuracy:.2%}, and only a better one is saved there again"
    return replace(found, notes=(*found.notes, gone))


def newest_usable(folders: list[Path], output_dir: Path, run: str = "") -> Start:
    """The first of `folders` (newest first) that is whole and of this `run`, every file of it checked."""
    faults: list[str] = []
    latest = format.latest_step(output_dir)
    if latest is not None and f"checkpoint-{latest}" not in {folder.name for folder in folders}:
        faults.append(f"{output_dir / f'checkpoint-{latest}'}: is gone, though it was saved last")
    for folder in folders:
        try:
            found = checkpoints.read(folder, run)
        except CheckpointError as fault:
            faults.append(str(fault).removesuffix(f"; {format.REMEDY}"))
            continue
        return Start(
            found,
            tuple(f"passed over: {fault}" for fault in faults)
            + ((f"using {found.path}",) if faults else ()),
            run,
        )
    raise CheckpointError(
        f"{output_dir}: none of its {len(folders)} checkpoints can be used ({'; '.join(faults)}); choose another --output_dir to start anew"
    )


def _refuse_foreign(output_dir: Path, legacy: bool) -> None:
    """A folder without args.json may hold predictions, but no run: a lineage's log.txt would be rewritten, a checkpoint replaced."""
    names = (
        "log.txt",
        "steps.jsonl",
        "checkpoint_best",
        *((published.BEST_FILE,) if legacy else ()),
    )
    found = next((output_dir / name for name in names if os.path.lexists(output_dir / name)), None)
    found = found or next(iter(format.step_folders(output_dir)), None)
    if found is not None:
        raise UserError(
            f"{found}: is of another program or run (there is no args.json beside it); put that back, or choose another --output_dir"
        )


def read_args(path: Path) -> dict[str, Any]:
    """What the run in this folder was started with. `run` and `resume` are texts, whatever a file says."""
    try:
        saved = read_json_object(path, "args.json")
        if odd := next(
            (name for name in ("run", "resume") if not isinstance(saved.get(name, ""), str | None)),
            None,
        ):
            fail(f"{path}: '{odd}' is {show(saved[odd])}, not a text; correct it")
        return saved
    except UserError as error:
        raise UserError(
            f"{error}, or choose another --output_dir: it cannot be told whose run this folder holds"
        ) from None


def run_of(saved: Mapping[str, Any]) -> str:
    """Which run an args.json is of; empty where it does not say."""
    return str(saved.get("run") or "")


def start_progress(
    start: Checkpoint | None,
    steps_per_epoch: int,
    questions_per_step: int,
    config: RunConfig,
    prints: Mapping[str, str],
) -> TrainState:
    """Where the run stands. Raises UserError when `start` is of a run that this one does not continue.

    `prints`: fingerprints of backbone and data now, as far as they are known, which must be those of the run that wrote `start`.
    """
    if start is None or start.moments is None:
        return with_empty_sums(TrainState(questions_per_step=questions_per_step), config)
    if start.lineage_epoch is not None:
        done = replace(
            start.progress,
            step=(start.lineage_epoch + 1) * steps_per_epoch,
            questions_per_step=questions_per_step,
        )
        return with_empty_sums(done, config)
    saved = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in start.settings.items()
    }
    changed = differences(saved, config) + [
        (name, start.fingerprints.get(name, "none"), value)
        for name, value in prints.items()
        if start.fingerprints.get(name) != value and name.split()[0] not in config.allowed_changes
    ]
    remedy = f"give the same, or start a new run from its weights by --resume {start.path / format.WEIGHTS}"
    refuse_changes(
        f"{start.path}: was written by a run with other settings or files", changed, remedy
    )
    if start.progress.questions_per_step != questions_per_step:
        raise UserError(
            f"{start.path}: its steps took {start.progress.questions_per_step} questions and these would take {questions_per_step}; "
            "choose ranks, --batch_size and --accum_iter with the same product"
        )
    if config.output_dir not in start.path.parents:  # another run's best is not this one's
        return replace(start.progress, best_accuracy=None)
    return start.progress


def with_empty_sums(progress: TrainState, config: RunConfig) -> TrainState:
    return replace(
        progress,
        epoch_loss_sums=[0.0] * len(config.tasks),
        epoch_target_counts=[0] * len(config.tasks),
    )


Change = tuple[str, str, str]  # of a setting or file: (name, what it was, what it is)


def differences(saved: dict[str, Any], now: RunConfig) -> list[Change]:
    """Every setting that defines a run, is not what it was, and may not differ by --allow_change."""
    current = now.to_json()
    return [
        (name, json.dumps(saved.get(name)), json.dumps(current[name]))
        for name in current
        if name not in NOT_IDENTITY
        and name not in now.allowed_changes
        and saved.get(name) != current[name]
    ]


def refuse_changes(where: str, changes: Sequence[Change], remedy: str) -> None:
    """Raises UserError with a table of what changed, if anything did."""
    if changes:
        names = list(dict.fromkeys(name.split()[0] for name, _, _ in changes))
        raise UserError(
            f"{where} ({', '.join(names)}; table below); {remedy}, or allow it by --allow_change {','.join(names)}",
            [("changed", "was", "is"), *changes],
        )
