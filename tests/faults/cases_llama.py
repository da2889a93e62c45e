"""LLaMA weights and tokenizers that are refused, with what the error must say."""

import torch

from faults.case import Case, flags, refused
from faults.damage import (
    HTML,
    LFS,
    Payload,
    copy,
    cut,
    gone,
    js,
    link,
    pipe,
    pth,
    put,
    ring,
    tokenizer,
    two_shards,
)
from support.run_fixture import PARAMS, SHARD, SHARD_1, TINY, TOKENIZER

LLAMA: dict[str, Case] = {
    "no such model": flags(
        "--model 13B", "llama/13B: no such folder of weights; --model can be tiny"
    ),
    "no tokenizer": refused(
        gone(TOKENIZER),
        "tokenizer.model: No such file or directory; --llama_model_path must name the folder",
    ),
    "tokenizer as HTML": refused(
        put(TOKENIZER, HTML),
        "tokenizer.model: the tokenizer is an HTML page (42 bytes), most likely a failed download",
    ),
    "tokenizer empty": refused(
        put(TOKENIZER, ""),
        "tokenizer.model: not a sentencepiece model; copy tokenizer.model of the LLaMA "
        "weights again",
    ),
    "tokenizer cut off": refused(
        cut(TOKENIZER, 3000), "tokenizer.model: not a sentencepiece model; copy"
    ),
    "other tokenizer": refused(
        tokenizer(pieces=350),
        "llama/tiny: the embeddings have 560 rows and the tokenizer has 350 pieces; use "
        "the tokenizer.model that came with these weights",
    ),
    "no params.json": refused(
        gone(PARAMS),
        "params.json: no such file; params.json, which comes with the LLaMA weights, "
        "should be there",
    ),
    "params.json cut off": refused(
        cut(PARAMS, 30),
        "params.json:4: column 1: ",
        "correct {fixture}/toy/pretrained/llama/tiny/params.json",
    ),
    "params.json, layers": refused(
        js(PARAMS, n_layers=4),
        "consolidated.00.pth: lacks 9 tensor(s), e.g. 'layers.3.",
        "must be those of one LLaMA",
    ),
    "params.json, width": refused(
        js(PARAMS, dim=64),
        "'tok_embeddings.weight' has shape [560, 96] in 1 shard(s), and params.json asks "
        "for [560, 64]",
    ),
    "params.json, heads": refused(
        js(PARAMS, n_heads=5), "params.json: dim 96 over n_heads 5 is not an even whole number"
    ),
    "params.json, no width": refused(
        js(PARAMS, dim=...),
        "params.json: 'dim' is None and must be a whole number from 1 to 1000000",
    ),
    "params.json, grouped queries": refused(
        js(PARAMS, n_kv_heads=2),
        "'layers.0.attention.wk.weight' has shape [96, 96] in 1 shard(s), and "
        "params.json asks for [48, 96]",
    ),
    "params.json, odd groups": refused(
        js(PARAMS, n_kv_heads=3), "params.json: n_heads 4 over n_kv_heads 3 is not a whole number"
    ),
    "params.json, stretched rotary": refused(
        js(PARAMS, use_scaled_rope=True),
        "params.json: use_scaled_rope does not say by how much; add",
    ),
    "two tokenizers": refused(
        put(f"{TINY}/tokenizer.model", "x"),
        "tiny/tokenizer.model: is another tokenizer than {fixture}/toy/pretrained/llama/tokenizer",
    ),
    "two layouts": refused(
        put(f"{TINY}/model.safetensors", "x"),
        "llama/tiny: holds weights in Meta's layout (*.pth) and in Hugging Face's",
    ),
    "no shard": refused(
        gone(SHARD),
        "llama/tiny: no consolidated.00.pth; --llama_model_path and --model must name a "
        "folder of LLaMA weights",
    ),
    "shard cut off": refused(
        cut(SHARD, 9999),
        "consolidated.00.pth: the shard of LLaMA weights is cut off or damaged; fetch or "
        "copy it again",
        code=3,
    ),
    "shard as git-lfs pointer": refused(
        put(SHARD, LFS),
        "consolidated.00.pth: the shard of LLaMA weights is a git-lfs pointer",
        "git lfs pull",
        code=3,
    ),
    "shard that runs code": refused(
        pth(SHARD, lambda shard: shard.update(x=Payload())),
        "consolidated.00.pth: ",
        "posix.mkdir, refused",
        code=3,
    ),
    "shard, quantized": refused(
        pth(
            SHARD,
            lambda shard: shard.update({"output.weight": shard["output.weight"].to(torch.int8)}),
        ),
        "consolidated.00.pth: 'output.weight' is no dense tensor of floating-point "
        "numbers; quantized weights are not supported",
    ),
    "shard, another layout": refused(
        pth(SHARD, lambda shard: {"model": shard}),
        "consolidated.00.pth: not a dict of tensors; LLaMA weights in Meta's",
    ),
    "last shard missing": refused(
        two_shards(gone(SHARD_1)),
        "has shape [560, 48] in 1 shard(s), and params.json asks for",
        "all shards present",
    ),
    "first shard missing": refused(
        two_shards(gone(SHARD)),
        "llama/tiny: consolidated.00.pth is missing, consolidated.01.pth is there; copy all",
    ),
    "shards of two models": refused(
        two_shards(copy("other/consolidated.01.pth", SHARD_1)),
        "differs between the shards, so they are of different models; copy them again",
    ),
    "a shard twice": refused(
        two_shards(copy(SHARD, SHARD_1)),
        "llama/tiny: two of the 2 shards are the same file; copy consolidated.*.pth again",
    ),
    "tokenizer is a pipe": refused(
        pipe(TOKENIZER),
        "tokenizer.model: a device or a pipe, not a file; --llama_model_path must name",
    ),
    "params.json is a device": refused(
        link(PARAMS, "/dev/zero"),
        "params.json, which comes with the LLaMA weights, cannot be read (a device",
    ),
    "params.json, layers without end": refused(
        js(PARAMS, n_layers=10**30),
        "params.json: 'n_layers' is 1000000000000000000000000000000 and must be",
    ),
    "params.json, NaN": refused(
        put(PARAMS, '{"dim": NaN}'), "params.json:1: column 9: NaN is not JSON"
    ),
    "params.json, key twice": refused(
        put(PARAMS, '{"dim": 96,\n"dim": 32}'),
        "params.json:2: column 1: key 'dim' appears twice in one object",
    ),
    "shard is a pipe": refused(
        pipe(SHARD),
        "consolidated.00.pth: the shard of LLaMA weights cannot be opened (a device or a pipe",
        code=3,
    ),
    "shard, a key that forges lines": refused(
        pth(SHARD, lambda shard: shard.update({"x\nvico: done": torch.zeros(1)})),
        "holds unknown 1 tensor(s), e.g. 'x\\nvico: done'",
    ),
    "shard, a list that holds itself": refused(
        pth(SHARD, lambda shard: ring()), "consolidated.00.pth: not a dict of tensors"
    ),
}
