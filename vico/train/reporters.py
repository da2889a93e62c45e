"""Where curves go (--report_to): TensorBoard, Weights & Biases, Trackio. On rank 0 only.

A reporter that fails is said once, and the run goes on without it.
"""

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vico.distributed import signals
from vico.errors import UserError, one_line
from vico.io import log
from vico.io.output_dir import OutputDir
from vico.train.config import REPORTERS
from vico.train.heat_map import Picture, png

PROJECT = "vico"  # where the variables WANDB_PROJECT and TRACKIO_PROJECT name no other


@dataclass(frozen=True)
class Reported:
    """What reporters must know of a run when it starts."""

    output_dir: OutputDir
    args: Mapping[str, Any]  # those of args.json
    run_id: str
    step: int  # of the checkpoint that it starts from; 0: none

    @property
    def name(self) -> str:
        """Of the run, the same after each resumption."""
        return f"{self.output_dir.path.name}-{self.run_id[:8]}"


class Reporter(Protocol):
    """One place of curves. A method may raise any exception."""

    # Whether it forgets what an earlier start logged of the steps that this one repeats. To one
    # that does not, repeated steps are not sent again.
    forgets: bool

    def curves(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: Picture, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """OUTPUT_DIR/runs, with the arguments as text and as hyperparameters."""

    forgets = True

    def __init__(self, run: Reported) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and only rank 0 needs it
        from torch.utils.tensorboard.summary import hparams

        folder = run.output_dir.tensorboard
        if folder.is_symlink():  # it would write to where the link leads
            raise UserError(
                f"{folder}: is a symbolic link, not a folder; remove it, or choose another "
                "--output_dir"
            )
        purge = run.step + 1 if run.step else None
        board: Any = SummaryWriter(str(folder), purge_step=purge)  # its file is typed as None
        self._board = board
        text = json.dumps(run.args, indent=2)
        self._board.add_text("args", f"```json\n{text}\n```", run.step)
        values = {name: _as_hyperparameter(value) for name, value in run.args.items()}
        for summary in hparams(values, {"eval/acc": 0.0}):
            self._board.file_writer.add_summary(summary)

    def curves(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """Not by add_image, which wants Pillow."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, colours = picture.shape
        image = Summary.Image(
            height=height, width=width, colorspace=colours, encoded_image_string=png(picture)
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._board.file_writer.add_summary(summary, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def _as_hyperparameter(value: Any) -> Any:
    """TensorBoard's have no lists, and no null."""
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "none" if value is None else value


class WeightsAndBiases:
    """A run of wandb, by the variables that wandb knows. Without a login it stays on this disk."""

    forgets = False

    def __init__(self, run: Reported) -> None:
        import wandb  # takes seconds

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False):
            mode = "offline"
            log.info(
                "note: --report_to wandb: nobody is logged in, so curves stay in "
                f"{run.output_dir}/wandb; wandb sync sends them later"
            )
        settings = wandb.Settings(silent=True, console="off", init_timeout=60.0)
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.run_id or None,  # so that a resumed run goes on with its curves
            resume="allow",
            mode=mode,
            dir=os.environ.get("WANDB_DIR", str(run.output_dir)),
            config=dict(run.args),
            settings=settings,
        )

    def curves(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, picture: Picture, step: int) -> None:
        if importlib.util.find_spec("PIL") is not None:  # wandb wants it, and does not bring it
            self._run.log({name: self._image(picture)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run in Trackio's data base, by the variables that Trackio knows (TRACKIO_DIR, ...)."""

    forgets = False

    def __init__(self, run: Reported) -> None:
        import trackio  # takes seconds

        self._image = trackio.Image
        with contextlib.redirect_stdout(io.StringIO()):  # a page about its dashboard
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=run.name,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                config=dict(run.args),
            )

    def curves(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, picture: Picture, step: int) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def flush(self) -> None:
        """It writes by itself."""

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


_OPEN: dict[str, Callable[[Reported], Reporter]] = dict(
    zip(REPORTERS, (TensorBoard, WeightsAndBiases, Trackio), strict=True)
)


def chosen(report_to: str) -> list[str]:
    """The reporters that a value of --report_to means. Raises UserError for one without package."""
    names = [name.strip() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in REPORTERS if importlib.util.find_spec(name) is not None]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: the package is not installed; run pip install -c "
                f"launch/constraints.txt -e '.[{name}]', or leave it out"
            )
    return list(dict.fromkeys(names))


class Reporters:
    """All reporters of a run. `last_step` is the last one that an earlier start has logged."""

    def __init__(self, names: list[str], run: Reported, last_step: int = 0) -> None:
        self._open: dict[str, Reporter] = {}
        self._last_step = last_step
        for name in names:
            with self._said(name):
                self._open[name] = _OPEN[name](run)

    def curves(self, values: Mapping[str, float], step: int, again: bool | None = None) -> None:
        """`again`: whether an earlier start logged them; by default whether it did this step."""
        is_again = step <= self._last_step if again is None else again
        self._each(lambda reporter: reporter.curves(values, step), is_again)

    def picture(self, name: str, picture: Picture, step: int, again: bool) -> None:
        self._each(lambda reporter: reporter.picture(name, picture, step), again)

    def flush(self) -> None:
        self._each(lambda reporter: reporter.flush())

    def close(self) -> None:
        self._each(lambda reporter: reporter.close())

    def _each(self, do: Callable[[Reporter], None], again: bool = False) -> None:
        for name, reporter in list(self._open.items()):
            if again and not reporter.forgets:
                continue
            with self._said(name):
                do(reporter)

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Whatever fails inside is said, and the reporter `name` gets nothing more."""
        try:
            yield
        except (UserError, signals.Stopped):
            raise
        except Exception as problem:
            reason = str(problem) or type(problem).__name__
            log.warning(one_line(f"--report_to {name}: {reason}; the run goes on without it"))
            self._open.pop(name, None)
