"""The DeepSpeed config of a run: the shipped files, and those that contradict the run's flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.processes import ROOT
from vico.errors import UserError
from vico.train import ds_config
from vico.train.ds_config import TESTED_OPTIONS, read_config


def read(name: str) -> dict[str, Any]:
    return read_config(name, "bf16", micro_batch_size=8, accumulation=2, world_size=4)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_shipped_files(name: str) -> None:
    config = read(name)
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 64
    assert config["zero_optimization"]["stage"] == int(name[-1])
    assert config["gradient_clipping"] == 0.0
    assert "auto" not in json.dumps(config) and "bf16" not in config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_batch_size": 7},
            r"train_batch_size 7 does not fit --batch_size 8 --accum_iter 2 on 4 rank\(s\), "
            "which make 64",
        ),
        (
            {"zero_optimizaton": {}},
            "unknown key 'zero_optimizaton'; did you mean 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sze": 1}},
            "did you mean 'reduce_bucket_size'",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage is 0; use 1, 2 or 3"),
        ({"frozen_shards": "host"}, 'frozen_shards is "host"; use "node", "all" or "auto"'),
        ({"frozen_shards": "node"}, 'frozen_shards "node" is for stage 3, and the stage is 2'),
        ({"steps_per_print": 0}, "steps_per_print is 0 and must be a whole number of at least 1"),
        ({"dump_state": "yes"}, 'dump_state is "yes" and must be true or false'),
        ({"steps_per_print": True}, "steps_per_print is true and must be"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' must go"),
        ({"bf16": {"enabled": False}}, "bf16.enabled false against --precision bf16"),
    ],
)
def test_contradictions(tmp_path: Path, change: dict[str, object], message: str) -> None:
    shipped = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**shipped, **change}))
    with pytest.raises(UserError, match=message):
        read(str(path))


def test_untested_options_may_say_their_default(tmp_path: Path) -> None:
    """As a file that names every option does, or "auto", or false where there is none."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path = tmp_path / "ds.json"
    for default in (0, "auto"):
        options = {
            field.alias or name: field.default if default == 0 else default
            for name, field in DeepSpeedZeroConfig.model_fields.items()
            if name not in TESTED_OPTIONS
        }
        section = {name: value for name, value in options.items() if value is not None}
        content = {"zero_optimization": {**section, "stage": 2}, "steps_per_print": 1}
        path.write_text(json.dumps({**content, "wall_clock_breakdown": True}))
        config = read(str(path))
        assert config["steps_per_print"] == 1 and config["wall_clock_breakdown"] is True
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "cpu_offload": False}}))
    read(str(path))


def test_a_name_that_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are in order, whatever order the folder has."""
    for name in ("e", "c", "a", "d", "b"):
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr(ds_config, "SHIPPED_CONFIGS", tmp_path)
    message = refusal(read, "x")
    assert message.startswith("--deepspeed x: must be auto, a, b, c, d, e or the path of a JSON")
