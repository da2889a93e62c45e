"""The lines of `vico check`'s report: summaries, sample prompts, overlaps with other data sets."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from vico.data.datasets import accuracy_groups, find_dataset, names_in, read_questions
from vico.data.features import Features, Scan
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.errors import UserError, show
from vico.io.paths import is_file
from vico.train.config import RunConfig
from vico.train.preflight import BackboneFiles, Part

SPLITS = ("train", "val", "test")
SAMPLES_PER_TASK = 2
# Tokens shown before the first target, and of the targets.
NUM_CONTEXT_TOKENS, NUM_TARGET_TOKENS = 24, 24
NUM_EXAMPLES = 3


# Summaries


def describe_backbone(backbone: BackboneFiles) -> str:
    weights, tokenizer = backbone.weights, backbone.tokenizer
    config = weights.config
    return (
        f"model: {weights.folder}: {config.n_layers} layers ({backbone.num_adapted} adapted), "
        f"width {config.dim}, {config.n_heads} heads; "
        f"{backbone.tokenizer_path.name} of {tokenizer.vocab_size} pieces, "
        f"begin {show(tokenizer.name_of(tokenizer.bos))}, "
        f"end {show(tokenizer.name_of(tokenizer.eos))}, "
        f"newline {show(tokenizer.name_of(tokenizer.newline))}"
    )


def describe_features(features: Features, used: Set[str]) -> str:
    num_used = sum(video in features for video in used)
    return (
        f"features: {features.path}: {len(features)} videos, of which the questions use {num_used}"
    )


def describe_split(
    config: RunConfig, dataset: str, split: str, questions: Sequence[Question]
) -> str:
    entry = find_dataset(dataset, config.folder_of(dataset))
    groups = accuracy_groups(entry, [q.type for q in questions])
    counts = []
    for group, types in groups.items():
        counts.append(f"{group} {sum(q.type in types for q in questions)}")
    num_videos = len({q.video for q in questions})
    answers = "" if questions[0].answer is not None else ", without answers"
    return (
        f"{config.label(dataset, split)}: {len(questions)} questions about {num_videos} videos"
        f"{answers}; {', '.join(counts)}"
    )


# Warnings


def scan_warnings(label: str, scan: Scan, used: Set[str], width: int) -> Iterator[str]:
    """Of suspicious videos. Those in `used`, the questions' videos, give errors elsewhere."""
    unused_malformed = [video for video in scan.malformed if video not in used]
    unused_not_finite = [video for video in scan.not_finite if video not in used]
    findings = (
        (scan.with_zeros, "hold a frame that is all zeros, of an extraction that failed"),
        (
            unused_malformed,
            f"are no floating-point tensor [frames >= 1, {width}], and no question uses them",
        ),
        (unused_not_finite, "hold NaN or infinite values, and no question uses them"),
    )
    for videos, what in findings:
        if videos:
            examples = ", ".join(map(show, videos[:NUM_EXAMPLES]))
            yield f"warning: {label}: {len(videos)} videos {what}, e.g. {examples}"


def repeated_question_warnings(label: str, questions: Sequence[Question]) -> Iterator[str]:
    distinct = Counter((q.video, q.feature_rows, q.question, q.options) for q in questions)
    num_repeated = len(questions) - len(distinct)
    if num_repeated:
        yield (
            f"warning: {label}: {num_repeated} questions are repeated, with the same options, "
            "under another id"
        )


@dataclass(frozen=True)
class _SplitContent:
    """What can be shared with a split of another data set."""

    videos: Set[str]
    questions: Set[tuple[str, str]]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> "_SplitContent":
        return cls({q.video for q in questions}, {_question_key(q) for q in questions})


def _question_key(q: Question) -> tuple[str, str]:
    """Video and text, without differences of case, blanks and question marks."""
    return q.video, " ".join(q.question.lower().rstrip("?").split())


def shared_dataset_warnings(
    config: RunConfig, questions: Mapping[Part, Sequence[Question]]
) -> Iterator[str]:
    """Of videos and questions that another data set beside those of the run has too.

    Those of one's own are compared as well. IntentQA's questions are a selection of NExT-QA's.
    """
    own = {config.label(*part): _SplitContent.of(q) for part, q in questions.items()}
    run = ", ".join(config.dataset_names)
    for name in names_in(config.data_path):
        folder = config.data_path / name
        if name in config.dataset_names:
            continue
        for split in SPLITS:
            try:
                path = find_dataset(name, folder).annotation_file(folder, split)
                if not is_file(path):
                    continue
                others = read_questions(name, folder, split)
            except UserError as error:
                yield f"{name}, {split}, is not compared with {run}: {error}"
                continue
            if overlaps := _overlaps(own, others):
                yield (
                    f"warning: {name}/{path.name}: of {len(others)} questions, shares "
                    f"{', '.join(overlaps)} of {run}: "
                    "trained on the one, its accuracy on the other says nothing"
                )


def _overlaps(own: Mapping[str, _SplitContent], others: Sequence[Question]) -> list[str]:
    """What each own split shares with `others`, for the splits that share a video."""
    other_videos = {q.video for q in others}
    overlaps = []
    for split, content in own.items():
        num_videos = len(other_videos & content.videos)
        num_questions = sum(_question_key(q) in content.questions for q in others)
        if num_videos:
            overlaps.append(f"{num_videos} videos and {num_questions} questions with {split}")
    return overlaps


# Samples


def sample_lines(
    config: RunConfig,
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    tokenizer: Tokenizer,
    prompts: Prompts,
) -> Iterator[str]:
    """Some prompts of each task, as text decoded from their tokens: context and targets."""
    split = "train" if "train" in questions else next(iter(questions))
    of_split = questions[split]
    distance = max(1, -(-len(of_split) // SAMPLES_PER_TASK))
    for task in config.tasks if split == "train" else ("vqa",):
        for q in of_split[::distance]:
            if task == "keep":
                continue
            if task == "cap" and q.video not in captions:
                continue
            try:
                sequence = _make_sequence(task, q, captions, prompts)
            except UserError:  # has been reported
                continue
            yield f"look: {q.place} {task}: {_describe_sequence(sequence, tokenizer)}"


def _make_sequence(
    task: str, question: Question, captions: Mapping[str, str], prompts: Prompts
) -> TokenSequence:
    """Raises UserError for a question that cannot be shortened enough."""
    fitted = prompts.fit(question, "vqa" if task == "cap" else task)
    if task == "cap":
        return prompts.caption(captions[question.video])
    return prompts.question_sequence(task, fitted, question.answer or 0)


def _describe_sequence(sequence: TokenSequence, tokenizer: Tokenizer) -> str:
    tokens, targets = sequence.tokens, sequence.targets
    context = tokens[max(0, targets.start - NUM_CONTEXT_TOKENS) : targets.start]
    context_text = tokenizer.decode([token for token in context if token != VIDEO_SLOT])
    target_tokens = [tokens[position] for position in targets]
    if target_tokens and target_tokens[0] == VIDEO_SLOT:
        shown = f"the {len(targets)} frames of the video"
    else:
        eos = tokenizer.eos
        head = [token for token in target_tokens[:NUM_TARGET_TOKENS] if token != eos]
        ellipsis = " ..." if len(targets) > NUM_TARGET_TOKENS else ""
        end = " and EOS" if target_tokens and target_tokens[-1] == eos else ", cut"
        shown = f"{tokenizer.decode(head)!r}{ellipsis}{end}"
    return f"...{context_text!r} -> {shown} ({len(targets)} targets of {len(tokens)} tokens)"
