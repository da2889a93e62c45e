"""Files changed at random: every reader takes them or refuses them in one line, and never ends in anything else."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from faults.damage import SRT, old_format, star, star_item, tvqa, tvqa_row
from faults.result import Result, Scale
from support.processes import PYTHONPATH
from support.run_fixture import (
    CAPTIONS,
    CHECKPOINT,
    FEATURES,
    NEXTQA,
    OPTIMIZER,
    PARAMS,
    SHARD,
    STATE,
    TINY,
    TOKENIZER,
    VAL,
    RunFixture,
    make_run_fixture,
)
from support.warm_process import WarmProcess
from vico.checkpoint import format
from vico.cli.convert import convert
from vico.cli.flags import parse
from vico.data.datasets import read_questions
from vico.data.features import Features
from vico.data.readers import captions
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.errors import UserError
from vico.io.output_dir import OutputDir
from vico.model.weights.load import open_weights
from vico.train.config import RunConfig
from vico.train.ds_config import read_config
from vico.train.resume import differences, read_checkpoint

NAME = "fuzz"
TITLE = "fuzzed tables, JSON, YAML, headers and .pth bytes: taken, or refused in one line"
MINUTES = (0.6, 10.2)
SECONDS = {True: 25.0, False: 600.0}
PROCESSES = 2
TOO_LONG, LONGEST = 10.0, 1500  # seconds of a single file, characters of a line
LOG = "fuzz.jsonl"
TOKENS = [
    *(
        b'"',
        b"NaN",
        b"\n",
        b"[[",
        b"{",
        b"}",
        b"]",
        b",",
        b":",
        b"null",
        b"1e999",
        b"\\ud800",
        b"\0",
        b"\r",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
    ),
    *(
        b"-1",
        b"99999999999999999999",
        b"true",
        b"../../x",
        b"\x1b[2J",
        b"<html>",
        b"PK\x03\x04",
        b"&a",
        b"*a",
        b"!!python/name:os.system",
    ),
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    "x" * 3000,
    "\ud800",
    "../../x",
    [],
    {},
    [[[]]],
    {"a": None},
    0.5,
    "nan",
    "\n\x1b[2J",
]


@dataclass(frozen=True)
class Target:
    """A file of the fixture, and what reads it."""

    file: str
    read: Callable[[Path], object]  # of the fixture's folder
    is_json: bool = False
    with_checksum: bool = (
        False  # a state.json, which vouches for itself: also with a seal that fits
    )


def targets(fixture: RunFixture) -> dict[str, Target]:
    """Makes it a fixture that has everything: STAR's, TVQA's and Hugging Face's files too."""
    for damage in (
        star([star_item(), star_item(question_id="A_1")]),
        tvqa(tvqa_row(), tvqa_row(qid=6), subtitles=SRT),
    ):
        damage(fixture)
    convert(fixture.folder / TINY, fixture.folder / "hf")
    shutil.copy(fixture.folder / "lineage.pth", fixture.folder / "old.pth")
    old_format("old.pth")(fixture)
    (fixture.folder / "r.yaml").write_text(
        "lr: 1e-3\nvaq: true\nmodel: 7B\ncaptions: x.json\nepochs: 3\n# note\nadapter_layer: null\n"
    )
    shutil.copy(
        Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json",
        fixture.folder / "ds.json",
    )
    return _targets()


def _targets() -> dict[str, Target]:
    data = "world/data"
    return {
        "NExT-QA's CSV": Target(VAL, lambda f: read_questions("nextqa", f / NEXTQA, "val")),
        "STAR's JSON": Target(
            f"{data}/star/STAR_val.json",
            lambda f: read_questions("star", f / data / "star", "val"),
            is_json=True,
        ),
        "TVQA's JSON lines": Target(
            f"{data}/tvqa/tvqa_val.jsonl",
            lambda f: read_questions("tvqa", f / data / "tvqa", "val"),
        ),
        "subtitles": Target(
            f"{data}/tvqa/tvqa_subtitles/100000.srt",
            lambda f: read_questions("tvqa", f / data / "tvqa", "val", True),
        ),
        "captions": Target(CAPTIONS, lambda f: captions.read(f / NEXTQA, None), is_json=True),
        "features": Target(FEATURES, lambda f: _use_features(f / FEATURES)),
        "params.json": Target(PARAMS, lambda f: open_weights(f / TINY, 560), is_json=True),
        "shard": Target(SHARD, lambda f: open_weights(f / TINY, 560)),
        "config.json": Target(
            "hf/config.json", lambda f: open_weights(f / "hf", 560), is_json=True
        ),
        "safetensors of weights": Target(
            "hf/model.safetensors", lambda f: open_weights(f / "hf", None)
        ),
        "tokenizer": Target(
            TOKENIZER, lambda f: Tokenizer(f / TOKENIZER).encode_with_ends("Why (A)?\n")
        ),
        "lineage": Target("lineage.pth", lambda f: read_checkpoint(f / "lineage.pth")),
        "lineage in the old format": Target("old.pth", lambda f: read_checkpoint(f / "old.pth")),
        "state.json": Target(
            STATE, lambda f: read_checkpoint(f / CHECKPOINT), is_json=True, with_checksum=True
        ),
        "optimizer's state": Target(OPTIMIZER, lambda f: read_checkpoint(f / CHECKPOINT)),
        "adapter as safetensors": Target(OPTIMIZER, lambda f: read_checkpoint(f / OPTIMIZER)),
        "args.json": Target(
            "run/args.json", lambda f: _use_args(f / "run" / "args.json"), is_json=True
        ),
        "ds_config": Target(
            "ds.json", lambda f: read_config(str(f / "ds.json"), "bf16", 1, 1, 1), is_json=True
        ),
        "recipe": Target(
            "r.yaml", lambda f: parse(["--config", str(f / "r.yaml")], "vico train", "").resolve()
        ),
    }


