"""What the adapter does to text: against full logits of the definition, in float64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from reference.oracle_sequences import OracleSequence
from support.asked_world import AskedWorld
from support.backbones import (
    ATTENTIONS,
    KINDS,
    LENGTH,
    Ungrouped,
    make_hugging_face,
    make_model,
)
from support.toy_dataset import ToyData
from vico.checkpoint.read import read
from vico.cli.main import main
from vico.data.packing import Example, pack
from vico.data.text_windows import Text, text_sequence, windows
from vico.model.config import backbone_shapes
from vico.model.weights.load import open_weights

TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 12


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("cognition"), toy)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "plain.txt"
    path.write_text(TEXT)
    return path


def measured(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["cognition", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return result


def oracle_measures(asked: AskedWorld, window: int, texts: list[str]) -> list[Tensor]:
    """Per text [4, N]: by full logits in float64, a window at a time."""
    model = oracle_files.load_meta(asked.toy.llama / "tiny", torch.float64)
    trained = {k: v.double() for k, v in read(asked.run / "checkpoint_best").weights.items()}
    tokenizer, measures = asked.toy.tokenizer, []
    for text in texts:
        columns, ids = [], tokenizer.encode(text)
        for first in range(0, len(ids), window - 1):
            tokens = [tokenizer.bos_id(), *ids[first : first + window - 1]]
            columns.append(text_measures(model, trained, tokens))
        measures.append(torch.cat(columns, dim=1))
    return measures


def text_measures(model: oracle.Model, trained: oracle.Trainables, tokens: list[int]) -> Tensor:
    """[4, N] of a window: losses of the frozen and of the adapted model, KL, the same top token."""
    trained = {**trained, "temporal_emb.weight": trained["temporal_emb.weight"][:0]}  # no slots
    frozen = {k: v * 0 if k.endswith("gate1") else v for k, v in trained.items()}
    sequence = OracleSequence("caption", tokens, [], len(tokens))
    no_video = torch.zeros(0, 768, dtype=torch.float64)
    p, q = (
        oracle.trunk(model, trainables, sequence, no_video, oracle.Hyper())
        @ model[1]["output.weight"].T
        for trainables in (frozen, trained)
    )
    p, q = p[:-1].log_softmax(-1), q[:-1].log_softmax(-1)
    targets = torch.tensor(tokens[1:])[:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    losses = [-p.gather(1, targets)[:, 0], -q.gather(1, targets)[:, 0]]
    return torch.stack([*losses, kl, same])


def assert_described(result: dict[str, Any], measures: Tensor) -> None:
    frozen, adapted, kl, same = measures.mean(dim=1).tolist()
    assert result["tokens"] == measures.shape[1]
    assert result["perplexity_frozen"] == pytest.approx(math.exp(frozen), rel=1e-5)
    assert result["perplexity_adapted"] == pytest.approx(math.exp(adapted), rel=1e-5)
    assert result["kl_per_token"] == pytest.approx(kl, rel=1e-4)
    assert result["top1_agreement"] == same


def test_numbers_are_those_of_full_logits(
    asked: AskedWorld,
    text: Path,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Two files in windows of 32: per file, in all, and by position."""
    other = tmp_path / "other.txt"
    other.write_text("the dog smiles.\n")
    flags = ["--resume", asked.run, "--text", text, other, "--window", 32]
    result = measured(capsys, *flags)
    of_text, of_other = oracle_measures(asked, 32, [TEXT, other.read_text()])
    assert of_text[2].mean() > 1e-3 and 0 < of_text[3].mean() < 1, "the adapter changes something"
    assert_described(result["files"][str(text)], of_text)
    assert_described(result["files"][str(other)], of_other)
    assert_described(result, torch.cat([of_text, of_other], dim=1))
    first_tokens = torch.cat([of_text[:, ::31], of_other[:, :1]], dim=1)
    assert_described(result["positions"][0], first_tokens)
    assert sum(part["tokens"] for part in result["positions"]) == result["tokens"]
    bits = of_text[1].sum() / math.log(2) / len(TEXT)
    assert result["files"][str(text)]["bits_per_byte_adapted"] == pytest.approx(float(bits))


def test_a_closed_gate_changes_nothing(
    toy: ToyData,
    text: Path,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    closed = AskedWorld(tmp_path, toy, gates=0.0)
    result = measured(capsys, "--resume", closed.run, "--text", text)
    assert result["kl_per_token"] == 0 and result["top1_agreement"] == 1
    assert result["perplexity_adapted"] == result["perplexity_frozen"]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["LLaMA-1", "LLaMA-2-70B"])
