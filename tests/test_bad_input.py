"""The hostile user: whatever is wrong, the command ends with one line that says where and what to do, and changes nothing.

Rows of bad tables and feature files are in test_readers.py and test_features.py; here it is the whole command that ends.
"""

import argparse
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from vico import dist, lock
from vico.cli import main
from world import Ended, World, end, make_rows, make_tokenizer, start, write_csv

HTML = "<!DOCTYPE html><html>Quota exceeded</html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@dataclass(frozen=True)
class Home:
    """A user's files: a world of its own, the checkpoints of a finished run, and an output_dir that is not there yet."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "world" / "data" / "nextqa"

    @property
    def llama(self) -> Path:
        return self.folder / "world" / "llama"

    @property
    def flags(self) -> list[str]:
        where = ["--llama_model_path", str(self.llama), "--model", "tiny", "--data_path", str(self.data.parent)]
        how = ["--precision", "fp32", "--max_seq_len", "256", "--num_workers", "0", "--batch_size", "4", "--epochs", "1"]
        return [*where, *how, "--output_dir", str(self.folder / "out")]

    def contents(self) -> dict[str, str]:
        files = sorted(path for path in self.folder.rglob("*") if path.name != lock.NAME)
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "not a file" for p in files}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, alone: dist.World) -> Home:
    """What every case gets a copy of: a world, `run` (an output_dir of this very command after a step), `lineage.pth`."""
    home = Home(tmp_path_factory.mktemp("original"))
    World(home.folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, alone)
        assert main(["train", *home.flags, "--max_steps", "1"]) == 0
    (home.folder / "out").rename(home.folder / "run")
    params = json.loads((home.llama / "tiny" / "params.json").read_text())
    hyper = oracle.Hyper()
    trainables = oracle.init_trainables(params, hyper, random_gates=True)
    optimizer = oracle.make_optimizer(trainables, hyper)
    for parameter in trainables.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    oracle.save_lineage(home.folder / "lineage.pth", trainables, optimizer, epoch=0)
    return home


def in_this_process(patch: pytest.MonkeyPatch, alone: dist.World) -> None:
    """DeepSpeed connects once per process, so the commands here share a world of one rank."""
    patch.setattr(dist, "connect", lambda *_: alone)
    patch.setattr(dist, "disconnect", lambda world, together: None)


@pytest.fixture
def home(original: Home, tmp_path: Path) -> Home:
    shutil.copytree(original.folder, tmp_path / "home")
    return Home(tmp_path / "home")


# ---- how files go wrong ----------------------------------------------------------------------------------------------

Damage = Callable[[Home], Any]


def put(name: str, content: str | bytes) -> Damage:
    def damage(home: Home) -> None:
        path = home.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda home: os.truncate(home.folder / name, size)


def flip(name: str, at: int) -> Damage:
    def damage(home: Home) -> None:
        content = bytearray((home.folder / name).read_bytes())
        content[at] ^= 4
        (home.folder / name).write_bytes(content)

    return damage


def gone(name: str) -> Damage:
    return lambda home: (home.folder / name).unlink()


def folder(name: str) -> Damage:
    return lambda home: (home.folder / name).mkdir(parents=True)


def copy(source: str, target: str) -> Damage:
    def damage(home: Home) -> None:
        (home.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (home.folder / source).is_dir() else shutil.copy)(home.folder / source, home.folder / target)

    return damage


def pth(name: str, change: Callable[[Any], Any]) -> Damage:
    """A torch file changed in place, or replaced by what `change` returns."""

    def damage(home: Home) -> None:
        with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
            content = torch.load(home.folder / name, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, home.folder / name)

    return damage


def js(name: str, **changes: Any) -> Damage:
    def damage(home: Home) -> None:
        content = json.loads((home.folder / name).read_text()) | changes
        (home.folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return damage


def ds(**changes: Any) -> Damage:
    return put("ds.json", json.dumps({"zero_optimization": {"stage": 2}, **changes}))


def two_shards(*also: Damage) -> Damage:
    def damage(home: Home) -> None:
        oracle.write_tiny_meta(home.llama / "tiny", 400, shards=2)
        oracle.write_tiny_meta(home.folder / "other", 400, shards=2, seed=5)
        for change in also:
            change(home)

    return damage


class Payload:
    """Pickled, this is a call of os.mkdir."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("vico-canary",)


# ---- one rank --------------------------------------------------------------------------------------------------------

