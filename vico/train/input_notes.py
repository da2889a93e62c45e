"""What is said of a run's files before it starts: counts, and whatever is suspicious."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from vico.data.datasets import count_equal_options, find_dataset
from vico.data.length_stats import Lengths, QuestionLengths
from vico.data.mixture import epoch_count
from vico.data.readers import subtitles
from vico.data.types import Question, Questions
from vico.train.config import RunConfig
from vico.train.preflight import Part


def annotation_notes(
    config: RunConfig, dataset: str, questions: Mapping[str, Sequence[Question]]
) -> list[str]:
    """What the files of `questions` (by split, as they were read) hold and is not used."""
    notes = []
    for split, of_split in questions.items():
        if not isinstance(of_split, Questions):
            continue
        label = config.label(dataset, split)
        if num_blank := of_split.num_blank_rows:
            notes.append(f"warning: {label}: {num_blank} rows of blanks are passed over")
        notes += [f"{label}: {note}" for note in of_split.notes]
    folder = config.folder_of(dataset)
    if find_dataset(dataset, folder).has_dialogue and not config.sub:
        for path in subtitles.found_in(folder):
            notes.append(f"{path}: not used; --sub puts the subtitles into the prompts")
    return notes


def split_notes(
    config: RunConfig,
    label: str,
    questions: Sequence[Question],
    dropped: Sequence[Question],
    num_past_end: int,
    measured: QuestionLengths,
) -> list[str]:
    """How many questions of a split are used, and what is special about them."""
    problems = problem_notes(config, label, questions, num_past_end, measured)
    return [usage_note(label, questions, dropped), *problems]


def mixture_notes(config: RunConfig, used: Mapping[Part, Sequence[Question]]) -> list[str]:
    """How many questions of each data set an epoch holds, where these are not all of the only one.

    Raises UserError for a data set of which it would hold none.
    """
    counts = []
    for choice in config.datasets:
        total = len(used[choice.name, "train"])
        counts.append(f"{epoch_count(choice, total)} of {total} {choice.name}")
    if config.dataset == config.dataset_names[0]:
        return []
    return [f"train: an epoch holds {', '.join(counts)} questions"]


def usage_note(label: str, questions: Sequence[Question], dropped: Sequence[Question]) -> str:
    """How many questions are used, and how many are dropped."""
    total = len(questions) + len(dropped)
    if not dropped:
        return f"{label}: {total} questions"
    num_videos = len({q.video for q in dropped})
    return (
        f"{label}: {len(questions)} used / {total} total questions: {len(dropped)} dropped, "
        f"whose {num_videos} videos have no features (--missing_features drop)"
    )


def problem_notes(
    config: RunConfig,
    label: str,
    questions: Sequence[Question],
    num_past_end: int,
    measured: QuestionLengths,
) -> list[str]:
    """Notes about the questions used, for those counts that are not zero."""
    num_shortened = measured.lengths.above(config.max_seq_len)
    num_equal = count_equal_options(questions)
    num_empty = sum(_has_empty_option(q) for q in questions)
    shortened = (
        f"shortened to fit --max_seq_len {config.max_seq_len} "
        f"(dialogue first, then options; answers never): they lose {measured.cuts.describe()}"
    )
    past_end = "about a clip that lies past the end of its video's features: zeros in its slots"
    counts = (
        (num_shortened, "", shortened),
        (num_past_end, "", past_end),
        (num_equal, "warning: ", "with two equal options"),
        (num_empty, "warning: ", "with an empty option"),
    )
    return [
        f"{prefix}{label}: {count} of {len(questions)} questions {what}"
        for count, prefix, what in counts
        if count
    ]


def _has_empty_option(question: Question) -> bool:
    return not all(option.strip() for option in question.options)


def caption_notes(config: RunConfig, label: str, lengths: Lengths) -> list[str]:
    """How many captions are cut to --max_cap_len."""
    num_cut, total = lengths.above(config.max_cap_len), lengths.num_sequences
    if not num_cut:
        return []
    return [
        f"{label}: {num_cut} of {total} captions are longer than --max_cap_len "
        f"{config.max_cap_len} when whole, and are cut: "
        f"they lose {lengths.tokens_above(config.max_cap_len)} of the {lengths.num_tokens} tokens "
        "of all captions"
    ]


def shared_video_notes(config: RunConfig, splits: Mapping[Part, Sequence[Question]]) -> list[str]:
    """Warnings of videos in two splits: a score on one split may then be learned from the other.

    Of two data sets too: one may be a selection of the other.
    """
    videos = {part: _videos_of(questions) for part, questions in splits.items()}
    notes = []
    for first, second in combinations(videos, 2):
        shared = videos[first] & videos[second]
        if shared and first[1] != second[1]:
            total, count = len(splits[second]), sum(q.video in shared for q in splits[second])
            label = config.label(*second)
            notes.append(
                f"warning: {len(shared)} videos are in {config.label(*first)} and in {label}: "
                f"{count} of {total} questions of {label} are about them"
            )
    return notes


def _videos_of(questions: Sequence[Question]) -> set[str]:
    return {q.video for q in questions}
