"""`vico submission`: predictions as the file that a benchmark's server takes.

The layouts follow public code that writes or reads them:
- nextqa: {"VIDEO_QID": {"prediction": 2, "answer": 0}}, which eval_mc.py of
  github.com/doc-doc/NExT-QA reads. "answer" is left out where the questions have none.
- tvqa: {"QID": 2}, the prediction_test_public.json (or prediction_val.json) that the CodaLab server
  takes in a zip with a meta.json; HawkEye's and MERLOT Reserve's code write it so.
- star: {"Interaction": [{"question_id": "Interaction_T1_1", "answer": 2}], "Sequence": ...}, as
  Flipped-VQA's code writes it for EvalAI challenge 1325. The answer is a choice_id.
All count options from 0. No server was asked: it may have changed since.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vico.cli.parser import OneLineParser, path_argument
from vico.data.datasets import read_questions
from vico.errors import UserError, fail, show
from vico.io import log
from vico.io.atomic import require_writable, write_json
from vico.io.paths import exists
from vico.train.predictions import read_predictions

FORMATS = ("nextqa", "tvqa", "star")
STAR_TYPES = ("Interaction", "Sequence", "Prediction", "Feasibility")
Record = Mapping[str, Any]

DESCRIPTION = (
    "Write the predictions of an evaluation (predictions_SPLIT.jsonl) as the file that a "
    "benchmark's server takes. Every question must be there exactly once."
)


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="vico submission", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("predictions", metavar="PREDICTIONS", type=path_argument)
    parser.add_argument("--format", choices=FORMATS, required=True, help="whose server it is")
    parser.add_argument(
        "--output", metavar="FILE", type=path_argument, required=True, help="must not exist yet"
    )
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        type=path_argument,
        help="folder of the data: compares the predictions with the questions of DATA_PATH/DATASET",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="whose predictions to take, of an evaluation on several (default: FORMAT)",
    )
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="of --data_path (default: test)"
    )
    parser.add_argument(
        "--partial", action="store_true", help="write the file although questions are missing"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    if exists(flags.output):
        raise UserError(f"{flags.output}: already exists; name another file, or remove it")
    require_writable(flags.output.parent, "the folder of --output")
    dataset = flags.dataset or flags.format
    predictions = read_predictions(flags.predictions)
    records = of_dataset(predictions, dataset, flags.predictions)
    named = None
    if flags.data_path is not None:
        questions = read_questions(dataset, flags.data_path / dataset, flags.split)
        named = [_key(flags.format, {"video": q.video, "qid": q.qid}) for q in questions]
    used, total = _count(flags.format, records, named, flags.predictions, flags.partial)
    write_json(flags.output, submission(flags.format, records, flags.predictions))
    compared = "" if named is not None else "; --data_path also counts questions behind the last"
    if len(records) < len(predictions):
        log.info(f"{flags.predictions}: {len(records)} of {len(predictions)} are of {dataset}")
    log.info(f"{flags.output}: {used} used of {total} total questions{compared}")
    return 0


def of_dataset(records: Sequence[Record], name: str, path: Path) -> list[Record]:
    """Those of one data set, where several were evaluated together. Raises UserError for none."""
    names = list(dict.fromkeys(str(r["dataset"]) for r in records if "dataset" in r))
    if not names:
        return list(records)
    if name not in names:
        fail(f"{path}: holds predictions on {', '.join(map(show, names))}; name one by --dataset")
    return [record for record in records if record.get("dataset") == name]


def _count(
    format: str,
    records: Sequence[Record],
    named: Sequence[str] | None,
    path: Path,
    partial: bool,
) -> tuple[int, int]:
    """(predictions, questions that there are). Raises UserError unless each question has one.

    `named`: the keys of all questions, if they are known; else gaps in the file's numbers count.
    """
    keys = [_key(format, record) for record in records]
    used = set(keys)
    if len(used) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        fail(f"{path}: question {show(twice)} appears twice; evaluate again, or keep one line")
    if named is not None:
        missing = [key for key in named if key not in used]
        foreign = used - {*named}
        if foreign:
            fail(
                f"{path}: question {show(min(foreign))} is none of the {len(named)} of the data; "
                "name the --split and --data_path that were evaluated"
            )
    else:
        indices = {record["index"] for record in records}
        missing = [f"number {i}" for i in range(max(indices) + 1) if i not in indices]
    total = len(keys) + len(missing)
    if missing and not partial:
        fail(
            f"{path}: {len(keys)} used of {total} total questions, {show(missing[0])} is the first "
            "that is missing; evaluate all, or write what there is by --partial"
        )
    return len(keys), total


def _key(format: str, record: Record) -> str:
    """What the server calls a question."""
    qid = str(record["qid"])
    return f"{record['video']}_{qid}" if format == "nextqa" else qid


def submission(format: str, records: Sequence[Record], path: Path) -> dict[str, Any]:
    """The content of the file that the server takes. Raises UserError."""
    if format == "tvqa":
        return {_key(format, record): record["prediction"] for record in records}
    if format == "nextqa":
        return {_key(format, record): _next_qa(record) for record in records}
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in STAR_TYPES}
    for record in records:
        group = record["qid"].split("_")[0]
        if group not in groups:
            fail(
                f"{path}: question {show(record['qid'])} is none of STAR's: its id begins with "
                f"none of {', '.join(STAR_TYPES)}; name another --format"
            )
        groups[group].append({"question_id": record["qid"], "answer": record["prediction"]})
    return groups


def _next_qa(record: Record) -> dict[str, int]:
    known = {} if record.get("answer") is None else {"answer": record["answer"]}
    return {"prediction": record["prediction"], **known}


if __name__ == "__main__":  # `python -m vico.cli.submission`, or this file
    from vico.cli.main import console

    console(command="submission")
