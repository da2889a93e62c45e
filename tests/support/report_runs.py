"""Folders of runs for the report, without training: settings, logs, predictions, captions."""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = "video question answer qid type a0 a1 a2 a3 a4".split()
TYPES = ("CW", "CH", "TN", "DL")
# Texts that a page must show as they are, and not read as markup, JSON or JavaScript.
EVIL = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>'\"\u2028&amp;"


@dataclass(frozen=True)
class Report:
    """Questions in NExT-QA's format in `folder`/data, and runs beside it."""

    folder: Path
    num_questions: int
    video: str = "video"  # each begins so
    seed: int = 0

    def write_questions(self) -> None:
        data = self.folder / "data" / "nextqa"
        data.mkdir(parents=True)
        with (data / "val.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for i in range(self.num_questions):
                row = {"video": self.video_of(i), "qid": str(i % 7), "type": TYPES[i % 4]}
                row |= {"question": f"what does the <b>man</b> do after clip {i}"}
                row |= {"answer": str(self.right_answer(i))}
                writer.writerow(row | {f"a{k}": f"he runs {k} times in {i}" for k in range(5)})

    def video_of(self, i: int) -> str:
        return f"{self.video}{i // 7}"

    def right_answer(self, i: int) -> int:
        return i * 7 % 5

    def write_run(self, name: str, wrong_every: int, **settings: Any) -> Path:
        """A run that answers every `wrong_every`-th question wrong."""
        run = self.folder / name
        run.mkdir()
        saved = {"dataset": "nextqa", "data_path": str(self.folder / "data"), "run": name}
        (run / "args.json").write_text(json.dumps(saved | settings), encoding="utf-8")
        rng = random.Random(self.seed)
        steps = []
        for step in range(1, 41):
            loss = 3 / step + 0.1 * rng.random()
            record = {"step": step, "epoch": step // 20, "loss": loss, "vqa_loss": loss}
            record |= {"lr": 0.01 / step, "real_tokens": 900, "step_seconds": 0.3}
            steps.append(record | {"cap_loss": None})
        write_lines(run / "steps.jsonl", steps)
        epochs = [{"step": 20, "val_acc": 0.5, "val_n": 40}, {"step": 40, "val_acc": 0.75}]
        write_lines(run / "log.txt", epochs)
        self.write_predictions(run, wrong_every)
        return run

    def write_predictions(self, run: Path, wrong_every: int) -> None:
        run.mkdir(exist_ok=True)
        rng = random.Random(self.seed)
        records = []
        for i in range(self.num_questions):
            answer = self.right_answer(i)
            prediction = (answer + 1) % 5 if i % wrong_every == 0 else answer
            scores = [2 + rng.random() for _ in range(5)]
            scores[prediction] = 0.5
            record = {"index": i, "qid": str(i % 7), "video": self.video_of(i)}
            record |= {"type": TYPES[i % 4], "scores": scores, "answer": answer}
            records.append(record | {"prediction": prediction})
        write_lines(run / "predictions_val.jsonl", records)

    def write_captions(self, run: Path, text: str) -> None:
        videos = dict.fromkeys(self.video_of(i) for i in range(self.num_questions))
        lines = []
        for video in videos:
            line = {"dataset": "nextqa", "video": video, "caption": f"{text} {video}"}
            lines.append(line | {"references": [f"a man runs in {video}"]})
        write_lines(run / "captions_val.jsonl", lines)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
