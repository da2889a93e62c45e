"""What a checkpoint's accuracy is made of: the same questions with one thing taken away at a time.

The model is loaded once. Videos are swapped, or left out of the prompts; adapter prompts are
switched off by closing their gates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vico.data.micro_batches import Clip, clip_of
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import Inputs
from vico.train.cognition import without_video
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import Evaluation, evaluate, score, summarize_split

# What is taken away: its name in the result, and in the table.
CONDITIONS = {
    "as_trained": "as trained",
    "video_swapped": "another video's frames",
    "without_video": "without the video",
    "without_prompts": "without adapter prompts",
    "without_both": "without both",
}


def ablate(
    engine: Engine, inputs: Inputs, config: RunConfig, world: World
) -> Mapping[str, Evaluation]:
    """{name of a condition: the evaluation of config.split under it}. A collective.

    Raises UserError, on all ranks, for a split whose videos cannot be swapped; otherwise as
    `evaluate` does.
    """
    split = config.split
    questions: Sequence[Question] = inputs.questions[split]
    with world.raise_together():
        swapped = swap_videos(questions)
    bare = without_video(inputs)

    def scored(of: Inputs, asked: Sequence[Question], name: str) -> Evaluation:
        slots = 0 if of is bare else config.max_feats
        label = f"{split} ({CONDITIONS[name]})"
        scores = score(engine, of, asked, label, config, world, num_slots=slots)
        return summarize_split(inputs, split, config, scores)

    found = {"as_trained": evaluate(engine, inputs, split, config, world)}
    found["video_swapped"] = scored(inputs, swapped, "video_swapped")
    found["without_video"] = scored(bare, questions, "without_video")
    with engine.closed_gates():
        found["without_prompts"] = scored(inputs, questions, "without_prompts")
        found["without_both"] = scored(bare, questions, "without_both")
    return found


def swap_videos(questions: Sequence[Question]) -> list[Question]:
    """Each question about a clip of the next video of its data set; of the last, the first's.

    Questions about one clip get one clip. Raises UserError for a data set with a single video.
    """
    clips: dict[str, dict[str, list[Clip]]] = {}  # data set -> video -> its clips
    for question in questions:
        of_video = clips.setdefault(question.dataset, {}).setdefault(question.video, [])
        if clip_of(question) not in of_video:
            of_video.append(clip_of(question))
    others: dict[Clip, Clip] = {}
    for name, of_set in clips.items():
        if len(of_set) == 1:
            raise UserError(
                f"{name or 'the split'}: all {len(questions)} questions are about video "
                f"'{next(iter(of_set))}', so there is no other to show; name a split with several"
            )
        videos = list(of_set.values())
        for own, other in zip(videos, [*videos[1:], videos[0]], strict=True):
            others |= {clip: other[i % len(other)] for i, clip in enumerate(own)}
    return [_about(question, others[clip_of(question)]) for question in questions]


def _about(question: Question, clip: Clip) -> Question:
    _, video, rows = clip
    return replace(question, video=video, feature_rows=rows)
