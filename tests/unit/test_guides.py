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
ITEM = re.compile(r"^\d+\. \[.+?\]\((.+?)\)", re.MULTILINE)
ITEM_AND_NAME = re.compile(r"^\d+\. \[.+?\]\((.+?)\): `([\w.]+)`", re.MULTILINE)

# How one gets to each file of the step that the package's guide follows: (a file, what it says).
# The caller is not always the file before it: train.sh is read twice, and work() is train.py's.
WAY = {
    "../launch/train.sh": [],
    "../launch/start.py": [
        ("../launch/train.sh", "/start.sh"),
        ("../launch/start.sh", '"$here/start.py" "$script"'),
    ],
    "cli/main.py": [
        ("../launch/start.py", "launch.main()"),
        ("../launch/train.sh", "from vico.cli.main import console"),
        ("../launch/train.sh", 'console(["train"'),
    ],
    "cli/train.py": [
        ("cli/main.py", '"train": ("train"'),
        ("cli/main.py", 'import_module(f"vico.cli.{module}").main(argv)'),
    ],
    "cli/with_world.py": [
        ("cli/train.py", "from vico.cli.with_world import with_world"),
        ("cli/train.py", "return with_world(line, work)"),
    ],
    "train/start.py": [
        ("cli/with_world.py", "work(world)"),
        ("cli/train.py", "from vico.train.start import start"),
        ("cli/train.py", "run(start(config, world))"),
    ],
    "train/build.py": [
        ("train/start.py", "from vico.train.build import"),
        ("train/start.py", "read_inputs("),
        ("train/start.py", "build_engine("),
    ],
    "train/loop.py": [
        ("cli/train.py", "from vico.train.loop import run"),
        ("train/loop.py", " _run_steps(run, run_log, early_save)"),
    ],
    "train/step.py": [
        ("train/loop.py", "from vico.train.step import"),
        ("train/loop.py", "train_step("),
    ],
    "model/vico.py": [
        ("train/build.py", "from vico.model.vico import ViCo"),
        ("train/step.py", "engine.forward("),
        ("train/engine.py", "self._engine(batch)"),
    ],
    "model/llama.py": [
        ("model/vico.py", "from vico.model.llama import"),
        ("model/vico.py", "self.trunk("),
    ],
    "train/engine.py": [
        ("train/step.py", "from vico.train.engine import Engine"),
        ("train/step.py", "engine.step("),
        ("train/engine.py", "self._engine.step()"),
    ],
}


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


def read_beside_the_package_guide(name: str) -> str:
    return (ROOT / "vico" / name).read_text(encoding="utf-8")


def test_the_step_can_be_followed() -> None:
    """Each file of the package's guide holds the function that the guide names first."""
    items = ITEM_AND_NAME.findall(read_beside_the_package_guide("README.md"))
    assert len(items) >= 10
    for file, name in items:
        code = read_beside_the_package_guide(file)
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", code, re.MULTILINE), f"{file}: {name}"


def test_the_way_to_each_file() -> None:
    """One gets from file to file as the guide says: each is imported and called on the way."""
    files = ITEM.findall(read_beside_the_package_guide("README.md"))
    assert files == list(WAY) and len(files) <= 12
    for file, steps in WAY.items():
        for caller, words in steps:
            assert words in read_beside_the_package_guide(caller), f"{file}: {caller}: {words}"
