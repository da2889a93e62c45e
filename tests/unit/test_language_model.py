"""How a model answers the requests of lm-evaluation-harness, rule by rule, without a LLaMA."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import ALONE
from support.errors import refusal
from vico.generation.generate import Generated, Prompt
from vico.generation.settings import GenerationSettings
from vico.model.batch import PackedBatch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from vico.train import language_tasks
from vico.train.language_tasks import LanguageModel, TaskRequest, run_tasks, tasks_table

BOS, EOS = 1, 2


@dataclass
class Letters:
    """A tokenizer: each character is a token."""

    bos: int = BOS
    eos: int = EOS
    adds_bos: bool = True

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Engine:
    """A target's loss is its token's number, and 1000 for each token before it; adapted, twice."""

    num_measured: int = 0
    module: str = "the model"
    calls: list[Any] = field(default_factory=list)
    are_closed: bool = False

    def train(self, mode: bool) -> None:
        self.calls.append(("train", mode))

    def compare(self, batch: PackedBatch) -> Tensor:
        ids = batch.token_target_ids_N
        self.num_measured += len(ids)
        contexts = batch.positions_T[batch.wanted_rows_R[batch.token_rows_N]] + 1
        losses = (ids + 1000 * contexts).double()
        likeliest = [ids % 2 == 1, ids % 3 == 0]  # of the frozen and of the adapted model
        return torch.stack([losses, 2 * losses, *torch.zeros(2, len(ids)), *likeliest]).double()

    @contextlib.contextmanager
    def closed_gates(self) -> Iterator[None]:
        self.are_closed = True
        yield
        self.are_closed = False


def model_of(which: str = "frozen", max_length: int = 8, **tokenizer: bool) -> LanguageModel:
    shapes = {"temporal_emb.weight": (10, 8), "visual_proj.weight": (8, 768)}
    asked: Any = SimpleNamespace(
        tokenizer=Letters(**tokenizer),
        engine=Engine(),
        world=ALONE,
        inputs=SimpleNamespace(trainable_shapes=shapes),
        feature_width=5,
    )
    return LanguageModel(asked, max_length, which, {})


def instances(kind: str, *all_arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments, 0) for arguments in all_arguments]


def loss(context: str, continuation: str, bos: bool = True) -> int:
    """By the rule of Engine, where the model sees everything before a token."""
    before = len(context) + bos
    return sum(ord(c) + 1000 * (before + i) for i, c in enumerate(continuation))


# ---- tokens and their probabilities -------------------------------------------------------------


def test_tokens_of_a_text() -> None:
    """BOS where the tokenizer's makers put it, unless the harness says so."""
    for adds_bos, expected in ((True, [BOS, 97, 98]), (False, [97, 98])):
        model = model_of(adds_bos=adds_bos)
        assert model.tok_encode("ab") == expected
        assert model.tok_encode("ab", add_special_tokens=True) == [BOS, 97, 98]
        assert model.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert (model.prefix_token_id, model.eot_token_id) == (BOS, EOS)


@pytest.mark.parametrize(
    ("which", "factor", "likes_f"), [("frozen", 1, False), ("adapted", 2, True)]
)
def test_log_likelihoods(which: str, factor: int, likes_f: bool) -> None:
    """Of the continuation alone; it is the likeliest if each of its tokens is."""
    model = model_of(which)
    pairs = [("ab", "cc"), ("ab", "cd"), ("ab", "c"), ("x", "cc"), ("ab", "cc"), ("ab", "ff")]
    found = model.loglikelihood(instances("loglikelihood", *pairs))
    assert [value for value, _ in found] == [-factor * loss(*pair) for pair in pairs]
    # The frozen model finds odd codes likely, the adapted one those that 3 divides: c is 99.
    assert [is_likeliest for _, is_likeliest in found] == [True, False, True, True, True, likes_f]


