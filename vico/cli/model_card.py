"""The model card of an exported adapter: README.md with metadata that a model hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vico.data.mixture import dataset_names
from vico.errors import one_line
from vico.io.text import yaml_text

TASK = "visual-question-answering"
# Settings that a reader looks for first.
SHOWN = "dataset epochs lr blr batch_size warmup_epochs weight_decay cap vaq qav precision seed"


@dataclass(frozen=True)
class Facts:
    """What a card says about an adapter."""

    name: str
    base_model: str
    base_id: str | None  # of the LLaMA on the hub, where the user has named one
    license: str | None
    dataset: str | None
    step: int
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    shapes: Mapping[str, Sequence[int]]
    split: str = "val"  # of the accuracies
    # At this step, by group, "acc" of all; empty: not known.
    accuracies: Mapping[str, float] = field(default_factory=dict)
    num_questions: tuple[int, int] | None = None  # used, of the file


def model_card(facts: Facts) -> str:
    """The text of README.md."""
    metadata = yaml_text(_metadata(facts))
    sections = (_what_it_is(facts), _results(facts), _use(facts), _training(facts), _files(facts))
    return f"---\n{metadata}---\n\n" + "\n".join(sections)


def _metadata(facts: Facts) -> dict[str, Any]:
    """In the layout of huggingface_hub's ModelCardData."""
    metadata: dict[str, Any] = {}
    if facts.base_id is not None:
        metadata |= {"base_model": facts.base_id, "base_model_relation": "adapter"}
    if facts.license is not None:
        metadata["license"] = facts.license
    metadata |= {"library_name": "vico", "pipeline_tag": "video-text-to-text"}
    metadata["tags"] = ["vico", "video-question-answering", "adapter"]
    if facts.accuracies and facts.dataset:
        results = [_result(facts, *part) for part in _by_dataset(facts).items()]
        metadata["model-index"] = [{"name": facts.name, "results": results}]
    return metadata


def _result(facts: Facts, name: str, accuracies: Mapping[str, float]) -> dict[str, Any]:
    metrics = []
    for group, value in accuracies.items():
        of = "accuracy" if group == "acc" else f"accuracy of {group}"
        metrics.append({"type": "accuracy", "value": value, "name": of})
    dataset = {"name": f"{name} {facts.split}", "type": name, "split": facts.split}
    return {"task": {"type": TASK}, "dataset": dataset, "metrics": metrics}


def _by_dataset(facts: Facts) -> dict[str, dict[str, float]]:
    """The accuracies of each data set; of several, first those over all of them.

    There the names of the others begin with the data set's.
    """
    names = dataset_names(facts.dataset) if facts.dataset else ()
    if len(names) < 2:
        return {facts.dataset or "": dict(facts.accuracies)}
    parts: dict[str, dict[str, float]] = {", ".join(names): {}}
    parts |= {name: {} for name in names}
    for key, value in facts.accuracies.items():
        fitting = [name for name in names if key.startswith(f"{name}_")]
        name = max(fitting, key=len, default=", ".join(names))
        parts[name][key.removeprefix(f"{name}_")] = value
    return {name: part for name, part in parts.items() if part}


def _what_it_is(facts: Facts) -> str:
    digests = {k: v for k, v in facts.fingerprints.items() if not k.startswith("data")}
    rows = "".join(f"| {name} | `{value}` |\n" for name, value in digests.items())
    table = f"\n| of the base model | digest or value |\n|---|---|\n{rows}" if rows else ""
    unknown = "" if rows else " Its digest was not recorded."
    return (
        f"# {_text(facts.name)}\n\nAn adapter of ViCo: it teaches a frozen LLaMA to answer "
        "multiple-choice questions about videos. It holds adapter prompts, gates of two kinds, a "
        "projection of video features and a temporal embedding.\n\n"
        "**PEFT's `PeftModel` and transformers cannot load it.** `vico` can; it refuses a LLaMA of "
        f"another digest.\n\nBase model: {_text(facts.base_model)}.{unknown}\n{table}"
    )


def _results(facts: Facts) -> str:
    if not facts.accuracies:
        return "## Results\n\nNone are recorded with this checkpoint.\n"
    used, total = facts.num_questions or (0, 0)
    rows, parts = "", _by_dataset(facts)
    for dataset, accuracies in parts.items():
        of = f"{_text(dataset)}: " if len(parts) > 1 else ""
        for group, value in accuracies.items():
            rows += f"| {of}{'all' if group == 'acc' else _text(group)} | {value:.2%} |\n"
    evaluated = f"{_text(facts.dataset or '')} {facts.split}"
    split = f"{evaluated}, {used} used of {total} questions, step {facts.step}"
    return f"## Results\n\n{split}:\n\n| questions | accuracy |\n|---|---|\n{rows}"


def _use(facts: Facts) -> str:
    paths = "--llama_model_path PATH --data_path PATH"
    name = _text(facts.name)
    return (
        "## Use\n\n```\n"
        f"hf download USER/{name} --local-dir {name}\n"
        f"vico eval --resume {name} {paths}\n"
        f"vico train --resume {name} {paths} --output_dir OUT    # a new run from its weights\n"
        "```\n\nUploaded by:\n\n```\n"
        f"hf upload USER/{name} {name}\n```\n"
    )


def _training(facts: Facts) -> str:
    known = [name for name in SHOWN.split() if facts.settings.get(name) is not None]
    rows = "".join(f"| `{name}` | {_text(str(facts.settings[name]))} |\n" for name in known)
    steps = f"Optimizer steps: {facts.step}. " if facts.step else ""
    where = "All settings are in `adapter_config.json`."
    table = f"\n| setting | value |\n|---|---|\n{rows}" if rows else ""
    return f"## Training\n\n{steps}{where}\n{table}"


def _files(facts: Facts) -> str:
    shapes = dict(facts.shapes)
    gates = [name for name in shapes if "gate" in name]
    rows = "".join(f"| `{n}` | {list(s)} |\n" for n, s in shapes.items() if n not in gates)
    if gates:
        rows += (
            f"| {len(gates)} gates, `{gates[0]}` to `{gates[-1]}` | {list(shapes[gates[0]])} |\n"
        )
    return f"## Tensors\n\n| tensor | shape |\n|---|---|\n{rows}"


def _text(value: str) -> str:
    """`value` without what Markdown would take for a table, a link or HTML."""
    return one_line(value).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
