"""The folder of a run as --resume, and more epochs on a run that is complete."""

import json
import shutil
from pathlib import Path

from faults.interrupted import train_command
from support.toy_dataset import ToyData
from support.warm_process import CommandResult, WarmProcess
from vico.train.run_log import read_records


def test_the_folder_of_a_run(
    toy: ToyData, undisturbed: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    """Training goes on from its newest checkpoint, evaluation takes its best; both say which."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoint-6")
    (run / "checkpoint-4" / "state.json").write_text("{}")
    evaluated = warm.run(["eval", "--resume", str(run)], tmp_path)
    assert f"--resume {run}: its best checkpoint, {run}/checkpoint_best" in evaluated.stdout
    accuracy = json.loads(evaluated.stdout.splitlines()[-1])["acc"]
    best = max(record["val_acc"] for record in read_records(undisturbed / "log.txt"))
    assert evaluated.code == 0 and accuracy == best
    command = [*train_command(toy, 1, out, "--resume", str(run)), "--max_steps", "4"]
    for _ in range(2):  # the same command resumes the new run, or finds it complete
        trained = warm.run(command, tmp_path)
        assert trained.code == 0, trained.stderr
    first = warm.run([*command[:-1], "5"], tmp_path)
    assert "resuming from step 4" in first.stdout
    # The folder itself is what a start without --resume resumes.
    itself = train_command(toy, 1, out, "--resume", str(out), "--max_steps", "6")
    assert "resuming from step 5" in warm.run(itself, tmp_path).stdout
    shutil.rmtree(run / "checkpoint_best")
    evaluated = warm.run(["eval", "--resume", str(run), "--max_feats", "9"], tmp_path)
    replaced = "note: --max_feats 9: unlike the run, whose predictions_val.jsonl is replaced"
    assert replaced in evaluated.stdout
    assert f"its newest checkpoint, {run}/checkpoint-3" in evaluated.stdout
    assert f"passed over: {run}/checkpoint-4/state.json" in evaluated.stdout
    converted = warm.run(["convert", str(run), str(tmp_path / "a.pth")], tmp_path)
    assert f"its newest checkpoint, {run}/checkpoint-3" in converted.stdout
    assert [record["step"] for record in read_records(out / "steps.jsonl")] == [4, 5, 6]
    assert json.loads((out / "args.json").read_text())["resume"] == str(run)


def test_more_epochs_on_a_complete_run(
    toy: ToyData, undisturbed: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    """One flag and one line; a run inside its epochs is still refused."""
    out, cut = tmp_path / "out", tmp_path / "cut"
    for folder in (out, cut):
        shutil.copytree(undisturbed, folder)
    shutil.rmtree(cut / "checkpoint-6")

    def train(folder: Path, *flags: str) -> CommandResult:
        return warm.run(train_command(toy, 1, folder, *flags), tmp_path)

    ended = train(out)
    assert "nothing to train, and a larger --epochs trains on" in ended.stdout
    again = train(out, "--epochs", "3")
    assert again.code == 0 and "resuming from step 6" in again.stdout
    assert "to redo" not in again.stdout
    assert "steps: 7 to 9, 3 per epoch, 8 questions each" in again.stdout
    (note,) = [line for line in again.stdout.splitlines() if "note: --epochs" in line]
    assert "note: --epochs 2 -> 3: the learning-rate schedule spans all 3 epochs, so" in note
    steps = read_records(out / "steps.jsonl")
    before, after = f"{steps[5]['lr']:.2e}", f"{steps[6]['lr']:.2e}"
    assert f"step 7 takes {after}, where step 6 took {before}; " in note
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert json.loads((out / "args.json").read_text())["epochs"] == 3
    assert "complete at step 9 of 9" in train(out, "--epochs", "3").stdout
    fewer = train(out, "--epochs", "2")
    assert fewer.code == 2 and "--allow_change epochs" in fewer.stderr
    inside = train(cut, "--epochs", "3")
    assert inside.code == 2 and "--allow_change epochs" in inside.stderr
    other = train(out, "--epochs", "4", "--seed", "9")
    assert other.code == 2 and "--allow_change seed" in other.stderr