def test_a_request_is_measured_once_for_both_models() -> None:
    """Equal ones too, and none at all is no forward."""
    adapted = model_of("adapted")
    requests = instances("loglikelihood", ("ab", "cd"), ("ab", "cd"), ("ab", "e"))
    first = adapted.loglikelihood(requests)
    assert adapted.asked.engine.num_measured == 3
    frozen = LanguageModel(adapted.asked, 8, "frozen", adapted.answered)
    assert [2 * value for value, _ in frozen.loglikelihood(requests)] == [v for v, _ in first]
    assert adapted.asked.engine.num_measured == 3
    assert frozen.loglikelihood([]) == []


def test_contexts_that_are_too_long() -> None:
    """They lose their beginning: the model sees 8 tokens, and the last one is only a target."""
    model = model_of()
    whole, cut = model._request([*range(5)], [*range(5, 9)]), model._request([*range(9)], [9])
    assert (whole.tokens, whole.first_target, model.num_cut) == ((*range(9),), 5, 1)
    assert (cut.tokens, cut.first_target) == ((*range(1, 10),), 8)
    longest = model._request([0], [*range(1, 9)])
    assert (longest.tokens, longest.first_target, model.num_cut) == ((*range(9),), 1, 1)
    assert refusal(model._request, [0], [*range(9)]) == (
        "a task asks for 9 tokens in one piece, and the model sees 8; raise --window, or leave "
        "that task out"
    )


def test_what_is_cut_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    model.say_cut()
    assert capsys.readouterr().out == ""
    for _ in range(2):
        model._request([*range(9)], [9])
    model.say_cut()
    assert capsys.readouterr().out == (
        "note: 2 requests of the tasks are longer than 8 tokens, and lose their beginning; "
        "--window raises that\n"
    )


def test_whole_texts() -> None:
    """Each token once: the first 8 after BOS, a later one with the 7 before it that fit."""
    model = model_of(adds_bos=False)
    texts = ["abc", "abcdefghijklmnop", "", "z"]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", *[(t,) for t in texts]))
    of_long = sum(ord(c) + 1000 * min(i + 1, 8) for i, c in enumerate(texts[1]))
    first, whole, empty, last = found
    assert (first, empty, last) == (-loss("", "abc"), 0, -loss("", "z"))
    # The second window predicts tokens 8 to 15 behind the seventh alone.
    again = sum(ord(c) + 1000 * (i + 1) for i, c in enumerate(texts[1][8:]))
    assert whole == -(loss("", texts[1][:8]) + again) and -whole < of_long


# ---- texts that are written ---------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(prompts, settings) of each call of `generate`, which answers a prompt by its own end."""
    calls: list[Any] = []

    def generate(model: Any, prompts: list[Prompt], *others: Any) -> list[Generated]:
        tokenizer, settings, world = others
        assert (model, world) == ("the model", ALONE) and isinstance(tokenizer, Letters)
        calls.append((prompts, settings))
        answers = []
        for prompt in prompts:
            ids = (*prompt.sequence.tokens[-3:-1], ord("#"), ord("x"), EOS)
            answers.append(Generated("", ids, (0.0,) * len(ids), False))
        return answers

    monkeypatch.setattr(language_tasks, "generate", generate)
    return calls


def test_texts_are_written_together_by_their_settings(written: list[Any]) -> None:
    """In the order of the requests; a text ends before its stop text, and has no EOS."""
    model = model_of(max_length=20)
    two, three = {"max_gen_toks": 2, "until": ["#"]}, {"max_gen_toks": 3}
    requests = instances("generate_until", ("ab", two), ("cd", three), ("ef", two))
    assert model.generate_until(requests) == ["ab", "cd#x", "ef"]
    assert [len(prompts) for prompts, _ in written] == [2, 1]
    assert [settings for _, settings in written] == [
        GenerationSettings(2, stop=("#",)),
        GenerationSettings(3),
    ]
    prompt = written[0][0][0]
    assert prompt.sequence.tokens == (BOS, 97, 98, EOS), "a target in the place of the first token"
    assert prompt.sequence.targets == range(3, 4)
    assert prompt.features_FC.shape == (10, 5) and not prompt.features_FC.any()
    assert model.asked.engine.calls == [("train", False)] * 2 and model.num_cut == 0


