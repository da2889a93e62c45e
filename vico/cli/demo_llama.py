"""The demo's tiny LLaMA: its tokenizer, its weights and its pretraining.

It is trained on the method's own prompts, with the embeddings of words in the video slots. It then
reads such words, and ViCo has to learn to map video features to what the LLaMA would read as them.
"""

import io
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vico.cli.demo_domain import PARTS, DemoVideo, Domain, part_of
from vico.data.prompts import ANSWER_TEXT, Prompts, letter, option_text, question_text
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question, TokenSequence
from vico.io import log
from vico.io.atomic import write_json
from vico.model.config import LlamaConfig, backbone_shapes
from vico.model.llama import rotary_angles
from vico.model.ops.autograd import rotate

Weights = dict[str, Tensor]

MODEL_NAME = "tiny"
DIM, NUM_LAYERS, NUM_HEADS, MULTIPLE_OF, NORM_EPS = 96, 3, 4, 32, 1e-5
VOCAB_SIZE = 560
NUM_SLOTS = 10
NUM_STEPS, PEAK_LR, NUM_WARMUP_STEPS = 500, 4e-3, 20
BATCH_SIZE = 48
MAX_TOKENS = 512
# Of the word for when a frame is, relative to a word for what it shows.
TIME_STRENGTH = 1.5
# The answer's letter is one token of sixty, and the one that decides the score.
WORD_WEIGHT, LETTER_WEIGHT = 0.5, 10.0


def make_tokenizer(path: Path, seed: int, domain: Domain, vocab_size: int = VOCAB_SIZE) -> None:
    """Train a tokenizer of LLaMA's kind (BPE, byte fallback, no normalization) on prompts."""
    from sentencepiece import SentencePieceTrainer  # optional: only the demo trains tokenizers

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_tokenizer_lines(random.Random(f"{seed} tokenizer"), domain)),
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


def _tokenizer_lines(rng: random.Random, domain: Domain) -> list[str]:
    """The text that the tokenizer is trained on."""
    lines = ["Instruction: Predict the answer based on the video and question.", "Video:"] * 50
    lines += ["Instruction: describe the what happens in the video."] * 50
    lines += [*domain.concepts, *PARTS] * 20
    for i in range(400):
        video = domain.make_video(rng)
        question = _random_question(rng, domain, video, domain.types[i % len(domain.types)])
        prompt = question_text(question) + option_text(question) + ANSWER_TEXT + letter(i % 5)
        lines += prompt.split("\n")
        lines.append(f"Description: {video.caption()}")
    return [line for line in lines if line]


def _random_question(
    rng: random.Random, domain: Domain, video: DemoVideo, question_type: str
) -> Question:
    text, options, answer = domain.question(rng, video, question_type)
    return Question(0, "", "", question_type, text, options, answer)


