"""The tables and sentences of the page."""

import json
from collections.abc import Sequence
from statistics import median
from xml.etree.ElementTree import Element

from vico.report.charts import colour
from vico.report.load import Run, accuracy_of, number
from vico.report.markup import element, table
from vico.report.questions import QuestionSet
from vico.report.results import ALL, Difference, Row, accuracies, differences
from vico.report.statistics import Share

NONE = "–"
DIFFERENCES = (
    "On the questions that both runs have answered. The p-value of McNemar's exact test, "
    "two-sided, says how often runs of equal accuracy would differ as much; it is not corrected "
    "for the number of comparisons."
)
SPEED = (
    "Steps are from steps.jsonl; evaluation and memory are from TensorBoard's files in runs/, over "
    "all starts of the run."
)
# Settings that name a run or its place, and differ between any two.
OWN = ("output_dir", "run")


def run_name(number: int, name: str) -> Element:
    """The run's name behind a dot of its colour."""
    dot = element("span", class_=f"dot {colour(number).lstrip('-')}")
    dot.tail = name
    return element("span", children=[dot])


def percent(share: Share | None) -> str:
    if share is None:
        return NONE
    low, high = share.interval
    return f"{100 * share.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---- The summary


def summary(runs: Sequence[Run], sets: Sequence[QuestionSet]) -> list[Element]:
    cards = [_card(i, run, sets, len(runs)) for i, run in enumerate(runs)]
    parts = [element("div", class_="cards", children=cards)]
    for questions in sets:
        for difference in differences_to_best(questions, len(runs)):
            text = sentence(difference, runs, questions.name)
            parts.append(element("p", text, class_="finding"))
    return parts


def differences_to_best(questions: QuestionSet, num_runs: int) -> list[Difference]:
    """Over all questions, of the most accurate run and each other; the tables have all pairs."""
    rows = accuracies(questions, num_runs)
    if not rows:
        return []
    values = [share.value if share is not None else -1.0 for share in rows[0].shares]
    best = values.index(max(values))
    found = [one for one in differences(questions, num_runs) if one.group == ALL]
    return [one for one in found if best in (one.first, one.second)]


def _card(i: int, run: Run, sets: Sequence[QuestionSet], num_runs: int) -> Element:
    lines = [element("h3", children=[run_name(i, run.name)])]
    best = best_epoch(run)
    if best is not None:
        accuracy, step = best
        lines.append(element("p", f"{100 * accuracy:.1f} %", class_="figure"))
        lines.append(element("p", f"best validation accuracy, at step {step:,}"))
    for questions in sets:
        rows = accuracies(questions, num_runs)
        if rows and rows[0].shares[i] is not None:
            text = f"{percent(rows[0].shares[i])} of its predictions on {questions.name} are right"
            lines.append(element("p", text))
    if not any(line.get("class") == "figure" for line in lines) and len(lines) == 1:
        lines.append(element("p", "no accuracy yet"))
    if run.steps:
        lines.append(element("p", f"{run.steps[-1]['step']:,} steps logged"))
    lines.append(element("p", str(run.path), class_="path"))
    return element("article", class_="card", children=lines)


def best_epoch(run: Run) -> tuple[float, int] | None:
    """(accuracy, step) of the best evaluation in log.txt; of equal ones, the first."""
    best = None
    for record in run.epochs:
        found = accuracy_of(record)
        if found is not None and (best is None or found[0] > best[0]):
            best = (found[0], record["step"])
    return best


def sentence(difference: Difference, runs: Sequence[Run], set_name: str) -> str:
    """Such as "B answers 2.0 points more than A on nextqa val right (300 questions, p = 0.2)."""
    first, second = runs[difference.first].name, runs[difference.second].name
    paired = difference.paired
    p = p_text(paired.p_value)
    test = (
        f"{paired.n:,} questions of both, McNemar's exact test: p {'' if p[0] == '<' else '= '}{p}"
    )
    points = 100 * paired.difference
    if not points:
        return f"{set_name}: {first} and {second} have the same accuracy ({test})."
    better, worse = (second, first) if points > 0 else (first, second)
    return f"{set_name}: {better} is {abs(points):.1f} points above {worse} ({test})."


