"""What `vico check` shows for the eye, and how it compares a data set with the others on the disk."""

from collections.abc import Iterator, Mapping, Sequence

from vico.data.datasets import DATASETS, read_questions
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.errors import UserError
from vico.train.config import RunConfig

ROWS = 2  # of each task
TAIL, HEAD = 24, 24  # tokens shown before the first target, and of the targets


def samples(
    config: RunConfig,
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    tokenizer: Tokenizer,
    prompts: Prompts,
) -> Iterator[str]:
    """Of some rows, what stands before the targets and the targets, as text made from the tokens."""
    split = "train" if "train" in questions else next(iter(questions))
    for task in config.tasks if split == "train" else ("vqa",):
        asked = questions[split]
        for q in asked[:: max(1, -(-len(asked) // ROWS))]:
            if task == "cap" and q.video not in captions:
                continue
            try:
                fitted = prompts.fit(q, "vqa" if task == "cap" else task)
                sequence = (
                    prompts.caption(captions[q.video])
                    if task == "cap"
                    else prompts.question_sequence(task, fitted, q.answer or 0)
                )
            except UserError:  # which has been said
                continue
            yield f"look: {q.place} {task}: {_shown(sequence, tokenizer)}"


def _shown(sequence: TokenSequence, tokenizer: Tokenizer) -> str:
    tokens, targets = sequence.tokens, sequence.targets
    before = [t for t in tokens[max(0, targets.start - TAIL) : targets.start] if t != VIDEO_SLOT]
    wanted = [tokens[t] for t in targets]
    if wanted and wanted[0] == VIDEO_SLOT:
        shown = f"the {len(wanted)} frames of the video"
    else:
        ends = bool(wanted) and wanted[-1] == tokenizer.eos
        text = tokenizer.decode([t for t in wanted[:HEAD] if t != tokenizer.eos])
        shown = f"{text!r}{' ...' if len(wanted) > HEAD else ''}{' and EOS' if ends else ', cut'}"
    return f"...{tokenizer.decode(before)!r} -> {shown} ({len(wanted)} targets of {len(tokens)} tokens)"


def shared_with_other_sets(
    config: RunConfig, questions: Mapping[str, Sequence[Question]]
) -> Iterator[str]:
    """Warnings of videos and questions that another data set has too: IntentQA's questions are NExT-QA's."""
    ours = {
        split: ({q.video for q in asked}, {_identity(q) for q in asked})
        for split, asked in questions.items()
    }
    for name in DATASETS:
        folder = config.data_path / name
        for split in ("train", "val", "test"):
            path = DATASETS[name].annotation_file(folder, split)
            if name == config.dataset or not path.is_file():
                continue
            try:
                theirs = read_questions(name, folder, split)
            except UserError as error:
                yield f"{name}/{path.name} is not compared with {config.dataset}: {error}"
                continue
            asked = {
                own: sum(_identity(q) in identities for q in theirs)
                for own, (_, identities) in ours.items()
            }
            filmed = {
                own: len({q.video for q in theirs} & videos) for own, (videos, _) in ours.items()
            }
            if any(filmed.values()):
                where = ", ".join(
                    f"{filmed[own]} videos and {asked[own]} questions with {own}"
                    for own in ours
                    if filmed[own]
                )
                yield (
                    f"warning: {name}/{path.name}: of {len(theirs)} questions, shares {where} of {config.dataset}: "
                    "trained on the one, its accuracy on the other says nothing"
                )


def _identity(q: Question) -> tuple[str, str]:
    return q.video, " ".join(q.question.lower().rstrip("?").split())
