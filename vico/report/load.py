"""What the folder of a run holds, read as far as it goes. What is missing or damaged is a note."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vico.data.mixture import dataset_names
from vico.errors import UserError, fail, one_line
from vico.io.output_dir import OutputDir, step_of
from vico.io.paths import entries, exists, is_file, is_folder
from vico.io.text import json_kind, parse_json, read_json_lines, read_json_object
from vico.train.heat_map import LARGEST, gate_values
from vico.train.predictions import read_readable_predictions
from vico.train.run_log import Record, read_records_and_damage
from vico.train.saved_run import is_run, newest_of

PREDICTIONS = re.compile(r"predictions_(?:(?P<datasets>.+)_)?(?P<split>[^_]+)\.jsonl")
CAPTIONS = re.compile(r"captions_(?:(?P<datasets>.+)_)?(?P<split>[^_]+)\.jsonl")
# Curves that only TensorBoard's files have.
PERFORMANCE = ("memory/", "perf/eval_questions_per_second", "perf/save_seconds")
MAX_NUMBER = 1e200  # millions of them have a sum
NO_RUN = (
    "holds no run (no args.json, log.txt, steps.jsonl, cognition.json, predictions_SPLIT.jsonl or "
    "captions_SPLIT.jsonl)"
)


@dataclass(frozen=True)
class PredictionSet:
    """A run's predictions on a split of a data set. `dataset` is None where no file names it."""

    dataset: str | None
    split: str
    file: str
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Caption:
    dataset: str | None
    split: str
    video: str
    text: str
    references: list[str]
    is_cut: bool = False  # it has as many tokens as were allowed, and no end


