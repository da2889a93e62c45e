"""Flags, recipes and saved settings: strict, typed, and the published commands as they are."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.command_line import error_of, parse_line, recipe
from vico.cli.aliases import ALIASES
from vico.cli.flags import RETIRED, make_parser, off_switch, parse
from vico.cli.main import main
from vico.errors import UserError
from vico.train import config as configs
from vico.train.config import RunConfig

RULES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_defaults() -> None:
    """Those of the published code, where it has the flag (METHOD section 5)."""
    expected = {"batch_size": 64, "epochs": 400, "accum_iter": 1, "max_seq_len": 512}
    expected |= {"max_feats": 10, "adapter_len": 10, "adapter_layer": None}
    expected |= {"weight_decay": 0.05, "blr": 1e-3, "lr": None, "min_lr": 0.0}
    expected |= {"warmup_epochs": 40.0, "bias": 3.0, "tau": 100.0, "num_workers": 2, "seed": 0}
    expected |= {"cap": 0.5, "max_cap_len": 384, "data_path": Path("data"), "precision": "bf16"}
    assert {name: getattr(RunConfig(), name) for name in expected} == expected


@pytest.mark.parametrize("dataset", ["nextqa", "star", "tvqa", "intentqa"])
def test_published_commands(dataset: str) -> None:
    line = parse_line(
        "--model 7B --max_seq_len 160 --max_cap_len 384 --batch_size 8 --epochs 10 "
        "--warmup_epochs 2 --bias 3.5 --tau 100. --max_feats 10 "
        f"--dataset {dataset} --blr 9e-2 --weight_decay 0.14 "
        f"--output_dir ./checkpoint/{dataset} --accum_iter 2 --cap 0.5"
    )
    config = line.resolve()
    expected = {"dataset": dataset, "blr": 0.09, "bias": 3.5, "warmup_epochs": 2.0, "accum_iter": 2}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.output_dir == Path.cwd() / "checkpoint" / dataset
    assert config.folder_of(dataset) == Path.cwd() / "data" / dataset
    assert config.tasks == ("vqa", "cap") and config.task_weights == (1.0, 0.5)
    assert line.notes == ()


def test_launcher_and_retired_flags() -> None:
    """They are accepted, with a note for each retired one."""
    retired = "--device cuda --pin_mem --no_pin_mem --start_epoch 0"
    retired += " --world_size 8 --dist_url env:// --dist_on_itp"
    line = parse_line(f"--local_rank -1 --local-rank=3 {retired} --seed 1")
    assert line.given == {"seed": 1}
    assert [note.split()[0] for note in line.notes] == [f"--{name}" for name in RETIRED]
    assert all("does nothing now: " in note for note in line.notes)


def test_note_on_unused_blr(tmp_path: Path) -> None:
    """--lr overrules --blr, whether it comes from a flag or from the recipe."""
    (tmp_path / "r.yaml").write_text("lr: 1e-2\n")
    line = parse(["--config", str(tmp_path / "r.yaml"), "--blr", "1e-3"], "vico train", "")
    assert line.notes == ("--blr 0.001 is not used, since --lr 0.01 is given by the recipe",)
    assert parse_line("--lr 1 --blr 2").notes == ("--blr 2 is not used, since --lr 1 is given",)
    assert parse_line("--blr 2").notes == ()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for field in dataclasses.fields(RunConfig):
        assert f"\n  --{field.name} " in text or f"\n  --{field.name}\n" in text, field.name
        assert " ".join(field.metadata["help"].split()) in " ".join(text.split()), field.name
    assert all(f"--{name}" in text for name in RETIRED)
    for group in ("model", "data", "objective", "optimization", "run"):
        assert f"\n{group}:\n" in text


def test_help_of_vico(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["--help"], 0), ([], 2)):
        assert main(argv) == code
        text = capsys.readouterr().out
        assert all(f"\n  {name}" in text for name in ("train", "eval", "demo"))


SEE_HELP = "see vico train --help"
COUNT = "must be a whole number of at least 1, and at most a billion"
CHOICES = "'bf16', 'fp16', 'fp32'"
FLAG_ERRORS = [
    ("--batchsize 4", "unknown flag --batchsize; did you mean '--batch_size'?"),
    ("--batch-size 4", "unknown flag --batch-size; did you mean '--batch_size'?"),
    ("--epoch=3", "unknown flag --epoch; did you mean '--epochs'?"),
    ("--max_seq 3", "unknown flag --max_seq; did you mean '--max_seq_len'?"),
    ("--zzz 4", f"unknown flag --zzz; {SEE_HELP}"),
    (
        "--lr 1 2",
        f"unexpected word '2': a value follows a --flag, and switches take none; {SEE_HELP}",
    ),
    ("--lr", f"--lr: expected one argument ({SEE_HELP})"),
    ("--lr 1,5", f"--lr: '1,5' is not a number ({SEE_HELP})"),
    ("--epochs 2.5", f"--epochs: '2.5' is not a whole number ({SEE_HELP})"),
    ("--resume caf\udce9", rf"--resume: 'caf\udce9' is not a path in UTF-8 ({SEE_HELP})"),
    ("--resume ''", f"--resume: '' is not a path in UTF-8 ({SEE_HELP})"),
    ("--sub=yes", f"--sub: takes no value, but was given 'yes' ({SEE_HELP})"),
    (
        "--precision fp8",
        f"--precision: invalid choice: 'fp8' (choose from {CHOICES}) ({SEE_HELP})",
    ),
    ("--accum_iter 0", f"--accum_iter 0: {COUNT}"),
    ("--max_steps -2", f"--max_steps -2: {COUNT}"),
    ("--cap nan", "--cap nan: must be 0 or more, and finite"),
    ("--tau 0", "--tau 0.0: must be above 0, and finite"),
    ("--blr inf", "--blr inf: must be 0 or more, and finite"),
    ("--save_steps -1", f"--save_steps -1: {COUNT.replace('1', '0')}"),
    ("--save_total_limit -1", f"--save_total_limit -1: {COUNT.replace('1', '0')}"),
    ("--epochs " + "9" * 30, f"--epochs {'9' * 30}: {COUNT}"),
    ("--num_workers 9999", "--num_workers 9999: must be a whole number from 0 to 1024"),
    ("--seed -1", f"--seed -1: must be a whole number from 0 to {2**63 - 1}"),
    ("--max_feats 512", "--max_feats 512: must be below --max_seq_len 512"),
    ("--dataset star --sub", "--sub: only TVQA has subtitles, and --dataset is star; drop --sub"),
]


@pytest.mark.parametrize(("line", "message"), FLAG_ERRORS)
def test_flag_errors(line: str, message: str) -> None:
    assert error_of(line) == message


NUMBERS = [
    f.name for f in dataclasses.fields(RunConfig) if configs.value_type(f.type)[0] in (int, float)
]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(name: str) -> None:
    """Below, above, and for a fraction neither NaN nor infinity."""
    kind, _ = configs.value_type(HINTS[name])
    bad = [-1, 10**30] if kind is int else [-1e300, 1e300, float("nan"), float("inf")]
    for value in bad:
        with pytest.raises(UserError, match=f"^--{name} .*: must be "):
            RunConfig(**{name: value})


def test_more_than_a_word_of_layers_is_refused() -> None:
    assert "none, full or a number" in error_of("--checkpoint_activations " + "9" * 5000)


def test_last_of_a_repeated_flag_wins() -> None:
    assert parse_line("--seed 1 --vaq --seed 2 --vaq").given == {"seed": 2, "vaq": True}
    assert parse_line("--vaq --no-vaq --no_shuffle --shuffle --no-qav --qav").given == {
        "vaq": False,
        "no_shuffle": False,
        "qav": True,
    }


def test_flags_switch_off_what_a_recipe_or_checkpoint_sets(tmp_path: Path) -> None:
    """Every switch and every value that may be absent, except for texts and paths."""
    fields = dataclasses.fields(RunConfig)
    switches = {f.name: True for f in fields if f.type is bool}
    numbers = {"adapter_layer": 2, "max_tokens": 9, "lr": 0.1, "max_steps": 3, "save_steps": 4}
    numbers |= {"save_total_limit": 5, "logging_steps": 6, "expect_world_size": 2}
    values = {**switches, **numbers, "quantize": "nf4", "dataset": "tvqa"}
    off = [off_switch(name) for name in switches]
    assert {"--no-sub", "--shuffle", "--eval"} < {*off}
    off += [f"--{name}=none" for name in (*numbers, "quantize")]
    text = recipe(tmp_path, json.dumps(values))
    assert parse_line(text).resolve().sub
    by_recipe = parse_line(" ".join([text, *off])).resolve()
    over_checkpoint = parse_line(" ".join(off)).resolve(values)
    assert by_recipe == over_checkpoint == parse_line("--dataset tvqa").resolve()
    optional = {f.name for f in fields if type(None) in typing.get_args(f.type)}
    # --no_eval excludes it, so it is switched off alone.
    evaluated = ("eval_captions", "attention_shares")
    for name in evaluated:
        assert getattr(parse_line(f"--{name}=none").resolve({name: 3}), name) is None
    texts = {"captions", "features", "resume", "allow_change"}
    assert optional - texts == {*numbers, *evaluated, "quantize", "keep"}


def test_recipe_is_typed_and_flags_win(tmp_path: Path) -> None:
    text = """\
