"""ViCo from Python: a checkpoint that answers questions about videos, and describes them.

    import vico.api
    model = vico.api.load("runs/a")  # or load(..., encoder="clip-vit-large-patch14") for videos
    model.ask(features, "what does the dog chase", ["a ball", "a cat"]).answer

`features` is a tensor or array [frames, width] by the encoder of the training's features; with
`encoder`, it may be the path of a video instead. Errors are vico.errors.UserError, with one line.
Commands (vico.cli.main) need a process of their own: this one stays connected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.errors import UserError

if TYPE_CHECKING:  # they import torch, which is slow
    from vico.data.features import Features
    from vico.distributed.world import World
    from vico.train.asking import Answer, AskedModel


@dataclass(frozen=True)
class Model:
    """A checkpoint. Its weights are loaded at the first question or caption."""

    asked: "AskedModel"
    encoder: Path | None
    fps: Fraction | None
    opening: str | None

    def ask(self, video: Any, question: str, options: Sequence[str] = ()) -> "Answer | str":
        """The answer to a question about one video.

        Of 2 to 26 options an Answer: `answer`, `index`, `probabilities` and `scores`, those of
        `vico eval`. Without options a generated text, which is outside the method. `video`:
        features [frames, width], or a path. Raises UserError.
        """
        from vico.cli.ask import one_question
        from vico.generation.settings import GenerationSettings

        features, name = self._features(video)
        asked = one_question(question, options, name)
        if options:
            (answer,) = self.asked.ask([asked], features)
            return answer
        (generated,) = self.asked.answer_freely([asked], features, GenerationSettings())
        return generated.text

    def caption(self, video: Any, **settings: Any) -> str:
        """A generated caption of one video. `settings`: of GenerationSettings. Raises UserError."""
        from vico.generation.settings import GenerationSettings

        features, name = self._features(video)
        chosen = GenerationSettings(**settings)
        (generated,) = self.asked.caption([(features, name)], chosen, self._opening)
        return generated.text

    @cached_property
    def _opening(self) -> tuple[int, ...]:
        from vico.train.captioning import opening_of

        opening, note = opening_of(self.asked, self.opening)
        self.asked.world.print_rank0(note)
        return opening

    def _features(self, video: Any) -> tuple["Features", str]:
        """(the features of one video, its id there)."""
        import torch

        from vico.cli.asked import encoded
        from vico.data.features import FeaturesInMemory

        if isinstance(video, str | Path):
            if self.encoder is None:
                raise UserError(
                    f"{video}: a video needs an encoder: load(..., encoder=FOLDER); or give its "
                    "features, a tensor [frames, width]"
                )
            return encoded(self.asked, Path(video), self.encoder, self.fps), str(video)
        return FeaturesInMemory({"video": torch.as_tensor(video)}, "features"), "video"


def load(
    checkpoint: str | Path,
    *,
    encoder: str | Path | None = None,
    fps: float | Fraction | None = None,
    opening: str | None = None,
    world: "World | None" = None,
    **settings: Any,
) -> Model:
    """The checkpoint at a path: its folder, that of a run (its best), an export, or a .pth file.

    `settings` win over the checkpoint's, as the flags of `vico ask` do: precision="fp32". `encoder`
    and `fps` are for videos given by path; `opening` as of `vico caption`. `world`: of a program
    that has connected its ranks; by default this process alone. Raises UserError.
    """
    from vico.cli.asked import open_model
    from vico.cli.flags import CommandLine
    from vico.train.settings import settings_from

    given = {"resume": str(checkpoint), **{k: _plain(v) for k, v in settings.items()}}
    line = CommandLine(settings_from(given, "vico.api.load"), (), False)
    folder = None if encoder is None else Path(encoder)
    rate = None if fps is None else Fraction(fps).limit_denominator(10**6)
    return Model(open_model(line, world or _alone()), folder, rate, opening)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@cache
def _alone() -> "World":
    """DeepSpeed connects once per process."""
    from vico.distributed.world import connect

    return connect()
