"""The DeepSpeed config of a run: the shipped files, and those that contradict the run's flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.processes import ROOT
from vico.errors import UserError
from vico.train import ds_config
from vico.train.ds_config import (
    REFUSED,
    RUN_KEYS,
    SECTIONS,
    SWITCHES,
    TESTED_OPTIONS,
    read_config,
    resolve_auto,
)


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


# ---- each rule, without a file ------------------------------------------------------------------

PATH = Path("own.json")


def resolved(precision: str = "bf16", stage: Any = 2, **values: Any) -> dict[str, Any]:
    """What becomes of these values: of a run of 8 x 2 questions on each of 4 ranks."""
    config = {"zero_optimization": {"stage": stage}, **values}
    return resolve_auto(config, PATH, precision, micro_batch_size=8, accumulation=2, world_size=4)


def refused(**values: Any) -> str:
    message = refusal(resolved, **values)
    assert message.startswith("--deepspeed own.json: ")
    return message.removeprefix("--deepspeed own.json: ")


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **options}}


WHOLE = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 64,
    "gradient_clipping": 0.0,
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def test_all_that_deepspeed_gets() -> None:
    """The run's numbers, no clipping and no lines of its own; torch's AdamW, also off-loaded."""
    assert resolved() == WHOLE
    auto = dict.fromkeys(
        (*RUN_KEYS, *SWITCHES, "steps_per_print", "gradient_clipping", "frozen_shards"), "auto"
    )
    assert resolved(**auto) == WHOLE
    own = {"zero_optimization": {"stage": 2, "overlap_comm": "auto", "sub_group_size": 7}}
    assert resolved(**own) == WHOLE | {"zero_optimization": {"stage": 2, "sub_group_size": 7}}
    mine = {"zero_allow_untested_optimizer": False, "zero_force_ds_cpu_optimizer": True}
    kept = {"steps_per_print": 1, "dump_state": True, "frozen_shards": "all"}
    assert resolved(**mine, **kept) == WHOLE | kept
    assert resolved(stage=3, frozen_shards="node")["frozen_shards"] == "node"


def test_numbers_that_follow_from_the_flags() -> None:
    """They may be given as they are."""
    numbers = dict(zip(RUN_KEYS, (8, 2, 64), strict=True))
    assert resolved(**numbers) == WHOLE
    for key, value in numbers.items():
        for wrong, shown in ((value + 1, value + 1), (0, 0), (None, "null")):
            assert refused(**{key: wrong}) == (
                f"{key} {shown} does not fit --batch_size 8 --accum_iter 2 on 4 rank(s), which "
                f'make {value}; write "auto"'
            )
    one = {"zero_optimization": {"stage": 2}, "train_batch_size": True}
    assert "train_batch_size true does not fit" in refusal(resolve_auto, one, PATH, "bf16", 1, 1, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_precision_is_the_flag_s(precision: str) -> None:
    """A config may agree; what DeepSpeed would do by itself about it is left out."""
    for kind in ("bf16", "fp16"):
        right = precision == kind
        for section in ({}, {"enabled": "auto"}, {"enabled": right}):
            assert resolved(precision, **{kind: section}) == WHOLE
        shown = "false" if right else "true"
        assert refused(precision=precision, **{kind: {"enabled": not right}}) == (
            f'{kind}.enabled {shown} against --precision {precision}; write "auto"'
        )


OF_ZERO = [name.partition(".")[2] for name in REFUSED if "." in name]


@pytest.mark.parametrize("key", [name for name in REFUSED if "." not in name])
def test_what_the_method_or_the_program_sets(key: str) -> None:
    """Each key says what to use instead; one that is off goes without a word."""
    for value in (1.5, "on", {"enabled": True}, {}, [1], "fp32"):
        if (key, value) != ("communication_data_type", "fp32"):
            assert refused(**{key: value}) == f"'{key}' must go: {REFUSED[key]}"
    for off in ("auto", None, 0, 0.0, False, {"enabled": False}):
        assert resolved(**{key: off}) == WHOLE


def test_exact_sums_and_weights() -> None:
    for key in OF_ZERO:
        said = refused(**zero(**{key: True}))
        assert said == f"'zero_optimization.{key}' must go: {REFUSED[f'zero_optimization.{key}']}"
    assert len(OF_ZERO) == 4 and resolved(communication_data_type="fp32") == WHOLE


@pytest.mark.parametrize("key", SECTIONS)
def test_sections(key: str) -> None:
    assert refused(**{key: True}) == f"'{key}' must be a section of its own"


@pytest.mark.parametrize("key", SWITCHES)
def test_switches(key: str) -> None:
    for wrong, shown in ((1, "1"), (0, "0"), ("true", '"true"'), (None, "null")):
        assert refused(**{key: wrong}) == f"{key} is {shown} and must be true or false"


def test_numbers_of_stages_and_steps() -> None:
    for stage in (1, 2, 3):
        assert resolved(stage=stage)["zero_optimization"] == {"stage": stage}
    for wrong, shown in ((0, "0"), (4, "4"), (2.0, "2.0"), (True, "true"), ("2", '"2"')):
        assert refused(stage=wrong) == f"zero_optimization.stage is {shown}; use 1, 2 or 3"
    assert refusal(resolve_auto, {}, PATH, "bf16", 1, 1, 1) == (
        "--deepspeed own.json: zero_optimization.stage is null; use 1, 2 or 3"
    )
    for wrong, shown in ((0, "0"), (1.0, "1.0"), (True, "true"), ("9", '"9"')):
        assert refused(steps_per_print=wrong) == (
            f"steps_per_print is {shown} and must be a whole number of at least 1"
        )


def test_where_frozen_weights_lie() -> None:
    for stage in (1, 2):
        assert refused(stage=stage, frozen_shards="node") == (
            f'frozen_shards "node" is for stage 3, and the stage is {stage}'
        )
    for wrong, shown in ((None, "null"), ("nodes", '"nodes"')):
        said = refused(stage=3, frozen_shards=wrong)
        assert said == f'frozen_shards is {shown}; use "node", "all" or "auto"'


@pytest.mark.parametrize("section", ["offload_param", "offload_optimizer"])
def test_weights_and_moments_on_the_host(section: str) -> None:
    """Not on NVMe; what a config for NVMe leaves over does no harm."""
    for device in ("none", "cpu"):
        left = {"device": device, "pin_memory": True, "buffer_count": 9, "nvme_path": "/x"}
        assert resolved(**zero(**{section: left}))["zero_optimization"][section] == left
    for device, shown in (("nvme", '"nvme"'), (1, "1")):
        assert refused(**zero(**{section: {"device": device}})) == (
            f'zero_optimization.{section}.device is {shown}; use "cpu" or leave it out'
        )
    options = {"offload_param": {}, "offload_optimizer": {"fast_init": True, "ratio": 0.5}}
    for key, value in options[section].items():
        assert refused(**zero(**{section: {"device": "cpu", key: value}})) == (
            f"'zero_optimization.{section}.{key}' must go: checkpoints are not tested with it, and "
            "it may change what a save finds"
        )
    assert resolved(**zero(**{section: None}))


def test_unknown_keys() -> None:
    assert refused(zero_optimisation={}) == (
        "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"
    )
    assert refused(qqq=1) == "unknown key 'qqq'"
    assert refused(**zero(overlap_com=True)) == (
        "unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?"
    )


def test_what_deepspeed_refuses_itself() -> None:
    """Its own words, cut at 300 letters."""
    said = refused(**zero(reduce_bucket_size="big"))
    assert said.startswith("DeepSpeed refuses reduce_bucket_size 'big': Input should be a valid in")
    said = refused(**zero(offload_param={"devise": "cpu"}))
    assert said == "DeepSpeed refuses offload_param.devise 'cpu': Extra inputs are not permitted"
