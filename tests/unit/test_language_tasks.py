"""`vico cognition --tasks`: log-likelihoods, texts and metrics, against the harness's own."""

import json
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.asked_world import AskedWorld
from support.language_tasks import OPENINGS, STOP, TEXTS, make_world, write_tasks
from support.toy_dataset import ToyData
from vico.checkpoint.read import read
from vico.cli.main import main
from vico.distributed.world import World
from vico.train.asking import AskedModel

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from vico.train.language_tasks import LanguageModel

MAX_LENGTH = 24  # shorter than a text, and than a question with its examples
LOG_LIKELIHOOD_ATOL = 1e-4  # fp32, sums of up to 100 tokens


@dataclass
class Worlds:
    """One LLaMA: by the harness's own backend, and under checkpoints of ViCo."""

    reference: HFLM
    closed: AskedWorld
    opened: AskedWorld
    tasks: Path
    names: list[str]


@pytest.fixture(scope="module")
def worlds(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Half of the targets of `local_write` are what the reference writes."""
    folder = tmp_path_factory.mktemp("tasks")
    closed, _ = make_world(folder / "closed", toy, gates=0.0)
    opened, _ = make_world(folder / "opened", toy, gates=1.0)
    llama = str(closed.toy.llama / "tiny")
    reference = HFLM(llama, dtype="float32", device="cpu", batch_size=1, max_length=MAX_LENGTH)
    written = reference.generate_until(openings())
    assert all(STOP not in text for text in written) and len(set(map(len, written))) > 1
    names = write_tasks(folder / "tasks", [*written[:2], "other", "other"])
    return Worlds(reference, closed, opened, folder / "tasks", names)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets are kept in this test's folder; their bars are switched off."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def instances(kind: str, all_arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, 0) for arguments in all_arguments]


def openings() -> list[Instance]:
    settings = {"until": [STOP], "max_gen_toks": 12, "do_sample": False}
    return instances("generate_until", [(text, dict(settings)) for text in OPENINGS])


def language_model(asked: AskedWorld, world: World, which: str) -> LanguageModel:
    model = AskedModel(asked.config, read(asked.run / "checkpoint_best"), world)
    return LanguageModel(model, MAX_LENGTH, which, {})


def test_log_likelihoods_are_the_harness_s(worlds: Worlds, alone: World) -> None:
    """With closed gates, of both models: cut contexts, blanks, none, the likeliest words."""
    pairs = [("the man holds the", " dog"), ("the man holds the ", "ball"), ("", "a dog runs")]
    pairs += [(TEXTS[0], " a dog"), ("why", " does the man hold it?")]
    # Some of these letters are the likeliest token.
    pairs += [(text, letter) for text in OPENINGS for letter in string.printable]
    requests = instances("loglikelihood", list(pairs))
    expected = worlds.reference.loglikelihood(requests, disable_tqdm=True)
    assert {is_likeliest for _, is_likeliest in expected} == {True, False}
    for which in ("frozen", "adapted"):
        model = language_model(worlds.closed, alone, which)
        found = model.loglikelihood(requests)
        assert [pair[1] for pair in found] == [pair[1] for pair in expected]
        of_texts = [pair[0] for pair in expected]
        assert [pair[0] for pair in found] == pytest.approx(of_texts, abs=LOG_LIKELIHOOD_ATOL)
        assert model.num_cut == 1


def test_whole_texts_and_written_ones_are_the_harness_s(worlds: Worlds, alone: World) -> None:
    texts = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    model = language_model(worlds.closed, alone, "adapted")
    expected = worlds.reference.loglikelihood_rolling(texts, disable_tqdm=True)
    assert model.loglikelihood_rolling(texts) == pytest.approx(expected, abs=LOG_LIKELIHOOD_ATOL)
    assert model.generate_until(openings()) == worlds.reference.generate_until(openings())


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_metrics_are_the_harness_s(
    worlds: Worlds, in_this_process: None, capsys: pytest.CaptureFixture[str], num_fewshot: int
) -> None:
    """Of the frozen model, in three kinds of tasks; open gates move those of the adapted one."""
    manager = TaskManager(include_path=worlds.tasks, include_defaults=False)
    results = simple_evaluate(
        worlds.reference, tasks=worlds.names, task_manager=manager, num_fewshot=num_fewshot
    )["results"]
    words = ["--tasks", ",".join(worlds.names), "--include_path", worlds.tasks]
    words += ["--num_fewshot", num_fewshot, "--window", MAX_LENGTH]
    found = run(capsys, worlds.opened, *words)
    assert found.keys() == results.keys()
    for name, expected in results.items():
        numbers = {k: v for k, v in expected.items() if isinstance(v, int | float)}
        assert numbers and found[name]["frozen"] == pytest.approx(numbers, rel=1e-5)
    if num_fewshot == 0:
        assert found["local_write"]["frozen"]["exact_match,none"] == 0.5
    frozen, adapted = (found["local_text"][w]["bits_per_byte,none"] for w in ("frozen", "adapted"))
    assert not math.isclose(frozen, adapted, rel_tol=1e-3)
    assert run(capsys, worlds.closed, *words) != found


def run(capsys: pytest.CaptureFixture[str], asked: AskedWorld, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["cognition", "--resume", str(asked.run), *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    tasks: dict[str, Any] = json.loads(captured.out.splitlines()[-1])["tasks"]
    return tasks


def test_questions_after_tasks_are_the_adapted_model_s(
    worlds: Worlds, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks close the gates for the frozen model, and open them again."""
    answers = []
    tasks = ["--tasks", "local_choice", "--include_path", worlds.tasks]
    for words in (["--questions"], ["--questions", *tasks]):
        capsys.readouterr()
        assert main(["cognition", "--resume", str(worlds.opened.run), *map(str, words)]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["without_video"])
    assert answers[1] == answers[0]
    assert answers[0]["loss_adapted"] != answers[0]["loss_frozen"]


def test_the_first_documents_alone(
    worlds: Worlds, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks", "local_choice", "--include_path", worlds.tasks, "--limit", 3]
    assert run(capsys, worlds.opened, *words)["local_choice"]["adapted"]["sample_len"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(
            ["--tasks", "local_chioce"],
            "knows no such task; did you mean 'local_choice'?",
            marks=pytest.mark.slow,  # the harness reads all its tasks
        ),
        (["--tasks", "absent_data"], "--tasks absent_data: cannot be loaded ("),
        (["--tasks", "runs_code"], "--tasks runs_code: runs code that a model has written"),
        (["--tasks", "beams"], "a task asks to generate with num_beams=4"),
        (["--tasks", "local_write", "--window", "6"], "asks for texts of 12 tokens"),
        (["--tasks", "local_choice", "--num_fewshot", "-1"], "--num_fewshot -1: must be 0"),
        (["--limit", "3"], "--limit: needs tasks; name some by --tasks"),
    ],
)
def test_bad_input_is_one_line(
    worlds: Worlds,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    expected: str,
) -> None:
    tasks = tmp_path / "own"
    write_tasks(tasks, ["a"] * len(OPENINGS))
    text = (tasks / "local_write.yaml").read_text().replace("task: local_write", "task: NAME")
    (tasks / "a.yaml").write_text(text.replace("NAME", "runs_code") + "unsafe_code: true\n")
    (tasks / "b.yaml").write_text(text.replace("NAME", "absent_data").replace("jsonl", "gone"))
    (tasks / "c.yaml").write_text(
        text.replace("NAME", "beams").replace("max_", "num_beams: 4\n  max_")
    )
    if "--tasks" in words:
        words = [*words, "--include_path", str(tasks)]
    assert main(["cognition", "--resume", str(worlds.closed.run), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert expected in lines[-1], lines
    assert not any("Traceback" in line for line in lines)
