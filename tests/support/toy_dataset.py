"""Small worlds that tests make for themselves: a tokenizer, a random LLaMA in Meta's layout, questions, features, captions."""

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from reference import oracle, oracle_files
from vico.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "man",
    "woman",
    "dog",
    "ball",
    "red",
    "blue",
    "table",
    "kitchen",
    "run",
    "jump",
    "sit",
    "hold",
    "after",
    "before",
    "why",
    "what",
    "how",
    "does",
    "the",
    "a",
    "of",
    "on",
    "door",
    "smiles",
]
TYPES = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO")
COLUMNS = (
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


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def make_tokenizer(path: Path, vocab_size: int = 400) -> None:
    """LLaMA's recipe in small: BPE, byte fallback, no normalisation, a dummy prefix blank."""
    rng = random.Random(0)
    lines = [
        "Instruction: Predict the answer based on the dialogue, video and question.",
        "Video:",
        "Answer: The answer is (A)",
    ]
    lines += [
        "Instruction: describe the what happens in the video.",
        "Description:",
        "Question:",
        "Choices: (A) (B) (C) (D) (E)",
    ] * 20
    lines += [sentence(rng, 8) + "." for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    path.with_suffix(".vocab").unlink()


def make_rows(num: int, num_videos: int, seed: int, prefix: str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for i in range(num):
        row = {
            "video": f"{prefix}{i % num_videos:04d}",
            "frame_count": "100",
            "width": "640",
            "height": "480",
            "qid": str(i // num_videos),
        }
        row |= {
            "question": sentence(rng, rng.randint(3, 9)),
            "answer": str(rng.randrange(5)),
            "type": TYPES[i % 8],
        }
        rows.append(row | {f"a{k}": sentence(rng, rng.randint(1, 4)) for k in range(5)})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class ToyData:
    """A NExT-QA-shaped data set and a tiny LLaMA under `folder`, and the flags that name them."""

    folder: Path
    num_train: int = 20
    num_val: int = 10
    shards: int = 1
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.llama, self.data = self.folder / "llama", self.folder / "data" / "nextqa"
        self.llama.mkdir(parents=True)
        self.data.mkdir(parents=True)
        make_tokenizer(self.llama / "tokenizer.model")
        self.tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=str(self.llama / "tokenizer.model")
        )
        oracle_files.write_tiny_meta(
            self.llama / "tiny",
            self.tokenizer.vocab_size(),
            dim=32,
            n_layers=3,
            n_heads=4,
            shards=self.shards,
        )
        self.rows = {
            "train": make_rows(self.num_train, 7, 1, "v"),
            "val": make_rows(self.num_val, 4, 2, "w"),
        }
        for split, rows in self.rows.items():
            write_csv(self.data / f"{split}.csv", rows)
        videos = sorted({row["video"] for rows in self.rows.values() for row in rows})
        generator = torch.Generator().manual_seed(3)
        self.features = {
            v: torch.randn(4 + 3 * i, 768, generator=generator) for i, v in enumerate(videos)
        }
        torch.save(self.features, self.data / "clipvitl14.pth")
        rng = random.Random(4)
        self.captions = {v: ". ".join(sentence(rng, 6) for _ in range(5)) + "." for v in videos}
        (self.data / "llava_v15_13b_n6.json").write_text(json.dumps(self.captions))

    @property
    def flags(self) -> list[str]:
        where = [
            "--llama_model_path",
            str(self.llama),
            "--model",
            "tiny",
            "--data_path",
            str(self.folder / "data"),
        ]
        return [*where, "--precision", "fp32", "--max_seq_len", "256", "--num_workers", "0"]

    def items(self, split: str) -> list[oracle.Question]:
        """The rows as the oracle takes them, captions whole."""
        return [
            oracle.Question(
                r["question"],
                tuple(r[f"a{k}"] for k in range(5)),
                int(r["answer"]),
                self.features[r["video"]],
                self.captions[r["video"]],
            )
            for r in self.rows[split]
        ]


@dataclass
class Ended:
    """How the ranks of a command ended."""

    codes: list[int]
    stdouts: list[str]
    stderrs: list[str]

    @property
    def output(self) -> str:
        return "\n".join([*self.stdouts, *self.stderrs])


VICO = ("-c", "from vico.cli.main import console; console()")


def start(
    *args: str, ranks: int, cwd: Path | None = None, program: tuple[str, ...] = VICO
) -> list[subprocess.Popen[str]]:
    """`vico ARGS` (or another Python program) on this many ranks, as a launcher would start them, each with a thread, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    launched = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *program, *args],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **launched,
                "PYTHONPATH": path,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def end(processes: list[subprocess.Popen[str]], timeout: float) -> Ended:
    """Wait for all of them; end those that are still there after the time."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Ended(
        [p.returncode for p in processes], [o for o, _ in outputs], [e for _, e in outputs]
    )


def vico(*args: str, ranks: int = 1, cwd: Path | None = None, timeout: float = 240.0) -> Ended:
    return end(start(*args, ranks=ranks, cwd=cwd), timeout)


def succeeds(*args: str, ranks: int = 1, cwd: Path | None = None) -> Ended:
    ended = vico(*args, ranks=ranks, cwd=cwd)
    assert ended.codes == [0] * ranks, ended.output
    return ended


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(*call: Any, **named: Any) -> str:
    """The one line with which `call[0](*call[1:], **named)` refuses."""
    function, *arguments = call
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    return message
