"""Odd but legal files: a run reads exactly the samples of their clean twin, bit for bit."""

import codecs
import csv
import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from faults.damage import (
    Damage,
    as_torch_files,
    both,
    copy,
    gone,
    hugging_face,
    js,
    pth,
    put,
    stored,
    tokenizer_json,
)
from faults.damage_tables import SRT, rows, star, star_item, tvqa, tvqa_row
from faults.legal_features import FEATURE_FORMATS, features_as
from faults.legal_formats import CAPTION_FORMATS, star_formats, tvqa_formats
from faults.legal_schema import (
    CONVERSATIONS,
    MY_FLAGS,
    NEXTQA_FORMATS,
    SCHEMA_TWINS,
    TYPED,
    UNTYPED,
)
from faults.result import Result, Scale
from support.run_fixture import (
    CAPTIONS,
    FEATURES,
    NEXTQA,
    PARAMS,
    SHARD,
    TINY,
    TOKENIZER,
    TRAIN,
    VAL,
    RunFixture,
    make_run_fixture,
)
from support.training_steps import training_steps
from support.warm_process import WarmProcess
from vico.cli.flags import parse
from vico.data.evaluation_batches import EvaluationChunks
from vico.distributed.world import World
from vico.model.batch import PackedBatch
from vico.train.build import Inputs, read_inputs
from vico.train.config import RunConfig

HF_CONFIG = f"{TINY}/config.json"
NAME = "legal"
TITLE = "odd but legal files give the very samples of their clean twins, by hash"
MINUTES = (0.2, 0.4)

# Texts that careless readers change, and ids that they count with.
OPTIONS = ("a0", "a1", "a2", "a3", "a4")
TEXTS: list[dict[str, str]] = [
    dict(zip(OPTIONS, ("None", "nan", "NA", "null", "1e3"), strict=True)),
    dict(zip(OPTIONS, ("", "007", " x ", "True", "1.0"), strict=True)),
    dict(
        zip(OPTIONS, ("Answer: (B)", "a,b", "caf\u00e9 \u732b", "(A)\nChoices:", "-"), strict=True)
    ),
]
TEXTS[2]["question"] = '  he said "why"  '
IDS = [{"video": "007", "qid": "01"}, {"video": "007", "qid": "1"}, {"video": "1e3", "qid": "0"}]


