"""How many training questions `vico plan` counts on, and how long they are. No torch."""

from pathlib import Path
from typing import NamedTuple

from vico.data.datasets import DATASETS, find_dataset, read_questions
from vico.data.mixture import epoch_count, parse_datasets
from vico.data.prompts import Prompts
from vico.data.readers import schema
from vico.data.tokenizer import Tokenizer, find_tokenizer
from vico.errors import nearest, show
from vico.io.paths import exists
from vico.model.weights import folders

ASSUMED = "nextqa"  # where lengths are not known
NUM_SLOTS = 10  # of a video, the default of --max_feats
NUM_MEASURED = 512  # questions whose lengths stand for all: a second


class Epoch(NamedTuple):
    """What a run trains on per epoch, and what a user should know of where it is from."""

    mean_tokens: float  # of a question's sequence
    num_questions: int
    notes: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a run's files are, and how long a question may be."""

    data_path: Path
    llama_folder: Path
    model_folder: Path
    max_seq_len: int


def of_datasets(text: str, place: Place) -> Epoch:
    """Of the data sets that --dataset names. Raises UserError for a file with a fault."""
    num_tokens, num_questions, notes = 0.0, 0, list[str]()
    for choice in parse_datasets(text):
        epoch = _of_dataset(choice.name, place)
        count = epoch_count(choice, epoch.num_questions)
        num_questions += count
        num_tokens += count * epoch.mean_tokens
        notes += epoch.notes
    return Epoch(num_tokens / num_questions, num_questions, tuple(notes))


def _of_dataset(name: str, place: Place) -> Epoch:
    known = DATASETS.get(name, DATASETS[ASSUMED])
    folder = place.data_path / name
    if name in DATASETS:
        return Epoch(known.mean_question_tokens, known.num_train_questions)
    if not schema.is_dataset(folder) or not exists(schema.annotation_file(folder, "train")):
        note = (
            f"--dataset {name}: {folder} holds no training questions, so the numbers are those of "
            f"{ASSUMED}: --data_path names the folder of data sets{nearest(name.lower(), DATASETS)}"
        )
        return Epoch(known.mean_question_tokens, known.num_train_questions, (note,))
    questions = read_questions(name, folder, "train")
    total = len(questions)
    shared = folders.tokenizer_folder(place.llama_folder, place.model_folder)
    tokenizer_path = find_tokenizer(shared, place.model_folder)
    if not exists(tokenizer_path):
        note = (
            f"--dataset {name}: {total} training questions; {tokenizer_path}: no such file, so the "
            f"mean length is that of {ASSUMED}, {known.mean_question_tokens} tokens"
        )
        return Epoch(known.mean_question_tokens, total, (note,))
    dialogue = find_dataset(name, folder).has_dialogue
    prompts = Prompts(
        Tokenizer(tokenizer_path),
        NUM_SLOTS,
        place.max_seq_len,
        place.max_seq_len,
        dialogue=dialogue,
    )
    measured = questions[:: -(-total // NUM_MEASURED)]
    lengths = [min(place.max_seq_len, prompts.length(q, "vqa")) for q in measured]
    mean = sum(lengths) / len(lengths)
    note = (
        f"--dataset {name}: {total} training questions, {mean:.0f} tokens on average of "
        f"{len(measured)} of them by {show(str(tokenizer_path))[1:-1]}"
    )
    return Epoch(mean, total, (note,))