# ---- Tables


def accuracy_table(questions: QuestionSet, runs: Sequence[Run], rows: Sequence[Row]) -> Element:
    header = ["type", "questions", *(run.name for run in runs)]
    lines: list[list[str | Element]] = []
    for row in rows:
        n = max(share.n for share in row.shares if share is not None)
        name = element("span", row.name, class_="part" if row.is_part else "group")
        lines.append([name, f"{n:,}", *map(percent, row.shares)])
    caption = f"Accuracy on {questions.name} with Wilson's interval of 95 %"
    return table(caption, header, lines)


def difference_table(
    questions: QuestionSet, runs: Sequence[Run], found: Sequence[Difference]
) -> Element:
    header = "runs;type;questions of both;difference, points;only first right;only second right;p"
    lines: list[list[str | Element]] = []
    for one in found:
        paired = one.paired
        lines.append(
            [
                f"{runs[one.first].name} → {runs[one.second].name}",
                one.group,
                f"{paired.n:,}",
                f"{100 * paired.difference:+.1f}",
                f"{paired.only_first:,}",
                f"{paired.only_second:,}",
                p_text(paired.p_value),
            ]
        )
    caption = f"Differences on {questions.name}, by McNemar's exact test"
    return table(caption, header.split(";"), lines)


def speed_table(runs: Sequence[Run]) -> Element | None:
    """Speed and peak memory; None where nothing was logged."""
    header = (
        "run;steps;median seconds per step;tokens per second;hours of steps;"
        "evaluation, questions per second;peak host memory, GiB;peak GPU memory, GiB"
    )
    rows = [_speed_row(i, run) for i, run in enumerate(runs) if run.steps or run.performance]
    caption = "Speed, and peak memory of rank 0"
    return table(caption, header.split(";"), rows) if rows else None


def _speed_row(i: int, run: Run) -> list[str | Element]:
    seconds = _values(run, "step_seconds")
    tokens = sum(_values(run, "real_tokens"))
    curves = run.performance
    evaluation = curves.get("perf/eval_questions_per_second", [])
    host = curves.get("memory/host_peak_gib", [])
    device = curves.get("memory/device_peak_allocated_gib", [])
    return [
        run_name(i, run.name),
        f"{len(run.steps):,}",
        f"{median(seconds):.3g}" if seconds else NONE,
        f"{tokens / sum(seconds):,.0f}" if sum(seconds) else NONE,
        f"{sum(seconds) / 3600:.2g}" if seconds else NONE,
        f"{median(evaluation):,.3g}" if evaluation else NONE,
        f"{max(host):.2f}" if host else NONE,
        f"{max(device):.2f}" if device else NONE,
    ]


def _values(run: Run, key: str) -> list[float]:
    values = (number(record.get(key)) for record in run.steps)
    return [value for value in values if value is not None]


def setting_tables(runs: Sequence[Run]) -> tuple[Element | None, Element | None]:
    """(settings that differ between the runs, all settings); None: there are none."""
    known = [(i, run) for i, run in enumerate(runs) if run.settings]
    if not known:
        return None, None
    names = list(dict.fromkeys(name for _, run in known for name in run.settings))
    header = ["setting", *(run.name for _, run in known)]
    rows, differing = [], []
    for name in names:
        values = [_shown(run.settings[name]) if name in run.settings else NONE for _, run in known]
        rows.append([name, *values])
        texts = {json.dumps(run.settings.get(name), sort_keys=True) for _, run in known}
        if len(texts) > 1 and name not in OWN:
            differing.append([name, *values])
    caption = "Settings that differ, from args.json; output_dir and the run's id are left out"
    changed = table(caption, header, differing, "settings") if differing else None
    return changed, table("All settings, from args.json", header, rows, "settings")


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
