"""What cannot be exported, read back or submitted, with what the error must say."""

import json
from typing import Any

from faults.case import EVAL, Case, flags, refused
from faults.damage import HTML, both, cut, put
from support.run_fixture import SHARD, WEIGHTS

SUBMIT = "!submission {fixture}/p.jsonl --output {fixture}/o.json --format "
EXPORT = "!export {fixture}/"


def predictions(*changes: dict[str, Any] | str) -> Any:
    """A predictions file: lines of two options with these changes, or texts."""
    lines = []
    for index, change in enumerate(changes):
        line = {"index": index, "qid": str(index), "video": "7", "scores": [1, 2], "prediction": 0}
        lines.append(change if isinstance(change, str) else json.dumps(line | change))
    return put("p.jsonl", "\n".join(lines))


def adapter(config: Any) -> Any:
    return put("hub/adapter_config.json", json.dumps(config))


def record(**changes: Any) -> Any:
    """An export's adapter_config.json, without the weights beside it."""
    files = {"adapter_model.safetensors": {"bytes": 9, "sha256": "x"}}
    whole = {"format": 1, "settings": {}, "fingerprints": {}, "files": files}
    return adapter({"auto_mapping": {"vico": whole | changes}})


def of_hub(damage: Any, *parts: str) -> Case:
    """An export, to evaluate."""
    return refused(damage, *parts, line=f"{EVAL}hub", code=3)


EXPORTS: dict[str, Case] = {
    "export, nothing": flags(
        f"{EXPORT}nowhere {{fixture}}/x", "{fixture}/nowhere: no such checkpoint; ", code=3
    ),
    "export, onto something": flags(
        f"{EXPORT}run {{fixture}}/run", "{fixture}/run: already exists; name another target"
    ),
    "export, into nothing": refused(
        put("file", ""),
        "the target's folder {fixture}/file: ",
        line=f"{EXPORT}run {{fixture}}/file/x",
    ),
    "export, a LLaMA": flags(
        f"{EXPORT}{SHARD} {{fixture}}/x", " tensors of a LLaMA and none of an adapter", code=3
    ),
    "export, a published file without its LLaMA": flags(
        f"{EXPORT}published.pth {{fixture}}/x",
        "{fixture}/published.pth: does not say which LLaMA it was trained on; give --base_model",
    ),
    "export, damaged": refused(
        both(cut(WEIGHTS, 1000), cut("run/checkpoint_best/adapter_model.safetensors", 1000)),
        "adapter_model.safetensors: damaged (1000 of ",
        line=f"{EXPORT}run {{fixture}}/x",
        code=3,
    ),
    "an adapter of LoRA": of_hub(
        adapter({"peft_type": "LORA", "r": 8}),
        "{fixture}/hub/adapter_config.json: is of another kind of adapter ('peft_type' is 'LORA')",
        "name a folder of `vico export`",
    ),
    "an export of another version": of_hub(
        record(format=2), "adapter_config.json: 'format' is 2 and not 1, so another version wrote"
    ),
    "an export without its weights": of_hub(
        record(), "hub/adapter_model.safetensors: damaged (No such file or directory)"
    ),
    "an export without settings": of_hub(
        record(settings=3), "adapter_config.json: 'settings' is 3 and must be an object; fetch or"
    ),
    "an export, cut off": of_hub(
        put("hub/adapter_config.json", '{"auto_mapping": {'),
        "adapter_config.json:1: column ",
        "correct {fixture}/hub/adapter_config.json or fetch it again",
    ),
    "submission, nothing": flags(
        f"{SUBMIT}tvqa", "{fixture}/p.jsonl: no such file; the file of predictions should be there"
    ),
    "submission, HTML": refused(
        put("p.jsonl", HTML),
        "p.jsonl: the file of predictions is an HTML page",
        line=f"{SUBMIT}tvqa",
    ),
    "submission, another server": refused(
        predictions({}), "invalid choice: 'agqa'", "nextqa", line=f"{SUBMIT}agqa"
    ),
    "submission, cut off": refused(
        predictions({}, '{"index": 1'), "p.jsonl:2: column 12: ", line=f"{SUBMIT}tvqa"
    ),
    "submission, an option that is not there": refused(
        predictions({}, {"prediction": 2}),
        "p.jsonl:2: 'prediction' is 2 and must be a whole number from 0 to 1",
        line=f"{SUBMIT}nextqa",
    ),
    "submission, no predictions": refused(
        predictions({"scores": None}),
        "p.jsonl:1: 'scores' is None and must be a list; name the predictions_SPLIT.jsonl",
        line=f"{SUBMIT}nextqa",
    ),
    "submission, of other data sets": refused(
        predictions({"dataset": "mine"}),
        "holds predictions on 'mine'; name one by --dataset",
        line=f"{SUBMIT}nextqa",
    ),
    "submission, a question twice": refused(
        predictions({}, {"qid": "0"}), "question '7_0' appears twice", line=f"{SUBMIT}nextqa"
    ),
    "submission, a question missing": refused(
        predictions({}, {"index": 2}),
        "p.jsonl: 2 used of 3 total questions, 'number 1' is the first that is missing",
        "or write what there is by --partial",
        line=f"{SUBMIT}nextqa",
    ),
    "submission, of other data": refused(
        predictions({}),
        "question '7_0' is none of the 10 of the data; name the --split and --data_path",
        line=f"{SUBMIT}nextqa --data_path {{fixture}}/toy/data --split val",
    ),
    "submission, no questions of STAR's": refused(
        predictions({}), "question '0' is none of STAR's: its id begins", line=f"{SUBMIT}star"
    ),
    "submission, onto something": refused(
        both(predictions({}), put("o.json", "{}")),
        "{fixture}/o.json: already exists; name another file",
        line=f"{SUBMIT}tvqa",
    ),
}
