"""The texts and the table of cognition.sh.

Usage: python cognition.py texts FOLDER      kept.txt, and the texts that are measured
       python cognition.py table RUNS FOLDER
`table` reads ablate.json, texts.json, steps.jsonl and row.json of each run, and prints the
table as Markdown and the record, which it writes to a new file in FOLDER if a row is new.
"""

import fractions
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from launch.examples.row_facts import facts_of, write_or_print
from vico.io.atomic import make_folder, write_text
from vico.train.run_log import read_records

# Of the texts of the manual, in characters. Half of its pages are trained on, the others measured.
KEPT, MANUAL = 100_000, 40_000
# The texts that are measured -> what the table calls them: one like the text that is kept, two of
# other kinds.
TEXTS = {"manual": "manual", "code": "Python code", "licence": "licence"}
# A run's name -> what the table calls it.
ROWS = {
    "trained": "trained",
    "keep-0.3": "`--keep 0.3`",
    "keep-1": "`--keep` (1, the default)",
    "keep-10": "`--keep 10`",
    "10-layers": "adapter in 10 layers, not in all 30",
    "no-captions": "`--cap 0`: no captions",
}
COLUMNS = ("", "accuracy", "other video", "no video", *TEXTS.values(), "same top token")


def write_texts(folder: Path) -> None:
    """kept.txt and manual.txt hold different pages, the first characters of their halves."""
    make_folder(folder)
    pages = [topics[name] for name in sorted(topics)]
    (licence,) = (
        file.read_text()
        for file in importlib.metadata.files("transformers") or ()
        if file.name == "LICENSE"
    )
    texts = {
        "kept": "\n".join(pages[::2])[:KEPT],
        "manual": "\n".join(pages[1::2])[:MANUAL],
        "code": inspect.getsource(fractions),
        "licence": licence,
    }
    for name, text in texts.items():
        write_text(folder / f"{name}.txt", text)


def read_rows(runs: Path) -> dict[str, dict[str, Any]]:
    """{"frozen" or a run's name: what was measured}; shares are between 0 and 1."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        asked, texts = (
            json.loads((runs / name / f"{part}.json").read_text(encoding="utf-8"))
            for part in ("ablate", "texts")
        )
        steps = read_records(runs / name / "steps.jsonl")
        accuracies = {key: row["acc"] for key, row in asked["conditions"].items()}
        if not rows:
            rows["frozen"] = {  # it knows no video: its accuracy is by text alone
                "without_video": accuracies["without_both"],
                "texts": _of_texts(texts, "frozen"),
                "questions": asked["n"],
            }
        rows[name] = {
            "accuracy": accuracies["as_trained"],
            "video_swapped": accuracies["video_swapped"],
            "without_video": accuracies["without_video"],
            "texts": _of_texts(texts, "adapted"),
            "steps": len(steps),
            "training_minutes": sum(step["step_seconds"] for step in steps) / 60,
            **facts_of(runs / name),
        }
    return rows


def _of_texts(measured: Mapping[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """{a text's name: what `model` ("frozen" or "adapted") makes of it}."""
    found = {}
    for path, part in measured["files"].items():
        is_frozen = model == "frozen"
        found[Path(path).stem] = {
            "tokens": part["tokens"],
            "perplexity": part[f"perplexity_{model}"],
            "kl_per_token": 0.0 if is_frozen else part["kl_per_token"],
            "top1_agreement": 1.0 if is_frozen else part["top1_agreement"],
        }
    return found


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table. A text has perplexity and (KL per token). What a row does not have is a dash."""
    titles = {"frozen": "frozen LLaMA", **ROWS}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = [titles[name]]
        for key in ("accuracy", "video_swapped", "without_video"):
            cells.append(f"{row[key]:.1%}".replace("%", " %") if key in row else "-")
        for text in TEXTS:
            of_text = row["texts"][text]
            cells.append(f"{of_text['perplexity']:.2f} ({of_text['kl_per_token']:.4f})")
        cells.append(f"{row['texts']['manual']['top1_agreement']:.1%}".replace("%", " %"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    command, *paths = arguments
    if command == "texts":
        write_texts(Path(paths[0]))
        return 0
    runs, folder = map(Path, paths)
    rows = read_rows(runs)
    print(markdown(rows), file=sys.stderr)
    cases = [{"name": name, **row} for name, row in rows.items()]
    config = {"rows": list(rows), "steps": [row["steps"] for row in cases[1:]]}
    write_or_print("cognition", config, cases, cases[1:], folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
