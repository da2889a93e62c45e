"""The page: one HTML file with its style, scripts and data inside, which requests nothing."""

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any
from xml.etree.ElementTree import Element

from vico.errors import UserError
from vico.io.paths import read_bytes
from vico.report import sections
from vico.report.attention import attention_charts
from vico.report.charts import (
    Chart,
    accuracy_chart,
    confusion_chart,
    speed_charts,
    training_charts,
)
from vico.report.frames import Frames
from vico.report.gates import gate_charts, opening_charts
from vico.report.language import language_tables, text_charts
from vico.report.load import Caption, Run, all_notes
from vico.report.markup import element, to_html
from vico.report.questions import Item, QuestionSet
from vico.report.results import accuracies, confusions, differences

HERE = Path(__file__).resolve().parent
# The first lines of every page, by which an earlier one is known.
MARK = '<meta name="generator" content="vico report">'
# Nothing is fetched, framed or sent: the page's own scripts, by their sha256, and its own images.
POLICY = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def plotly_script() -> str:
    """plotly's own JavaScript, from the installed package. Raises UserError without it."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise UserError(
            "vico report needs plotly; run: pip install -c launch/constraints.txt -e '.[report]'"
        ) from None
    script: str = get_plotlyjs()
    return script


def page(
    runs: Sequence[Run],
    sets: Sequence[QuestionSet],
    notes: Sequence[str],
    frames: Frames,
    plotly: str,
) -> bytes:
    """The whole file. `notes`: what is missing, besides what the runs' own notes say."""
    builder = _Builder(runs, sets)
    builder.add_all([*all_notes(runs), *notes, *frames.notes])
    scripts = [_read("browse.js"), plotly, _read("charts.js")]
    hashes = " ".join(map(_hash, scripts))
    names = ", ".join(run.name for run in runs)
    files = sorted({file for questions in sets for file in questions.files})
    text = Template(_read("page.html")).substitute(
        policy=POLICY.format(hashes=hashes),
        title=html.escape(f"ViCo report: {names}"),
        style=_read("page.css"),
        subtitle=html.escape(f"{names} · written {time.strftime('%Y-%m-%d %H:%M')}"),
        links="".join(to_html(link) for link in builder.links()),
        sections="".join(to_html(section) for section in builder.sections),
        predictions_source=html.escape(f"From {', '.join(files)}. {frames.caption}"),
        captions_source="From captions_SPLIT.jsonl.",
        data=_safe_json(page_data(runs, sets, builder.charts, frames)),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    # A lone half of a surrogate pair, which JSON may hold, has no bytes of its own.
    return text.encode("utf-8", "backslashreplace")


def is_report(start: bytes) -> bool:
    """Whether a file that begins so is a page of this module."""
    return MARK.encode() in start


def _read(name: str) -> str:
    return read_bytes(HERE / name).decode()


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _safe_json(value: object) -> str:
    """JSON in ASCII without <, so that no text in it ends the script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


class _Builder:
    """The sections of the page in order, and the charts that they refer to by number."""

    def __init__(self, runs: Sequence[Run], sets: Sequence[QuestionSet]) -> None:
        self.runs, self.sets = runs, sets
        self.sections: list[Element] = []
        self.charts: list[Chart] = []

    def links(self) -> list[Element]:
        ids = {section.get("id", ""): section[0].text or "" for section in self.sections}
        if any(questions.items for questions in self.sets):
            ids["predictions"] = "Predictions"
        if any(run.captions for run in self.runs):
            ids["captions"] = "Captions"
        return [element("a", title, href=f"#{name}") for name, title in ids.items()]

    def add_all(self, notes: Sequence[str]) -> None:
        self._add("summary", "Summary", sections.summary(self.runs, self.sets))
        for questions in self.sets:
            self._add(
                f"accuracy-{len(self.sections)}",
                f"Accuracy: {questions.name}",
                self._accuracy(questions),
            )
        self._add("training", "Training", self._grid(training_charts(self.runs)))
        of_texts = [*self._grid(text_charts(self.runs)), *language_tables(self.runs)]
        self._add("language", "Language", of_texts)
        gates = []
        for run in self.runs:
            gates += gate_charts(run, run.gates) if run.gates is not None else []
            opened = run.gates_over_time
            gates += opening_charts(run, opened) if opened is not None else []
        self._add("gates", "Gates", self._grid(gates))
        self._add("attention", "Attention", self._grid(attention_charts(self.runs)))
        self._add("speed", "Speed and memory", self._speed())
        self._add("settings", "Settings", self._settings())
        if notes:
            items = [element("li", note) for note in notes]
            self._add("missing", "What is missing", [element("ul", class_="notes", children=items)])

    def _add(self, name: str, title: str, parts: Sequence[Element]) -> None:
        """Add a section, unless it would be empty."""
        if parts:
            self.sections.append(
                element("section", id=name, children=[element("h2", title), *parts])
            )

    def _accuracy(self, questions: QuestionSet) -> list[Element]:
        rows = accuracies(questions, len(self.runs))
        if not rows:
            return [element("p", "No right answers are given, so there is no accuracy.")]
        parts = self._grid([accuracy_chart(questions.name, questions.files, self.runs, rows)])
        parts.append(sections.accuracy_table(questions, self.runs, rows))
        if found := differences(questions, len(self.runs)):
            parts.append(element("h3", "Differences between runs"))
            parts.append(element("p", sections.DIFFERENCES))
            parts.append(sections.difference_table(questions, self.runs, found))
        parts.append(element("h3", "Which options are chosen"))
        tables = confusions(questions, len(self.runs))
        source = ", ".join(questions.files)
        parts += self._grid(
            [
                confusion_chart(questions.name, source, run, table)
                for run, table in zip(self.runs, tables, strict=True)
                if table
            ]
        )
        return parts

    def _speed(self) -> list[Element]:
        parts = self._grid(speed_charts(self.runs))
        table = sections.speed_table(self.runs)
        if table is not None:
            parts += [element("p", sections.SPEED), table]
        return parts

    def _settings(self) -> list[Element]:
        changed, every = sections.setting_tables(self.runs)
        if every is None:
            return []
        shown = element("details", children=[element("summary", "All settings"), every])
        if changed is not None:
            return [changed, shown]
        known = sum(bool(run.settings) for run in self.runs)
        text = "The runs have the same settings." if known > 1 else "Of one run, from args.json."
        return [element("p", text), shown]

    def _grid(self, charts: Sequence[Chart]) -> list[Element]:
        """The charts beside each other where the window is wide; no element without charts."""
        if not charts:
            return []
        figures = [self._figure(chart, len(charts) == 1) for chart in charts]
        return [element("div", class_="charts", children=figures)]

    def _figure(self, chart: Chart, is_alone: bool) -> Element:
        plot = element("div", class_="plot", role="img", style=f"height: {chart.height}px")
        plot.set("data-chart", str(len(self.charts)))
        plot.set("aria-label", chart.title)
        self.charts.append(chart)
        parts = [element("h4", chart.title), plot, element("figcaption", chart.caption)]
        return element("figure", class_="chart whole" if is_alone else "chart", children=parts)


# ---- The data of the scripts


def page_data(
    runs: Sequence[Run], sets: Sequence[QuestionSet], charts: Sequence[Chart], frames: Frames
) -> dict[str, Any]:
    """What browse.js and charts.js read. `sets`: [data set or null, split, name]."""
    questions = []
    for number, of_set in enumerate(sets):
        questions += [_question(item, number) for item in of_set.items]
    return {
        "runs": [run.name for run in runs],
        "sets": [[of_set.dataset, of_set.split, of_set.name] for of_set in sets],
        "questions": questions,
        "captions": _captions(runs),
        "frames": frames.uris,
        "charts": [chart.to_json() for chart in charts],
    }


def _question(item: Item, number: int) -> dict[str, Any]:
    video, qid, _, right_answer, num_options = item.key
    answers: list[Any] = []
    for answer in item.answers:
        if answer is None:
            answers.append(None)
        else:
            scores = [float(f"{score:.5g}") for score in answer.scores]
            answers.append([answer.prediction, scores])
    return {
        "set": number,
        "video": video,
        "qid": qid,
        "type": item.type,
        "question": None if item.text is None else item.text.question,
        "options": None if item.text is None else item.text.options,
        "numOptions": num_options,
        "answer": right_answer,
        "answers": answers,
    }


def _captions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A record per video, with the caption of each run, or null."""
    records: dict[tuple[str | None, str, str], dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for caption in run.captions:
            record = records.setdefault(_key(caption), _empty_record(caption, len(runs)))
            record["texts"][number] = caption.text
            record["cut"][number] = caption.is_cut
            for reference in caption.references:
                if reference not in record["references"]:
                    record["references"].append(reference)
    return list(records.values())


def _key(caption: Caption) -> tuple[str | None, str, str]:
    return caption.dataset, caption.split, caption.video


def _empty_record(caption: Caption, num_runs: int) -> dict[str, Any]:
    return {
        "dataset": caption.dataset,
        "split": caption.split,
        "video": caption.video,
        "references": [],
        "texts": [None] * num_runs,
        "cut": [False] * num_runs,
    }
