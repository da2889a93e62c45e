"""Ways in which a user's files go wrong, each a function that spoils a fixture."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.run_fixture import CAPTIONS, FEATURES, NEXTQA, TINY, TOKENIZER, VAL, RunFixture
from vico.cli.convert import convert
from vico.cli.demo_dataset import CSV_COLUMNS
from vico.cli.demo_llama import make_tokenizer
from vico.io.safe_load import load_tensors

Damage = Callable[[RunFixture], Any]
Case = tuple[
    Damage | None, str, int, list[str]
]  # what is spoilt, flags or a command, exit code, parts of the line

HTML = "<!DOCTYPE html><html>Quota exceeded</html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class Payload:
    """Pickled, this is a call of os.mkdir."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("vico-canary",)


def put(name: str, content: str | bytes) -> Damage:
    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda fixture: os.truncate(fixture.folder / name, size)


def flip(name: str, at: int) -> Damage:
    def damage(fixture: RunFixture) -> None:
        content = bytearray((fixture.folder / name).read_bytes())
        content[at] ^= 4
        (fixture.folder / name).write_bytes(content)

    return damage


def gone(name: str) -> Damage:
    return lambda fixture: (fixture.folder / name).unlink()


def folder(name: str) -> Damage:
    return lambda fixture: (fixture.folder / name).mkdir(parents=True)


def pipe(name: str) -> Damage:
    def damage(fixture: RunFixture) -> None:
        (fixture.folder / name).unlink(missing_ok=True)
        os.mkfifo(fixture.folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(fixture: RunFixture) -> None:
        (fixture.folder / name).unlink(missing_ok=True)
        (fixture.folder / name).symlink_to(target)

    return damage


def copy(source: str, target: str) -> Damage:
    def damage(fixture: RunFixture) -> None:
        (fixture.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (fixture.folder / source).is_dir() else shutil.copy)(
            fixture.folder / source, fixture.folder / target
        )

    return damage


def text(name: str, old: str, new: str, encoding: str = "utf-8") -> Damage:
    """The first `old` of a text file replaced."""

    def damage(fixture: RunFixture) -> None:
        content = (fixture.folder / name).read_bytes().decode()
        assert old in content, f"{name} does not hold {old!r}"
        (fixture.folder / name).write_bytes(content.replace(old, new, 1).encode(encoding))

    return damage


def pth(name: str, change: Callable[[Any], Any]) -> Damage:
    """A torch file changed, or replaced by what `change` returns."""

    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / name
        content = load_tensors(path, "the file", [argparse.Namespace], allow_old_format=True)
        changed = change(content)
        torch.save(content if changed is None else changed, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)  # the old one is still mapped

    return damage


def js(name: str, **changes: Any) -> Damage:
    """Keys of a JSON object set, or removed by `...`."""

    def damage(fixture: RunFixture) -> None:
        content = json.loads((fixture.folder / name).read_text()) | changes
        (fixture.folder / name).write_text(
            json.dumps({k: v for k, v in content.items() if v is not ...})
        )

    return damage


def ds(**changes: Any) -> Damage:
    return put("ds.json", json.dumps({"zero_optimization": {"stage": 2}, **changes}))


def both(*damages: Damage) -> Damage:
    return lambda fixture: [damage(fixture) for damage in damages]


def two_shards(*also: Damage) -> Damage:
    """The LLaMA in two files, and in `other` a second model's."""

    def damage(fixture: RunFixture) -> None:
        whole = fixture.folder / TINY
        convert(whole, fixture.folder / "hf")
        convert(fixture.folder / "hf", fixture.folder / "split", to="meta", shards=2)
        weights = load_file(fixture.folder / "hf" / "model.safetensors")
        save_file(
            {name: value * 1.5 for name, value in weights.items()},
            fixture.folder / "hf" / "model.safetensors",
        )
        convert(fixture.folder / "hf", fixture.folder / "other", to="meta", shards=2)
        shutil.rmtree(whole)
        (fixture.folder / "split").rename(whole)
        for change in also:
            change(fixture)

    return damage


# Tables

SOUND = {
    "video": "100000",
    "frame_count": "9",
    "width": "4",
    "height": "3",
    "question": "why",
    "answer": "0",
    "type": "CW",
}
SOUND |= {f"a{k}": text for k, text in enumerate(("clap", "run", "sit", "jump", "bow"))}


def rows(*changes: Mapping[str, str], name: str = VAL) -> Damage:
    """A CSV of sound rows with these changes."""

    def damage(fixture: RunFixture) -> None:
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**SOUND, "qid": str(i), **change} for i, change in enumerate(changes))
        (fixture.folder / name).write_text(out.getvalue(), encoding="utf-8")

    return damage


