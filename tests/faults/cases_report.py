"""What `vico report` refuses, with what the error must say."""

from faults.case import Case, flags, refused
from faults.damage import both, put
from support.run_fixture import CHECKPOINT

PAGE = "--output {fixture}/r.html"
TO_REPLACE = "is there already and is no report; name another file, or remove it"

REPORTS: dict[str, Case] = {
    "report, no run at all": flags(f"!report {PAGE}", "the following arguments are required: RUN"),
    "report, no output": flags("!report {fixture}/run", "required: --output"),
    "report, no folder": flags(
        f"!report {{fixture}}/run {{fixture}}/nowhere {PAGE}",
        "{fixture}/nowhere: no such folder; name the --output_dir of a run",
    ),
    "report, a folder without a run": flags(
        f"!report {{fixture}}/toy {PAGE}",
        "{fixture}/toy: holds no run (no args.json, log.txt, steps.jsonl, cognition.json, ",
    ),
    "report, a file": flags(
        f"!report {{fixture}}/run/log.txt {PAGE}",
        "{fixture}/run/log.txt: is a file, not a folder; name the --output_dir of a run",
    ),
    "report, a checkpoint": flags(
        f"!report {{fixture}}/{CHECKPOINT} {PAGE}",
        f"{{fixture}}/{CHECKPOINT}: is a checkpoint; name the folder of its run, {{fixture}}/run",
    ),
    "report, a run twice": flags(
        f"!report {{fixture}}/run {{fixture}}/toy/../run {PAGE}",
        "{fixture}/run: is named twice; name each run once",
    ),
    "report, onto a file of the run": flags(
        "!report {fixture}/run --output {fixture}/run/args.json",
        f"{{fixture}}/run/args.json: {TO_REPLACE}",
    ),
    "report, onto a folder": flags(
        "!report {fixture}/run --output {fixture}/toy", f"{{fixture}}/toy: {TO_REPLACE}"
    ),
    "report, onto another page": refused(
        put("r.html", "<!DOCTYPE html><title>mine</title>"),
        f"{{fixture}}/r.html: {TO_REPLACE}",
        line=f"!report {{fixture}}/run {PAGE}",
    ),
    "report, a folder without videos": flags(
        f"!report {{fixture}}/run --videos {{fixture}}/toy {PAGE}",
        "--videos {fixture}/toy: holds no video (.mp4, .mkv, .webm, .avi, .mov, .flv ...); "
        "name another",
    ),
    "report, no frames": flags(
        f"!report {{fixture}}/run --max_videos 0 {PAGE}", "argument --max_videos: 0 must be 1 to"
    ),
    "report, into nothing": refused(
        both(put("file", ""), put("other", "")),
        "the folder of --output {fixture}/file: '{fixture}/file' is not a folder",
        line="!report {fixture}/run --output {fixture}/file/r.html",
    ),
}
