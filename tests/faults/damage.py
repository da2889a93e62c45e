"""Ways in which a user's files go wrong: functions that return a change of a fixture."""

import argparse
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from support.run_fixture import TINY, TOKENIZER, RunFixture
from vico.cli.convert import convert
from vico.cli.demo_dataset import DOMAIN
from vico.cli.demo_llama import make_tokenizer
from vico.io.safe_load import load_tensors

Damage = Callable[[RunFixture], Any]

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
        path = fixture.folder / source
        (fixture.folder / target).parent.mkdir(parents=True, exist_ok=True)
        copy_any = shutil.copytree if path.is_dir() else shutil.copy
        copy_any(path, fixture.folder / target)

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
        path = fixture.folder / name
        content = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        path.write_text(json.dumps(kept))

    return damage


def ds(**changes: Any) -> Damage:
    return put("ds.json", json.dumps({"zero_optimization": {"stage": 2}, **changes}))


def both(*damages: Damage) -> Damage:
    return lambda fixture: [damage(fixture) for damage in damages]


def two_shards(*also: Damage) -> Damage:
    """The LLaMA in two files, and in `other` a second model's."""

    def damage(fixture: RunFixture) -> None:
        one_file, hf = fixture.folder / TINY, fixture.folder / "hf"
        convert(one_file, hf)
        convert(hf, fixture.folder / "split", to="meta", shards=2)
        weights = load_file(hf / "model.safetensors")
        others = {name: value * 1.5 for name, value in weights.items()}
        save_file(others, hf / "model.safetensors")
        convert(hf, fixture.folder / "other", to="meta", shards=2)
        shutil.rmtree(one_file)
        (fixture.folder / "split").rename(one_file)
        for change in also:
            change(fixture)

    return damage


def hugging_face(*also: Damage) -> Damage:
    """The LLaMA in Hugging Face's layout, with its own tokenizer."""

    def damage(fixture: RunFixture) -> None:
        folder = fixture.folder / TINY
        convert(folder, fixture.folder / "hf")
        shutil.rmtree(folder)
        (fixture.folder / "hf").rename(folder)
        (fixture.folder / TOKENIZER).rename(folder / "tokenizer.model")
        for change in also:
            change(fixture)

    return damage


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """The safetensors of `hugging_face` after `change`."""

    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / TINY / "model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return damage


def as_torch_files(num_files: int = 1) -> Damage:
    """The safetensors of `hugging_face` as pytorch_model*.bin."""

    def damage(fixture: RunFixture) -> None:
        folder = fixture.folder / TINY
        tensors = {n: value.clone() for n, value in load_file(folder / "model.safetensors").items()}
        (folder / "model.safetensors").unlink()
        if num_files == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
            return
        weight_map: dict[str, str] = {}
        for i in range(num_files):
            name, part = (
                f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin",
                list(tensors)[i::num_files],
            )
            torch.save({key: tensors[key] for key in part}, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)

    return damage


def tokenizer_json(**beside: Any) -> Damage:
    """The tokenizer of `hugging_face` as a tokenizer.json, and a tokenizer_config.json."""

    def damage(fixture: RunFixture) -> None:
        folder = fixture.folder / TINY
        content = converted_tokenizer(folder / "tokenizer.model")
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))

    return damage


def converted_tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer.json with the pieces of a sentencepiece model of LLaMA's recipe."""
    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)}
    pairs = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p))]
    merges = [pair for pair in pairs if scores.keys() >= set(pair)]
    merges.sort(key=lambda pair: -scores["".join(pair)])
    blank = "\u2581"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    replace = {"type": "Replace", "pattern": {"String": blank}, "content": " "}
    prepend = {"type": "Prepend", "prepend": blank}
    replace_blank = {"type": "Replace", "pattern": {"String": " "}, "content": blank}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], **special, "special": True} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace_blank]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }


# ---- files that are not what they claim ---------------------------------------------------------


def tokenizer(pieces: int) -> Damage:
    return lambda fixture: make_tokenizer(fixture.folder / TOKENIZER, 0, DOMAIN, pieces)


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
    """The first tensor of a torch file claims so many numbers; nothing else is changed."""

    def lie(content: bytes, end: bytes) -> bytes:
        size_of_storage = re.compile(b"(K.|M..|J....)(" + end + b"tq.Q)", re.DOTALL)
        long_number = b"\x8a\x08" + struct.pack("<q", numbers)
        changed, count = size_of_storage.subn(long_number + rb"\2", content, count=1)
        assert count == 1, "no size of a storage was found"
        return changed

    def damage(fixture: RunFixture) -> None:
        path, new_path = fixture.folder / name, fixture.folder / "new"
        if not zipfile.is_zipfile(path):
            path.write_bytes(lie(path.read_bytes(), b"N"))
            return
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(new_path, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = lie(content, b"")
                new.writestr(entry.filename, content)
        new_path.replace(path)

    return damage


def tar(name: str, first: bytes = b"storages") -> Damage:
    """A tar archive, as torch wrote before 0.1.10, with members that lead out of the folder.

    `first`: the first bytes of the file.
    """

    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / name
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            for member in (first.decode("latin-1"), "../../vico-canary", "/tmp/vico-canary"):
                info = tarfile.TarInfo(member)
                info.size = 4
                archive.addfile(info, io.BytesIO(b"\x80\x02N."))
        path.write_bytes(first + path.read_bytes()[len(first) :])

    return damage