def star_item(**more: Any) -> dict[str, Any]:
    choices = [{"choice_id": i, "choice": c} for i, c in [(3, "d"), (1, "b"), (0, "a"), (2, "b")]]
    item = {
        "question_id": "Interaction_T1_13",
        "question": "Which?",
        "video_id": "100000",
        "start": 1.5,
        "end": 6.099999999999998,
    }
    return {**item, "answer": "b", "choices": choices, **more}


def tvqa_row(**more: Any) -> dict[str, Any]:
    facts = {
        "answer_idx": 1,
        "q": "Why?",
        "qid": 5,
        "vid_name": "100000",
        "show_name": "Castle",
        "ts": "1.62-2.02",
    }
    return {
        **{f"a{i}": text for i, text in enumerate(("clap", "None", "nan", "NA ", "007"))},
        **facts,
        **more,
    }


SRT = (
    "1\n00:00:01,000 --> 00:00:02,000\n(Ted:) into\n\n2\n00:00:02,000 --> 00:00:02,500\nthe clip\n"
)


def star(val: Any, dump: Callable[[Any], str] = json.dumps) -> Damage:
    """The world as STAR's: `val`, dumped, is its STAR_val.json."""
    return _as(
        "star",
        {
            "STAR_train.json": json.dumps([star_item(question_id="Sequence_1", video_id="000000")]),
            "STAR_val.json": dump(val),
        },
    )


def tvqa(*val: Mapping[str, Any] | str, subtitles: str | None = SRT) -> Damage:
    """The world as TVQA's: `val` are the rows of its tvqa_val.jsonl."""
    lines = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in val)
    files = {
        "tvqa_train.jsonl": json.dumps(tvqa_row(vid_name="000000")) + "\n",
        "tvqa_val.jsonl": lines,
    }
    if subtitles is not None:
        files |= {f"tvqa_subtitles/{video}.srt": subtitles for video in ("000000", "100000")}
    return _as("tvqa", files)


def _as(dataset: str, files: Mapping[str, str]) -> Damage:
    def damage(fixture: RunFixture) -> None:
        target = (fixture.folder / NEXTQA).parent / dataset
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(content, encoding="utf-8")
        for name in (FEATURES, CAPTIONS):
            shutil.copy(fixture.folder / name, target)

    return damage


# Files that are not what they say


def tokenizer(pieces: int) -> Damage:
    return lambda fixture: make_tokenizer(fixture.folder / TOKENIZER, 0, pieces)


def ring() -> list[Any]:
    """A list that holds itself."""
    content: list[Any] = []
    content.append(content)
    return content


def safetensors_of(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def old_format(name: str) -> Damage:
    """A torch file written anew in the format before torch 1.6."""

    def damage(fixture: RunFixture) -> None:
        content = load_tensors(fixture.folder / name, "the file", [argparse.Namespace])
        torch.save(content, fixture.folder / "old", _use_new_zipfile_serialization=False)
        (fixture.folder / "old").replace(fixture.folder / name)

    return damage


def claims(name: str, numbers: int) -> Damage:
    """The first tensor of a torch file says that it has so many numbers; nothing else is changed."""

    def lie(content: bytes, end: bytes) -> bytes:
        found, count = re.subn(
            b"(K.|M..|J....)(" + end + b"tq.Q)",
            b"\x8a\x08" + struct.pack("<q", numbers) + rb"\2",
            content,
            count=1,
            flags=re.DOTALL,
        )
        assert count == 1, "no size of a storage was found"
        return found

    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / name
        if not zipfile.is_zipfile(path):
            path.write_bytes(lie(path.read_bytes(), b"N"))
            return
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(fixture.folder / "new", "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                new.writestr(
                    entry.filename,
                    lie(content, b"") if entry.filename.endswith("data.pkl") else content,
                )
        (fixture.folder / "new").replace(path)

    return damage


def tar(name: str, first: bytes = b"storages") -> Damage:
    """A tar archive, as torch wrote before 0.1.10, with members that lead away; `first`: the first bytes of the file."""

    def damage(fixture: RunFixture) -> None:
        with tarfile.open(fixture.folder / name, "w", format=tarfile.GNU_FORMAT) as archive:
            for member in (first.decode("latin-1"), "../../vico-canary", "/tmp/vico-canary"):
                info = tarfile.TarInfo(member)
                info.size = 4
                archive.addfile(info, io.BytesIO(b"\x80\x02N."))
        content = bytearray((fixture.folder / name).read_bytes())
        content[: len(first)] = first
        (fixture.folder / name).write_bytes(content)

    return damage