# ours
lr: 3e-4
blr: 1
epochs: 7
vaq: true
qav: no
adapter_layer: null
data_path: some/where
model: '7'
precision: fp32
"""
    given = parse_line(f"{recipe(tmp_path, text)} --epochs 9").given
    expected = {"lr": 0.0003, "blr": 1.0, "epochs": 9, "vaq": True, "qav": False}
    expected |= {"adapter_layer": None, "data_path": Path("some/where"), "model": "7"}
    assert given == {**expected, "precision": "fp32"}
    assert isinstance(given["blr"], float)


RECIPE_ERRORS = [
    ("batchsize: 4", "unknown key 'batchsize'; did you mean 'batch_size'?"),
    ("--lr: 4", "unknown key '--lr'; did you mean 'lr'?"),
    ("3: 4", "unknown key 3"),
    ("lr: 1\nvaq: true\nlr: 2", "'lr' appears twice; keep one"),
    ("vaq: 'no'", "vaq: 'no' is not true or false"),
    ("vaq: 1", "vaq: 1 is not true or false"),
    ("epochs: 1.0", "epochs: 1.0 is not a whole number"),
    ("epochs: '3'", "epochs: '3' is not a whole number"),
    ("epochs: true", "epochs: True is not a whole number"),
    ("epochs:", "epochs: None is not a whole number"),
    ("lr: yes", "lr: True is not a number"),
    ("lr: 3e-4x", "lr: '3e-4x' is not a number"),
    ("lr: [1]", "lr: [1] is not a number"),
    ("model: 7", "model: 7 is not a text (quote it)"),
    ("resume: ''", "resume: '' is not a path in UTF-8"),
    ('resume: "a\\0b"', "resume: 'a\\x00b' is not a path in UTF-8"),
    ("dataset: [nextqa]", "dataset: ['nextqa'] is not a text (quote it)"),
    ("dataset: nextqa,,star", "--dataset 'nextqa,,star': holds an empty name; write NAME or"),
    ("config: other.yaml", "unknown key 'config'"),
    ("lr: 1\n---\nlr: 2", "not valid YAML: expected a single document"),
    (
        "lr: !!python/name:os.system",
        "not valid YAML: could not determine a constructor for the tag",
    ),
    ("lr: 2020-13-45", "not valid YAML: month must be in 1..12"),
    ("? [a]\n: b", "not valid YAML: "),
    ("hello", "must hold lines 'flag: value'"),
    ("warmup_epochs: " + "9" * 400, "is not a number"),
    ("lr: " + "[" * 3000, "not valid YAML: "),
]


@pytest.mark.parametrize(("text", "message"), RECIPE_ERRORS)
def test_recipe_errors(tmp_path: Path, text: str, message: str) -> None:
    error = error_of(recipe(tmp_path, text))
    assert error.startswith(f"--config {tmp_path}/recipe.yaml: ")
    assert message in error and len(error) < 500


FRAGMENTS = "--lr --lr= --seed --vaq --model --config -h3 -- - --lr=-1e-3 -1 = --=3".split()
WORDS = st.sampled_from([*FRAGMENTS, "9" * 5000]) | st.text(max_size=6)


@RULES
@given(words=st.lists(WORDS, max_size=5))
def test_random_command_lines(words: list[str]) -> None:
    """They end in no exception but UserError."""
    try:
        parse(words, "vico train", "").resolve()
    except UserError:
        pass
    except SystemExit as help_shown:
        assert help_shown.code == 0


YAML_CHARACTERS = "lr:-&*a[]{}?!|>\n '\"#%@"
RECIPES = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(str.encode),
    st.text(YAML_CHARACTERS, max_size=20).map(str.encode),
)


@RULES
@given(content=RECIPES)
def test_random_recipes(tmp_path: Path, content: bytes) -> None:
    """They end in no exception but UserError."""
    (tmp_path / "recipe.yaml").write_bytes(content)
    try:
        parse(["--config", str(tmp_path / "recipe.yaml")], "vico train", "").resolve()
    except UserError as problem:
        assert str(problem)


HINTS = typing.get_type_hints(RunConfig, include_extras=True)


def test_parser_has_exactly_the_settings() -> None:
    flags = {action.dest for action in make_parser("vico train", "")._actions}
    others = {"help", "config", "print_config", "debug", "local_rank", *RETIRED, *ALIASES}
    settings_flags = flags - others
    assert settings_flags == {f.name for f in dataclasses.fields(RunConfig)}
