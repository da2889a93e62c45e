"""launch/examples/keep_demo.sh: what --keep does at its default weight, on the demo."""

import json
from pathlib import Path

import pytest

from support.processes import ROOT, base_environment, run_command

SCRIPT = ROOT / "launch" / "examples" / "keep_demo.sh"
SECONDS = 3600.0  # on a machine that others use
MIN_RATIO, MAX_LOSS = 5, 0.01  # of KL per token, and of the accuracy


@pytest.mark.slow
def test_the_default_weight(tmp_path: Path) -> None:
    """The same seed with and without --keep. A second call trains nothing again."""
    environment = base_environment(VICO_EXAMPLE_SEEDS="0", VICO_EXAMPLE_WEIGHTS="1")
    command = ["bash", str(SCRIPT), "out"]
    first = run_command(command, tmp_path, environment, seconds=SECONDS)
    assert first.codes == [0], first.output
    record = json.loads(first.stdouts[0].splitlines()[-1])
    without, kept = record["cases"]
    assert (without["name"], kept["name"]) == ("without", "keep-1")
    for text in ("kl_kept", "kl_other"):
        assert without[text][0] >= MIN_RATIO * kept[text][0], text
    assert kept["accuracy"][0] >= without["accuracy"][0] - MAX_LOSS
    for row in (without, kept):
        (run,) = row["runs"]
        assert run["seed"] == "0" and run["settings"]["seed"] == 0 and run["seconds"] >= 1
        assert record["commits"] == [run["commit"]]
    second = run_command(command, tmp_path, environment, seconds=120)
    assert second.codes == [0] and "training:" not in second.stderrs[0], second.output
    assert json.loads(second.stdouts[0].splitlines()[-1]) == record
