"""Every figure of the README's benchmark tables has its record."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest

from benchmarks.paths import RESULTS, ROOT

sys.path.insert(0, str(ROOT / "launch" / "examples"))
import cognition
import keep_demo

TABLES = (
    ("README.md", "Benchmarks"),
    ("README.md", "What the LLaMA keeps"),
    ("benchmarks/README.md", "Results"),
    ("launch/README.md", "What the LLaMA keeps"),
)
NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)(?: %)?")


@cache
def recorded() -> tuple[float, ...]:
    values: list[float] = []
    for path in RESULTS.glob("*.json"):
        values += numbers(json.loads(path.read_text(encoding="utf-8")))
    return tuple(values)


def numbers(value: Any) -> Iterator[float]:
    """Of medians, peaks and ratios, at any depth; not of lists of single times, nor of settings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "cases":
                for case in inner:
                    yield from numbers(case)
            elif not isinstance(inner, list) and key != "settings":
                yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def cells(document: str, heading: str) -> Iterator[tuple[str, list[str]]]:
    """(first cell, the other cells that are numbers) of each table row of the document's part."""
    text = (ROOT / document).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    for line in text.split("\n## ")[0].splitlines():
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        found = [cell for cell in others if NUMBER.fullmatch(cell)]
        if line.startswith("|") and found:
            yield first, found


def is_recorded(cell: str, values: tuple[float, ...]) -> bool:
    match = NUMBER.fullmatch(cell)
    assert match is not None
    digits = match[1].replace(",", "")
    decimals = len(digits.partition(".")[2])
    scale = 100 if cell.endswith("%") else 1
    return any(f"{scale * value:.{decimals}f}" == digits for value in values)


def quotient(found: list[str]) -> tuple[float, ...]:
    """Of a row's first two figures, which may come from two records."""
    values = [float(cell.replace(",", "")) for cell in found if not cell.endswith("%")]
    return (values[0] / values[1],) if len(values) > 1 and values[1] else ()


@pytest.mark.parametrize(("document", "heading"), TABLES)
def test_figures_have_records(document: str, heading: str) -> None:
    rows = list(cells(document, heading))
    assert len(rows) >= 4
    for first, found in rows:
        for cell in found:
            assert is_recorded(cell, recorded() + quotient(found)), f"{first}: {cell}"


def test_a_wrong_figure_is_found() -> None:
    assert is_recorded("19,380", recorded()) and is_recorded("50.8 %", recorded())
    assert not is_recorded("19,381", recorded()) and not is_recorded("77.77 %", recorded())


# ---- tables of the examples, line by line --------------------------------------------------------


def newest(suite: str) -> list[dict[str, Any]]:
    """The cases of its newest record."""
    *_, path = sorted(RESULTS.glob(f"{suite}-*.json"))
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert isinstance(cases, list)
    return cases


def tables(text: str) -> list[str]:
    """Every table of a guide's text, its lines as they stand."""
    return [found.strip("\n") for found in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def part(document: str, heading: str) -> str:
    """From a heading of any level to the next one."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.split(rf"^#+ {re.escape(heading)}\n", text, flags=re.MULTILINE)[1].split("\n#")[0]


def short_rows(rows: Mapping[str, Mapping[str, Any]], table: str) -> list[str]:
    """The lines that the README's short table must have, in the order and under the names it has.

    A name says the weight of --keep, of which 1 is the default, or else which model it is.
    """
    lines = []
    for line in table.splitlines()[2:]:
        title = line.strip("|").split("|")[0].strip()
        weight = re.search(r"--keep(?: ([\d.]+))?", title)
        name = f"keep-{weight[1] or 1}" if weight else title.split()[0]
        assert name in rows, f"{title}: no row of the record"
        row = rows[name]
        accuracy = f"{row['accuracy']:.1%}".replace("%", " %") if "accuracy" in row else "-"
        manual = row["texts"]["manual"]
        measured = (f"{manual['perplexity']:.2f}", f"{manual['kl_per_token']:.4f}")
        lines.append("| " + " | ".join((title, accuracy, *measured)) + " |")
    return lines


def test_the_table_of_cognition_is_its_newest_record() -> None:
    rows = {case["name"]: case for case in newest("cognition")}
    heading = "What the LLaMA keeps"
    assert tables(part("launch/README.md", heading)) == [cognition.markdown(rows)]
    (short,) = tables(part("README.md", heading))
    assert short.splitlines()[2:] == short_rows(rows, short)
    assert len(short.splitlines()) >= 6


def test_the_table_of_keep_demo_is_its_newest_record() -> None:
    assert keep_demo.markdown(newest("keep_demo")) in tables(
        part("vico/README.md", "Keep it in training")
    )


def synthetic() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(["frozen", *cognition.ROWS]):
        text = {"perplexity": 10.0 + i, "kl_per_token": i / 10, "top1_agreement": 1 - i / 10}
        rows[name] = {"without_video": 0.2, "texts": dict.fromkeys(cognition.TEXTS, text)}
        if i:
            rows[name] |= {"accuracy": 0.5 + i / 100, "video_swapped": 0.2}
    return rows


def test_swapped_rows_are_found() -> None:
    """A cell must be its own row's: also in a short table, whose figures all are in the record."""
    rows = synthetic()
    whole = cognition.markdown(rows)
    assert tables(f"text\n\n{whole}\n\nmore text | here\n") == [whole]
    lines = whole.splitlines()
    lines[3], lines[4] = lines[4], lines[3]
    assert tables("\n".join(lines)) != [whole]

    right = "| frozen | - | 10.00 | 0.0000 |\n| trained | 51.0 % | 11.00 | 0.1000 |\n"
    right += "| `--text FILE --keep 0.3` | 52.0 % | 12.00 | 0.2000 |\n"
    right += "| `--text FILE --keep` (1) | 53.0 % | 13.00 | 0.3000 |"
    head = "| | accuracy | perplexity | KL per token |\n|---|---|---|---|\n"
    assert right.splitlines() == short_rows(rows, head + right)
    for one, other in (("52.0", "53.0"), ("12.00", "13.00"), ("0.2000", "0.3000")):
        wrong = right.replace(one, "x").replace(other, one).replace("x", other)
        assert wrong.splitlines() != short_rows(rows, head + wrong)
