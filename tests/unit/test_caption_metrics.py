"""Metrics of captions are pycocoevalcap's own; which tokenizer made them is said."""

import contextlib
import io
import random
import shutil
import sys
from typing import Any

import pytest

from support.errors import refusal
from support.toy_dataset import sentence
from vico.generation.caption_metrics import caption_metrics

pytest.importorskip("pycocoevalcap", exc_type=ImportError)
NAMES = [f"bleu_{i}" for i in range(1, 5)]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")


def texts(num: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions that share words with their references, in capitals, with marks and clitics."""
    rng = random.Random(1)
    captions, references = {}, {}
    for i in range(num):
        words = sentence(rng, 9).split()
        references[f"v{i}"] = [" ".join(words).capitalize() + ", isn't it?"]
        references[f"v{i}"] += [sentence(rng, 7) + " (twice)."] * (i % 3)
        captions[f"v{i}"] = " ".join(words[: 2 + i % 8]) + f" the dog's {rng.choice(words)}."
    return captions, references


def own(
    captions: dict[str, str], references: dict[str, list[str]], *more: tuple[str, Any]
) -> dict[str, float]:
    """By the package's scorers, after its tokenizer. `more`: further scorers, by name."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    wanted, found = {}, {}
    for video, caption in captions.items():
        wanted[video] = [{"caption": text} for text in references[video]]
        found[video] = [{"caption": caption}]
    wanted, found = PTBTokenizer().tokenize(wanted), PTBTokenizer().tokenize(found)
    with contextlib.redirect_stdout(io.StringIO()):
        scores = dict(zip(NAMES, Bleu(4).compute_score(wanted, found)[0], strict=True))
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider()), *more):
        scores[name] = scorer.compute_score(wanted, found)[0]
    return scores


@needs_java
def test_metrics_are_the_package_s_own(capfd: pytest.CaptureFixture[str]) -> None:
    """To the last bit, on 200 captions; and nothing is printed."""
    captions, references = texts(200)
    metrics = caption_metrics(captions, references, meteor=False)
    assert capfd.readouterr() == ("", "")
    expected = own(captions, references)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["cider"] > 0.1 and metrics["bleu_1"] > metrics["bleu_4"] > 0.1
    counts = {"n": 200, "n_references": sum(map(len, references.values())), "tokenizer": "ptb"}
    assert metrics.items() >= counts.items() and len(metrics) == 9


@pytest.mark.slow
@needs_java
def test_meteor_is_the_package_s_own() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    captions, references = texts(200)
    scorer = Meteor()
    expected = own(captions, references, ("meteor", scorer))["meteor"]
    scorer.meteor_p.stdout.close()
    scorer.meteor_p.stderr.close()
    assert caption_metrics(captions, references)["meteor"] == expected > 0.1


def test_without_java() -> None:
    """The plain tokenizer, no METEOR; case and marks do not count."""
    captions = {"a": "The DOG'S ball, is red!", "b": "a man runs far away"}
    references = {"a": ["the dog's ball is red."], "b": ["A man; runs far away"]}
    metrics = caption_metrics(captions, references, java=False)
    assert metrics["tokenizer"] == "plain" and "meteor" not in metrics
    assert metrics["bleu_4"] == pytest.approx(1) and metrics["rouge_l"] == 1
    assert metrics["cider"] == pytest.approx(10)
    worse = caption_metrics({**captions, "b": "a ball"}, references, java=False)
    assert worse["cider"] < metrics["cider"] and worse["bleu_1"] < 1


@needs_java
def test_captions_without_words() -> None:
    """Blank ones, and marks alone, between others: each caption keeps its own references."""
    captions = {"a": "", "b": "a dog runs in the park", "c": " \n", "d": "...", "e": "one\u2028two"}
    references = {video: ["a dog runs in the park"] for video in captions}
    metrics = caption_metrics(captions, references, meteor=False)
    assert metrics["rouge_l"] == pytest.approx(1 / 5)
    only = caption_metrics({"b": captions["b"]}, {"b": references["b"] * 2}, meteor=False)
    assert only["cider"] is None and only["n"] == 1 and only["n_references"] == 2


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert "the extra 'captions'" in refusal(caption_metrics, {"a": "x"}, {"a": ["x"]})
