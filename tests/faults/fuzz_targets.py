"""The files that are fuzzed, each with the reader that must take or refuse it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.damage import old_format
from faults.damage_tables import SRT, star, star_item, tvqa, tvqa_row
from support.processes import ROOT
from support.run_fixture import (
    CAPTIONS,
    CHECKPOINT,
    FEATURES,
    NEXTQA,
    OPTIMIZER,
    PARAMS,
    PUBLISHED,
    SHARD,
    STATE,
    TINY,
    TOKENIZER,
    VAL,
    RunFixture,
)
from vico.cli.convert import convert
from vico.cli.flags import parse
from vico.data.datasets import read_questions
from vico.data.features import Features
from vico.data.readers import captions
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.io.output_dir import OutputDir
from vico.model.weights.load import open_weights
from vico.train.config import RunConfig
from vico.train.ds_config import read_config
from vico.train.resume import differences
from vico.train.saved_run import read_checkpoint

STAR, TVQA = "toy/data/star", "toy/data/tvqa"
RECIPE_TEXT = """\
lr: 1e-3
vaq: true
model: 7B
captions: x.json
epochs: 3
# note
adapter_layer: null
"""


@dataclass(frozen=True)
class Target:
    """`read` is called with the fixture's folder.

    `with_checksum`: a state.json, which holds its own checksum; it is also fuzzed with a new one.
    """

    file: str
    read: Callable[[Path], object]
    is_json: bool = False
    with_checksum: bool = False


def add_files(fixture: RunFixture) -> None:
    """Give the fixture everything that is read: STAR's, TVQA's and Hugging Face's files too."""
    star([star_item(), star_item(question_id="A_1")])(fixture)
    tvqa(tvqa_row(), tvqa_row(qid=6), subtitles=SRT)(fixture)
    folder = fixture.folder
    convert(folder / TINY, folder / "hf")
    shutil.copy(folder / PUBLISHED, folder / "old.pth")
    old_format("old.pth")(fixture)
    (folder / "r.yaml").write_text(RECIPE_TEXT)
    shutil.copy(ROOT / "ds_configs" / "zero3.json", folder / "ds.json")


def _read_features(folder: Path) -> None:
    features = Features(folder / FEATURES)
    questions = [
        Question(0, "0", "100000", "", "", ("a",), 0, (0, 9)),
        Question(1, "1", "000002", "", "", ("a",), 0),
    ]
    features.check(questions)
    features.check_finite(questions, 10)
    features.scan()


def _read_args(folder: Path) -> None:
    saved = OutputDir(folder / "run").read_args()
    differences(saved, RunConfig())
    Path(saved.get("resume") or ".")


def _read_recipe(folder: Path) -> None:
    parse(["--config", str(folder / "r.yaml")], "vico train", "").resolve()


TARGETS: dict[str, Target] = {
    "NExT-QA's CSV": Target(VAL, lambda f: read_questions("nextqa", f / NEXTQA, "val")),
    "STAR's JSON": Target(
        f"{STAR}/STAR_val.json", lambda f: read_questions("star", f / STAR, "val"), is_json=True
    ),
    "TVQA's JSON lines": Target(
        f"{TVQA}/tvqa_val.jsonl", lambda f: read_questions("tvqa", f / TVQA, "val")
    ),
    "subtitles": Target(
        f"{TVQA}/tvqa_subtitles/100000.srt",
        lambda f: read_questions("tvqa", f / TVQA, "val", True),
    ),
    "captions": Target(CAPTIONS, lambda f: captions.read(f / NEXTQA, None), is_json=True),
    "features": Target(FEATURES, _read_features),
    "params.json": Target(PARAMS, lambda f: open_weights(f / TINY, 560), is_json=True),
    "shard": Target(SHARD, lambda f: open_weights(f / TINY, 560)),
    "config.json": Target("hf/config.json", lambda f: open_weights(f / "hf", 560), is_json=True),
    "safetensors of weights": Target(
        "hf/model.safetensors", lambda f: open_weights(f / "hf", None)
    ),
    "tokenizer": Target(
        TOKENIZER, lambda f: Tokenizer(f / TOKENIZER).encode_with_ends("Why (A)?\n")
    ),
    "published": Target(PUBLISHED, lambda f: read_checkpoint(f / PUBLISHED)),
    "published in the old format": Target("old.pth", lambda f: read_checkpoint(f / "old.pth")),
    "state.json": Target(
        STATE, lambda f: read_checkpoint(f / CHECKPOINT), is_json=True, with_checksum=True
    ),
    "optimizer's state": Target(OPTIMIZER, lambda f: read_checkpoint(f / CHECKPOINT)),
    "adapter as safetensors": Target(OPTIMIZER, lambda f: read_checkpoint(f / OPTIMIZER)),
    "args.json": Target("run/args.json", _read_args, is_json=True),
    "ds_config": Target(
        "ds.json", lambda f: read_config(str(f / "ds.json"), "bf16", 1, 1, 1), is_json=True
    ),
    "recipe": Target("r.yaml", _read_recipe),
}
