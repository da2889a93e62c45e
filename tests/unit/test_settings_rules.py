"""Each rule of a setting's value: its type, its bounds, what it means, and the words against it."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import refusal
from vico.train.bounds import BARE, BOUNDS, COUNT, is_path, plain, value_type
from vico.train.config import RunConfig
from vico.train.resume import differences
from vico.train.settings import (
    evaluated_split,
    expand_home,
    expand_variables,
    has_dialogue,
    has_split,
    is_path_setting,
    parse_path,
    settings_from,
    training_splits,
    with_absolute_paths,
)

MAX = 3e38
LARGEST_SEED = 9_223_372_036_854_775_807

# ---- bounds -------------------------------------------------------------------------------------


def test_the_bounds_of_all_numbers() -> None:
    """Whole numbers that are not listed are counts from 1."""
    not_negative = (0, MAX, "0 or more, and finite")
    positive = (math.nextafter(0, 1), MAX, "above 0, and finite")
    minutes = (math.nextafter(0, 1), 1e6, "minutes above 0, at most a million")
    from_0 = (0, 10**9, "a whole number of at least 0, and at most a billion")
    names = "cap blr min_lr weight_decay warmup_epochs".split()
    assert {
        **dict.fromkeys(names, not_negative),
        **dict.fromkeys(("lr", "tau"), positive),
        **dict.fromkeys(("collective_timeout", "hang_timeout"), minutes),
        **dict.fromkeys(("save_steps", "save_total_limit", "max_tokens"), from_0),
        "keep": (0, 1e15, "0 or more, and at most 1e+15"),
        "bias": (-MAX, MAX, "finite"),
        "num_workers": (0, 1024, "a whole number from 0 to 1024"),
        "seed": (0, LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}"),
    } == BOUNDS
    assert COUNT == (1, 10**9, "a whole number of at least 1, and at most a billion")
    assert BARE == {"keep": 1.0, "attention_shares": 64}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("epochs", 1, 10**9),
        ("save_steps", 0, 10**9),
        ("num_workers", 0, 1024),
        ("seed", 0, LARGEST_SEED),
        ("bias", -MAX, MAX),
        ("cap", 0.0, MAX),
        ("lr", 5e-324, MAX),
        ("hang_timeout", 5e-324, 1e6),
    ],
)
def test_both_ends_are_allowed(name: str, least: float, most: float) -> None:
    for value in (least, most):
        assert getattr(RunConfig(**{name: value}), name) == value
    step = 1 if isinstance(least, int) else None
    below = least - 1 if step else math.nextafter(least, -math.inf)
    above = most + 1 if step else math.nextafter(most, math.inf)
    for value in (below, above):
        assert refusal(RunConfig, **{name: value}).startswith(f"--{name} {value}: must be ")


def test_types_of_annotations() -> None:
    assert value_type(Literal["a", "b"] | None) == (str, ("a", "b"))
    assert value_type(None | float) == (float, None)
    assert value_type(tuple[Path, ...]) == (tuple, None)
    assert value_type(Path | None) == (Path, None)


def test_values_as_json_has_them() -> None:
    values = [Path("a/b"), (Path("a"), Path("b")), (), 3, None, "x", True]
    assert [plain(value) for value in values] == ["a/b", ["a", "b"], [], 3, None, "x", True]
    assert json.loads(json.dumps(RunConfig().to_json()))["data_path"] == "data"


# ---- rules of several settings ------------------------------------------------------------------


def test_captions_with_evaluations_need_both() -> None:
    assert RunConfig(eval_captions=3).eval_captions == 3
    for flags in ({"cap": 0}, {"no_eval": True}):
        assert refusal(RunConfig, eval_captions=3, **flags) == (
            "--eval_captions 3: must be left out with --no_eval or --cap 0"
        )


def test_texts_have_a_use() -> None:
    """With an evaluation, or to be kept; and only so can something be kept."""
    texts = (Path("a"), Path("b"))
    assert RunConfig(text=texts).text == texts
    assert RunConfig(text=texts, no_eval=True, keep=0.5).keep == 0.5
    for keep in (None, 0.0):
        assert refusal(RunConfig, text=texts, no_eval=True, keep=keep) == (
            "--text a b: must be left out with --no_eval and without --keep"
        )
    assert refusal(RunConfig, keep=0.5) == "--keep 0.5: must be given together with --text FILE"
    assert RunConfig(keep=0.0).tasks == ("vqa", "cap"), "0 is off"
    again = (Path("a"), Path("b"), Path("a"))
    assert refusal(RunConfig, text=again) == "--text: a is there twice; name each file once"


def test_slots_leave_room_for_a_question() -> None:
    assert RunConfig(max_feats=511, max_seq_len=512).max_feats == 511
    assert refusal(RunConfig, max_feats=60, max_seq_len=60) == (
        "--max_feats 60: must be below --max_seq_len 60"
    )


@pytest.mark.parametrize("layers", ["all", "-1", "1.5", "", "\u00b2", "1" * 10])
def test_layers_that_cannot_run_again(layers: str) -> None:
    assert refusal(RunConfig, checkpoint_activations=layers) == (
        f"--checkpoint_activations {layers}: must be none, full or a number of layers"
    )
    assert RunConfig(checkpoint_activations="1" * 9).num_checkpointed == 111_111_111


def test_no_weight_is_no_task() -> None:
    """A run with --keep 0 is resumed without the flag, and the other way round."""
    assert RunConfig(keep=0.0) == RunConfig(keep=-0.0) == RunConfig()
    assert differences(RunConfig(keep=0).to_json(), RunConfig()) == []
    assert refusal(RunConfig, attention_shares=0).startswith("--attention_shares 0: must be ")
    assert RunConfig(cap=0.0).cap == 0.0


def test_changes_that_are_allowed() -> None:
    """Settings, and what is known of files; blanks and empty names do no harm."""
    config = RunConfig(allow_change=" lr, data ,,backbone,tokenizer")
    assert config.allowed_changes == ("lr", "data", "backbone", "tokenizer")
    assert RunConfig().allowed_changes == ()
    said = refusal(RunConfig, allow_change="lr,blrr")
    assert said == "--allow_change blrr: no such setting; did you mean 'blr'?"


def test_reporters_that_can_be_named() -> None:
    for names in ("none", "all", "tensorboard", "wandb , trackio", "trackio,tensorboard,wandb"):
        assert RunConfig(report_to=names).report_to == names


def test_only_a_checkpoint_can_be_all_that_is_evaluated() -> None:
    found = [RunConfig(init_eval=i, resume=r) for i in (True, False) for r in (Path("c"), None)]
    assert [config.only_evaluates for config in found] == [True, False, False, False]


def test_tasks_and_their_weights() -> None:
    """In the order of the flags; a switch means 1."""
    whole = RunConfig(cap=0.25, vaq=True, qav=True, keep=2.0, text=(Path("a"),))
    assert whole.tasks == ("vqa", "cap", "vaq", "qav", "keep")
    assert whole.task_weights == (1.0, 0.25, 1.0, 1.0, 2.0)
    assert (RunConfig(cap=0).tasks, RunConfig(cap=0).task_weights) == (("vqa",), (1.0,))


def test_names_of_splits_and_folders() -> None:
    one, two = RunConfig(dataset="star"), RunConfig(dataset="star,my:0.5", data_path=Path("d"))
    assert (one.label("star", "val"), two.label("my", "val")) == ("val", "my val")
    assert (two.dataset_names, two.folder_of("my")) == (("star", "my"), Path("d/my"))
    named = RunConfig(dataset="a,b", captions=Path("b=x"), features=Path("a=y,b=z"))
    assert [named.captions_of(name) for name in "ab"] == [None, Path("x")]
    assert [named.features_of(name) for name in "ab"] == [Path("y"), Path("z")]
    for flag in ("captions", "features"):
        said = refusal(RunConfig, dataset="a,b", **{flag: Path("x")})
        assert said.startswith(f"--{flag} x: must be NAME=PATH[,NAME=PATH]")


def test_names_of_ds_configs() -> None:
    paths = {"zero2": False, "auto": False, "own.json": True, "a/zero2": True, "json": False}
    assert {name: is_path(name) for name in paths} == paths


# ---- values of a recipe -------------------------------------------------------------------------


def typed(key: str, value: Any) -> Any:
    (result,) = settings_from({key: value}, "r.yaml").values()
    return result


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epochs", 7, 7),
        ("lr", 1, 1.0),
        ("lr", "3e-4", 0.0003),
        ("lr", None, None),
        ("vaq", False, False),
        ("model", "7", "7"),
        ("keep", True, 1.0),
        ("keep", 2, 2.0),
        ("keep", False, None),
        ("keep", 0, None),
        ("attention_shares", True, 64),
        ("attention_shares", False, None),
        ("cap", 0, 0.0),
        ("quantize", "nf4", "nf4"),
        ("quantize", None, None),
        ("precision", "fp16", "fp16"),
        ("resume", "a/b", Path("a/b")),
        ("text", "a", (Path("a"),)),
        ("text", ["a", "b"], (Path("a"), Path("b"))),
        ("text", [], ()),
    ],
)
def test_values_get_the_type_of_their_setting(key: str, value: Any, expected: Any) -> None:
    found = typed(key, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("epochs", 7.0, "7.0 is not a whole number"),
        ("epochs", None, "None is not a whole number"),
        ("lr", True, "True is not a number"),
        ("lr", "fast", "'fast' is not a number"),
        ("lr", 10**400, "1000000"),
        ("vaq", 1, "1 is not true or false"),
        ("model", 7, "7 is not a text (quote it)"),
        ("cap", False, "False is not a number"),
        ("precision", "fp8", "'fp8' is not one of bf16, fp16, fp32"),
        ("precision", None, "None is not one of bf16, fp16, fp32"),
        ("resume", " ", "' ' is not a path in UTF-8"),
        ("resume", ["a"], "['a'] is not a path in UTF-8"),
        ("text", ["a", 3], "['a', 3] is not a path in UTF-8, or a list of them"),
        ("text", ["a", ""], "['a', ''] is not a path in UTF-8, or a list of them"),
        ("text", 3, "3 is not a path in UTF-8, or a list of them"),
    ],
)
def test_values_of_another_type(key: str, value: Any, said: str) -> None:
    assert refusal(typed, key, value).startswith(f"r.yaml: {key}: {said}")


def test_keys_of_a_recipe() -> None:
    """Others than settings are known where they are named; data sets are looked at."""
    assert refusal(typed, "epoch", 3) == "r.yaml: unknown key 'epoch'; did you mean 'epochs'?"
    found = settings_from({"limit": 3, "seed": 1}, "r.yaml", {"limit": int | None})
    assert found == {"limit": 3, "seed": 1}
    message = refusal(settings_from, {"seed": 1, "limi": 3}, "r.yaml", {"limit": int})
    assert message == "r.yaml: unknown key 'limi'; did you mean 'limit'?"
    said = "r.yaml: --dataset 'a,a': names 'a' twice; give it a weight instead (NAME:2)"
    assert refusal(typed, "dataset", "a,a") == said


# ---- paths --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_every_text_is_a_path_but_blank_ones(text: str) -> None:
    if text.strip():
        assert parse_path(text) == Path(text)
    else:
        with pytest.raises(ValueError):  # it has no words
            parse_path(text)


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "\udce9"])
def test_texts_that_are_no_path(text: str) -> None:
    with pytest.raises(ValueError):
        parse_path(text)


def test_which_values_are_paths() -> None:
    """By the setting; of --deepspeed those that are no names."""
    named = {"data_path": "d", "text": "a", "resume": "r", "deepspeed": "a/b", "captions": "c"}
    assert all(is_path_setting(name, value) for name, value in named.items())
    others: dict[str, Any] = {"deepspeed": "zero2", "model": "a/b", "text": ["a"], "seed": "1"}
    others |= {"unknown": "a/b", "resume": None}
    assert not any(is_path_setting(name, value) for name, value in others.items())
    assert not is_path_setting("deepspeed", 3)


def test_homes_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("NAME_", "n")
    monkeypatch.setenv("BLANK_", "")
    assert [expand_home(text) for text in ("~/a", "a/~", "~")] == ["/h/a", "a/~", "/h"]
    assert refusal(expand_home, "~no_one/x") == (
        "'~no_one/x': no such home folder; write ./~ for a name that begins so"
    )
    assert expand_variables("$NAME_/${NAME_}x/$$") == "n/nx/$"
    for name in ("BLANK_", "NOT_THERE_"):
        said = refusal(expand_variables, f"a/${name}")
        assert said == f"'a/${name}': the variable {name} is not set"
    said = "'a$/b': no name follows a $; write $$ for a dollar sign"
    assert refusal(expand_variables, "a$/b") == said


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several data sets too, where no shell expands a home; a name is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    (tmp_path / "d" / "star").mkdir(parents=True)
    (tmp_path / "d" / "star" / "own.pth").touch()
    config = RunConfig(
        dataset="nextqa:1, star:0.50",
        data_path=Path("d"),
        text=(Path("t"), Path("/u")),
        captions=Path("star=~/c.json"),
        features=Path("nextqa=f.pth,star=own.pth"),
        deepspeed="a/ds.json",
        resume=Path("r"),
    )
    found = with_absolute_paths(config)
    assert found.dataset == "nextqa,star:0.5"
    assert found.text == (tmp_path / "t", Path("/u"))
    assert found.captions == Path("star=/h/c.json")
    features = f"nextqa={tmp_path}/f.pth,star={tmp_path}/d/star/own.pth"
    assert found.features == Path(features)
    assert (found.deepspeed, found.resume) == (f"{tmp_path}/a/ds.json", tmp_path / "r")
    assert with_absolute_paths(found) == found
    one = with_absolute_paths(RunConfig(dataset="star", captions=Path("~/c"), deepspeed="zero2"))
    assert one.captions == tmp_path / "~" / "c", "the shell's or the recipe's to expand"
    assert (one.deepspeed, one.features, one.resume) == ("zero2", None, None)


# ---- splits -------------------------------------------------------------------------------------


def test_splits_of_several_data_sets(tmp_path: Path) -> None:
    """A split is there if each of them has its table."""
    for name in ("nextqa", "intentqa"):
        (tmp_path / name).mkdir()
    config = RunConfig(dataset="nextqa,intentqa", data_path=tmp_path, split="test")
    assert not has_split(config, "nextqa", "test")
    (tmp_path / "nextqa" / "test.csv").touch()
    assert has_split(config, "nextqa", "test") and not has_split(config, "nextqa", "val")
    assert (evaluated_split(config), training_splits(config)) == ("val", ("train", "val"))
    (tmp_path / "intentqa" / "test.csv").touch()
    assert evaluated_split(config) == "test"
    (tmp_path / "nextqa" / "val.csv").touch()
    assert evaluated_split(config) == "test", "one of them has a val"
    (tmp_path / "intentqa" / "val.csv").touch()
    assert evaluated_split(config) == "val"


def test_dialogues() -> None:
    sets = {"tvqa": True, "nextqa": False, "nextqa,tvqa": True, "nextqa,star": False}
    assert {name: has_dialogue(RunConfig(dataset=name)) for name in sets} == sets
    config = RunConfig(dataset="nextqa,star", sub=True)
    said = "--sub: only TVQA has subtitles, and --dataset is nextqa,star; drop --sub"
    assert refusal(with_absolute_paths, config) == said
    assert with_absolute_paths(RunConfig(dataset="nextqa,tvqa", sub=True)).sub
