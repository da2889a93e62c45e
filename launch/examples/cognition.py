"""The texts and the table of cognition.sh.

Usage: python cognition.py texts FOLDER      kept.txt and measured.txt, of Python's own manual
       python cognition.py table RUNS FOLDER
`table` reads ablate.json, cognition.json and steps.jsonl of each run, prints the table as Markdown,
and writes the record to a new file in FOLDER.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.report.record import new_record, write_record
from vico.io.atomic import make_folder, write_text
from vico.train.run_log import read_records

# Of each text, in characters. Half of the manual's pages are trained on, the others are measured.
KEPT, MEASURED = 100_000, 40_000
# A run's name -> what the table calls it.
ROWS = {
    "trained": "trained",
    "keep-0.3": "`--keep 0.3`",
    "keep-1": "`--keep` (1, the default)",
    "keep-10": "`--keep 10`",
    "10-layers": "adapter in 10 layers, not in all 30",
    "no-captions": "`--cap 0`: no captions",
}
COLUMNS = (
    "",
    "accuracy",
    "other video",
    "no video",
    "perplexity",
    "KL per token",
    "same top token",
)


def write_texts(folder: Path) -> None:
    """kept.txt and measured.txt hold different pages, the first characters of their halves."""
    make_folder(folder)
    pages = [topics[name] for name in sorted(topics)]
    for name, half, size in (("kept", pages[::2], KEPT), ("measured", pages[1::2], MEASURED)):
        write_text(folder / f"{name}.txt", "\n".join(half)[:size])


def read_rows(runs: Path) -> dict[str, dict[str, Any]]:
    """{"frozen" or a run's name: what was measured}; shares are between 0 and 1."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        asked, texts = (
            json.loads((runs / name / f"{part}.json").read_text(encoding="utf-8"))
            for part in ("ablate", "cognition")
        )
        steps = read_records(runs / name / "steps.jsonl")
        accuracies = {key: row["acc"] for key, row in asked["conditions"].items()}
        if not rows:
            rows["frozen"] = {
                "accuracy": accuracies["without_both"],
                "without_video": accuracies["without_both"],
                "perplexity": texts["perplexity_frozen"],
                "kl_per_token": 0.0,
                "top1_agreement": 1.0,
                "questions": asked["n"],
                "tokens": texts["tokens"],
            }
        rows[name] = {
            "accuracy": accuracies["as_trained"],
            "video_swapped": accuracies["video_swapped"],
            "without_video": accuracies["without_video"],
            "perplexity": texts["perplexity_adapted"],
            "kl_per_token": texts["kl_per_token"],
            "top1_agreement": texts["top1_agreement"],
            "steps": len(steps),
            "training_minutes": sum(step["step_seconds"] for step in steps) / 60,
        }
    return rows


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table. What a row does not have is a dash."""
    titles = {"frozen": "frozen LLaMA", **ROWS}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = [titles[name]]
        for key in ("accuracy", "video_swapped", "without_video"):
            cells.append(f"{row[key]:.1%}".replace("%", " %") if key in row else "-")
        cells += [f"{row['perplexity']:.2f}", f"{row['kl_per_token']:.4f}"]
        cells.append(f"{row['top1_agreement']:.1%}".replace("%", " %"))
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
    record = new_record("cognition", {"rows": list(rows)})
    record["command"] = "bash launch/examples/cognition.sh"
    write_record({**record, "cases": [{"name": name, **row} for name, row in rows.items()]}, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