def clean_features(videos: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Videos of IDS too, and numbers that bfloat16, half and float can all hold."""
    more = {"007": videos["100000"].clone(), "1e3": videos["100001"].clone()}
    return {name: value.bfloat16().half() for name, value in {**videos, **more}.items()}


CLEAN = both(rows(*TEXTS, *IDS), pth(FEATURES, clean_features))


def table(
    change: Callable[[list[list[str]]], list[list[str]]], end: str = "\n", **options: Any
) -> Damage:
    """Both tables with `change` of their fields, written with these options of csv.writer."""

    def damage(fixture: RunFixture) -> None:
        for name in (TRAIN, VAL):
            path = fixture.folder / name
            fields = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
            out = io.StringIO()
            csv.writer(out, lineterminator=end, **options).writerows(change(fields))
            path.write_bytes(out.getvalue().encode())

    return damage


def raw(change: Callable[[bytes], bytes], *names: str) -> Damage:
    """Both tables, or the files `names`, with `change` of their bytes."""

    def damage(fixture: RunFixture) -> None:
        for name in names or (TRAIN, VAL):
            (fixture.folder / name).write_bytes(change((fixture.folder / name).read_bytes()))

    return damage


def blanks(fields: list[list[str]]) -> list[list[str]]:
    """Around column names, ids, types and answers, never around texts."""
    header, *rows = fields
    columns = [header.index(name) for name in ("video", "qid", "type", "answer")]
    for row in rows:
        for column in columns:
            row[column] = f" {row[column]} "
    return [[f" {name}\t" for name in header], *rows]


def with_columns(fields: list[list[str]]) -> list[list[str]]:
    header, *rows = fields
    return [[*header, "lemma", "note"], *([*row, 'x "y"\nz', ""] for row in rows)]


def with_attributes(clip: torch.Tensor) -> torch.Tensor:
    """As torch.save writes a tensor that a program has marked."""
    clip.fps, clip.source = 25.0, {"file": "a.mp4"}  # type: ignore[attr-defined]
    return clip


def views(videos: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All videos as pieces of one storage, every other row of it."""
    whole = torch.cat(list(videos.values())).repeat_interleave(2, 0)
    cut, place = {}, 0
    for name, value in videos.items():
        cut[name] = whole[place : place + 2 * len(value) : 2]
        place += 2 * len(value)
    return cut


def shuffled(name: str) -> Damage:
    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(dict(reversed(content.items())), indent=4)
        path.write_text(text, encoding="utf-8")

    return damage


def with_rows(num_spare: int) -> Damage:
    """Rows behind the vocabulary's."""
    names = ("tok_embeddings.weight", "output.weight")
    return pth(
        SHARD,
        lambda shard: shard.update({n: F.pad(shard[n], (0, 0, 0, num_spare)) for n in names}),
    )


def tied(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def in_three_types(tensors: dict[str, torch.Tensor]) -> None:
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to((torch.float32, torch.float16, torch.bfloat16)[i % 3])


BOM = codecs.BOM_UTF8
NEXTQA_TWINS: dict[str, Damage] = {
    "byte order mark": raw(lambda content: BOM + content),
    "CRLF": raw(lambda content: content.replace(b"\n", b"\r\n")),
    "CRLF and a byte order mark": raw(lambda content: BOM + content.replace(b"\n", b"\r\n")),
    "all fields quoted": table(lambda fields: fields, quoting=csv.QUOTE_ALL),
    "blanks around ids, types, answers and column names": table(blanks),
    "columns in another order": table(lambda fields: [row[::-1] for row in fields]),
    "further columns, newlines in them": table(with_columns),
    "further columns and CRLF": table(with_columns, end="\r\n"),
    "video_id for video": raw(lambda content: content.replace(b"video,", b"video_id,", 1)),
    "without the columns that nothing uses": table(
        lambda fields: [[row[0], *row[4:]] for row in fields]
    ),
    "empty lines": raw(lambda content: b"\n\n" + content + b"\n,,,,,,,,,,,,\n \n"),
    "no newline at the end": raw(lambda content: content.rstrip(b"\n")),
    "features, bfloat16": features_as(lambda v: v.bfloat16()),
    "features, float32": features_as(lambda v: v.float()),
    "features, float64": features_as(lambda v: v.double()),
    "features, views of one storage": pth(FEATURES, views),
    "features, transposed in memory": features_as(lambda v: v.t().contiguous().t()),
    "features, another order and unused videos": pth(
        FEATURES,
        lambda videos: {"unused": torch.zeros(1, 768), **dict(reversed(videos.items()))},
    ),
    "features, an OrderedDict": pth(FEATURES, OrderedDict),
    "features, with attributes of Python": features_as(with_attributes),
    "features, parameters": features_as(lambda v: torch.nn.Parameter(v, requires_grad=False)),
    **FEATURE_FORMATS,
    "features, blanks around ids": pth(
        FEATURES, lambda videos: {f" {name}\n": value for name, value in videos.items()}
    ),
    "captions, another order and layout": shuffled(CAPTIONS),
    "captions, byte order mark, CRLF": raw(
        lambda content: BOM + content.replace(b"{", b"{\r\n"), CAPTIONS
    ),
    "captions, blanks around ids": raw(
        lambda content: content.replace(b'": "', b' ": "').replace(b', "', b', " '), CAPTIONS
    ),
    "captions, escapes and unused ones": js(CAPTIONS, **{"\u732b": "unused"}),
    "captions, another of the known names": both(
        copy(CAPTIONS, f"{NEXTQA}/blip2_n6.json"), gone(CAPTIONS)
    ),
    "params.json, byte order mark, unknown keys": both(
        js(PARAMS, max_seq_len=2048, _note="x"), raw(lambda content: BOM + content, PARAMS)
    ),
    "weights in Hugging Face's layout": hugging_face(),
    "weights, a row more than pieces": with_rows(1),
    "weights, a vocabulary padded to a multiple of 64": with_rows(16),
    "weights, tied": hugging_face(stored(tied), js(HF_CONFIG, tie_word_embeddings=True)),
    "weights, pytorch_model.bin": hugging_face(as_torch_files()),
    "weights, pytorch_model.bin in three files": hugging_face(as_torch_files(3)),
    "weights, three types": hugging_face(stored(in_three_types)),
    "weights, head_dim named": hugging_face(js(HF_CONFIG, head_dim=24)),
    "weights, Mistral": hugging_face(js(HF_CONFIG, model_type="mistral", sliding_window=4096)),
    "tokenizer.json with its config": hugging_face(
        tokenizer_json(bos_token={"content": "<s>"}, eos_token="</s>")
    ),
    "tokenizer in the model's folder": both(
        copy(TOKENIZER, f"{TINY}/tokenizer.model"), gone(TOKENIZER)
    ),
    "other files about": both(
        put(f"{NEXTQA}/notes.txt", b"\xff"),
        put(f"{NEXTQA}/val.csv.bak", "x"),
        put(f"{TINY}/checklist.chk", "x"),
    ),
}
STAR_ITEMS = [
    star_item(),
    star_item(question_id="Odd", start=0, end=2, answer="d"),
    star_item(question_id="A_2", question=" None "),
]


def star_twins() -> dict[str, Damage]:
    other, other_choices, spaced = [], [], []
    for item in STAR_ITEMS:
        more = {**item, "start": str(item["start"]), "extra": [1, {}]}
        other.append(dict(reversed(more.items())))
        other_choices.append({**item, "choices": item["choices"][::-1]})
        ids = {"video_id": f" {item['video_id']} ", "question_id": f"{item['question_id']}\n"}
        spaced.append({**item, **ids})

    def pretty(val: Any) -> str:
        return "\ufeff" + json.dumps(val, indent=2).replace("\n", "\r\n")

    return {
        "STAR, pretty and CRLF": star(STAR_ITEMS, pretty),
        "STAR, keys in another order, times as text, more keys": star(other),
        "STAR, choices in another order": star(other_choices),
        "STAR, blanks around ids": star(spaced),
        **star_formats(STAR_ITEMS),
    }


TVQA_ROWS = [
    tvqa_row(),
    tvqa_row(qid=6, ts="NaN-NaN", q="None"),
    tvqa_row(qid="007", a0="caf\u00e9", vid_name="100001"),
]


def tvqa_twins() -> dict[str, Damage]:
    other, spaced = [], []
    for row in TVQA_ROWS:
        more = dict(reversed({**row, "located_frame": [1]}.items()))
        other.append(json.dumps(more, ensure_ascii=False) + "\r\n\r\n")
        ids = {"vid_name": f" {row['vid_name']}", "qid": f"{row['qid']} "}
        spaced.append({**row, **ids, "answer_idx": str(row["answer_idx"])})
    return {
        "TVQA, byte order mark, CRLF, empty lines, another order": _with_srt(
            tvqa("\ufeff", *other), SRT
        ),
        "TVQA, blanks around ids, answers as text": _with_srt(tvqa(*spaced), SRT),
        "TVQA, subtitles with byte order mark and CRLF": _with_srt(
            tvqa(*TVQA_ROWS), "\ufeff" + SRT.replace("\n", "\r\n")
        ),
        "TVQA, subtitles with more empty lines": _with_srt(
            tvqa(*TVQA_ROWS), "\n" + SRT.replace("\n\n", " \n\n\n")
        ),
        **tvqa_formats(TVQA_ROWS),
    }


def _with_srt(damage: Damage, content: str) -> Damage:
    files = []
    for video in ("000000", "100000", "100001"):
        files.append(put(f"toy/data/tvqa/tvqa_subtitles/{video}.srt", content))
    return both(damage, *files)


def groups() -> list[tuple[Damage, dict[str, Damage], list[str]]]:
    """(clean files, their twins, flags) of each data set."""
    return [
        (CLEAN, {**NEXTQA_TWINS, **CAPTION_FORMATS, **NEXTQA_FORMATS}, []),
        (TYPED, SCHEMA_TWINS, MY_FLAGS),
        (UNTYPED, CONVERSATIONS, MY_FLAGS),
        (star(STAR_ITEMS), star_twins(), ["--dataset", "star"]),
        (_with_srt(tvqa(*TVQA_ROWS), SRT), tvqa_twins(), ["--dataset", "tvqa", "--sub"]),
    ]


def run(scale: Scale) -> Result:
    with WarmProcess() as warm:
        original = make_run_fixture(scale.folder / "original", warm)
    failures, distinct, total = list[str](), set[str](), 1
    for clean, twins, flags in groups():
        expected = digest(original, clean, None, scale.folder, flags)
        distinct.add(expected)
        total += len(twins)
        for name, damage in twins.items():
            try:
                same = digest(original, clean, damage, scale.folder, flags) == expected
                fault = "" if same else "other samples than the clean twin's"
            except Exception as problem:  # a refusal is wrong, too
                fault = f"{type(problem).__name__}: {problem}"
            if fault:
                failures.append(f"{name}: {fault}")
    for name, damage in not_twins().items():
        if digest(original, CLEAN, damage, scale.folder, []) in distinct:
            failures.append(f"the hash does not see a change: {name}")
    passed = max(0, total - len(failures))
    return Result(passed, total, {"twins": total - 1, "failures": failures})


def not_twins() -> dict[str, Damage]:
    """Changes that must change the samples."""
    return {
        "an option's blank": raw(lambda content: content.replace(b" x ", b" x"), VAL),
        "an answer": rows(*TEXTS, *IDS[:-1], {**IDS[-1], "answer": "1"}),
        "a feature": pth(FEATURES, lambda videos: videos["000001"][0].add_(0.1) is None or videos),
        "a caption": js(CAPTIONS, **{"000001": "Another. One. That is here. And more."}),
    }


def digest(
    original: RunFixture, clean: Damage, damage: Damage | None, folder: Path, flags: list[str]
) -> str:
    """Of the samples of two training epochs and of the evaluation, on the damaged fixture."""
    fixture = original.copy(folder / f"twin-{os.urandom(4).hex()}")
    clean(fixture)
    if damage is not None:
        damage(fixture)
    config = parse([*fixture.flags, *flags, "--vaq", "--qav"], "vico train", "").resolve()
    inputs = read_inputs(config, ("train", "val"), World(0, 1, torch.device("cpu"), None))
    digest = hashlib.sha256()
    for batch in _batches(config, inputs):
        for name, tensor in sorted(batch._tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        digest.update(repr(batch.segments).encode())
    for q in inputs.questions["val"]:
        digest.update(repr((q.index, q.qid, q.video, q.type, q.answer)).encode())
    return digest.hexdigest()


def _batches(config: RunConfig, inputs: Inputs) -> Iterable[PackedBatch]:
    steps = training_steps(
        inputs,
        micro_batch_size=config.batch_size,
        dataset=config.dataset,
        tasks=config.tasks,
    )
    for epoch in range(2):
        for step in range(steps.steps_per_epoch):
            yield from steps[epoch, step].micro_batches
    chunks = EvaluationChunks(
        inputs.questions["val"],
        inputs.datasets,
        num_slots=config.max_feats,
        rank=0,
        world_size=1,
    )
    for i in range(len(chunks)):
        batch = chunks[i].batch
        assert batch is not None
        yield batch