def test_openings_that_leave_no_room(written: list[Any]) -> None:
    model = model_of(max_length=5)
    two = {"max_gen_toks": 2}
    model.generate_until(instances("generate_until", ("ab", two), ("abc", two)))
    prompts = [prompt.sequence.tokens[:-1] for prompt in written[0][0]]
    assert prompts == [(BOS, 97, 98), (97, 98, 99)] and model.num_cut == 1
    model.generate_until(instances("generate_until", ("ab", {"max_gen_toks": 4})))
    assert written[1][0][0].sequence.tokens[:-1] == (98,)
    too_many = instances("generate_until", ("ab", {"max_gen_toks": 5}))
    assert refusal(model.generate_until, too_many) == (
        "a task asks for texts of 5 tokens, and the model sees 5; raise --window, or leave that "
        "task out"
    )


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ({}, GenerationSettings(256)),
        ({"do_sample": False, "temperature": 0.5}, GenerationSettings(256)),
        ({"do_sample": True}, GenerationSettings(256)),
        ({"temperature": 0.5}, GenerationSettings(256, temperature=0.5)),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.25},
            GenerationSettings(256, temperature=0.5, top_p=0.25),
        ),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.25}, GenerationSettings(256)),
        ({"until": "a"}, GenerationSettings(256, stop=("a",))),
        ({"until": ["a", "", "b"]}, GenerationSettings(256, stop=("a", "b"))),
    ],
    ids=repr,
)
def test_the_harness_s_words(words: dict[str, Any], settings: GenerationSettings) -> None:
    """What is not drawn has no temperature and no top_p, whatever the task leaves out."""
    assert language_tasks._settings(words) == settings


def test_words_without_meaning_here() -> None:
    assert refusal(language_tasks._settings, {"top_k": 3, "num_beams": 4}) == (
        "a task asks to generate with num_beams=4, which ViCo does not have; leave that task out"
    )


# ---- tasks --------------------------------------------------------------------------------------


@dataclass
class Task:
    num_fewshot: int | None = None
    seed: int = 0

    def get_config(self, key: str) -> Any:
        return getattr(self, key)

    def set_config(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed


@pytest.mark.parametrize(
    ("asked", "own", "number"),
    [(None, None, 0), (None, 5, 5), (None, 0, 0), (3, None, 3), (3, 5, 3), (3, 0, 0), (0, 5, 0)],
)
def test_examples_before_the_questions(asked: int | None, own: int | None, number: int) -> None:
    """As many as are asked for, but none where the task says so; the harness's own choice."""
    task = Task(own)
    TaskRequest(("a",), num_fewshot=asked).prepare(task)
    assert (task.num_fewshot, task.seed) == (number, 1234)
    assert TaskRequest(("a",)) == TaskRequest(("a",), None, None, None, context=2048)


@dataclass
class Manager:
    """Knows three tasks, one of which cannot be loaded."""

    problem: Exception | None = None
    all_tasks: tuple[str, ...] = ("math", "unsafe", "pictures")

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.all_tasks]

    def load(self, names: list[str]) -> dict[str, Any]:
        if self.problem is not None:
            raise self.problem
        kinds: dict[str, Any] = {"unsafe": {"UNSAFE_CODE": True}, "pictures": {"MULTIMODAL": True}}
        return {"tasks": {name: SimpleNamespace(**kinds.get(name, {})) for name in names}}


def test_tasks_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager()
    monkeypatch.setattr(TaskRequest, "_manager", lambda request: manager)
    assert [*TaskRequest(("math",)).load()["tasks"]] == ["math"]
    unknown = "--tasks {}: lm-evaluation-harness knows no such task{}"
    said = refusal(TaskRequest(("math", "mth")).load)
    assert said == unknown.format("mth", "; did you mean 'math'?")
    said = refusal(TaskRequest(("zzzz",)).load)
    assert said == unknown.format("zzzz", "; see `lm-eval ls tasks`")
    for name in ("unsafe", "pictures"):
        assert refusal(TaskRequest(("math", name)).load) == (
            f"--tasks {name}: runs code that a model has written, or shows pictures, which "
            "`vico cognition` does not; name tasks of text"
        )
    for problem, shown in ((OSError("no route\nto it"), "'no route'"), (KeyError(), "'KeyError'")):
        manager.problem = problem
        assert refusal(TaskRequest(("math", "unsafe")).load) == (
            f"--tasks math,unsafe: cannot be loaded ({shown}); a task's data set comes over the "
            "network the first time"
        )


