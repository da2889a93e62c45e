"""Where the files of the benchmarks are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = ROOT / "benchmarks" / "lengths.json"
