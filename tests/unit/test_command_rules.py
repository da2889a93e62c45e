"""Small rules of the commands, as tables: what is shown of a value, an error, an adapter."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.errors import refusal
from vico.cli import env, exit_cause, recipes
from vico.cli.model_card import Facts, model_card
from vico.cli.submission import of_dataset, submission
from vico.errors import UserError, nearest, one_line, show
from vico.train.config import RunConfig

# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 58, "'" + "x" * 58 + "'"),
        ("x" * 59, "'" + "x" * 56 + "..."),
        ("\u202e\n", r"'\u202e\n'"),
        ([[[1]]], "[[[...]]]"),
        ([1, 2, 3, 4, 5, 6, 7], "[1, 2, 3, 4, 5, 6, ...]"),
        (None, "None"),
        (1e300, "1e+300"),
    ],
)
def test_what_is_shown_of_a_value(value: object, shown: str) -> None:
    assert show(value) == shown and len(shown) <= 60


def test_errors_are_one_line() -> None:
    """Of 4,000 characters and what is left out of the middle; nothing in them forges a line."""
    assert one_line("a\nb\t\x1b\u2028\u00e9") == "a\\nb\\t\\x1b\\u2028\u00e9"
    whole = "a" * 2000 + "b" * 2000
    assert one_line(whole) == whole
    begin, left_out, end = one_line("a" * 2000 + "x" * 1234 + "b" * 2000).split(" ... ")
    assert (begin, left_out, end) == ("a" * 2000, "(1,234 characters left out)", "b" * 2000)


def test_rows_below_an_error() -> None:
    """In columns as wide as their widest cell."""
    error = UserError("it", [("a", "bb", ""), ("ccc", "d", "e")])
    assert error.details == "it\n  a    bb\n  ccc  d   e"
    assert UserError("it\n").details == "it\\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--bach_size", "; did you mean '--batch_size'?"),
        ("epoch", "; did you mean 'epochs'?"),
        ("--x", ""),
        ("", ""),
    ],
)
def test_the_nearest_word(word: str, hint: str) -> None:
    assert nearest(word, ["--batch_size", "epochs", "--lr"]) == hint


# ---- why a rank ends ----------------------------------------------------------------------------


def world_in(phase: str) -> Any:
    return SimpleNamespace(rank=3, phase=phase)


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("loading the weights", exit_cause.MODEL_REMEDY),
        ("building the model", exit_cause.MODEL_REMEDY),
        ("reading the features", exit_cause.HOST_REMEDY),
        ("saving step 7", exit_cause.HOST_REMEDY),
        ("waiting for a batch", exit_cause.BATCH_REMEDY),
        ("in micro-batch 2 of step 7", exit_cause.STEP_REMEDY),
        ("in step 7", exit_cause.STEP_REMEDY),
    ],
)
def test_remedies_of_little_memory(phase: str, remedy: str) -> None:
    """By what was done; the peak is that of the process."""
    for error, kind in ((MemoryError(), "host"), (RuntimeError("can't allocate memory"), "host")):
        cause = exit_cause.known_cause(error, world_in(phase))
        assert cause is not None and cause.exit_code == 4
        begin, end = str(cause).split(" GiB); ")
        assert (
            begin.startswith("rank 3 on ")
            and f"is out of {kind} memory while {phase} (peak " in begin
        )
        assert 0.01 < float(begin.rpartition(" ")[2]) < 1000
        assert end == f"{remedy}; `vico plan` shows what fits"


def test_errors_that_are_bugs() -> None:
    world = world_in("in step 7")
    for error in (RuntimeError("shape"), KeyError("a"), OSError(28, "full", "/data")):
        assert exit_cause.known_cause(error, world) is None
    missing = exit_cause.known_cause(ModuleNotFoundError("no", name="tiktoken"), world)
    assert "has no module 'tiktoken'; run 'bash launch/" in str(missing)
    full = exit_cause.known_cause(OSError(28, "No space left", "/dev/shm"), world)
    assert full is not None and full.exit_code == 4
    assert "no room for the batches of data workers (No space left); free some" in str(full)


def test_words_for_lost_ranks() -> None:
    """NCCL's own words are shown where no rank is known to have exited."""
    hint = f"see the lines above, or the log of that rank; {exit_cause.RESUME_HINT}"
    describe: Callable[..., str] = exit_cause._describe_loss
    world, lost = world_in("in step 7"), RuntimeError("NCCL error: bad\nmore")
    end = f" while in step 7, which ends this run; {hint}"
    assert describe(world, lost, ["rank 1", "rank 3"]) == f"rank 1, rank 3 exited{end}"
    failed = "a peer rank exited, or NCCL failed (NCCL error: bad)"
    assert describe(world, lost, []) == failed + end
    assert describe(world, RuntimeError("Broken pipe"), []) == f"a peer rank exited{end}"


def test_only_failures_are_causes() -> None:
    assert exit_cause.Cause("h", "it", 4, 1, "m").code == 4
    for code in (0, 75, 130, 7, -1):
        with pytest.raises(ValueError, match=f"code {code}: ends no run that failed"):
            exit_cause.Cause("h", "it", code, 1, "m")
    assert exit_cause._signal_name(signal.SIGBUS) == "SIGBUS"
    assert exit_cause._signal_name(33) == "signal 33"


# ---- what is written for others -----------------------------------------------------------------

FACTS: dict[str, Any] = {
    "name": "an|adapter",
    "base_model": "LLaMA <7B>",
    "base_id": "org/llama",
    "license": "mit",
    "dataset": "nextqa",
    "step": 12,
    "settings": {"dataset": "nextqa", "lr": 0.5, "blr": None, "cap": True, "other": 1},
    "fingerprints": {"weights": "abc", "data_train": "not shown"},
    "shapes": {"query": [3, 4], "l1.gate1": [1, 2], "l2.gate1": [1, 2]},
    "accuracies": {"acc": 0.5, "T": 0.123456},
    "num_questions": (7, 9),
}


