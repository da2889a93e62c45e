"""Names and phrases that the field's terms have replaced do not come back (CONTRIBUTING.md)."""

import ast

from support.processes import ROOT

MODULES = """
    assembly attempts batches block causes check_view cost demo_world dist figure files footprint
    functions gate gathered graphs hardware home hosts in_server launched layout lengths lineage
    lock meeting meters outcome plan_report quantized records remembered resident safeload stage
    stopping tables textfiles workers world_check
""".split()
NAMES = """
    Given InUse Items LlamaShape MISTAKE Memory PeerLost Places Progress Replay Sequence Setting
    TargetCrossEntropy TrainingFault Unreachable Visibility Work adopt agreeing construction decided
    doing end_with fitted fullest leave listen longest_first lost meet most narrowed product
    product_added rehearse say sealed stay turn turn_both unblanked wish
""".split()
PHRASES = (
    "two commands;what matters of it runs;remembered by file;frozen products packed;"
    "goes on where its last checkpoint stands;refuses a world;the remedy for a run;"
    "start at minus this;minutes without a move;hangs or did not come;did not come to;"
    "does not get on;what has changed since has not run;a mistake of ours"
).split(";")


def test_old_names() -> None:
    for path in (ROOT / "vico").rglob("*.py"):
        assert path.stem not in MODULES, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert node.name.strip("_") not in NAMES, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Name):
                assert not node.id.startswith(("MOST_", "LARGEST_")), f"{path}:{node.lineno}"


def test_old_phrases() -> None:
    for path in (ROOT / "README.md", *(ROOT / "tests" / "unit" / "golden").glob("*.txt")):
        text = " ".join(path.read_text(encoding="utf-8").lower().split())
        assert not [phrase for phrase in PHRASES if phrase in text], path