def test_open_gates_on_grouped_heads(kind: str, attention: str, tmp_path: Path) -> None:
    """Both perplexities and the divergence, of a model with a key head per query head."""
    make_hugging_face(tmp_path, KINDS[kind])
    weights = open_weights(tmp_path, None)
    model = make_model(weights, ATTENTIONS[attention])
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "gate" in name:
            value.data = torch.randn(value.shape, generator=generator)
    ids = torch.randint(3, 300, (2, LENGTH), generator=generator).tolist()
    sequences = [text_sequence(tuple(tokens)) for tokens in ids]
    examples = [Example(sequence, 0, 0) for sequence in sequences]
    with torch.no_grad():
        found_6N = model(pack(examples, torch.zeros(0, 10, 768)), compare=True)

    whole = Ungrouped(weights)
    backbone = {name: whole.read(name).double() for name in backbone_shapes(whole.config)}
    params = {"n_heads": 4, "norm_eps": 1e-5, "n_layers": 2}
    trained = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    expected_4N = torch.cat([text_measures((params, backbone), trained, t) for t in ids], dim=1)
    for found, expected in zip(found_6N[:2], expected_4N[:2], strict=True):
        assert math.exp(found.mean()) == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert float(found_6N[2].mean()) == pytest.approx(float(expected_4N[2].mean()), rel=1e-4)
    assert torch.equal(found_6N[3], expected_4N[3])
    assert expected_4N[2].mean() > 1e-2 and 0 < expected_4N[3].mean() < 1


@pytest.mark.parametrize("kind", ["LLaMA-1", "LLaMA-2-70B", "LLaMA-3.1", "tied"])
def test_the_frozen_model_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """Its losses, grouped heads included, whatever the gates; every attention gives the same."""
    reference = make_hugging_face(tmp_path, KINDS[kind])
    ids = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(1))
    batch = pack([Example(text_sequence(tuple(ids.tolist())), 0, 0)], torch.zeros(0, 10, 768))
    logits = reference(ids[None]).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    results = []
    for attend in ATTENTIONS.values():
        model = make_model(open_weights(tmp_path, None), attend)
        for name, value in model.named_parameters():
            if name.endswith("gate1"):
                value.detach().fill_(0.5)
        with torch.no_grad():
            results.append(model(batch, compare=True))
            losses = model(batch)
        assert torch.allclose(results[-1][0], expected, atol=1e-5)
        assert torch.allclose(results[-1][1], losses.double(), atol=1e-5)
        assert (results[-1][2] > 0).all(), "open gates move every prediction"
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5)


def test_windows_hold_every_token_once() -> None:
    texts = [Text(Path("a"), list(range(10, 17)), 7), Text(Path("b"), [20, 21, 22], 3)]
    made = windows(texts, bos=1, length=4)
    assert [w.sequence.tokens for w in made] == [
        (1, 10, 11, 12),
        (1, 13, 14, 15),
        (1, 16),
        (1, 20, 21, 22),
    ]
    assert [(w.start, w.stop) for w in made] == [(0, 3), (3, 6), (6, 7), (7, 10)]
    assert all(len(w.sequence.targets) == w.stop - w.start for w in made)


def test_questions_by_their_text_alone(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Other features change nothing; with closed gates the frozen model answers alike."""
    result = measured(capsys, "--resume", asked.run)["without_video"]
    assert result["n"] == len(asked.rows) and result["split"] == "val"
    swapped = tmp_path / "swapped.pth"
    torch.save({video: value.flip(0) + 1 for video, value in asked.videos.items()}, swapped)
    words = ["--features", swapped, "--allow_change", "features", "--questions"]
    assert measured(capsys, "--resume", asked.run, *words)["without_video"] == result
    closed = AskedWorld(tmp_path / "closed", asked.toy, gates=0.0)
    of_closed = measured(capsys, "--resume", closed.run)["without_video"]
    assert of_closed["loss_frozen"] == of_closed["loss_adapted"] == result["loss_frozen"]
    assert result["loss_frozen"] != result["loss_adapted"]


def test_how_rows_were_read_is_said(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an evaluation, once: answers of which form, and how many questions."""
    assert main(["cognition", "--resume", str(asked.run), "--questions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    num_rows = len(asked.rows)
    assert lines.count(f"val: answers: {num_rows} by index") == 1
    assert lines.count(f"val: {num_rows} questions") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--text", "absent.txt"], "absent.txt: no such file; plain text should be there"),
        (["--text", "blank.txt"], "blank.txt: is empty; plain text"),
        (["--text", "latin.txt"], "latin.txt:1: not UTF-8 (byte 0xe9 at offset 0)"),
        (["--text", "a.txt", "a.txt"], "--text: a.txt is there twice"),
        (["--text", "a.txt", "--window", "1"], "--window 1: has no room for a token"),
        (["--text", "a.txt", "--window", "0"], "--window: 0 must be 1 to"),
        (["--text", "a.txt", "--txt", "b"], "unknown flag --txt"),
    ],
)
def test_bad_input_is_one_line(
    asked: AskedWorld,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a man.")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert main(["cognition", "--resume", str(asked.run), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and expected in lines[0]
