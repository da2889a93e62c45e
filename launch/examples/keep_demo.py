"""The data and the table of keep_demo.sh.

Usage: python keep_demo.py make FOLDER                      the demo, kept.txt and other.txt
       python keep_demo.py table FOLDER "WEIGHTS" "SEEDS"   a row without, and one per weight
`table` reads eval.json, texts.json and row.json of each run, and prints the table as Markdown
and the record, which it writes to a new file in FOLDER if a row is new.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from launch.examples.row_facts import facts_of, write_or_print
from vico.cli.demo import make_toy_dataset
from vico.cli.demo_llama import NUM_STEPS
from vico.io.atomic import make_folder, write_text

SPLITS = {"train": 240, "val": 300, "test": 60}  # 1,500 questions of val: an error of 0.6 points
TEXTS = {"kept": "train", "other": "val"}  # a text's name -> the videos that it tells of


def make(folder: Path, steps: int = NUM_STEPS) -> None:
    """A text is the captions of a split's videos, each with a question. `steps`: of the LLaMA's."""
    make_toy_dataset(folder / "demo", steps=steps, splits=SPLITS)
    data = folder / "demo" / "data" / "nextqa"
    (captions,) = data.glob("*.json")
    by_video = json.loads(captions.read_text(encoding="utf-8"))
    make_folder(folder / "texts")
    for name, split in TEXTS.items():
        with (data / f"{split}.csv").open(encoding="utf-8") as file:
            questions = {row["video"]: row["question"] for row in csv.DictReader(file)}
        lines = [f"{by_video[video]} {question}?\n" for video, question in questions.items()]
        write_text(folder / "texts" / f"{name}.txt", "".join(lines))


def read_runs(folder: Path, name: str, seeds: Sequence[str]) -> dict[str, Any]:
    """{"accuracy": [one per seed], "kl_kept", "kl_other", "runs"}: of the runs of this name."""
    row: dict[str, Any] = {"name": name, "accuracy": [], "kl_kept": [], "kl_other": [], "runs": []}
    for seed in seeds:
        run = folder / "runs" / f"{name}-{seed}"
        scored, texts = (
            json.loads((run / f"{part}.json").read_text(encoding="utf-8"))
            for part in ("eval", "texts")
        )
        row["accuracy"].append(scored["acc"])
        row["runs"].append({"seed": seed, **facts_of(run)})
        for path, part in texts["files"].items():
            row[f"kl_{Path(path).stem}"].append(part["kl_per_token"])
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, with the least and the largest; differences to the first row."""
    lines = [
        "| | accuracy | difference, points | KL, kept text | KL, other text |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        differences = [a - b for a, b in zip(row["accuracy"], rows[0]["accuracy"], strict=True)]
        cells = [row["name"], _spread([100 * acc for acc in row["accuracy"]], ".1f")]
        is_first = row is rows[0]
        cells.append("-" if is_first else _spread([100 * value for value in differences], "+.1f"))
        for name in TEXTS:
            divergences = row[f"kl_{name}"]
            ratio = mean(rows[0][f"kl_{name}"]) / mean(divergences)
            lower = "" if is_first else f", {ratio:.1f} times lower"
            cells.append(_spread(divergences, ".4f") + lower)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the least and the largest of several."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(arguments: list[str]) -> int:
    command, folder, *words = arguments
    if command == "make":
        make(Path(folder))
        return 0
    weights, seeds = (word.split() for word in words)
    names = ["without", *(f"keep-{weight}" for weight in weights)]
    rows = [read_runs(Path(folder), name, seeds) for name in names]
    print(markdown(rows), file=sys.stderr)
    config = {"weights": weights, "seeds": seeds}
    facts = [run for row in rows for run in row["runs"]]
    write_or_print("keep_demo", config, rows, facts, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