def _use_features(path: Path) -> None:
    features = Features(path)
    asked = [
        Question(0, "0", "100000", "", "", ("a",), 0, (0, 9)),
        Question(1, "1", "000002", "", "", ("a",), 0),
    ]
    features.check(asked)
    features.check_finite(asked, 10)
    features.scan()


def _use_args(path: Path) -> None:
    saved = OutputDir(path.parent).read_args()
    differences(saved, RunConfig())
    Path(saved.get("resume") or ".")


def run(scale: Scale) -> Result:
    with WarmProcess() as warm:
        fixture = make_run_fixture(scale.folder / "fixture", warm)
    every = targets(fixture)
    faults = [
        f"{name}: {fault}, though nothing is wrong"
        for name, target in every.items()
        if (fault := _fault(target, fixture.folder, True))
    ]
    tried: dict[str, int] = {}
    seconds = SECONDS[scale.quick]
    children = [
        _start(fixture.copy(scale.folder / str(i)), f"{scale.seed} {i}", seconds)
        for i in range(PROCESSES)
    ]
    for i, child in enumerate(children):
        try:
            child.wait(timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        lines = (scale.folder / str(i) / LOG).read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            tried = {
                name: tried.get(name, 0) + n for name, n in record.get("tried", {}).items()
            } or tried
            faults += [record["fault"]] if "fault" in record else []
        if child.returncode != 0:
            faults.append(
                f"process {i} was ended by {child.returncode}; the file it was at is lost"
            )
    total = max(1, sum(tried.values()), len(faults))
    return Result(
        total - len(faults),
        total,
        {"files_tried": tried, "seed": scale.seed, "failures": faults[:50]},
    )


def _start(fixture: RunFixture, seed: str, seconds: float) -> "subprocess.Popen[bytes]":
    """A process of its own that tries files until the time is over: a crash costs one process, and is seen."""
    words = [sys.executable, "-m", "faults.scenario_fuzz", str(fixture.folder), seed, str(seconds)]
    return subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        cwd=Path(__file__).resolve().parents[2],
    )


def main(folder: Path, seed: str, seconds: float) -> None:
    signal.signal(signal.SIGALRM, _ring)
    with (folder / LOG).open("w", encoding="utf-8") as log:
        tried = fuzz(
            _targets(),
            RunFixture(folder),
            random.Random(seed),
            seconds,
            lambda fault: _write(log, {"fault": fault}),
        )
        _write(log, {"tried": tried})


def _write(log: Any, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


def _ring(number: int, frame: object) -> NoReturn:
    raise TimeoutError(f"took more than {TOO_LONG:.0f} s")


def fuzz(
    every: dict[str, Target],
    fixture: RunFixture,
    rng: random.Random,
    seconds: float,
    report: Callable[[str], None],
) -> dict[str, int]:
    """How many files of each kind were tried."""
    sound = {name: (fixture.folder / target.file).read_bytes() for name, target in every.items()}
    tried, end, parent = dict.fromkeys(every, 0), time.monotonic() + seconds, os.getppid()
    while (
        time.monotonic() < end and os.getppid() == parent
    ):  # nobody waits for it when its parent is gone
        for name, target in every.items():
            content = changed(sound[name], target, rng)
            path = fixture.folder / target.file
            path.write_bytes(content)
            signal.setitimer(signal.ITIMER_REAL, TOO_LONG)
            fault = _fault(target, fixture.folder)
            signal.setitimer(signal.ITIMER_REAL, 0)
            path.unlink()  # not written again in place: it may still be mapped
            path.write_bytes(sound[name])
            tried[name] += 1
            if fault is not None:
                report(f"{name}: {fault}, of {content[:400].hex()}")
    return tried


def _fault(target: Target, folder: Path, sound: bool = False) -> str | None:
    """What is wrong with how the file is taken; `sound`: being refused is wrong, too."""
    try:
        target.read(folder)
    except UserError as refusal:
        text = str(refusal)
        return (
            f"refused ({text})"
            if sound
            else None
            if len(text) < LONGEST
            else f"a line of {len(text)} characters: {text[:200]}"
        )
    except BaseException as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return None


def changed(content: bytes, target: Target, rng: random.Random) -> bytes:
    if target.is_json and rng.random() < 0.5:
        content = _other_json(content, target.with_checksum, rng)
        if rng.random() < 0.7:
            return content
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = rng.randrange(len(content) + 1), rng.choice((0, 1, 2, 8, 200, 5000))
        if rng.random() < 0.3:  # the ends have headers and directories
            at = rng.choice(
                (
                    rng.randrange(min(200, len(content) + 1)),
                    max(0, len(content) - rng.randrange(200)),
                )
            )
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content = (
                content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
            )
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + rng.choice(TOKENS) + content[at + size :]
        elif kind == 3:
            content = content[:at] + rng.randbytes(size) + content[at:]
        else:
            content = content[:at] + content[at + size :]
    return content


def _other_json(content: bytes, with_checksum: bool, rng: random.Random) -> bytes:
    """One value, or key, of a JSON text put in another's place; of a state.json with the seal that then fits."""
    value = json.loads(content)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3:
        moved = node.pop(key)
        if rng.random() < 0.5:
            node[rng.choice(["x", "", "\n", "../x"])] = moved
    else:
        node[key] = rng.choice([*VALUES, rng.choice(places)[1]])
    if with_checksum:
        value.pop("sha256", None)
        return format.with_checksum(value).encode()
    return json.dumps(value).encode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
