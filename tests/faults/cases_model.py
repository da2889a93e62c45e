"""LLaMA files and checkpoints that cannot be used, with what the line must say."""

import torch

from faults.cases_settings import EVAL
from faults.damage import (
    HTML,
    LFS,
    Case,
    Payload,
    both,
    claims,
    copy,
    cut,
    flip,
    folder,
    gone,
    js,
    link,
    old_format,
    pipe,
    pth,
    put,
    ring,
    safetensors_of,
    tar,
    tokenizer,
    two_shards,
)
from support.run_fixture import (
    CHECKPOINT,
    OPTIMIZER,
    PARAMS,
    SHARD,
    SHARD_1,
    STATE,
    TINY,
    TOKENIZER,
    WEIGHTS,
)

MODEL: dict[str, Case] = {
    # LLaMA
    "no such model": (
        None,
        "--model 13B",
        2,
        ["llama/13B: no such folder of weights; --model can be tiny"],
    ),
    "no tokenizer": (
        gone(TOKENIZER),
        "",
        2,
        ["tokenizer.model: No such file or directory; --llama_model_path must name the folder"],
    ),
    "tokenizer as HTML": (
        put(TOKENIZER, HTML),
        "",
        2,
        [
            "tokenizer.model: the tokenizer is an HTML page (42 bytes), most likely a failed download"
        ],
    ),
    "tokenizer empty": (
        put(TOKENIZER, ""),
        "",
        2,
        [
            "tokenizer.model: not a sentencepiece model; copy tokenizer.model of the LLaMA weights again"
        ],
    ),
    "tokenizer cut off": (
        cut(TOKENIZER, 3000),
        "",
        2,
        ["tokenizer.model: not a sentencepiece model; copy"],
    ),
    "other tokenizer": (
        tokenizer(pieces=350),
        "",
        2,
        [
            "llama/tiny: the embeddings have 560 rows and the tokenizer has 350 pieces; use the tokenizer.model that came with these weights"
        ],
    ),
    "no params.json": (
        gone(PARAMS),
        "",
        2,
        [
            "params.json: no such file; params.json, which comes with the LLaMA weights, should be there"
        ],
    ),
    "params.json cut off": (
        cut(PARAMS, 30),
        "",
        2,
        ["params.json:4: column 1: ", "correct {fixture}/world/pretrained/llama/tiny/params.json"],
    ),
    "params.json, layers": (
        js(PARAMS, n_layers=4),
        "",
        2,
        ["consolidated.00.pth: lacks 9 tensor(s), e.g. 'layers.3.", "must be those of one LLaMA"],
    ),
    "params.json, width": (
        js(PARAMS, dim=64),
        "",
        2,
        [
            "'tok_embeddings.weight' has shape [560, 96] in 1 shard(s), and params.json asks for [560, 64]"
        ],
    ),
    "params.json, heads": (
        js(PARAMS, n_heads=5),
        "",
        2,
        ["params.json: dim 96 over n_heads 5 is not an even whole number"],
    ),
    "params.json, no width": (
        js(PARAMS, dim=...),
        "",
        2,
        ["params.json: 'dim' is None and must be a whole number from 1 to 1000000"],
    ),
    "params.json, grouped queries": (
        js(PARAMS, n_kv_heads=2),
        "",
        2,
        [
            "'layers.0.attention.wk.weight' has shape [96, 96] in 1 shard(s), and params.json asks for [48, 96]"
        ],
    ),
    "params.json, odd groups": (
        js(PARAMS, n_kv_heads=3),
        "",
        2,
        ["params.json: n_heads 4 over n_kv_heads 3 is not a whole number"],
    ),
    "params.json, stretched rotary": (
        js(PARAMS, use_scaled_rope=True),
        "",
        2,
        ["params.json: use_scaled_rope does not say by how much; add"],
    ),
    "two tokenizers": (
        put(f"{TINY}/tokenizer.model", "x"),
        "",
        2,
        [
            "tiny/tokenizer.model: is another tokenizer than {fixture}/world/pretrained/llama/tokenizer"
        ],
    ),
    "two layouts": (
        put(f"{TINY}/model.safetensors", "x"),
        "",
        2,
        ["llama/tiny: holds weights in Meta's layout (*.pth) and in Hugging Face's"],
    ),
    "no shard": (
        gone(SHARD),
        "",
        2,
        [
            "llama/tiny: no consolidated.00.pth; --llama_model_path and --model must name a folder of LLaMA weights"
        ],
    ),
    "shard cut off": (
        cut(SHARD, 9999),
        "",
        3,
        [
            "consolidated.00.pth: the shard of LLaMA weights is cut off or damaged; fetch or copy it again"
        ],
    ),
    "shard as git-lfs pointer": (
        put(SHARD, LFS),
        "",
        3,
        ["consolidated.00.pth: the shard of LLaMA weights is a git-lfs pointer", "git lfs pull"],
    ),
    "shard that runs code": (
        pth(SHARD, lambda shard: shard.update(x=Payload())),
        "",
        3,
        ["consolidated.00.pth: ", "posix.mkdir, refused"],
    ),
    "shard, quantized": (
        pth(
            SHARD,
            lambda shard: shard.update({"output.weight": shard["output.weight"].to(torch.int8)}),
        ),
        "",
        2,
        [
            "consolidated.00.pth: 'output.weight' is no dense tensor of floating-point numbers; quantized weights are not supported"
        ],
    ),
    "shard, another layout": (
        pth(SHARD, lambda shard: {"model": shard}),
        "",
        2,
        ["consolidated.00.pth: not a dict of tensors; LLaMA weights in Meta's"],
    ),
    "last shard missing": (
        two_shards(gone(SHARD_1)),
        "",
        2,
        ["has shape [560, 48] in 1 shard(s), and params.json asks for", "all shards present"],
    ),
    "first shard missing": (
        two_shards(gone(SHARD)),
        "",
        2,
        ["llama/tiny: consolidated.00.pth is missing, consolidated.01.pth is there; copy all"],
    ),
    "shards of two models": (
        two_shards(copy("other/consolidated.01.pth", SHARD_1)),
        "",
        2,
        ["differs between the shards, so they are of different models; copy them again"],
    ),
    "a shard twice": (
        two_shards(copy(SHARD, SHARD_1)),
        "",
        2,
        ["llama/tiny: two of the 2 shards are the same file; copy consolidated.*.pth again"],
    ),
    # checkpoints
    "nothing to resume": (
        None,
        "--resume {fixture}/nowhere",
        3,
        ["{fixture}/nowhere: no such checkpoint; --resume takes a checkpoint folder or a .pth"],
    ),
    "nothing to evaluate": (
        None,
        "eval",
        2,
        ["--resume is missing: name the checkpoint folder or .pth file to evaluate"],
    ),
    "empty folder": (
        folder("empty"),
        f"{EVAL}empty",
        3,
        ["{fixture}/empty/state.json: no such file; a checkpoint is a folder with state.json"],
    ),
    "the run, not its checkpoint": (
        None,
        f"{EVAL}run",
        3,
        ["{fixture}/run/state.json: no such file; did you mean {fixture}/run/checkpoint-1?"],
    ),
    "own, weights cut off": (
        cut(WEIGHTS, 1000),
        EVAL + CHECKPOINT,
        3,
        ["adapter_model.safetensors: damaged (1000 of ", "use another checkpoint"],
    ),
    "own, moments flipped": (
        flip(OPTIMIZER, 5000),
        EVAL + CHECKPOINT,
        3,
        ["optimizer.safetensors: damaged (its sha256 is not the recorded one)"],
    ),
    "own, state changed": (
        js(STATE, progress={}),
        EVAL + CHECKPOINT,
        3,
        ["state.json: damaged (its sha256 is not the recorded one); use another"],
    ),
    "own, state cut off": (
        cut(STATE, 99),
        EVAL + CHECKPOINT,
        3,
        ["state.json:", "the text is cut off here; correct {fixture}/run/checkpoint-1/state.json"],
    ),
    "own, of another version": (
        js(STATE, format=2),
        EVAL + CHECKPOINT,
        3,
        ["state.json: 'format' is 2 and not 1, so another version wrote it"],
    ),
    "own, moments missing": (
        gone(OPTIMIZER),
        EVAL + CHECKPOINT,
        3,
        ["optimizer.safetensors: damaged (No such file or directory); use another"],
    ),
    "own, other settings": (
        None,
        f"--seed 9 --resume {{fixture}}/{CHECKPOINT}",
        2,
        [
            "checkpoint-1: was written by a run with other settings or files (seed; table below); give the same, or",
            "--allow_change seed",
            "seed     0    9",
        ],
    ),
    "own, other shape": (
        None,
        f"--adapter_len 4 --resume {{fixture}}/{CHECKPOINT}",
        3,
        [
            "checkpoint-1: does not fit --model, --adapter_layer, --adapter_len and --max_feats",
            "(adapter_query.weight [30, 96] instead of [12, 96])",
        ],
    ),
    "moments as weights": (
        None,
        EVAL + OPTIMIZER,
        3,
        [
            "optimizer.safetensors: does not fit",
            "9 missing (adapter_query.weight, ",
            "18 unexpected",
        ],
    ),
    "weights of garbage": (
        put("x.safetensors", HTML),
        f"{EVAL}x.safetensors",
        3,
        ["x.safetensors: damaged (", "use another checkpoint"],
    ),
    "lineage, HTML": (
        put("lineage.pth", HTML),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint is an HTML page (42 bytes), most likely a failed"],
    ),
    "lineage, git-lfs": (
        put("lineage.pth", LFS),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint is a git-lfs pointer", "run 'git lfs pull'"],
    ),
    "lineage, cut off": (
        cut("lineage.pth", 9999),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint is cut off or damaged; fetch or copy it again"],
    ),
    "lineage, flipped": (
        flip("lineage.pth", 50_000),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint is cut off", "(wrong checksum of its part"],
    ),
    "lineage, runs code": (
        pth("lineage.pth", lambda c: c.update(args=Payload())),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint holds the Python object posix.mkdir"],
    ),
    "lineage, not one": (
        pth("lineage.pth", lambda c: c["model"]),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: has no 'model' dict of tensors; a lineage"],
    ),
    "lineage, key missing": (
        pth("lineage.pth", lambda c: [c["model"].pop("visual_proj.weight")] and c),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: does not fit", "1 missing (visual_proj.weight)"],
    ),
    "lineage, key unexpected": (
        pth("lineage.pth", lambda c: c["model"].update(lora=torch.zeros(1))),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: does not fit", "1 unexpected (lora)"],
    ),
    "lineage, NaN": (
        pth(
            "lineage.pth", lambda c: c["model"]["temporal_emb.weight"].fill_(torch.nan) is None or c
        ),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: 'temporal_emb.weight' holds NaN or infinite values; use another checkpoint"],
    ),
    "lineage, integers": (
        pth(
            "lineage.pth",
            lambda c: c["model"].update(
                {"temporal_emb.weight": torch.zeros(10, 96, dtype=torch.int64)}
            ),
        ),
        f"{EVAL}lineage.pth",
        3,
        [
            "lineage.pth: 'model' entry 'temporal_emb.weight' is no dense tensor of floating-point numbers"
        ],
    ),
    "lineage, other optimizer": (
        pth("lineage.pth", lambda c: c.update(optimizer={"state": {}})),
        "--resume {fixture}/lineage.pth",
        3,
        [
            "lineage.pth: 'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'"
        ],
    ),
    "lineage, epoch": (
        pth("lineage.pth", lambda c: c.update(epoch="3")),
        "--resume {fixture}/lineage.pth",
        3,
        ["'epoch' is '3', not a whole number"],
    ),
    "tokenizer is a pipe": (
        pipe(TOKENIZER),
        "",
        2,
        ["tokenizer.model: a device or a pipe, not a file; --llama_model_path must name"],
    ),
    "params.json is a device": (
        link(PARAMS, "/dev/zero"),
        "",
        2,
        ["params.json, which comes with the LLaMA weights, cannot be read (a device"],
    ),
    "params.json, layers without end": (
        js(PARAMS, n_layers=10**30),
        "",
        2,
        ["params.json: 'n_layers' is 1000000000000000000000000000000 and must be"],
    ),
    "params.json, NaN": (
        put(PARAMS, '{"dim": NaN}'),
        "",
        2,
        ["params.json:1: column 9: NaN is not JSON"],
    ),
    "params.json, key twice": (
        put(PARAMS, '{"dim": 96,\n"dim": 32}'),
        "",
        2,
        ["params.json:2: column 1: key 'dim' appears twice in one object"],
    ),
    "shard is a pipe": (
        pipe(SHARD),
        "",
        3,
        ["consolidated.00.pth: the shard of LLaMA weights cannot be opened (a device or a pipe"],
    ),
    "shard, a key that forges lines": (
        pth(SHARD, lambda shard: shard.update({"x\nvico: done": torch.zeros(1)})),
        "",
        2,
        ["holds unknown 1 tensor(s), e.g. 'x\\nvico: done'"],
    ),
    "shard, a list that holds itself": (
        pth(SHARD, lambda shard: ring()),
        "",
        2,
        ["consolidated.00.pth: not a dict of tensors"],
    ),
    "state.json is a pipe": (
        pipe(STATE),
        EVAL + CHECKPOINT,
        3,
        ["state.json: the state of the checkpoint cannot be read (a device or a pipe"],
    ),
    "weights are a device": (
        link(WEIGHTS, "/dev/zero"),
        EVAL + CHECKPOINT,
        3,
        ["adapter_model.safetensors: "],
    ),
    "state.json, files that lead away": (
        js(STATE, files={"../../x": {}}),
        EVAL + CHECKPOINT,
        3,
        ["state.json: damaged (its sha256 is not the recorded one)"],
    ),
    "safetensors, a header without end": (
        put("x.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        f"{EVAL}x.safetensors",
        3,
        ["x.safetensors: damaged (", "use another checkpoint"],
    ),
    "safetensors, more numbers than bytes": (
        put(
            "x.safetensors",
            safetensors_of(
                '{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
            ),
        ),
        f"{EVAL}x.safetensors",
        3,
        ["x.safetensors: damaged (", "use another checkpoint"],
    ),
    "safetensors, another shape than bytes": (
        put(
            "x.safetensors",
            safetensors_of('{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        ),
        f"{EVAL}x.safetensors",
        3,
        ["x.safetensors: damaged (", "use another checkpoint"],
    ),
    "lineage is a pipe": (
        pipe("lineage.pth"),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint cannot be opened (a device or a pipe"],
    ),
    "lineage, larger than its file": (
        claims("lineage.pth", 10**12),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint "],
    ),
    "lineage in the old format, larger than its file": (
        both(old_format("lineage.pth"), claims("lineage.pth", 10**12)),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint claims ", "numbers that are not all among its "],
    ),
    "lineage in the old format, cut off": (
        both(old_format("lineage.pth"), cut("lineage.pth", 30_000)),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint "],
    ),
    "lineage as a tar archive": (
        tar("lineage.pth"),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint is no torch file"],
    ),
    "lineage as a tar archive in disguise": (
        tar("lineage.pth", first=b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
        f"{EVAL}lineage.pth",
        3,
        ["lineage.pth: the checkpoint "],
    ),
    "a folder as .pth": (
        folder("x.pth"),
        f"{EVAL}x.pth",
        3,
        ["{fixture}/x.pth/state.json: no such file; a checkpoint is a folder with state.json"],
    ),
    "convert, nothing": (
        None,
        "!convert {fixture}/nowhere {fixture}/x.pth",
        2,
        ["{fixture}/nowhere: no such file or folder to convert"],
    ),
    "convert, onto something": (
        None,
        "!convert {fixture}/lineage.pth {fixture}/run",
        2,
        ["{fixture}/run: is there already"],
    ),
    "convert, HTML": (
        put("lineage.pth", HTML),
        "!convert {fixture}/lineage.pth {fixture}/x.safetensors",
        3,
        ["lineage.pth: the checkpoint is an HTML page"],
    ),
    "plan, broken params.json": (
        put(PARAMS, "{"),
        "!plan --model {fixture}/" + TINY + " --gpu H100",
        2,
        ["params.json:1: column 2: "],
    ),
}