@pytest.mark.parametrize(
    ("folder", "names", "made"),
    [
        (None, ("a",), [{"include_path": None}]),
        ("f", ("own",), [{"include_path": Path("f"), "include_defaults": False}]),
        (
            "f",
            ("own", "a"),
            [{"include_path": Path("f"), "include_defaults": False}, {"include_path": Path("f")}],
        ),
    ],
)
def test_the_harness_s_own_tasks_are_read_only_if_asked_for(
    folder: str | None, names: tuple[str, ...], made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its 15,000 files takes seconds."""
    found: list[Any] = []

    class Tasks(Manager):
        def __init__(self, **given: Any) -> None:
            super().__init__(all_tasks=("own",))
            found.append(given)

    monkeypatch.setattr(language_tasks, "TaskManager", Tasks)
    TaskRequest(names, folder and Path(folder))._manager()
    assert found == made


def test_both_models_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen one with closed gates, by the same requests and the same first documents."""
    task, seen = Task(), list[Any]()
    request = TaskRequest(("a",), num_fewshot=2, limit=7, context=9)
    monkeypatch.setattr(TaskRequest, "load", lambda request: {"tasks": {"a": task}})

    def evaluate(model: LanguageModel, tasks: Any, **settings: Any) -> Any:
        assert tasks == {"tasks": {"a": task}} and task == Task(2, 1234)
        task.seed = 0  # as if it were prepared no more
        seen.append((model.which, model.asked.engine.are_closed, model.max_length, settings))
        model.answered[language_tasks._Request((1,), len(seen))] = None  # type: ignore[assignment]
        assert len(model.answered) == len(seen), "one store for both"
        return {"results": {"a": {"acc,none": float(len(seen)), "alias": "a", "n": 3}}}

    monkeypatch.setattr(language_tasks.evaluator, "evaluate", evaluate)
    asked = model_of().asked
    assert run_tasks(asked, request) == {
        "a": {"adapted": {"acc,none": 1.0, "n": 3}, "frozen": {"acc,none": 2.0, "n": 3}}
    }
    settings = {"limit": 7, "bootstrap_iters": 1000, "log_samples": False}
    assert seen == [("adapted", False, 9, settings), ("frozen", True, 9, settings)]


def test_only_rank_0_hears_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("lm_eval")
    monkeypatch.setattr(log, "level", logging.INFO)
    monkeypatch.setattr(TaskRequest, "load", lambda request: {"tasks": {}})
    found: Any = {"results": {}}
    monkeypatch.setattr(language_tasks.evaluator, "evaluate", lambda *_, **__: found)
    asked: Any = model_of().asked
    for rank, level in ((0, logging.INFO), (1, logging.ERROR)):
        asked.world = replace(ALONE, rank=rank)
        assert run_tasks(asked, TaskRequest(("a",))) == {} and log.level == level


def test_the_table_of_metrics() -> None:
    """A line per metric, without errors and counts; long names are cut."""
    frozen = {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 3, "exact,strict": 0.25}
    metrics = {"a": {"frozen": frozen, "adapted": {name: 2 * x for name, x in frozen.items()}}}
    metrics["t" * 40] = {"frozen": {"m" * 30: 1.0}, "adapted": {"m" * 30: math.pi}}
    assert tasks_table(metrics).splitlines() == [
        "metrics of lm-evaluation-harness:",
        f"  {'task':<32}{'metric':<24}    frozen   adapted",
        f"  {'a':<32}{'acc':<24}    0.5000    1.0000",
        f"  {'a':<32}{'exact,strict':<24}    0.2500    0.5000",
        f"  {'t' * 31} {'m' * 23}     1.0000    3.1416",
    ]
