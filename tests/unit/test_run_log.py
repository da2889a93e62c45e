"""The logs of a run, as a resumed run takes them up."""

from pathlib import Path

from vico.io.atomic import write_lines
from vico.io.output_dir import OutputDir
from vico.train.run_log import RunLog, read_logs


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """And no step where the checkpoint is the newest of all."""
    output_dir = OutputDir(tmp_path)
    write_lines(output_dir.steps, [{"step": step} for step in (1, 2, 3)])
    write_lines(output_dir.epochs, [{"epoch": 0, "step": 2}])
    for step, num_dropped, num_epochs in ((3, 0, 1), (2, 1, 1), (1, 1, 0)):
        log = RunLog(output_dir, read_logs(output_dir), step)
        log.close()
        assert log.num_dropped == num_dropped
        kept = read_logs(output_dir)
        assert (kept.last_step, len(kept.epochs)) == (step, num_epochs)


def test_an_epoch_without_its_evaluation_is_logged_again(tmp_path: Path) -> None:
    output_dir = OutputDir(tmp_path)
    write_lines(output_dir.steps, [{"step": 1}, {"step": 2}])
    write_lines(output_dir.epochs, [{"epoch": 0, "step": 2}])
    RunLog(output_dir, read_logs(output_dir), 2, evaluation_due=True).close()
    kept = read_logs(output_dir)
    assert (kept.last_step, kept.epochs) == (2, [])
