"""Tasks of lm-evaluation-harness on the adapted and on the frozen model.

The harness makes the requests and counts the metrics; ViCo answers the requests, by the functions
that measure texts and write captions. Every rank gets all requests and answers its share of them.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from vico.data.text_windows import Window, text_sequence
from vico.errors import UserError, nearest, show
from vico.generation.generate import Prompt, generate
from vico.generation.settings import GenerationSettings
from vico.train.asking import AskedModel
from vico.train.cognition import measure_windows

DEFAULT_CONTEXT = 2048  # of the first LLaMA; the harness takes it where nothing else is said
DEFAULT_NEW_TOKENS = 256  # as the harness's own backends
FEWSHOT_SEED = 1234  # the harness's own: other examples would be another task
BOOTSTRAPS = 1000  # for the error of a metric that has no formula for it
GENERATION_KEYS = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks, in the harness's own words."""

    names: tuple[str, ...]
    include_path: Path | None = None  # a folder of further tasks
    num_fewshot: int | None = None  # None: what each task says, else 0
    limit: int | None = None  # the first so many documents of each task
    context: int = DEFAULT_CONTEXT  # positions that the model may see

    def load(self) -> dict[str, Any]:
        """The tasks and their documents. Raises UserError."""
        manager = self._manager()
        for name in self.names:
            if not manager.match_tasks([name]):
                hint = nearest(name, manager.all_tasks) or "; see `lm-eval ls tasks`"
                raise UserError(f"--tasks {name}: lm-evaluation-harness knows no such task{hint}")
        try:
            loaded: dict[str, Any] = manager.load(manager.match_tasks(list(self.names)))
        except Exception as problem:  # of the harness, its data sets and their host
            lines = str(problem).splitlines() or [type(problem).__name__]
            raise UserError(
                f"--tasks {','.join(self.names)}: cannot be loaded ({show(lines[0])}); a task's "
                "data set comes over the network the first time"
            ) from None
        for name, task in loaded["tasks"].items():
            self._check(name, task)
        return loaded

    def _manager(self) -> TaskManager:
        """Reading the harness's own 15,000 files takes seconds, so only if they are asked for."""
        if self.include_path is not None:
            own = TaskManager(include_path=self.include_path, include_defaults=False)
            if all(own.match_tasks([name]) for name in self.names):
                return own
        return TaskManager(include_path=self.include_path)

    def _check(self, name: str, task: Any) -> None:
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"--tasks {name}: runs code that a model has written, or shows pictures, which "
                "`vico cognition` does not; name tasks of text"
            )

    def prepare(self, task: Any) -> None:
        """The examples before its questions: how many, and which."""
        own = task.get_config("num_fewshot")
        if self.num_fewshot is not None and own != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def run_tasks(asked: AskedModel, request: TaskRequest) -> dict[str, Any]:
    """{task: {"frozen" and "adapted": the harness's metrics}}. A collective.

    Raises UserError, on all ranks, for tasks that cannot be had.
    """
    world = asked.world
    if not world.is_main:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    answered: dict[_Request, _Answers] = {}
    metrics: dict[str, dict[str, Any]] = {}
    with world.raise_together():
        tasks = request.load()
    for name in ("adapted", "frozen"):
        for task in tasks["tasks"].values():
            request.prepare(task)
        model = LanguageModel(asked, request.context, name, answered)
        with asked.engine.closed_gates() if name == "frozen" else nullcontext():
            found = evaluator.evaluate(
                model, tasks, limit=request.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
            )
        for title, values in found["results"].items():
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            metrics.setdefault(title, {})[name] = numbers
    model.say_cut()  # both models get the same requests
    return metrics


def tasks_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """As text for people: a line per task and metric, without the errors."""
    rows = [f"  {'task':<32}{'metric':<24}{'frozen':>10}{'adapted':>10}"]
    for task, of_models in metrics.items():
        for metric, frozen in of_models["frozen"].items():
            name = metric.removesuffix(",none")
            if "_stderr" not in name and name != "sample_len":
                adapted = of_models["adapted"][metric]
                rows.append(f"  {task[:31]:<32}{name[:23]:<24}{frozen:>10.4f}{adapted:>10.4f}")
    return "\n".join(["metrics of lm-evaluation-harness:", *rows])


@dataclass(frozen=True)
class _Request:
    """Tokens of a text, those from `first_target` on to be predicted."""

    tokens: tuple[int, ...]
    first_target: int


@dataclass(frozen=True)
class _Answers:
    """Per model: (log P of the targets, whether each is the likeliest token)."""

    frozen: tuple[float, bool]
    adapted: tuple[float, bool]


