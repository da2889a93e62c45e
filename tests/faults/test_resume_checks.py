"""What a start finds in its output_dir: damage, a run of other files, a second writer."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.interrupted import ENDLESS, FLAGS, SECONDS, interrupt, steps_done, train_command
from support.processes import Processes, start, succeeds
from support.toy_dataset import ToyData
from support.toy_run import newest_step
from support.warm_process import WarmProcess
from vico.checkpoint.format import OPTIMIZER, STATE, WEIGHTS, TrainState
from vico.checkpoint.write import RunIdentity, save
from vico.errors import UserError
from vico.train.config import RunConfig
from vico.train.resume import RECORDED_FIRST, notes_of_uncompared, start_state
from vico.train.run_log import read_records
from vico.train.saved_run import read_checkpoint


def test_a_damaged_checkpoint_is_passed_over(
    toy: ToyData, undisturbed: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-6")
    data = bytearray((out / "checkpoint-4" / WEIGHTS).read_bytes())
    data[-5] ^= 4
    (out / "checkpoint-4" / WEIGHTS).write_bytes(data)
    os.truncate(out / "checkpoint-3" / OPTIMIZER, 1000)
    command = train_command(toy, 1, out)
    done = warm.run(command, tmp_path)
    output = done.stdout
    assert done.code == 0, done.stderr
    flipped = f"{out}/checkpoint-4/{WEIGHTS}: damaged (its sha256 is not the recorded one)"
    assert f"passed over: {flipped}" in output
    assert f"passed over: {out}/checkpoint-3/{OPTIMIZER}: damaged (1000 of " in output
    assert f"using {out}/checkpoint-2" in output and "resuming from step 2" in output
    for folder in out.glob("checkpoint-*"):
        (folder / STATE).write_text("{}")
    run = warm.run(command, tmp_path)
    assert run.code == 3 and run.stderr.count("\n") == 1
    assert "none of its 4 checkpoints can be used" in run.stderr


def change_one_number(path: Path, prefix: str = "") -> None:
    """Of the first matrix in a torch file."""
    tensors = torch.load(path, weights_only=True)
    matrices = [v for name, v in tensors.items() if name.startswith(prefix) and v.dim() == 2]
    matrix = matrices[0]
    matrix[len(matrix) // 2, 3] += 1
    torch.save(tensors, path)


def change_words(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace("man", "dog"), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "change", "name", "says"),
    [
        ("llama/tiny/consolidated.00.pth", change_one_number, "backbone", "backbone  "),
        ("data/nextqa/train.csv", change_words, "data", "data train questions  "),
        ("data/nextqa/clipvitl14.pth", change_one_number, "data", "data features  "),
    ],
)
def test_other_files_are_refused(
    undisturbed: Path,
    warm: WarmProcess,
    tmp_path: Path,
    file: str,
    change: Callable[[Path], None],
    name: str,
    says: str,
) -> None:
    """A resumed run must read the files that it began with; --allow_change NAME permits others."""
    other = ToyData(tmp_path / "other")  # the same but for the file that is then changed
    change(other.folder / file)
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-6")
    settings = ["--batch_size", "8", "--output_dir", str(out), "--max_steps", "5"]
    command = ["train", *other.flags, *FLAGS, *settings]
    run = warm.run(command, tmp_path)
    assert run.code == 2 and says in run.stderr and "--allow_change" in run.stderr
    assert not (out / "checkpoint-5").exists()
    run = warm.run([*command, "--allow_change", name], tmp_path)
    assert run.code == 0, run.stderr


def test_features_overwritten_in_a_run_are_not_saved(toy: ToyData, tmp_path: Path) -> None:
    """By finite numbers, at the same size, with the old time put back. A chmod before is none."""
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(toy.folder / "data", data)
    clips = data / "nextqa" / "clipvitl14.pth"
    command = [*train_command(toy, 1, out), "--data_path", str(data), *ENDLESS]
    command += ["--batch_size", "1", "--save_steps", "1"]  # 20 steps to the next evaluation
    last_clean = 0

    def overwrite(run: Processes) -> None:
        nonlocal last_clean
        clips.chmod(0o640)
        os.link(clips, tmp_path / "link")
        steps = steps_done(out)
        run.wait_until(lambda: steps_done(out) >= steps + 3, SECONDS)
        os.utime(clips.with_name("train.csv"))  # it has been read, and may change
        times = clips.stat()
        with clips.open("r+b") as file:  # a file that shrinks first would kill who maps it
            file.seek(clips.read_bytes().index(toy.features["v0003"].numpy().tobytes()))
            file.write(torch.ones(3, 768).numpy().tobytes())
        os.utime(clips, ns=(times.st_atime_ns, times.st_mtime_ns))
        last_clean = steps_done(out)

    run = interrupt(command, 1, lambda: steps_done(out) >= 5, overwrite)
    assert run.codes == [4] and run.errors == [run.stderrs[0].strip()]
    assert run.errors[0].startswith(f"vico: error: {clips}: changed during the run: it was written")
    assert run.stdouts[0].count("its entry changed during the run (chmod, ln)") == 1
    assert 6 <= newest_step(out) <= last_clean + 1


def test_an_evaluation_with_another_backbone_is_refused(
    toy: ToyData, undisturbed: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    """Of the same weights: another norm_eps. Other questions are noted; no notes without cause."""
    llama, data = tmp_path / "llama", tmp_path / "data"
    shutil.copytree(toy.llama, llama)
    shutil.copytree(toy.folder / "data", data)
    params = llama / "tiny" / "params.json"
    params.write_text(params.read_text().replace("1e-06", "0.001"))
    paths = ["--llama_model_path", str(llama), "--output_dir", str(tmp_path / "out")]
    command = ["eval", "--resume", str(undisturbed / "checkpoint_best"), *paths]
    run = warm.run(command, tmp_path)
    assert run.code == 2 and "backbone norm_eps  1e-06  0.001" in run.stderr
    allowed = warm.run([*command, "--allow_change", "backbone"], tmp_path)
    assert allowed.code == 0 and "note:" not in allowed.stdout, allowed.stderr
    checked = warm.run(["check", *toy.flags, *FLAGS, "--init_eval", *command[1:]], tmp_path)
    assert checked.code == 2 and "trained with other files (backbone;" in checked.stderr
    same = ["eval", "--resume", command[2], "--data_path", str(data), *paths[2:]]
    change_words(data / "nextqa" / "val.csv")
    assert "note: the val questions are not those" in warm.run(same, tmp_path).stdout
    shutil.copy(toy.data / "val.csv", data / "nextqa" / "val.csv")
    change_one_number(data / "nextqa" / "clipvitl14.pth", "w")
    run = warm.run(same, tmp_path)
    assert run.code == 2 and "data val features" in run.stderr, run.stdout


def test_an_older_checkpoint_is_compared_in_what_it_recorded(tmp_path: Path) -> None:
    """With a note on the rest."""
    config = RunConfig(output_dir=tmp_path / "out")
    old = dict.fromkeys(RECORDED_FIRST, "a")
    state = TrainState(questions_per_step=8)
    save(tmp_path / "out" / "checkpoint-0", {}, {}, state, RunIdentity("", config.to_json(), old))
    saved = read_checkpoint(tmp_path / "out" / "checkpoint-0")
    now = {**old, "tokenizer": "b", "backbone norm_eps": "1e-06", "data val features": "c"}
    assert start_state(saved, 4, 8, config, now).step == 0
    (note,) = notes_of_uncompared(saved, now)
    assert "did not record tokenizer, backbone norm_eps: " in note
    with pytest.raises(UserError) as refused:
        start_state(saved, 4, 8, config, {**now, "data val questions": "d"})
    assert refused.value.table[1:] == (("data val questions", "a", "d"),)


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--vaq", "vaq"), ("--qav", "qav"), ("--cap 0", "cap")],
)
def test_tasks_change_at_the_end_of_an_epoch(
    toy: ToyData,
    undisturbed: Path,
    warm: WarmProcess,
    tmp_path: Path,
    flags: str,
    name: str,
) -> None:
    """As the refusal offers, and the settings are rewritten with the first checkpoint of them."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-6")
    args = (out / "args.json").read_text()
    command = [*train_command(toy, 1, out, "--max_steps", "4"), *flags.split()]
    offered = warm.run(command, tmp_path)
    assert offered.code == 2 and f"--allow_change {name}" in offered.stderr
    command += ["--allow_change", name]
    inside = warm.run(command, tmp_path)
    assert inside.code == 2 and "checkpoint-4: is inside an epoch with 2 task" in inside.stderr
    shutil.rmtree(out / "checkpoint-4")
    if name == "vaq":  # ended by the dry run
        before = [*command, "--deepspeed", str(tmp_path / "none.json")]
        assert warm.run(before, tmp_path).code == 2
        run = start(*command, ranks=1, environment={"VICO_FAILPOINT": "dry_run=raise MemoryError"})
        assert run.wait(60) == [4], run.output
    assert (out / "args.json").read_text() == args
    changed = warm.run(command, tmp_path)
    assert changed.code == 0, changed.stderr
    last = read_records(out / "steps.jsonl")[-1]
    assert last["step"] == 4 and (last.get(f"{name}_loss") is None) == (name == "cap")
    assert json.loads((out / "args.json").read_text())[name] == {"cap": 0}.get(name, True)