@dataclass(frozen=True)
class Gates:
    """`values`: by gate ("gate1", "gate2") the share or logit of each head, [layers, heads]."""

    checkpoint: str
    step: int
    values: dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class GatesOverTime:
    """What log.txt says of the gates. `values`: by gate [evaluations, layers, heads]."""

    steps: list[float]
    layers: list[int]
    values: dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """All that the report shows of a run. Each part may be empty; `notes` say why."""

    name: str
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)  # args.json
    steps: list[Record] = field(default_factory=list)  # steps.jsonl
    epochs: list[Record] = field(default_factory=list)  # log.txt
    predictions: list[PredictionSet] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    cognition: dict[str, Any] = field(default_factory=dict)  # cognition.json
    gates: Gates | None = None
    gates_over_time: GatesOverTime | None = None
    # By name of a curve the values that were logged, in order.
    performance: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def number(value: object) -> float | None:
    """A number of a log that can be drawn and summed up; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < MAX_NUMBER else None  # False for NaN, too


def accuracy_of(record: Record, name: str = "acc") -> tuple[float, float | None] | None:
    """(accuracy, number of questions) of an epoch, of whichever split it evaluated.

    `name`: acc, or DATASET_acc of a mixture. None: the line has no such accuracy.
    """
    for split in ("val", "test"):
        accuracy = number(record.get(f"{split}_{name}"))
        if accuracy is not None and 0 <= accuracy <= 1:
            return accuracy, number(record.get(f"{split}_{name.removesuffix('acc')}n"))
    return None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders. Raises UserError for one that holds no run, or is named twice."""
    for path in paths:
        _require_run(path)
    resolved = [path.resolve() for path in paths]
    if twice := [path for path in resolved if resolved.count(path) > 1]:
        fail(f"{twice[0]}: is named twice; name each run once")
    names = run_names(resolved)
    return [_load(path, name) for path, name in zip(resolved, names, strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, the folders' names if possible."""
    longest = max(len(path.parts) for path in paths)
    names: list[str] = []
    for length in range(1, longest + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _require_run(path: Path) -> None:
    if not exists(path):
        fail(f"{path}: no such folder; name the --output_dir of a run")
    if not is_folder(path):
        fail(f"{path}: is a file, not a folder; name the --output_dir of a run")
    if exists(path / "state.json"):
        fail(f"{path}: is a checkpoint; name the folder of its run, {path.parent}")
    run = OutputDir(path)
    files = [run.args, run.steps, run.epochs, run.cognition]
    if not any(map(exists, files)) and not _named(path, PREDICTIONS) and not _named(path, CAPTIONS):
        fail(f"{path}: {NO_RUN}; name the --output_dir of a run")


def _named(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """The files of a folder whose whole name fits, with the match."""
    matches = ((path, pattern.fullmatch(path.name)) for path in entries(folder, "*.jsonl"))
    return [(path, match) for path, match in matches if match is not None]


def _load(path: Path, name: str) -> Run:
    run, notes = OutputDir(path), list[str]()
    settings = _settings(run, notes)
    epochs = _records(run.epochs, "the results of each epoch", notes)
    return Run(
        name,
        path,
        settings,
        _records(run.steps, "the curves of training", notes),
        epochs,
        _predictions(path, settings, notes),
        _captions(path, notes),
        _cognition(run, notes),
        _gates(path, notes),
        _gates_over_time(epochs, notes),
        _performance(run.tensorboard, notes),
        notes,
    )


def _settings(run: OutputDir, notes: list[str]) -> dict[str, Any]:
    if not run.has_run():
        notes.append("no args.json, so its settings are unknown (an evaluation alone writes none)")
        return {}
    return _object(run.args, "the settings of the run", "its settings are", notes)


def _cognition(run: OutputDir, notes: list[str]) -> dict[str, Any]:
    if not exists(run.cognition):
        return {}
    what = "what `vico cognition` has measured"
    return _object(run.cognition, what, f"{what} is", notes)


def _object(path: Path, what: str, they_are: str, notes: list[str]) -> dict[str, Any]:
    """The file's JSON object; empty, with a note that `they_are` not shown, where it is damaged."""
    try:
        return read_json_object(path, what)
    except UserError as error:
        notes.append(f"{they_are} not shown: {error}")
        return {}


def _records(path: Path, what: str, notes: list[str]) -> list[Record]:
    if not exists(path):
        notes.append(f"no {path.name}, so {what} are not shown")
        return []
    try:
        records, num_damaged = read_records_and_damage(path)
    except UserError as error:
        notes.append(f"{what} are not shown: {error}")
        return []
    if num_damaged:
        notes.append(f"{path.name}: {num_damaged} damaged line(s) left out")
    if not records:
        notes.append(f"{path.name} has no line yet, so {what} are not shown")
    by_step = {record["step"]: record for record in records}  # a repeated step: the last counts
    return [by_step[step] for step in sorted(by_step)]


def _predictions(folder: Path, settings: dict[str, Any], notes: list[str]) -> list[PredictionSet]:
    found = []
    named = _named(folder, PREDICTIONS)
    named.sort(key=lambda file: file[1]["datasets"] is not None)  # the run's own first
    for path, match in named:
        try:
            records, faults = read_readable_predictions(path)
        except UserError as error:
            notes.append(f"{path.name} is not shown: {error}")
            continue
        if faults:
            notes.append(f"{path.name}: {len(faults)} damaged line(s) left out, first: {faults[0]}")
        names = match["datasets"].split("+") if match["datasets"] else trained_datasets(settings)
        for dataset, of_set in _by_dataset(records, names).items():
            found.append(PredictionSet(dataset, match["split"], path.name, of_set))
    if not found:
        notes.append("no predictions_SPLIT.jsonl: it has not been evaluated yet")
    return found


def trained_datasets(settings: dict[str, Any]) -> list[str]:
    """Those of args.json; empty where it does not say."""
    try:
        return list(dataset_names(settings["dataset"]))
    except (KeyError, AttributeError, UserError):
        return []


def _by_dataset(
    records: Iterable[dict[str, Any]], names: Sequence[str]
) -> dict[str | None, list[dict[str, Any]]]:
    """Lines by data set: the line's own `dataset`, else the only one of `names`."""
    default = names[0] if len(names) == 1 else None
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for record in records:
        dataset = record.get("dataset", default)
        groups.setdefault(dataset if isinstance(dataset, str) else None, []).append(record)
    return groups


def _captions(folder: Path, notes: list[str]) -> list[Caption]:
    captions: list[Caption] = []
    for path, match in _named(folder, CAPTIONS):
        parse = partial(_caption, path, match["split"])
        try:
            of_file, faults = read_json_lines(path, "the captions", parse)
        except UserError as error:
            notes.append(f"{path.name} is not shown: {error}")
            continue
        captions += of_file
        if faults:
            notes.append(f"{path.name}: {len(faults)} damaged line(s) left out, first: {faults[0]}")
    by_video = {(one.dataset, one.split, one.video): one for one in captions}
    if repeated := len(captions) - len(by_video):
        notes.append(f"{repeated} caption(s) left out: of a video with several the last is shown")
    return list(by_video.values())


def _caption(path: Path, split: str, line: str, line_number: int) -> Caption:
    record, place = parse_json(line, path, line_number), f"{path.name}:{line_number}"
    if not isinstance(record, dict):
        fail(f"{place}: {json_kind(record)} where an object is expected")
    dataset, references = record.get("dataset"), record.get("references", [])
    texts = [record.get("video"), record.get("caption")]
    if isinstance(references, list):
        texts += references
    if not isinstance(references, list) or not all(isinstance(text, str) for text in texts):
        fail(f"{place}: 'video', 'caption' and each of 'references' must be texts")
    dataset = dataset if isinstance(dataset, str) else None
    is_cut = record.get("is_cut") is True
    return Caption(dataset, split, record["video"], record["caption"], references, is_cut)


def _gates(folder: Path, notes: list[str]) -> Gates | None:
    """Of the newest usable checkpoint. It is read by safetensors: nothing in it is executed."""
    try:
        if not is_run(folder):
            notes.append("no checkpoint here, so its gates are not shown")
            return None
        checkpoint = newest_of(folder).checkpoint
        assert checkpoint is not None
    except UserError as error:
        notes.append(f"its gates are not shown: {error}")
        return None
    values = {}
    for kind in LARGEST:
        gates = gate_values(checkpoint.weights, kind)
        if gates is not None:
            values[kind] = gates
    if not values:
        notes.append(f"{checkpoint.path.name} has no gates")
        return None
    step = step_of(checkpoint.path)
    return Gates(checkpoint.path.name, checkpoint.state.step if step is None else step, values)


def _gates_over_time(epochs: Sequence[Record], notes: list[str]) -> GatesOverTime | None:
    """Of the lines of log.txt that have gates of the model's shape."""
    read = [(number(record["step"]), _logged_gates(record)) for record in epochs]
    found = [(step, gates) for step, gates in read if step is not None and gates is not None]
    if not found:
        if any("gates" in record for record in epochs):
            notes.append("log.txt: the gates of all lines are damaged")
        elif epochs:
            notes.append(
                "log.txt has no gates (it is of an earlier version), so how they opened "
                "over time is not shown"
            )
        return None
    layers, last = found[-1][1]
    fitting = [
        (step, values)
        for step, (of, values) in found
        if of == layers and values["gate1"].shape == last["gate1"].shape
    ]
    if left_out := len(epochs) - len(fitting):
        notes.append(f"log.txt: the gates of {left_out} line(s) are absent or damaged")
    steps, of_steps = [step for step, _ in fitting], [values for _, values in fitting]
    values = {kind: np.stack(list(map(itemgetter(kind), of_steps))) for kind in LARGEST}
    return GatesOverTime(steps, layers, values)


def _logged_gates(record: Record) -> tuple[list[int], dict[str, npt.NDArray[np.float64]]] | None:
    """(layers, by gate [layers, heads]) of a line; None where it has not both, of one shape."""
    values = {}
    try:
        layers = [list(record["gates"][kind]) for kind in LARGEST]
        for kind in LARGEST:
            rows = [list(map(number, row)) for row in record["gates"][kind].values()]
            values[kind] = np.array(rows, dtype=np.float64)  # a None becomes NaN
        numbers = [int(layer) for layer in layers[0]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    shapes = {array.shape for array in values.values()}
    is_whole = all(array.ndim == 2 and np.isfinite(array).all() for array in values.values())
    if len(shapes) > 1 or layers[0] != layers[1] or not is_whole or not values["gate1"].size:
        return None
    return numbers, values


def _performance(folder: Path, notes: list[str]) -> dict[str, list[float]]:
    """The values of PERFORMANCE in the event files of TensorBoard, without its other curves."""
    curves: dict[str, list[float]] = {}
    for path in entries(folder, "events.out.tfevents.*"):
        if not is_file(path):  # a pipe, whose reader would wait for ever
            continue
        try:
            for tag, value in _events(path):
                curves.setdefault(tag, []).append(value)
        except Exception as problem:  # whatever its library says of a damaged file
            reason = one_line(str(problem) or type(problem).__name__)
            notes.append(f"runs/{path.name} is shown up to where it is damaged or ends ({reason})")
    return curves


def _events(path: Path) -> Iterable[tuple[str, float]]:
    # TensorBoard's own loaders end without a word where a file is damaged; its reader does not.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    names = [name.encode() for name in PERFORMANCE]
    reader = PyRecordReader_New(str(path))
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return
        raw = reader.record()
        if any(name in raw for name in names):
            for value in Event.FromString(raw).summary.value:
                plain = number(value.simple_value)
                if value.tag.startswith(PERFORMANCE) and plain is not None:
                    yield value.tag, plain


def all_notes(runs: Iterable[Run]) -> list[str]:
    """The notes of all runs, each with the name of its run."""
    notes = []
    for run in runs:
        notes += [f"{run.name}: {note}" for note in run.notes]
    return notes
