"""Settings by other names (Hugging Face's), by KEY=VALUE, and as a printed recipe."""

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.command_line import error_of, parse_line, recipe
from support.errors import refusal
from vico.cli import recipes
from vico.cli.aliases import ALIASES, SHARED
from vico.cli.flags import RETIRED, make_parser, read_flags
from vico.cli.main import main
from vico.cli.parser import SettingsParser
from vico.errors import UserError
from vico.train.config import RunConfig

# (Hugging Face's words, ours): both resolve to the same args.json.
TWINS = [
    ("--per_device_train_batch_size 4", "--batch_size 4"),
    ("--gradient_accumulation_steps 3", "--accum_iter 3"),
    ("--num_train_epochs 3", "--epochs 3"),
    ("--num_train_epochs 3.0", "--epochs 3"),
    ("--learning_rate 2e-5", "--lr 2e-5"),
    ("--warmup_ratio 0.1", "--warmup_epochs 40"),
    ("--warmup_ratio 0.1 --epochs 3", "--warmup_epochs 0.3 --epochs 3"),
    ("--warmup_ratio 0.03 --num_train_epochs 10", "--warmup_epochs 0.3 --epochs 10"),
    ("--warmup_ratio 0", "--warmup_epochs 0"),
    ("--lr_scheduler_type cosine", ""),
    ("--weight-decay 0.1", "--weight_decay 0.1"),
    ("--max-steps 7", "--max_steps 7"),
    ("--max_steps -1", "--max_steps none"),
    ("--save-steps 5", "--save_steps 5"),
    ("--save-total-limit 2", "--save_total_limit 2"),
    ("--resume_from_checkpoint run/checkpoint-3", "--resume run/checkpoint-3"),
    ("--resume_from_checkpoint True", ""),
    ("--logging-steps 10", "--logging_steps 10"),
    ("--report-to none", "--report_to none"),
    ("--dataloader_num_workers 0", "--num_workers 0"),
    ("--bf16", "--precision bf16"),
    ("--bf16 True --fp16 False", "--precision bf16"),
    ("--fp16=true", "--precision fp16"),
    ("--fp16 --seed 3", "--precision fp16 --seed 3"),
    ("--bf16 false", "--precision fp32"),
    ("--bf16 epochs=3", "--precision bf16 --epochs 3"),
    ("--learning_rate 1e-3 --lr 0.001", "--lr 1e-3"),
    ("--bf16 --precision bf16", "--precision bf16"),
]


def args_of(line: str) -> str:
    return json.dumps(parse_line(line).resolve().to_json())


@pytest.mark.parametrize(("theirs", "ours"), TWINS)
def test_alias_is_its_own_flag(theirs: str, ours: str) -> None:
    assert args_of(theirs) == args_of(ours)
    words = shlex.split(theirs)
    dashed = " ".join(w.replace("_", "-") if w in _flags(words) else w for w in words)
    assert args_of(dashed) == args_of(ours)


def _flags(words: list[str]) -> set[str]:
    """The words that may have dashes."""
    return {f"--{name}" for name in (*ALIASES, *SHARED)} & set(words)


def test_every_alias_has_a_twin() -> None:
    lines = " ".join(theirs for theirs, _ in TWINS).replace("-", "_")
    assert all(f"__{name} " in lines or f"__{name}=" in lines for name in (*ALIASES, *SHARED))