@dataclass
class LanguageModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks: the adapted model or, once its gates are closed, the frozen one."""

    asked: AskedModel
    max_length: int
    which: str  # "frozen" or "adapted"
    answered: dict[_Request, _Answers]  # by both models at once, each request once
    num_cut: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def eot_token_id(self) -> int:
        return self.asked.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.asked.tokenizer.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """With BOS where the tokenizer's makers put it, unless `add_special_tokens` says so."""
        tokenizer = self.asked.tokenizer
        with_bos = tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        return [tokenizer.bos] * with_bos + tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation): of the continuation after the context."""
        wanted = [self._request(context, continued) for _, context, continued in requests]
        self._answer([r for r in dict.fromkeys(wanted) if r not in self.answered])
        return [getattr(self.answered[request], self.which) for request in wanted]

    def _request(self, context: list[int], continuation: list[int]) -> _Request:
        """Without the beginning of what is too long: as the harness's own backends do."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task asks for {len(continuation)} tokens in one piece, and the model sees "
                f"{self.max_length}; raise --window, or leave that task out"
            )
        longest = self.max_length + 1  # the last token is only ever a target
        tokens = tuple((context + continuation)[-longest:])
        self.num_cut += len(context) + len(continuation) > longest
        return _Request(tokens, len(tokens) - len(continuation))

    def _answer(self, requests: Sequence[_Request]) -> None:
        """Those with equal beginnings, as options have them, share them in the stream."""
        made: list[Window] = []
        start = 0
        for request in requests:
            sequence = text_sequence(request.tokens, request.first_target)
            made.append(Window(start, start + len(sequence.targets), sequence))
            start = made[-1].stop
        if not made:
            return
        inputs, world = self.asked.inputs, self.asked.world
        what = f"{len(made):,} requests"
        table_6N = measure_windows(self.asked.engine, made, inputs, world, what, share=True)
        for request, window in zip(requests, made, strict=True):
            part_6n = table_6N[:, window.start : window.stop]
            losses, right = -part_6n[:2].sum(dim=1), part_6n[4:].all(dim=1)
            frozen, adapted = zip(losses.tolist(), right.tolist(), strict=True)
            self.answered[request] = _Answers(frozen, adapted)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each token once, with as much before it as the model sees."""
        pieces = [list(self._pieces(request.args[0])) for request in requests]
        flat = [(None, *piece) for piece in chain.from_iterable(pieces)]
        values = iter(value for value, _ in self._loglikelihood_tokens(flat))
        return [sum(islice(values, len(of_text))) for of_text in pieces]

    def _pieces(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(utils.make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a request's stop texts."""
        groups: dict[GenerationSettings, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(place)
        texts = [""] * len(requests)
        for settings, places in groups.items():
            contexts = [requests[place].args[0] for place in places]
            for place, text in zip(places, self._write(contexts, settings), strict=True):
                texts[place] = text
        return texts

    def _write(self, contexts: Sequence[str], settings: GenerationSettings) -> list[str]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for texts of {settings.max_new_tokens} tokens, and the model sees "
                f"{self.max_length}; raise --window, or leave that task out"
            )
        prompts = []
        for context in contexts:
            ids = self.tok_encode(context)
            self.num_cut += len(ids) > room
            prompts.append(self._prompt(ids[-room:]))
        self.asked.engine.train(False)
        model: Any = self.asked.engine.module
        tokenizer, world = self.asked.tokenizer, self.asked.world
        written = generate(model, prompts, tokenizer, settings, world)
        texts = []
        for of_prompt in written:
            ids = [i for i in of_prompt.token_ids if i != tokenizer.eos]
            stops = list(settings.stop)
            texts.append(postprocess_generated_text(tokenizer.decode(ids), stops, None))
        return texts

    def _prompt(self, ids: list[int]) -> Prompt:
        """`ids`, and a target in the place of the first new token; there is no video."""
        tokens = (*ids, self.eot_token_id)
        num_slots = self.asked.inputs.trainable_shapes["temporal_emb.weight"][0]
        no_video = torch.zeros(num_slots, self.asked.feature_width)
        return Prompt(text_sequence(tokens, len(ids)), no_video)

    def say_cut(self) -> None:
        if self.num_cut:
            self.asked.world.print_rank0(
                f"note: {self.num_cut} requests of the tasks are longer than {self.max_length} "
                "tokens, and lose their beginning; --window raises that"
            )


def _settings(words: Mapping[str, Any]) -> GenerationSettings:
    """Raises UserError for words of a task that have no meaning here."""
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(words), DEFAULT_NEW_TOKENS))
    unknown = sorted(kwargs.keys() - GENERATION_KEYS)
    if unknown:
        raise UserError(
            f"a task asks to generate with {unknown[0]}={show(kwargs[unknown[0]])}, which ViCo "
            "does not have; leave that task out"
        )
    stop = tuple(text for text in kwargs.get("until", ()) if text)
    draws = kwargs.get("do_sample") and kwargs.get("temperature")
    drawn = {"temperature": kwargs.get("temperature"), "top_p": kwargs.get("top_p", 1.0)}
    return GenerationSettings(kwargs["max_gen_toks"], stop=stop, **(drawn if draws else {}))