def make_llama(folder: Path, seed: int, num_steps: int, domain: Domain) -> None:
    """Pretrain the LLaMA for the tokenizer in `folder`, and write it there in Meta's layout."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    config = LlamaConfig(
        DIM, NUM_LAYERS, NUM_HEADS, tokenizer.vocab_size, MULTIPLE_OF, norm_eps=NORM_EPS
    )
    weights = _initial_weights(config, seed)
    if num_steps:
        # The result must not depend on the number of cores.
        torch.set_num_threads(1)
        _pretrain(weights, config, tokenizer, seed, num_steps, domain)
    model_folder = folder / MODEL_NAME
    half_weights = {name: value.detach().half() for name, value in weights.items()}
    torch.save(half_weights, model_folder / "consolidated.00.pth")
    params = {
        "dim": DIM,
        "n_layers": NUM_LAYERS,
        "n_heads": NUM_HEADS,
        "multiple_of": MULTIPLE_OF,
        "norm_eps": NORM_EPS,
        "vocab_size": -1,
    }
    write_json(model_folder / "params.json", params)


def _initial_weights(config: LlamaConfig, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in backbone_shapes(config).items():
        if "norm" in name:
            weights[name] = torch.ones(shape)
        else:
            scale = 1.0 if name.startswith("tok_embeddings") else shape[1] ** -0.5
            weights[name] = torch.randn(shape, generator=generator) * scale
    return {name: value.requires_grad_() for name, value in weights.items()}


def _pretrain(
    weights: Weights,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    seed: int,
    num_steps: int,
    domain: Domain,
) -> None:
    """Next-token training on the method's prompts; the video slots hold embeddings of words."""
    rng, generator = random.Random(f"{seed} pretraining"), torch.Generator().manual_seed(seed + 2)
    prompts = Prompts(tokenizer, NUM_SLOTS, MAX_TOKENS, MAX_TOKENS, dialogue=False)
    words = torch.tensor([tokenizer.encode(concept)[0] for concept in (*domain.concepts, *PARTS)])
    optimizer = torch.optim.AdamW(weights.values(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    start, mean_accuracy = time.monotonic(), 0.0
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / NUM_WARMUP_STEPS, 1 - step / num_steps)
        loss, accuracy = _loss(weights, config, domain, words, prompts, rng, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        mean_accuracy += (accuracy - mean_accuracy) / 8
        num_done = step + 1
        if num_done == 10 or num_done % 100 == 0 or num_done == num_steps:
            seconds_left = (time.monotonic() - start) / num_done * (num_steps - num_done)
            log.info(
                f"pretraining a tiny LLaMA: step {num_done}/{num_steps}, "
                f"answers right {mean_accuracy:.0%}, {seconds_left:.0f} s left"
            )


def _loss(
    weights: Weights,
    config: LlamaConfig,
    domain: Domain,
    words: Tensor,
    prompts: Prompts,
    rng: random.Random,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """(loss of a batch of prompts about new videos, share of answers that are right).

    `words`: token ids of the domain's concepts and of PARTS.
    """
    videos = [domain.make_video(rng) for _ in range(BATCH_SIZE)]
    sequences = _make_sequences(rng, domain, videos, prompts)
    ids_BS = _pad(sequences)
    embeddings = weights["tok_embeddings.weight"]
    starts_B1 = torch.tensor([[s.video_start] for s in sequences])
    slots = (torch.arange(BATCH_SIZE)[:, None], starts_B1 + torch.arange(NUM_SLOTS))
    slots_BFD = _slot_embeddings(embeddings, domain, words, videos, generator)
    x_BSD = F.embedding(ids_BS, embeddings).index_put(slots, slots_BFD)
    h_BSD = _forward(weights, config, x_BSD)
    # The row before a target predicts it.
    rows, positions, target_weights = _targets(sequences)
    logits = F.linear(h_BSD[rows, positions - 1], weights["output.weight"])
    targets = ids_BS[rows, positions]
    losses = F.cross_entropy(logits, targets, reduction="none")
    is_letter = target_weights == LETTER_WEIGHT
    accuracy = (logits.argmax(dim=-1) == targets)[is_letter].float().mean().item()
    return (losses * target_weights).sum() / target_weights.sum(), accuracy


def _make_sequences(
    rng: random.Random, domain: Domain, videos: list[DemoVideo], prompts: Prompts
) -> list[TokenSequence]:
    """A caption for every fourth video, a question for each other one."""
    sequences = []
    for i, video in enumerate(videos):
        if i % 4 == 3:
            sequences.append(prompts.caption(video.caption()))
        else:
            question = _random_question(rng, domain, video, rng.choice(domain.types))
            assert question.answer is not None
            sequences.append(prompts.vqa(question, question.answer))
    return sequences


def _pad(sequences: list[TokenSequence]) -> Tensor:
    """[B, S] token ids, 0 in video slots and behind the end."""
    length = max(len(s.tokens) for s in sequences)
    rows = []
    for sequence in sequences:
        ids = [max(token, 0) for token in sequence.tokens]
        rows.append(ids + [0] * (length - len(ids)))
    return torch.tensor(rows)


def _targets(sequences: list[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, positions, weights) of all target tokens."""
    rows, positions, weights = [], [], []
    for row, sequence in enumerate(sequences):
        # A VQA target ends with the letter, ")" and EOS.
        letter_position = sequence.targets.stop - 3 if sequence.task == "vqa" else None
        for position in sequence.targets:
            rows.append(row)
            positions.append(position)
            weights.append(LETTER_WEIGHT if position == letter_position else WORD_WEIGHT)
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(weights)


def _slot_embeddings(
    embeddings: Tensor,
    domain: Domain,
    words: Tensor,
    videos: list[DemoVideo],
    generator: torch.Generator,
) -> Tensor:
    """[B, F, D] for the video slots, as a projection of features might give.

    Each is a mixture of the embeddings of what the frame shows and of when it is, with noise.
    """
    concepts_BFC = torch.tensor([_slot_concepts(domain, video) for video in videos])
    strength_BFC = 0.5 + torch.rand(concepts_BFC.shape, generator=generator)
    concept_BFCD = F.embedding(words[concepts_BFC], embeddings)
    mixed_BFD = (concept_BFCD * strength_BFC[..., None]).sum(dim=2)
    # When a frame is: what ViCo's temporal embedding has to express.
    part_words = words[
        [len(domain.concepts) + part_of(slot, NUM_SLOTS) for slot in range(NUM_SLOTS)]
    ]
    mixed_BFD = mixed_BFD + TIME_STRENGTH * F.embedding(part_words, embeddings)
    frame_noise_BFD = torch.randn(mixed_BFD.shape, generator=generator)
    video_noise_B1D = torch.randn(len(videos), 1, mixed_BFD.shape[2], generator=generator)
    return mixed_BFD + 0.3 * (frame_noise_BFD + video_noise_B1D)


def _slot_concepts(domain: Domain, video: DemoVideo) -> list[list[int]]:
    return [domain.indices(video, slot, NUM_SLOTS) for slot in range(NUM_SLOTS)]


def _forward(weights: Weights, config: LlamaConfig, x_BSD: Tensor) -> Tensor:
    """[B, S, D] after the final norm: the network of vico/model/llama.py.

    That one gives no gradients for its weights, so this one is written in plain torch.
    """
    batch_size, length, _ = x_BSD.shape
    angles = rotary_angles(torch.arange(length), config.head_dim, config.rope_theta)

    def norm(x_BSD: Tensor, name: str) -> Tensor:
        return F.rms_norm(x_BSD, (config.dim,), weights[f"{name}.weight"], config.norm_eps)

    def linear(x_BSD: Tensor, name: str) -> Tensor:
        return F.linear(x_BSD, weights[f"{name}.weight"])

    for i in range(config.n_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        h_BSD = norm(x_BSD, f"layers.{i}.attention_norm")
        heads_shape = (batch_size, length, config.n_heads, -1)
        q_BSHd = rotate(linear(h_BSD, f"{attention}.wq").view(heads_shape), angles)
        k_BSHd = rotate(linear(h_BSD, f"{attention}.wk").view(heads_shape), angles)
        v_BSHd = linear(h_BSD, f"{attention}.wv").view(heads_shape)
        q_BHSd, k_BHSd, v_BHSd = (x.transpose(1, 2) for x in (q_BSHd, k_BSHd, v_BSHd))
        out_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)
        x_BSD = x_BSD + linear(out_BHSd.transpose(1, 2).flatten(2), f"{attention}.wo")
        h_BSD = norm(x_BSD, f"layers.{i}.ffn_norm")
        gate_BSW = F.silu(linear(h_BSD, f"{feed_forward}.w1"))
        mixed_BSW = gate_BSW * linear(h_BSD, f"{feed_forward}.w3")
        x_BSD = x_BSD + linear(mixed_BSW, f"{feed_forward}.w2")
    return norm(x_BSD, "norm")