# (Hugging Face's words, ours of the same meaning, ours of another).
PAIRS = [
    ("--per_device_train_batch_size 4", "--batch_size 4", "--batch_size 8"),
    ("--gradient_accumulation_steps 2", "--accum_iter 2", "--accum_iter 3"),
    ("--num_train_epochs 3.0", "--epochs 3", "--epochs 4"),
    ("--learning_rate 1e-3", "--lr 0.001", "--lr 0.01"),
    ("--warmup_ratio 0.1", "--warmup_epochs 40", "--warmup_epochs 4"),
    ("--resume_from_checkpoint x/y", "--resume x/y", "--resume x/z"),
    ("--dataloader_num_workers 0", "--num_workers 0", "--num_workers 1"),
    ("--bf16 true", "--precision bf16", "--precision fp16"),
    ("--fp16 true", "--precision fp16", "--precision bf16"),
    ("--weight-decay 0.1", "--weight_decay 0.1", "weight_decay=0.2"),
    ("--max-steps 7", "--max_steps 7", "max_steps=8"),
    ("--save-steps 5", "--save_steps 5", "save_steps=6"),
    ("--save-total-limit 2", "--save_total_limit 2", "save_total_limit=3"),
    ("--logging-steps 9", "--logging_steps 9", "logging_steps=10"),
    ("--report-to none", "--report_to none", "report_to=tensorboard"),
]


@pytest.mark.parametrize(("theirs", "same", "other"), PAIRS)
def test_both_names(theirs: str, same: str, other: str) -> None:
    """Both are fine where they say the same; else both are named."""
    assert args_of(f"{theirs} {same}") == args_of(same)
    for line in (f"{theirs} {other}", f"{other} {theirs}"):
        message = error_of(line)
        assert "say different things; keep one" in message
        for words in (theirs, other):
            name = words.replace("=", " ").split()[0].removeprefix("--").replace("-", "_")
            assert name in message
    without_pair = {"lr_scheduler_type"}  # it has one value
    assert {*ALIASES, *SHARED} - without_pair == {
        pair[0].split()[0].removeprefix("--").replace("-", "_") for pair in PAIRS
    }


RECIPE_TWINS = [
    ("learning_rate: 2e-5\nper_device_train_batch_size: 4", "lr: 2e-5\nbatch_size: 4"),
    ("num_train_epochs: 3.0\nwarmup_ratio: 0.5", "epochs: 3\nwarmup_epochs: 1.5"),
    ("bf16: false\nfp16: true", "precision: fp16"),
    ("max_steps: -1\nlr_scheduler_type: cosine", "max_steps: null"),
    ("resume_from_checkpoint: ~/c\ngradient_accumulation_steps: 2", "resume: ~/c\naccum_iter: 2"),
    ("resume_from_checkpoint: true\ndataloader_num_workers: 1", "num_workers: 1"),
    ("lr: 0.1\nlearning_rate: 0.1", "lr: 0.1"),
    ("report_to: [wandb, tensorboard]", "report_to: wandb,tensorboard"),
]


@pytest.mark.parametrize(("theirs", "ours"), RECIPE_TWINS)
def test_aliases_in_a_recipe(theirs: str, ours: str, tmp_path: Path) -> None:
    expected = args_of(recipe(tmp_path, ours))
    assert args_of(recipe(tmp_path, theirs)) == expected


def test_flags_win_over_a_recipe_whatever_their_names(tmp_path: Path) -> None:
    text = recipe(tmp_path, "learning_rate: 0.1\nwarmup_ratio: 0.5\nepochs: 8\nbf16: true")
    config = parse_line(f"{text} --lr 0.2 --warmup_epochs 1 --precision fp32").resolve()
    assert (config.lr, config.warmup_epochs, config.precision) == (0.2, 1.0, "fp32")
    text = recipe(tmp_path, "lr: 0.1\nwarmup_epochs: 2\nepochs: 8")
    config = parse_line(f"{text} learning_rate=0.2 warmup_ratio=0.25 epochs=4").resolve()
    assert (config.lr, config.warmup_epochs, config.epochs) == (0.2, 1.0, 4)


