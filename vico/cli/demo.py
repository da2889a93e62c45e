"""`vico demo`: a world to try everything on, made on the spot: tokenizer, trained tiny LLaMA, videos, questions, captions.

The LLaMA is trained here, on the method's own prompts, with words in the video slots instead of video tokens; so it can
read, and what is left for ViCo to learn is to see: to map features to what the LLaMA would read as those words.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from vico.cli.demo_dataset import (
    CONCEPTS,
    PARTS,
    TYPES,
    Camera,
    Video,
    ask,
    caption,
    make_video,
    part,
)
from vico.data.prompts import ANSWER_TEXT, Prompts, letter, option_text, question_text
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question, TokenSequence
from vico.errors import UserError
from vico.io.atomic import make_folder, write_json
from vico.io.text import read_json_object
from vico.model.config import FEATURE_WIDTH, LlamaConfig, backbone_shapes
from vico.model.llama import rotary_angles
from vico.model.ops.autograd import rotate

VERSION = 1
NUM_SLOTS = 10
SPLITS = {"train": 240, "val": 60, "test": 60}  # videos
QUESTIONS_PER_VIDEO = 5
PRETRAINING_STEPS, PEAK_LR = 500, 4e-3
BATCH = 48
TIME_STRENGTH = 1.5  # of the word for when a frame is, against a word for what it shows
WORD_WEIGHT = 0.5
LETTER_WEIGHT = 10.0  # of the answer's letter against a word: it is one token of sixty, and the one that matters
SHAPE = {"dim": 96, "n_layers": 3, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
CSV_COLUMNS = (
    "video",
    "frame_count",
    "width",
    "height",
    "question",
    "answer",
    "qid",
    "type",
    "a0",
    "a1",
    "a2",
    "a3",
    "a4",
)
Weights = dict[str, Tensor]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see vico demo --help)")


def main(argv: list[str]) -> int:
    parser = _Parser(
        prog="vico demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="where the world goes (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    make_toy_dataset(flags.output_dir, flags.seed)
    return 0


def make_toy_dataset(
    out: Path, seed: int = 0, steps: int = PRETRAINING_STEPS, splits: dict[str, int] | None = None
) -> None:
    """`out` with pretrained/llama, data/nextqa and data_swapped/nextqa; what is whole already is left as it is.

    Each part is made under another name and renamed, the manifest last: a killed start is mended by the next one.
    """
    made_of = {"version": VERSION, "seed": seed, "steps": steps, "splits": splits or SPLITS}
    manifest = out / "world.json"
    if manifest.exists():
        if read_json_object(manifest, "the demo world's manifest") != made_of:
            raise UserError(
                f"{out}: holds a demo world of other settings; remove it, or choose another --output_dir"
            )
        print(f"{out}: the demo world is there already", flush=True)
        return
    make_folder(out)
    temporary = out / f".world.tmp-{os.getpid()}"
    try:
        llama = temporary / "pretrained" / "llama"
        (llama / "tiny").mkdir(parents=True)
        _make_data(temporary, seed, splits or SPLITS)
        make_tokenizer(llama / "tokenizer.model", seed)
        _make_llama(llama, seed, steps)
        for part_name in ("data", "data_swapped", "pretrained"):
            shutil.rmtree(out / part_name, ignore_errors=True)
            (temporary / part_name).rename(out / part_name)
    except OSError as error:
        raise UserError(f"{out}: the demo world cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(manifest, made_of)
    print(f"{out}: the demo world is made", flush=True)


# The data set


def _make_data(root: Path, seed: int, splits: dict[str, int]) -> None:
    """Annotation files, features and captions; in data_swapped the features of each video are another one's."""
    camera, generator = Camera(FEATURE_WIDTH, seed), torch.Generator().manual_seed(seed + 1)
    folder, swapped = root / "data" / "nextqa", root / "data_swapped" / "nextqa"
    folder.mkdir(parents=True)
    swapped.mkdir(parents=True)
    features: dict[str, Tensor] = {}
    elsewhere: dict[str, Tensor] = {}
    captions: dict[str, str] = {}
    for i, (split, num_videos) in enumerate(splits.items()):
        rng = random.Random(f"{seed} {split}")
        videos = {f"{i}{n:05d}": make_video(rng) for n in range(num_videos)}
        rows = [row for name, video in videos.items() for row in _rows(rng, name, video)]
        for target in (folder, swapped):
            with (target / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, CSV_COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
        filmed = {name: camera.film(video, generator) for name, video in videos.items()}
        names = list(filmed)
        features |= filmed
        elsewhere |= {name: filmed[names[(n + 1) % len(names)]] for n, name in enumerate(names)}
        captions |= {name: caption(video) for name, video in videos.items()}
    for target, content in ((folder, features), (swapped, elsewhere)):
        torch.save(content, target / "clipvitl14.pth")
        (target / "llava_v15_13b_n6.json").write_text(json.dumps(captions), encoding="utf-8")


def _rows(rng: random.Random, name: str, video: Video) -> list[dict[str, object]]:
    rows = []
    for qid, kind in enumerate(rng.sample(TYPES, QUESTIONS_PER_VIDEO)):
        text, options, answer = ask(rng, video, kind)
        size = {"video": name, "frame_count": video.num_frames * 30, "width": 640, "height": 480}
        asked = {"question": text, "answer": answer, "qid": qid, "type": kind}
        rows.append({**size, **asked, **{f"a{k}": option for k, option in enumerate(options)}})
    return rows


# The tokenizer


def make_tokenizer(path: Path, seed: int, vocab_size: int = 560) -> None:
    """LLaMA's kind of tokenizer (BPE, byte fallback, no normalisation) over the language of the prompts."""
    from sentencepiece import SentencePieceTrainer

    rng = random.Random(f"{seed} tokenizer")
    lines = ["Instruction: Predict the answer based on the video and question.", "Video:"] * 50
    lines += ["Instruction: describe the what happens in the video."] * 50 + [
        *CONCEPTS,
        *PARTS,
    ] * 20
    for i in range(400):
        video, kind = make_video(rng), TYPES[i % len(TYPES)]
        asked = _question(rng, video, kind)
        lines += (question_text(asked) + option_text(asked) + ANSWER_TEXT + letter(i % 5)).split(
            "\n"
        )
        lines.append(f"Description: {caption(video)}")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _question(rng: random.Random, video: Video, kind: str) -> Question:
    text, options, answer = ask(rng, video, kind)
    return Question(0, "", "", kind, text, options, answer)


# The LLaMA


def _make_llama(folder: Path, seed: int, steps: int) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.model")
    shape = LlamaConfig(vocab_size=tokenizer.vocab_size, **SHAPE)  # type: ignore[arg-type]
    weights = _initial_weights(shape, seed)
    if steps:
        torch.set_num_threads(1)  # the same bits on any number of cores
        _pretrain(weights, shape, tokenizer, seed, steps)
    torch.save(
        {name: value.detach().half() for name, value in weights.items()},
        folder / "tiny" / "consolidated.00.pth",
    )
    write_json(folder / "tiny" / "params.json", {**SHAPE, "vocab_size": -1})


def _initial_weights(shape: LlamaConfig, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in backbone_shapes(shape).items():
        if "norm" in name:
            weights[name] = torch.ones(size)
        else:
            scale = 1.0 if name.startswith("tok_embeddings") else size[1] ** -0.5
            weights[name] = torch.randn(size, generator=generator) * scale
    return {name: value.requires_grad_() for name, value in weights.items()}


def _pretrain(
    weights: Weights, shape: LlamaConfig, tokenizer: Tokenizer, seed: int, steps: int
) -> None:
    """Next-token training on the method's prompts, slots filled with the embeddings of the words for what a frame shows."""
    rng, generator = random.Random(f"{seed} pretraining"), torch.Generator().manual_seed(seed + 2)
    prompts = Prompts(tokenizer, NUM_SLOTS, 512, 512, dialogue=False)
    words = torch.tensor([tokenizer.encode(concept)[0] for concept in (*CONCEPTS, *PARTS)])
    optimizer = torch.optim.AdamW(weights.values(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    start, recent = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 20, 1 - step / steps)
        loss, right = _reading_loss(weights, shape, words, prompts, rng, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        recent += (right - recent) / 8
        if step == 9 or (step + 1) % 100 == 0 or step + 1 == steps:
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            print(
                f"teaching a tiny LLaMA to read: step {step + 1}/{steps}, answers right {recent:.0%}, {left:.0f} s left",
                flush=True,
            )


def _reading_loss(
    weights: Weights,
    shape: LlamaConfig,
    words: Tensor,
    prompts: Prompts,
    rng: random.Random,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """(loss of a batch of prompts about new videos, share of answers that are right)."""
    videos = [make_video(rng) for _ in range(BATCH)]
    sequences: list[TokenSequence] = []
    for i, video in enumerate(videos):
        if i % 4 == 3:
            sequences.append(prompts.caption(caption(video)))
        else:
            asked = _question(rng, video, TYPES[rng.randrange(len(TYPES))])
            assert asked.answer is not None
            sequences.append(prompts.vqa(asked, asked.answer))
    longest = max(len(s.tokens) for s in sequences)
    ids = torch.tensor(
        [[max(t, 0) for t in s.tokens] + [0] * (longest - len(s.tokens)) for s in sequences]
    )
    rows, at, weight = (torch.tensor(column) for column in zip(*_wanted(sequences), strict=True))
    x_BSD = F.embedding(ids, weights["tok_embeddings.weight"])
    starts = torch.tensor([s.video_start for s in sequences])
    slots = (torch.arange(len(videos))[:, None], starts[:, None] + torch.arange(NUM_SLOTS))
    h_BSD = _hidden(
        weights, shape, x_BSD.index_put(slots, _soft_words(weights, words, videos, generator))
    )
    logits = F.linear(h_BSD[rows, at - 1], weights["output.weight"])
    losses = F.cross_entropy(logits, ids[rows, at], reduction="none")
    letters = weight == LETTER_WEIGHT
    right = (logits.argmax(dim=-1) == ids[rows, at])[letters].float().mean().item()
    return (losses * weight).sum() / weight.sum(), right


def _wanted(sequences: list[TokenSequence]) -> list[tuple[int, int, float]]:
    """(row, position, weight) of each token that is to be predicted."""
    found = [(row, t, WORD_WEIGHT) for row, s in enumerate(sequences) for t in s.targets]
    letters = {
        (row, s.targets.stop - 3) for row, s in enumerate(sequences) if s.task == "vqa"
    }  # letter, ")", EOS
    return [(row, t, LETTER_WEIGHT if (row, t) in letters else weight) for row, t, weight in found]


def _soft_words(
    weights: Weights, words: Tensor, videos: list[Video], generator: torch.Generator
) -> Tensor:
    """[B, F, D] for the slots: each a mixture of the embeddings of what the frame shows, with noise, as a projection would make it."""
    shown = torch.tensor(
        [
            [[CONCEPTS.index(c) for c in v.shown(j, NUM_SLOTS)] for j in range(NUM_SLOTS)]
            for v in videos
        ]
    )
    strength = 0.5 + torch.rand(shown.shape, generator=generator)
    mixed = (F.embedding(words[shown], weights["tok_embeddings.weight"]) * strength[..., None]).sum(
        dim=2
    )
    # When a frame is: what ViCo's temporal embedding is there to say.
    times = words[[len(CONCEPTS) + part(j, NUM_SLOTS) for j in range(NUM_SLOTS)]]
    mixed = mixed + TIME_STRENGTH * F.embedding(times, weights["tok_embeddings.weight"])
    noise = torch.randn(mixed.shape, generator=generator) + torch.randn(
        len(videos), 1, mixed.shape[2], generator=generator
    )
    return mixed + 0.3 * noise


def _hidden(weights: Weights, shape: LlamaConfig, x_BSD: Tensor) -> Tensor:
    """[B, S, D] of the network of model/llama.py, written plainly and with gradients for the weights, which that one never makes."""
    batch, length, _ = x_BSD.shape
    rotary = rotary_angles(torch.arange(length), shape.head_dim, shape.rope_theta)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (shape.dim,), weights[name], shape.norm_eps)

    def product(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"])

    for i in range(shape.n_layers):
        at = f"layers.{i}"
        h = norm(x_BSD, f"{at}.attention_norm.weight")
        q, k, v = (
            product(h, f"{at}.attention.{w}").view(batch, length, shape.n_heads, -1)
            for w in ("wq", "wk", "wv")
        )
        heads = [x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v)]
        seen = (
            F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        x_BSD = x_BSD + product(seen, f"{at}.attention.wo")
        h = norm(x_BSD, f"{at}.ffn_norm.weight")
        mixed = F.silu(product(h, f"{at}.feed_forward.w1")) * product(h, f"{at}.feed_forward.w3")
        x_BSD = x_BSD + product(mixed, f"{at}.feed_forward.w2")
    return norm(x_BSD, "norm.weight")
