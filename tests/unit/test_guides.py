"""The guides: every link leads somewhere, and every file they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".github", "vico", "launch", "benchmarks", "tests")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
GUIDES = sorted(page.relative_to(ROOT).as_posix() for page in PAGES)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|sbatch|json|yaml|txt|md))`")
FILES_OF_USERS = ("data/", "pretrained/", "demo/", "benchmarks/results/", "results/SUITE")
EXAMPLES = ("myqa", "_NAME")  # files that a guide shows how to write


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide: str) -> None:
    page = ROOT / guide
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(without_code(text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{guide}: {link}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{guide}: {link}"


@pytest.mark.parametrize("guide", GUIDES)
def test_named_files_exist(guide: str) -> None:
    """Seen from the checkout, from the package, or from the guide's own folder."""
    page = ROOT / guide
    roots = (ROOT, ROOT / "vico", page.parent)
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        is_users = name.startswith(FILES_OF_USERS) and not name.endswith(".py")
        if is_users or any(example in name for example in EXAMPLES):
            continue
        assert any((root / name).exists() for root in roots), f"{guide}: {name}"


def test_the_step_can_be_followed() -> None:
    """Each file of the package's guide holds the function that the guide names first."""
    guide = ROOT / "vico" / "README.md"
    items = re.findall(
        r"^\d+\. \[.+?\]\((.+?)\): `([\w.]+)`", guide.read_text("utf-8"), re.MULTILINE
    )
    assert len(items) >= 10
    for file, name in items:
        code = (guide.parent / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", code, re.MULTILINE), f"{file}: {name}"
