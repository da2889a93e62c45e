"""How the rows of cognition.sh and keep_demo.sh were made, and the record of their table.

Usage: python row_facts.py RUN SECONDS     writes RUN/row.json when the run is measured
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.record import git_commit, new_record, write_record
from vico.io import log
from vico.io.atomic import write_text
from vico.train.run_log import read_records

# Those of args.json that tell how a run was trained; paths are of the machine.
SETTINGS = """
    seed precision epochs max_steps steps_per_epoch batch_size accum_iter world_size lr blr min_lr
    warmup_epochs weight_decay bias cap keep adapter_layer adapter_len max_feats max_seq_len
    max_cap_len
""".split()


def write_facts(run: Path, seconds: int) -> None:
    """`seconds`: of the training and the measurements, in the call that ended them."""
    facts = {"commit": git_commit(), "seconds": seconds, "steps": _count_steps(run)}
    write_text(run / "row.json", json.dumps(facts) + "\n")


def _count_steps(run: Path) -> int | None:
    steps = run / "steps.jsonl"
    return len(read_records(steps)) if steps.exists() else None


def facts_of(run: Path) -> dict[str, Any]:
    """What row.json holds, and settings; None for what an earlier version did not write."""
    facts, settings = _read(run / "row.json"), _read(run / "args.json")
    return {
        "commit": facts.get("commit"),
        "seconds": facts.get("seconds"),
        "settings": {name: settings[name] for name in SETTINGS if name in settings} or None,
    }


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert isinstance(found, dict)
    return found


def write_or_print(
    suite: str,
    config: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    facts: Iterable[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Prints the record of these rows as the last line: the newest of `folder` that has the same
    rows, or else a new one. `facts`: of every run.
    """
    runs = list(facts)
    # Of the code that made the rows, which may be older than the code that reads them.
    commits = sorted({run["commit"] or "unknown" for run in runs})
    content = {
        "commits": commits,
        "seconds": _total([run["seconds"] for run in runs]),
        "cases": list(cases),
    }
    for path in sorted(folder.glob(f"{suite}-*.json"), reverse=True):
        record = _read(path)
        same = {"config": record.get("config"), **{key: record.get(key) for key in content}}
        if same == json.loads(json.dumps({"config": config, **content})):
            log.info(f"record: {path} (no row was made since)")
            print(json.dumps(record), flush=True)
            return
    record = new_record(suite, dict(config))
    record["command"] = f"bash launch/examples/{suite}.sh"
    if len(commits) == 1 and runs[0]["commit"] is not None:
        record["git_commit"] = runs[0]["commit"]
    write_record({**record, **content}, folder)


def _total(seconds: Sequence[int | None]) -> int | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


if __name__ == "__main__":
    write_facts(Path(sys.argv[1]), int(sys.argv[2]))
