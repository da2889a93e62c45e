"""LLaMA weights in Hugging Face's layout that are refused, with what the error must say."""

import json

from faults.case import Case, refused
from faults.damage import (
    Payload,
    as_torch_files,
    cut,
    gone,
    hugging_face,
    js,
    old_format,
    pth,
    put,
    stored,
    tokenizer,
    tokenizer_json,
)
from support.run_fixture import TINY

CONFIG, BIN = f"{TINY}/config.json", f"{TINY}/pytorch_model.bin"
FIRST = "pytorch_model-00001-of-00002.bin"
ONLY = "and only llama and mistral are read (LLaMA, TinyLlama, SmolLM2, Mistral"

HUGGING_FACE: dict[str, Case] = {
    "HF, a Gemma": refused(
        hugging_face(js(CONFIG, model_type="gemma2")),
        "tiny/config.json: 'model_type' is 'gemma2', " + ONLY,
    ),
    "HF, a Qwen": refused(
        hugging_face(js(CONFIG, model_type="qwen2")),
        "tiny/config.json: 'model_type' is 'qwen2', " + ONLY,
    ),
    "HF, biases in attention": refused(
        hugging_face(js(CONFIG, attention_bias=True)),
        "config.json: attention_bias True: no LLaMA has this, and ViCo cannot run it",
    ),
    "HF, biases in the MLP": refused(
        hugging_face(js(CONFIG, mlp_bias=True)),
        "config.json: mlp_bias True: no LLaMA has this",
    ),
    "HF, a short window": refused(
        hugging_face(js(CONFIG, model_type="mistral", sliding_window=64)),
        "llama/tiny: sliding_window is 64 tokens, and sequences may have 256; ViCo computes no "
        "window: set --max_seq_len 64 or less",
    ),
    "HF, odd head_dim": refused(
        hugging_face(js(CONFIG, head_dim=23)), "config.json: head_dim 23 must be even"
    ),
    "HF, another head_dim": refused(
        hugging_face(js(CONFIG, head_dim=32)),
        "'model.layers.0.self_attn.q_proj.weight' has shape [96, 96], and config.json asks for "
        "[128, 96]",
    ),
    "HF, fewer rows than pieces": refused(
        hugging_face(
            stored(lambda t: t.update({n: t[n][:555] for n in t if len(t[n]) == 560})),
            js(CONFIG, vocab_size=555),
        ),
        "llama/tiny: the embeddings have 555 rows and the tokenizer has 560 pieces; use the",
    ),
    "HF, many more rows than pieces": refused(
        hugging_face(tokenizer(pieces=350), gone(f"{TINY}/tokenizer.model")),
        "llama/tiny: the embeddings have 560 rows and the tokenizer has 350 pieces; use the",
    ),
    "HF, no head and not tied": refused(
        hugging_face(stored(lambda t: t.pop("lm_head.weight"))),
        "llama/tiny: lacks 1 tensor(s), e.g. 'lm_head.weight'",
    ),
    "bin that runs code": refused(
        hugging_face(as_torch_files(), pth(BIN, lambda tensors: tensors.update(x=Payload()))),
        "pytorch_model.bin: the file of LLaMA weights holds the Python object posix.mkdir, refused",
        code=3,
    ),
    "bin, cut off": refused(
        hugging_face(as_torch_files(), cut(BIN, 9999)),
        "pytorch_model.bin: the file of LLaMA weights is cut off or damaged",
        code=3,
    ),
    "bin in the old format": refused(
        hugging_face(as_torch_files(), old_format(BIN)),
        "pytorch_model.bin: the file of LLaMA weights is in torch's old format, which cannot be "
        'memory-mapped; convert it: python -c "import argparse, torch; ',
        code=3,
    ),
    "bin, a file missing": refused(
        hugging_face(as_torch_files(2), gone(f"{TINY}/{FIRST}")),
        f"{FIRST}: no such file; copy all files of the model",
    ),
    "bin, no index": refused(
        hugging_face(as_torch_files(2), gone(f"{BIN}.index.json")),
        "llama/tiny: no pytorch_model.bin and no pytorch_model.bin.index.json; copy it",
    ),
    "bin, an index of others": refused(
        hugging_face(
            as_torch_files(2),
            put(f"{BIN}.index.json", json.dumps({"weight_map": {"x": FIRST}})),
        ),
        f"{FIRST}: lacks 1 tensor(s), e.g. 'x'; pytorch_model.bin.index.json lists others",
    ),
    "tokenizer_config.json of another tokenizer": refused(
        hugging_face(tokenizer_json(eos_token="<|im_end|>")),
        "tiny/tokenizer_config.json: 'eos_token' is '<|im_end|>', which is no piece of "
        "tokenizer.json beside it",
    ),
    "config.json, an end beyond the tokenizer": refused(
        hugging_face(tokenizer_json(), js(CONFIG, eos_token_id=[128001])),
        "tiny/config.json: 'eos_token_id' is 128001 and must be an id of the tokenizer.json "
        "beside it, from 0 to 559",
    ),
    "tokenizer_config.json cut off": refused(
        hugging_face(tokenizer_json(), put(f"{TINY}/tokenizer_config.json", '{"bos_token": "<s')),
        "tokenizer_config.json:1: column 15: ",
        "the text is cut off here; correct",
    ),
}