NEXTQA, TINY, CHECKPOINT = "world/data/nextqa", "world/llama/tiny", "run/checkpoint-1"
VAL, FEATURES, CAPTIONS = f"{NEXTQA}/val.csv", f"{NEXTQA}/clipvitl14.pth", f"{NEXTQA}/llava_v15_13b_n6.json"
SHARD, SHARD_1, PARAMS, TOKENIZER = (
    f"{TINY}/consolidated.00.pth",
    f"{TINY}/consolidated.01.pth",
    f"{TINY}/params.json",
    "world/llama/tokenizer.model",
)
WEIGHTS, OPTIMIZER, STATE = (f"{CHECKPOINT}/{name}" for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"))
RECIPE, DS, EVAL = "--config {home}/r.yaml", "--deepspeed {home}/ds.json", "eval --resume {home}/"
ROWS = make_rows(3, 3, 2, "w")

# name: (damage, flags, exit code, what the line says: the place first, then fault and remedy)
Case = tuple[Damage | None, str, int, list[str]]
CASES: dict[str, Case] = {
    # flags
    "unknown command": (None, "trian", 2, ["unknown command 'trian'; use one of train, eval, "]),
    "unknown flag": (None, "--batchsize 4", 2, ["unknown flag --batchsize; did you mean '--batch_size'?"]),
    "dashes in a flag": (None, "--max-steps=4", 2, ["unknown flag --max-steps; did you mean '--max_steps'?"]),
    "not a number": (None, "--batch_size 1e3", 2, ["--batch_size: '1e3' is not a whole number"]),
    "no value": (None, "--lr", 2, ["--lr: expected one argument"]),
    "value of a switch": (None, "--vaq=true", 2, ["--vaq: takes no value, but was given 'true'"]),
    "stray word": (None, "--vaq true", 2, ["unexpected word 'true': ", "switches take none"]),
    "batch of 0": (None, "--batch_size 0", 2, ["--batch_size 0: must be a whole number of at least 1"]),
    "lr nan": (None, "--lr nan", 2, ["--lr nan: must be above 0, and finite"]),
    "beyond fp32": (None, "--bias 1e39", 2, ["--bias 1e+39: must be finite"]),
    "negative decay": (None, "--weight_decay -0.1", 2, ["--weight_decay -0.1: must be 0 or more, and finite"]),
    "seed too large": (None, "--seed 99999999999999999999", 2, ["--seed 99999999999999999999: must be a whole number from 0 to "]),
    "unknown data set": (None, "--dataset nextQA", 2, ["--dataset: invalid choice: 'nextQA' (choose from 'nextqa', 'star'"]),
    "subtitles of NExT-QA": (None, "--sub", 2, ["--sub: only TVQA has subtitles", "drop --sub"]),
    "unset variable": (None, "--output_dir=", 2, ["--output_dir: '' is not a path"]),
    "more layers than there are": (None, "--adapter_layer 4", 2, ["--adapter_layer 4: the model has 3 layers; leave it out to adapt all"]),
    "no room for a question": (None, "--max_seq_len 60", 2, ["train.csv:2: the question alone is ", "above --max_seq_len 60; raise it"]),
    "no room for the video": (None, "--max_feats 256", 2, ["--max_feats 256: must be below --max_seq_len 256"]),
    "no room for a caption": (None, "--max_cap_len 30", 2, ["--max_cap_len 30: leaves no caption token to learn; ", "is the least"]),
    # recipes
    "no recipe": (None, RECIPE, 2, ["{home}/r.yaml: no such file; the recipe (--config) should be there"]),
    "recipe, unknown key": (put("r.yaml", "batchsize: 4\n"), RECIPE, 2, ["--config {home}/r.yaml: unknown key 'batchsize'; did you mean"]),
    "recipe, key twice": (put("r.yaml", "lr: 1\nlr: 2\n"), RECIPE, 2, ["--config {home}/r.yaml: 'lr' stands there twice; keep one"]),
    "recipe, wrong type": (put("r.yaml", "vaq: 'yes'\n"), RECIPE, 2, ["--config {home}/r.yaml: vaq: 'yes' is not true or false"]),
    "recipe, wrong choice": (put("r.yaml", "precision: 16\n"), RECIPE, 2, ["r.yaml: precision: 16 is not one of bf16, fp16, fp32"]),
    "recipe, a list": (put("r.yaml", "- lr: 1\n"), RECIPE, 2, ["--config {home}/r.yaml: must hold lines 'flag: value'"]),
    "recipe, broken": (put("r.yaml", "lr:\t1\n\tx: 2\n"), RECIPE, 2, ["--config {home}/r.yaml: not valid YAML: ", "line 1, column 4"]),
    "recipe, latin-1": (put("r.yaml", "# é".encode("latin-1")), RECIPE, 2, ["r.yaml:1: not UTF-8 (byte 0xe9 at offset 2); save {home}/r.yaml"]),
    "recipe, runs code": (
        put("r.yaml", "lr: !!python/object/apply:os.mkdir ['vico-canary']\n"), RECIPE, 2,
        ["--config {home}/r.yaml: not valid YAML: could not determine a constructor for the tag"],
    ),
    "recipe, aliases without end": (
        put("r.yaml", "lr:\n- &a0 [x, x]\n" + "".join(f"- &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 13))), RECIPE, 2,
        ["--config {home}/r.yaml: lr: [", "is not a number"],
    ),
    # DeepSpeed's config
    "no ds_config": (None, DS, 2, ["{home}/ds.json: no such file; the DeepSpeed config (--deepspeed) should be there"]),
    "no such stage by name": (None, "--deepspeed zero4", 2, ["--deepspeed zero4: must be auto, zero2, zero3, zero3_nodes, zero3_offload or the path of a JSON file"]),
    "ds_config, no JSON": (put("ds.json", '{"a": 1,}'), DS, 2, ["ds.json:1: column 9: ", "correct {home}/ds.json"]),
    "ds_config, key twice": (
        put("ds.json", '{"zero_optimization": {"stage": 2,\n"stage": 3}}'), DS, 2, ["ds.json:2: column 1: key 'stage' stands twice in one object"],
    ),
    "ds_config, unknown key": (ds(zero_optimisation={}), DS, 2, ["ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"]),
    "ds_config, unknown key of zero": (
        ds(zero_optimization={"stage": 2, "overlap_com": True}), DS, 2,
        ["ds.json: unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?"],
    ),
    "ds_config, unknown key of offload": (
        ds(zero_optimization={"stage": 3, "offload_param": {"devise": "cpu"}}), DS, 2,
        ["ds.json: DeepSpeed refuses offload_param.devise 'cpu': Extra inputs are not permitted"],
    ),
    "ds_config, a number as text": (
        ds(zero_optimization={"stage": 2, "reduce_bucket_size": "big"}), DS, 2,
        ["ds.json: DeepSpeed refuses reduce_bucket_size 'big': Input should be a valid integer"],
    ),
    "ds_config, no such type": (
        ds(communication_data_type="fp9"), DS, 2, ["ds.json: DeepSpeed refuses a value: Invalid communication_data_type."]),
    "ds_config, a switch as text": (ds(wall_clock_breakdown="yes"), DS, 2, ["wall_clock_breakdown is \"yes\" and must be true or false"]),
    "ds_config, no stage": (put("ds.json", "{}"), DS, 2, ["ds.json: zero_optimization.stage is null; use 1, 2 or 3"]),
    "ds_config, stage 0": (ds(zero_optimization={"stage": 0}), DS, 2, ["ds.json: zero_optimization.stage is 0; use 1, 2 or 3"]),
    "ds_config, stage true": (ds(zero_optimization={"stage": True}), DS, 2, ["ds.json: zero_optimization.stage is true; use 1, 2 or 3"]),
    "ds_config, batch size": (
        ds(train_batch_size=7), DS, 2, ["train_batch_size 7 does not fit --batch_size 4 --accum_iter 1 on 1 rank(s), which make 4; write \"auto\""],
    ),
    "ds_config, micro-batch of 0": (ds(train_micro_batch_size_per_gpu=0), DS, 2, ["train_micro_batch_size_per_gpu 0 does not fit", "write \"auto\""]),
    "ds_config, accumulation": (ds(gradient_accumulation_steps="2"), DS, 2, ["gradient_accumulation_steps \"2\" does not fit"]),
    "ds_config, optimizer": (ds(optimizer={"type": "Adam"}), DS, 2, ["ds.json: 'optimizer' must go: ", "use --lr, --blr and --weight_decay"]),
    "ds_config, clipping": (ds(gradient_clipping=1.0), DS, 2, ["ds.json: 'gradient_clipping' must go: the method does not clip"]),
    "ds_config, precision": (ds(bf16={"enabled": True}), DS, 2, ["ds.json: bf16.enabled true against --precision fp32; write \"auto\""]),
    "ds_config, bf16 as a value": (ds(bf16=True), DS, 2, ["ds.json: 'bf16' must be a section of its own"]),
    # data
    "no data": (None, "--data_path {home}/nowhere", 2, ["{home}/nowhere/nextqa/train.csv: no such file; the CSV of the train questions"]),
    "no val.csv": (gone(VAL), "", 2, ["val.csv: no such file; the CSV of the val questions should be there"]),
    "no test.csv": (None, "eval --split test --resume {home}/" + CHECKPOINT, 2, ["test.csv: no such file; the CSV of the test questions"]),
    "column missing": (
        lambda home: (home.folder / VAL).write_text((home.folder / VAL).read_text().replace(",a3,", ",b3,", 1)), "", 2,
        ["val.csv:1: column 'a3' missing (has: 'video', ", "add what is missing to"],
    ),
    "answer 7": (
        lambda home: write_csv(home.folder / VAL, [*ROWS, {**ROWS[0], "qid": "9", "answer": "7"}]), "", 2,
        ["val.csv:5: 'answer' is '7', not one of 0, 1, 2, 3, 4; correct"],
    ),
    "text that forges lines": (
        lambda home: write_csv(home.folder / VAL, [{**ROWS[0], "answer": "7\nvico: done\x1b[2J"}]), "", 2, ["'7\\nvico: done\\x1b[2J', not one of"],
    ),
    "no features": (gone(FEATURES), "", 2, ["clipvitl14.pth: no such file; the video feature file should be there"]),
    "features cut off": (cut(FEATURES, 5000), "", 2, ["clipvitl14.pth: the video feature file is cut off or damaged; fetch or copy it again"]),
    "features as HTML": (put(FEATURES, HTML), "", 2, ["clipvitl14.pth: the video feature file is an HTML page (42 bytes)", "fetch it again"]),
    "features that run code": (
        pth(FEATURES, lambda videos: videos.update(v0000=Payload())), "", 2, ["holds the Python object posix.mkdir, refused because loading it can run"],
    ),
    "feature missing": (
        pth(FEATURES, lambda videos: [videos.pop("v0003")] and videos), "", 2,
        ["clipvitl14.pth: 3 of 20 questions (1 videos) have no features, e.g. 'v0003'; extract them"],
    ),
    "feature width": (
        pth(FEATURES, lambda videos: {k: v[:, :512].clone() for k, v in videos.items()}), "", 2,
        ["clipvitl14.pth: 20 of 20 questions (7 videos) have features that are no floating-point tensor [frames >= 1, 768], e.g. 'v0000' ([4, 512]"],
    ),
    "feature without numbers": (
        pth(FEATURES, lambda videos: videos.update(v0003=torch.zeros(3, 768, device="meta"))), "", 2, ["'v0003' ([3, 768] float32); extract them"],
    ),
    "feature NaN": (
        pth(FEATURES, lambda videos: videos.update(w0003=torch.full((3, 768), torch.nan))), "", 2,
        ["clipvitl14.pth: 2 of 10 questions (1 videos) have features with NaN or infinite values, e.g. 'w0003'"],
    ),
    "no captions": (gone(CAPTIONS), "", 2, ["nextqa: holds no caption file (llava_v15", "name one by --captions PATH, or train with --cap 0"]),
    "two caption files": (copy(CAPTIONS, f"{NEXTQA}/blip2_n6.json"), "", 2, ["holds llava_v15_13b_n6.json and blip2_n6.json; say which by --captions"]),
    "caption missing": (
        js(CAPTIONS, v0003=...), "", 2, ["llava_v15_13b_n6.json: 3 of 20 questions (1 videos) have no caption, e.g. 'v0003'; name the file"],
    ),
    "captions cut off": (cut(CAPTIONS, 1000), "", 2, ["llava_v15_13b_n6.json:1: column ", "the text is cut off here; correct"]),
    # LLaMA
    "no such model": (None, "--model 13B", 2, ["llama/13B: no such folder of weights; --model can be tiny"]),
    "no tokenizer": (gone(TOKENIZER), "", 2, ["tokenizer.model: No such file or directory; --llama_model_path must name the folder"]),
    "tokenizer as HTML": (put(TOKENIZER, HTML), "", 2, ["tokenizer.model: the tokenizer is an HTML page (42 bytes), most likely a failed download"]),
    "tokenizer empty": (put(TOKENIZER, ""), "", 2, ["tokenizer.model: not a sentencepiece model; copy tokenizer.model of the LLaMA weights again"]),
    "tokenizer cut off": (cut(TOKENIZER, 3000), "", 2, ["tokenizer.model: not a sentencepiece model; copy"]),
    "other tokenizer": (
        lambda home: make_tokenizer(home.folder / TOKENIZER, vocab_size=350), "", 2,
        ["llama/tiny: the embeddings have 400 rows and the tokenizer has 350 pieces; use the tokenizer.model that came with these weights"],
    ),
    "no params.json": (gone(PARAMS), "", 2, ["params.json: no such file; params.json, which comes with the LLaMA weights, should be there"]),
    "params.json cut off": (cut(PARAMS, 30), "", 2, ["params.json:1: column ", "correct {home}/world/llama/tiny/params.json"]),
    "params.json, layers": (js(PARAMS, n_layers=4), "", 2, ["consolidated.00.pth: lacks 9 tensor(s), e.g. 'layers.3.", "must be those of one LLaMA"]),
    "params.json, width": (js(PARAMS, dim=64), "", 2, ["'tok_embeddings.weight' has shape [400, 32] in 1 shard(s), and params.json asks for [400, 64]"]),
    "params.json, heads": (js(PARAMS, n_heads=3), "", 2, ["params.json: dim 32 over n_heads 3 is not an even whole number"]),
    "params.json, no width": (js(PARAMS, dim=...), "", 2, ["params.json: 'dim' is None and must be a whole number from 1 to 1000000"]),
    "params.json, grouped queries": (
        js(PARAMS, n_kv_heads=2), "", 2, ["'layers.0.attention.wk.weight' has shape [32, 32] in 1 shard(s), and params.json asks for [16, 32]"],
    ),
    "params.json, odd groups": (js(PARAMS, n_kv_heads=3), "", 2, ["params.json: n_heads 4 over n_kv_heads 3 is not a whole number"]),
    "params.json, stretched rotary": (js(PARAMS, use_scaled_rope=True), "", 2, ["params.json: use_scaled_rope does not say by how much; add"]),
    "two tokenizers": (put(f"{TINY}/tokenizer.model", "x"), "", 2, ["tiny/tokenizer.model: is another tokenizer than {home}/world/llama/tokenizer"]),
    "two layouts": (put(f"{TINY}/model.safetensors", "x"), "", 2, ["llama/tiny: holds weights in Meta's layout (*.pth) and in Hugging Face's"]),
    "no shard": (gone(SHARD), "", 2, ["llama/tiny: no consolidated.00.pth; --llama_model_path and --model must name a folder of LLaMA weights"]),
    "shard cut off": (cut(SHARD, 9999), "", 3, ["consolidated.00.pth: the shard of LLaMA weights is cut off or damaged; fetch or copy it again"]),
    "shard as git-lfs pointer": (put(SHARD, LFS), "", 3, ["consolidated.00.pth: the shard of LLaMA weights is a git-lfs pointer", "git lfs pull"]),
    "shard that runs code": (pth(SHARD, lambda shard: shard.update(x=Payload())), "", 3, ["consolidated.00.pth: ", "posix.mkdir, refused"]),
    "shard, quantised": (
        pth(SHARD, lambda shard: shard.update({"output.weight": shard["output.weight"].to(torch.int8)})), "", 2,
        ["consolidated.00.pth: 'output.weight' is no dense tensor of floating-point numbers; quantised weights are not read"],
    ),
    "shard, another layout": (pth(SHARD, lambda shard: {"model": shard}), "", 2, ["consolidated.00.pth: not a dict of tensors; LLaMA weights in Meta's"]),
    "last shard missing": (two_shards(gone(SHARD_1)), "", 2, ["has shape [400, 16] in 1 shard(s), and params.json asks for", "all shards present"]),
    "first shard missing": (two_shards(gone(SHARD)), "", 2, ["llama/tiny: consolidated.00.pth is missing, consolidated.01.pth is there; copy all"]),
    "shards of two models": (
        two_shards(copy("other/consolidated.01.pth", SHARD_1)), "", 2, ["differs between the shards, so they are of different models; copy them anew"],
    ),
    "a shard twice": (two_shards(copy(SHARD, SHARD_1)), "", 2, ["llama/tiny: two of the 2 shards are the same file; copy consolidated.*.pth anew"]),
    # checkpoints
    "nothing to resume": (None, "--resume {home}/nowhere", 3, ["{home}/nowhere: no such checkpoint; --resume takes a checkpoint folder or a .pth"]),
    "nothing to evaluate": (None, "eval", 2, ["--resume is missing: name the checkpoint folder or .pth file to evaluate"]),
    "empty folder": (folder("empty"), f"{EVAL}empty", 3, ["{home}/empty/state.json: no such file; a checkpoint is a folder with state.json"]),
    "the run, not its checkpoint": (None, f"{EVAL}run", 3, ["{home}/run/state.json: no such file; did you mean {home}/run/checkpoint-1?"]),
    "own, weights cut off": (cut(WEIGHTS, 1000), EVAL + CHECKPOINT, 3, ["adapter_model.safetensors: damaged (1000 of ", "use another checkpoint"]),
    "own, moments flipped": (flip(OPTIMIZER, 5000), EVAL + CHECKPOINT, 3, ["optimizer.safetensors: damaged (its sha256 is not the recorded one)"]),
    "own, state changed": (js(STATE, progress={}), EVAL + CHECKPOINT, 3, ["state.json: damaged (its sha256 is not the recorded one); use another"]),
    "own, state cut off": (cut(STATE, 99), EVAL + CHECKPOINT, 3, ["state.json:", "the text is cut off here; correct {home}/run/checkpoint-1/state.json"]),
    "own, of another version": (js(STATE, format=2), EVAL + CHECKPOINT, 3, ["state.json: 'format' is 2 and not 1, so another version wrote it"]),
    "own, moments missing": (gone(OPTIMIZER), EVAL + CHECKPOINT, 3, ["optimizer.safetensors: damaged (No such file or directory); use another"]),
    "own, other settings": (
        None, f"--seed 9 --resume {{home}}/{CHECKPOINT}", 2,
        ["checkpoint-1: was written by a run with other settings or files (seed; table below); give the same, or", "--allow_change seed", "seed     0    9"],
    ),
    "own, other shape": (
        None, f"--adapter_len 4 --resume {{home}}/{CHECKPOINT}", 3,
        ["checkpoint-1: does not fit --model, --adapter_layer, --adapter_len and --max_feats", "(adapter_query.weight [30, 32] instead of [12, 32])"],
    ),
    "moments as weights": (None, EVAL + OPTIMIZER, 3, ["optimizer.safetensors: does not fit", "9 missing (adapter_query.weight, ", "18 unexpected"]),
    "weights of garbage": (put("x.safetensors", HTML), f"{EVAL}x.safetensors", 3, ["x.safetensors: damaged (", "use another checkpoint"]),
    "lineage, HTML": (put("lineage.pth", HTML), f"{EVAL}lineage.pth", 3, ["lineage.pth: the checkpoint is an HTML page (42 bytes), most likely a failed"]),
    "lineage, git-lfs": (put("lineage.pth", LFS), f"{EVAL}lineage.pth", 3, ["lineage.pth: the checkpoint is a git-lfs pointer", "run 'git lfs pull'"]),
    "lineage, cut off": (cut("lineage.pth", 9999), f"{EVAL}lineage.pth", 3, ["lineage.pth: the checkpoint is cut off or damaged; fetch or copy it again"]),
    "lineage, flipped": (flip("lineage.pth", 50_000), f"{EVAL}lineage.pth", 3, ["lineage.pth: the checkpoint is cut off", "(wrong checksum of its part"]),
    "lineage, runs code": (
        pth("lineage.pth", lambda c: c.update(args=Payload())), f"{EVAL}lineage.pth", 3, ["lineage.pth: the checkpoint holds the Python object posix.mkdir"],
    ),
    "lineage, not one": (pth("lineage.pth", lambda c: c["model"]), f"{EVAL}lineage.pth", 3, ["lineage.pth: has no 'model' dict of tensors; a lineage"]),
    "lineage, key missing": (
        pth("lineage.pth", lambda c: [c["model"].pop("visual_proj.weight")] and c), f"{EVAL}lineage.pth", 3,
        ["lineage.pth: does not fit", "1 missing (visual_proj.weight)"],
    ),
    "lineage, key unexpected": (
        pth("lineage.pth", lambda c: c["model"].update(lora=torch.zeros(1))), f"{EVAL}lineage.pth", 3, ["lineage.pth: does not fit", "1 unexpected (lora)"],
    ),
    "lineage, NaN": (
        pth("lineage.pth", lambda c: c["model"]["temporal_emb.weight"].fill_(torch.nan) is None or c), f"{EVAL}lineage.pth", 3,
        ["lineage.pth: 'temporal_emb.weight' holds NaN or infinite values; use another checkpoint"],
    ),
    "lineage, integers": (
        pth("lineage.pth", lambda c: c["model"].update({"temporal_emb.weight": torch.zeros(10, 32, dtype=torch.int64)})), f"{EVAL}lineage.pth", 3,
        ["lineage.pth: 'model' entry 'temporal_emb.weight' is no dense tensor of floating-point numbers"],
    ),
    "lineage, other optimizer": (
        pth("lineage.pth", lambda c: c.update(optimizer={"state": {}})), "--resume {home}/lineage.pth", 3,
        ["lineage.pth: 'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'"],
    ),
    "lineage, epoch": (pth("lineage.pth", lambda c: c.update(epoch="3")), "--resume {home}/lineage.pth", 3, ["'epoch' is '3', not a whole number"]),
    # where results go
    "output_dir is a file": (put("out", ""), "", 2, ["--output_dir {home}/out: '{home}/out' is not a folder; choose another"]),
    "output_dir in a file": (put("file", ""), "--output_dir {home}/file/out", 2, ["--output_dir {home}/file/out: Not a directory; choose another"]),
    "output_dir with a name too long": (None, "--output_dir {home}/" + "x" * 300, 2, ["File name too long; choose another"]),
    "output_dir of another run": (
        copy("run", "out"), "--blr 1 --vaq", 2,
        ["{home}/out: holds a run with other settings (vaq, blr; table below); choose another --output_dir", "\n  vaq      false  true\n  blr      0.001  1.0\n"],
    ),
    "output_dir of a run that cannot be told": (put("out/args.json", "{"), "", 2, ["args.json:1: column 2: ", "choose another --output_dir"]),
    "output_dir of the lineage": (
        put("out/log.txt", '{"epoch": 0}\n'), "", 2,
        ["{home}/out/log.txt: is of another program or run (there is no args.json beside it); choose another --output_dir"],
    ),
    "output_dir with a damaged checkpoint": (
        lambda home: (copy("run", "out")(home), cut("out/checkpoint-1/optimizer.safetensors", 0)(home)), "", 3,
        ["{home}/out: none of its 1 checkpoints can be used ({home}/out/checkpoint-1/optimizer.safetensors: damaged (0 of ", "to start anew"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_where_and_what_to_do(
    name: str, home: Home, alone: dist.World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, line, code, parts = CASES[name]
    if damage is not None:
        damage(home)
    in_this_process(monkeypatch, alone)
    monkeypatch.chdir(home.folder)
    command, *flags = line.split() if line and not line.startswith("-") else ["train", *line.split()]
    before = home.contents()
    capfd.readouterr()
    ended = main([command, *home.flags, *(flag.format(home=home.folder) for flag in flags)])
    out, err = capfd.readouterr()
    line, *table = err.splitlines()
    assert line.startswith("vico: error: ") and err.endswith("\n") and err.replace("\n", "").isprintable(), err
    assert all(row.startswith("  ") for row in table) and ("table below" in line or not table), err
    assert all(part.replace("{home}", str(home.folder)) in err for part in parts), err
    assert ended == code
    assert "Traceback" not in out and len(err) < 1000
    assert home.contents() == before, "a run that is refused leaves no trace"


def test_debug_shows_where_an_error_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug", "--batch_size", "0"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "vico: error: --batch_size 0: must be a whole number of at least 1"


def test_what_looks_odd_and_is_legal(home: Home, alone: dist.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that the lineage saved and nobody can use, a byte order mark, a ds_config with every harmless word."""
    in_this_process(monkeypatch, alone)
    saved = argparse.Namespace(batch_size=-3, lr="nan", sub=True, resume="", epochs=1.5, max_feats=10, data_path=3)
    pth("lineage.pth", lambda content: content.update(args=saved))(home)
    (home.folder / PARAMS).write_text("\ufeff" + (home.folder / PARAMS).read_text(), encoding="utf-8")
    quiet = {
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "amp": {"enabled": False},
        "wandb": {"enabled": False},
    }
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": "auto"}
    ds(**quiet, gradient_clipping=0.0, steps_per_print="auto", train_batch_size=4, zero_optimization=offload)(home)
    flags = f"--resume {home.folder}/lineage.pth --deepspeed {home.folder}/ds.json".split()
    assert main(["eval", *home.flags, *flags]) == 0


@pytest.mark.parametrize("size", [150_000, 100_000, 2_500])
def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    size: int, home: Home, alone: dist.World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file can grow beyond `size`: the optimizer's state, the weights, or the curves are what does not fit."""
    in_this_process(monkeypatch, alone)
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # the thread that TensorBoard writes in
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = main(["train", *home.flags])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    err = capfd.readouterr().err.splitlines()
    assert code == 6 and len(err) == 1
    assert err[0].startswith(f"vico: error: {home.folder}/out") and f"({os.strerror(errno.EFBIG)}); free space" in err[0]
    assert not [p.name for p in (home.folder / "out").iterdir() if p.name.startswith((".", "checkpoint")) and p.name != lock.NAME]
    assert main(["train", *home.flags]) == 0, "the same command goes on when there is space"


# ---- two ranks -------------------------------------------------------------------------------------------------------


def spoil_rank_1(home: Home) -> None:
    """NaN in the one video that only the second of two ranks looks at before training."""
    write_csv(home.data / "val.csv", make_rows(4, 4, 2, "w"))
    pth(FEATURES, lambda videos: videos.update(w0001=torch.full((5, 768), torch.nan)))(home)


TWO_RANKS: dict[str, Case] = {
    "unknown flag": (None, "--epoch 3", 2, ["unknown flag --epoch; did you mean '--epochs'?"]),
    "no features": (gone(FEATURES), "", 2, ["clipvitl14.pth: no such file; the video feature file should be there"]),
    "a feature of rank 1": (spoil_rank_1, "", 2, ["clipvitl14.pth: 1 of 2 questions (1 videos) have features with NaN or infinite values, e.g. 'w0001'"]),
    "batch size of one rank": (ds(train_batch_size=4), DS, 2, ["train_batch_size 4 does not fit --batch_size 4 --accum_iter 1 on 2 rank(s), which make 8"]),
    "damaged checkpoint": (flip(OPTIMIZER, 5000), EVAL + CHECKPOINT, 3, ["optimizer.safetensors: damaged (its sha256 is not the recorded one)"]),
    "output_dir fails late": (None, "--output_dir /proc/vico", 2, ["/proc/vico: cannot be made (No such file or directory); choose another"]),
}  # fmt: skip
WAITED_FOR = "unknown flag"  # the case whose second rank may end by itself


def end_as_launchers_do(home: Home, line: str, wait: bool) -> tuple[int, Ended]:
    """(the rank that ended first, how all ended): every rank is ended as soon as one has; with `wait` only at last."""
    command, *flags = line.split() if line and not line.startswith("-") else ["train", *line.split()]
    ranks = start(command, *home.flags, *(flag.format(home=home.folder) for flag in flags), ranks=2)
    limit = time.monotonic() + 240
    while all(rank.poll() is None for rank in ranks) and time.monotonic() < limit:
        time.sleep(0.05)
    first = next((i for i, rank in enumerate(ranks) if rank.poll() is not None), -1)
    for rank in ranks:
        if rank.poll() is None and not wait:
            os.killpg(rank.pid, signal.SIGTERM)
    return first, end(ranks, timeout=60)


@pytest.fixture(scope="module")
def two_ranks(original: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, Ended]]]:
    """All cases at once: most of their time is spent in loading torch, and one in waiting."""

    def run(name: str) -> tuple[int, Ended]:
        home = Home(shutil.copytree(original.folder, tmp_path_factory.mktemp("two") / "home"))
        damage, line, _, _ = TWO_RANKS[name]
        if damage is not None:
            damage(home)
        return end_as_launchers_do(home, line, wait=name == WAITED_FOR)

    with ThreadPoolExecutor(3) as pool:
        yield dict(zip(TWO_RANKS, pool.map(run, TWO_RANKS), strict=True))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_rank_0_says_it_before_any_rank_ends(name: str, two_ranks: dict[str, tuple[int, Ended]]) -> None:
    _, _, code, parts = TWO_RANKS[name]
    first, ended = two_ranks[name]
    assert first == 0 and ended.codes == [code, code if name == WAITED_FOR else -signal.SIGTERM], ended.output
    assert "Traceback" not in ended.output and ended.stderrs[1] == ""
    line = ended.stderrs[0]
    assert line.startswith("vico: error: ") and line.count("\n") == 1 and all(part in line for part in parts), line