def test_a_model_card() -> None:
    """Its metadata, tables and commands; nothing in a name becomes a cell or a tag."""
    metadata, what, results, use, training, files = model_card(Facts(**FACTS)).split("\n#")
    assert metadata.startswith(
        "---\nbase_model: org/llama\nbase_model_relation: adapter\nlicense: mit\n"
        "library_name: vico\npipeline_tag: video-text-to-text\ntags:\n- vico\n"
    )
    assert "  - task:\n      type: visual-question-answering\n" in metadata
    assert "      name: nextqa val\n      type: nextqa\n      split: val\n" in metadata
    assert "value: 0.5\n      name: accuracy\n" in metadata
    assert "value: 0.123456\n      name: accuracy of T\n" in metadata
    assert what.startswith(" an\\|adapter\n") and "Base model: LLaMA &lt;7B>.\n" in what
    assert what.endswith(
        "| of the base model | digest or value |\n|---|---|\n| weights | `abc` |\n"
    )
    assert results == (
        "# Results\n\nnextqa val, 7 used of 9 questions, step 12:\n\n"
        "| questions | accuracy |\n|---|---|\n| all | 50.00% |\n| T | 12.35% |\n"
    )
    assert use.count("an\\|adapter") == 6
    assert training == (
        "# Training\n\nOptimizer steps: 12. All settings are in `adapter_config.json`.\n\n"
        "| setting | value |\n|---|---|\n| `dataset` | nextqa |\n| `lr` | 0.5 |\n| `cap` | True |\n"
    )
    assert files == (
        "# Tensors\n\n| tensor | shape |\n|---|---|\n| `query` | [3, 4] |\n"
        "| 2 gates, `l1.gate1` to `l2.gate1` | [1, 2] |\n"
    )


def test_a_model_card_of_little() -> None:
    nothing = {"base_id": None, "license": None, "dataset": None, "step": 0, "settings": {}}
    nothing |= {"fingerprints": {}, "shapes": {"query": [3]}, "accuracies": {}}
    card = model_card(Facts(**{**FACTS, **nothing}))
    assert card.startswith("---\nlibrary_name: vico\n") and "model-index" not in card
    assert "Base model: LLaMA &lt;7B>. Its digest was not recorded.\n" in card
    assert "## Results\n\nNone are recorded with this checkpoint.\n" in card
    assert "## Training\n\nAll settings are in `adapter_config.json`.\n\n## Tensors" in card
    assert card.endswith("| `query` | [3] |\n")


def test_a_model_card_of_several_data_sets() -> None:
    """The accuracies over all come first; each data set has its own groups."""
    accuracies = {"acc": 0.5, "star_acc": 0.25, "star_T": 0.2, "nextqa_acc": 0.75}
    card = model_card(Facts(**{**FACTS, "dataset": "nextqa,star", "accuracies": accuracies}))
    rows = [line for line in card.split("## Results")[1].splitlines() if line.endswith("0% |")]
    assert rows == [
        "| nextqa, star: all | 50.00% |",
        "| nextqa: all | 75.00% |",
        "| star: all | 25.00% |",
        "| star: T | 20.00% |",
    ]


def test_predictions_of_one_data_set() -> None:
    records = [{"dataset": "a", "qid": "1"}, {"dataset": "b", "qid": "2"}]
    assert of_dataset(records, "b", Path("p")) == records[1:]
    assert of_dataset([{"qid": "1"}], "b", Path("p")) == [{"qid": "1"}]
    said = "p: holds predictions on 'a', 'b'; name one by --dataset"
    assert refusal(of_dataset, records, "c", Path("p")) == said
    said = "p: question 'x_1' is none of STAR's: its id begins with none of Interaction, Sequence"
    assert refusal(submission, "star", [{"qid": "x_1"}], Path("p")).startswith(said)


def test_facts_as_the_user_reads_them() -> None:
    facts = {"torch": "2.1", "x": None, "y": {"a": 1, "b": None}}
    said = (
        "\n  torch         2.1\n  x             not installed\n  y             a 1, b not installed"
    )
    assert env._text(facts) == said
    assert (env._text(["a", "b"]), env._text([]), env._text({})) == ("\n  a\n  b", "none", "none")
    assert env._text(7) == "7" and env.installed("torch") and env.installed("no-such-thing") is None
    assert env._tried(lambda: 1 / 1) == 1.0
    assert torch.__version__.startswith(str(env.installed("torch")).split("+")[0])


def test_recipes_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dollar in a path stays one; a variable is expanded in a recipe of the user's."""
    config = RunConfig(output_dir=tmp_path / "a$b", epochs=3, dataset="star", lr=0.5)
    path = tmp_path / "r.yaml"
    text = recipes.as_text(config, ["one", "two"])
    assert text.startswith("# note: one\n# note: two\n# ") and "\nblr:" not in text
    path.write_text(text)
    read = recipes.read(path)
    assert (read["output_dir"], read["epochs"], read["lr"]) == (tmp_path / "a$b", 3, 0.5)
    monkeypatch.setenv("PLACE", "/p")
    path.write_text("output_dir: $PLACE/out\nepochs: 4\n")
    assert recipes.read(path) == {"output_dir": Path("/p/out"), "epochs": 4}
    path.write_text("output_dir: $NOWHERE_AT_ALL/out\n")
    assert refusal(recipes.read, path).startswith(f"--config {path}: output_dir: ")