def test_a_second_writer_is_refused(toy: ToyData, warm: WarmProcess, tmp_path: Path) -> None:
    """And the place of a dead one is free."""
    out = tmp_path / "out"
    command = train_command(toy, 1, out)

    def start_second(first: Processes) -> None:
        began = time.monotonic()
        second = warm.run(command, tmp_path)
        assert second.code == 6 and time.monotonic() - began < 5
        owner = f"{out}: in use by process {first.processes[0].pid} on "
        assert owner in second.stderr and second.stderr.count("\n") == 1
        first.processes[0].kill()

    assert interrupt(command, 1, lambda: steps_done(out) >= 1, start_second).codes == [-9]
    again = warm.run(command, tmp_path)
    assert again.code == 0, again.stderr


@pytest.mark.slow
def test_of_two_starts_on_a_new_folder_one_runs(toy: ToyData, tmp_path: Path) -> None:
    """The later one looked while the folder was empty; it must not overwrite the other's files."""
    out = tmp_path / "out"
    command = train_command(toy, 1, out)
    environment = {"VICO_FAILPOINT": "inputs=sleep 25"}
    late = start(*command, "--lr", "0.5", ranks=1, environment=environment)
    succeeds(*command)
    files = (out / "args.json", out / "checkpoint-6" / WEIGHTS)
    before = [path.read_bytes() for path in files]
    assert late.wait(90) == [6], late.output
    assert "another run began and wrote here while this one was starting" in late.stderrs[0]
    assert [path.read_bytes() for path in files] == before
