"""An export is a folder that a hub takes: read back bit for bit, and opened by PEFT's reader."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from support.checkpoints import LLAMA, SHAPES, random_state, same, validation_error
from support.errors import refusal
from vico.checkpoint.format import CARD, CONFIG, WEIGHTS, TrainState
from vico.checkpoint.validate import validate_for_model
from vico.checkpoint.write import RunIdentity, save
from vico.cli.export import export_checkpoint
from vico.errors import CheckpointError
from vico.train.config import RunConfig
from vico.train.saved_run import read_checkpoint

FINGERPRINTS = {"backbone": "ab12", "backbone n_heads": "4", "data train questions": "cd"}
LOG = {"step": 12, "epoch": 1, "train_loss": 0.5, "val_n": 9, "val_n_total": 10, "val_acc": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose best checkpoint is of step 12, with its log."""
    folder = tmp_path / "run"
    config = RunConfig(model="tiny", data_path=Path("/home/me/data"), seed=7, max_feats=10)
    identity = RunIdentity("r", config.to_json(), FINGERPRINTS)
    state = TrainState(12, 32, 12, 0.5)
    save(folder / "checkpoint_best", *random_state(SHAPES, 1), state, identity)
    later = dataclasses.replace(state, step=24)
    save(folder / "checkpoint-24", *random_state(SHAPES, 2), later, identity)
    lines = [LOG | {"val_C|x": 0.25}, LOG | {"step": 24, "val_acc": 0.1}]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def exported(run: Path, *options: Any) -> Path:
    target = run.parent / "my-adapter"
    export_checkpoint(run, target, *options)
    return target


def test_read_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, settings and fingerprints; the paths of the run's user are not in it."""
    target = exported(run)
    assert sorted(path.name for path in target.iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    assert f"hf upload USER/my-adapter {target}" in capsys.readouterr().out
    checkpoint = validate_for_model(read_checkpoint(target), SHAPES, LLAMA.n_layers)
    assert same(checkpoint.weights, random_state(SHAPES, 1)[0])
    assert checkpoint.moments is None and checkpoint.state == TrainState()
    assert checkpoint.fingerprints == FINGERPRINTS
    assert checkpoint.settings["seed"] == 7 and checkpoint.settings["model"] == "tiny"
    assert not any("/home/me" in path.read_text(errors="replace") for path in target.iterdir())
    with safe_open(target / WEIGHTS, "pt") as file:
        assert file.metadata()["backbone"] == "ab12" and file.metadata()["format"] == "pt"
    again = run.parent / "again"
    export_checkpoint(target, again)
    assert same(read_checkpoint(again).weights, read_checkpoint(target).weights)


def test_readers_of_other_libraries(run: Path) -> None:
    """PEFT opens the config and keeps what is ours, and makes no model of it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    target = exported(run, "me/llama")
    assert transformers.utils.find_adapter_config_file(str(target)) == str(target / CONFIG)
    assert peft.PeftConfig.from_json_file(str(target / CONFIG))["auto_mapping"]["vico"]
    config = peft.PeftConfig.from_pretrained(str(target))
    assert config.base_model_name_or_path == "me/llama" and config.inference_mode
    record = config.auto_mapping["vico"]
    assert record["shapes"] == {name: list(shape) for name, shape in SHAPES.items()}
    assert record["fingerprints"] == FINGERPRINTS and record["step"] == 12
    llama = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = transformers.LlamaConfig(vocab_size=9, intermediate_size=8, **llama)
    with pytest.raises(KeyError, match="peft_type"):
        peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(small), str(target))


def test_model_card(run: Path) -> None:
    """Its metadata are those that huggingface_hub writes and reads."""
    hub = pytest.importorskip("huggingface_hub")
    text = (exported(run, "me/llama", "mit") / CARD).read_text()
    card = hub.ModelCard(text)
    assert card.data.base_model == "me/llama" and card.data.license == "mit"
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results == {"accuracy": 0.5, "accuracy of C|x": 0.25}
    rewritten = yaml.safe_load(card.data.to_yaml())
    assert rewritten == yaml.safe_load(text.split("---\n")[1])
    for line in (
        "cannot load it.** `vico` can",
        "nextqa val, 9 used of 10 questions, step 12:",
        "| all | 50.00% |",
        "| C\\|x | 25.00% |",
        "| backbone | `ab12` |",
        "vico eval --resume my-adapter --llama_model_path PATH --data_path PATH",
        "| 6 gates, `layers.0.attention.gate1` to `layers.2.attention.gate2` | [1, 4, 1, 1] |",
    ):
        assert line in text, line
    assert "data train questions" not in text


def test_a_published_file(run: Path) -> None:
    """It records neither results nor, mostly, its LLaMA."""
    weights = random_state(SHAPES, 3)[0]
    source, target = run.parent / "a.pth", run.parent / "out"
    torch.save({"model": weights}, source)
    assert "does not say which LLaMA" in refusal(export_checkpoint, source, target)
    export_checkpoint(source, target, "me/llama")
    assert same(read_checkpoint(target).weights, weights)
    text = (target / CARD).read_text()
    assert "None are recorded" in text and "model-index" not in text
    assert "Its digest was not recorded" in text


def test_nothing_is_overwritten(run: Path) -> None:
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        target = run.parent / f"target{len(list(run.parent.iterdir()))}"
        make(target)
        assert "already exists" in refusal(export_checkpoint, run, target)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "'format' is 2 and not 1, so another version wrote it"),
    ({"settings": None}, "'settings' is None and must be an object; fetch or export it again"),
    ({"fingerprints": {"backbone": 3}}, "'backbone' is no text"),
    ({"files": []}, "'files' is [] and must be an object"),
    ({"files": {WEIGHTS: {"bytes": 1, "sha256": ""}}}, "adapter_model.safetensors: damaged ("),
    ({"settings": {"sed": 1}}, "adapter_config.json: unknown key 'sed'; did you mean 'seed'?"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_damage(run: Path, change: dict[str, Any], message: str) -> None:
    target = exported(run)
    content = json.loads((target / CONFIG).read_text())
    content["auto_mapping"]["vico"] |= change
    (target / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(target)
    assert message in str(caught.value)


def test_an_adapter_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "auto_mapping": null}')
    message = f"{tmp_path}/{CONFIG}: is of another kind of adapter ('peft_type' is 'LORA')"
    assert validation_error(tmp_path).startswith(message)