CONTRADICTIONS = [
    ("--lr 1e-3 --learning_rate 1e-4", "--lr 0.001 and --learning_rate 0.0001 say different"),
    ("--learning-rate 1 --lr 2", "--learning_rate 1.0 and --lr 2.0 say different things; keep one"),
    ("--batch_size 4 --per_device_train_batch_size 8", "--batch_size 4 and --per_device_train_"),
    ("--bf16 --fp16", "--bf16 true and --fp16 true say different"),
    ("--bf16 --precision fp32", "--bf16 true and --precision fp32 say different"),
    ("--warmup_ratio 0.1 --warmup_epochs 3", "--warmup_ratio 0.1 of 400 epochs and --warmup_epoch"),
    ("--lr 1 lr=2", "--lr 1.0 and lr=2.0 say different things; keep one"),
    ("--vaq vaq=no", "--vaq true and vaq=false say different"),
    ("--max_steps 3 max_steps=-1", "--max_steps 3 and max_steps=-1 say different"),
    ("--lr_scheduler_type linear", "--lr_scheduler_type linear: the learning rate rises linearly"),
    ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be from 0 to 1, a share of --epochs"),
    ("--warmup_ratio nan", "--warmup_ratio nan: must be from 0 to 1"),
    ("--num_train_epochs 2.5", "--num_train_epochs: '2.5' is not a whole number"),
    ("--learning_rate 1,5", "--learning_rate: '1,5' is not a number"),
    ("--bf16 maybe", "--bf16: 'maybe' is not true or false"),
    ("lrr=1", "lrr=1: unknown key 'lrr'; did you mean 'lr'?"),
    ("vaq=maybe", "vaq is 'maybe'; a switch is yes or no"),
    ("lr=", "--lr: '' is not a number"),
    ("config=x", "config=x: unknown key 'config'"),
    ("--zzz lr=1", "unknown flag --zzz"),
]


@pytest.mark.parametrize(("line", "message"), CONTRADICTIONS)
def test_contradictions_name_both(line: str, message: str) -> None:
    assert error_of(line).startswith(message)


def test_contradiction_in_a_recipe(tmp_path: Path) -> None:
    error = error_of(recipe(tmp_path, "lr: 1\nlearning_rate: 2"))
    assert error == (
        f"--config {tmp_path}/recipe.yaml: lr: 1 and learning_rate: 2 say different things; "
        "keep one"
    )
    error = error_of(recipe(tmp_path, "learning_rate: fast"))
    assert error.endswith("recipe.yaml: learning_rate: 'fast' is not a number")


def test_overrides_are_flags(tmp_path: Path) -> None:
    text = recipe(tmp_path, "lr: 1\nvaq: true\nno_shuffle: true\nmax_tokens: 9")
    words = "lr=1e-3 vaq=false no_shuffle=no max_tokens=none output_dir=~/a=b model=x=1"
    flags = "--lr 1e-3 --no-vaq --shuffle --max_tokens none --output_dir=~/a=b --model x=1"
    assert args_of(f"{text} {words}") == args_of(f"{text} {flags}")
    assert parse_line("--output_dir lr=1").given == {"output_dir": Path("lr=1")}, "a flag's value"
    assert parse_line("device=cuda").notes[0].startswith("--device does nothing now")


def test_overrides_behind_files() -> None:
    """They are none of the files, wherever they stand; a file of such a name has a path."""
    args = {"text": (Path("a.txt"), Path("b=c"), Path("./lr=1")), "lr": 1e-3, "keep": 2.0}
    for line in (
        "lr=1e-3 keep=2 --text a.txt b=c ./lr=1",
        "--text a.txt b=c ./lr=1 lr=1e-3 keep=2",
        "--text a.txt lr=1e-3 b=c ./lr=1 --keep 2",
    ):
        assert parse_line(line).given == args, line


def test_files_add_up() -> None:
    """A flag that takes several loses none of them, however often it is given."""
    for line in ("--text a.txt b.txt --text c.txt", "text=a.txt text=b.txt text=c.txt"):
        assert parse_line(line).given["text"] == (Path("a.txt"), Path("b.txt"), Path("c.txt"))
    message = "--text a.txt and text=b.txt say different things; keep one"
    assert error_of("--text a.txt text=b.txt") == message
    assert "there twice" in refusal(parse_line("--text a --text a").resolve)
    assert parse_line("--seed 1 --seed 2").given == {"seed": 2}


def add_own(parser: SettingsParser) -> None:
    group = parser.add_argument_group("own")
    group.add_argument("--runs", nargs="+", metavar="RUN")
    group.add_argument("--options", nargs="+", metavar="TEXT")


def test_own_flags_of_a_command_take_no_override() -> None:
    """Nor do they lose a value; an option of a question may be any text."""
    parser = make_parser("vico x", "", add_own=add_own)
    words = "--runs a cap=0 b=1 --vaq --runs ./lr=1 lr=2 --options cap=1 c --options d"
    line, typed = read_flags(parser, words.split())
    assert line.given == {"cap": 0.0, "lr": 2.0, "vaq": True}
    assert typed["runs"] == ["a", "b=1", "./lr=1"]
    assert typed["options"] == ["cap=1", "c", "d"]
    assert typed["cap"] == 0.0, "an override is a flag"


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["train", *shlex.split(line), "--print_config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_printed_config_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every setting, and notes as comments."""
    line = "--config launch/recipes/demo.yaml learning_rate=1e-5 --data_path 'a$b' --model '7'"
    text = printed(f"{line} --vaq --start_epoch 0", capsys)
    assert text.startswith("# note: --start_epoch does nothing now")
    again = recipe(tmp_path, text)
    assert args_of(again) == args_of(f"{line} --vaq")
    assert printed(again, capsys) == text.partition("\n")[2]
    assert parse_line(again).notes == ()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(name="a\x85b \u2028c", numbers=(1.0, 1))
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    numbers=st.tuples(st.floats(1e-30, 1e30), st.integers(0, 2**63 - 1)),
)
def test_any_config_reads_back(name: str, numbers: tuple[float, int], tmp_path: Path) -> None:
    config = RunConfig(
        model=name, data_path=tmp_path / f"{name}$x ~", lr=numbers[0], seed=numbers[1], vaq=True
    )
    path = tmp_path / "r.yaml"
    path.write_text(recipes.as_text(config, ()), encoding="utf-8")
    assert RunConfig(**recipes.read(path)) == config


def test_print_config_refuses_as_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print_config", "--lr", "nan"]) == 2
    assert main(["eval", "--print_config", "--resume", "x"]) == 2
    errors = capsys.readouterr().err
    assert "--lr nan: must be above 0" in errors and "unknown flag --print_config" in errors


def test_hints_name_no_retired_flag() -> None:
    parser = make_parser("vico train", "")
    for name in RETIRED:
        for typo in (name[:-1], name[1:], name.replace("_", "-") + "s"):
            with pytest.raises(UserError) as caught:
                parser.refuse_unknown([f"--{typo}"])
            named = str(caught.value).partition("; ")[2]
            assert not any(f"'--{retired}'" in named for retired in RETIRED), (typo, named)
    assert "did you mean '--learning_rate'?" in error_of("--learning_rat 1")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?; use one of train, eval"),
        (["chekc"], "unknown command 'chekc'; did you mean 'check'?"),
        (["--epochs", "3"], "--epochs: a command comes first, as in vico train --epochs"),
        (["x\n"], "unknown command 'x\\n'; use one of"),
    ],
)
def test_hints_know_commands(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert expected in capsys.readouterr().err


SCREEN_LINES = 40  # of a terminal window


def test_help_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    """Each fits on a screen, and together they are the whole help."""
    parser = make_parser("vico train", "Train.")
    whole = parser.help_of("all")
    assert whole == parser.help_of(None)
    for group in parser._action_groups:
        if group._group_actions and group.title is not None:
            text = parser.help_of(group.title.split()[-1])
            assert text.startswith(f"{group.title}:\n") and len(text.splitlines()) <= SCREEN_LINES
            assert " ".join(text.split()) in " ".join(whole.split())
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help", "Ranks"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ranks:\n  --deepspeed STR")
    assert "--help xyz: no such group of flags; there are all, " in error_of("--help xyz")
