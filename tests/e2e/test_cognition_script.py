"""launch/examples/cognition.sh in small: a random LLaMA of ten layers, a step of each training."""

import json
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

pytest.importorskip("av")
pytest.importorskip("transformers")

from support.backbones import make_hugging_face
from support.processes import ROOT, base_environment, run_command
from vico.cli.demo_llama import make_tokenizer

sys.path.insert(0, str(ROOT / "launch" / "examples"))
import cognition
import videos

SCRIPT = ROOT / "launch" / "examples" / "cognition.sh"

TINY = {"num_hidden_layers": 10, "hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    """It ends with its record; a second call trains nothing again."""
    llama = tmp_path / "tiny"
    llama.mkdir()
    make_tokenizer(llama / "tokenizer.model", 0, videos.DOMAIN)
    pieces = SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    sizes = {"vocab_size": len(pieces), "intermediate_size": 96}
    make_hugging_face(llama, TINY | sizes)
    environment = base_environment(VICO_EXAMPLE_STEPS="1")
    command = ["bash", str(SCRIPT), "--smollm2", str(llama), "out"]
    first = run_command(command, tmp_path, environment, seconds=500)
    assert first.codes == [0], first.output
    record = json.loads(first.stdouts[0].splitlines()[-1])
    assert [case["name"] for case in record["cases"]] == ["frozen", *cognition.ROWS]
    assert {case["steps"] for case in record["cases"][1:]} == {1}
    assert record["commits"] == [record["git_commit"]]
    seconds = [case["seconds"] for case in record["cases"][1:]]
    assert min(seconds) >= 1 and record["seconds"] == sum(seconds)
    assert {case["settings"]["max_steps"] for case in record["cases"][1:]} == {1}
    second = run_command(command, tmp_path, environment, seconds=60)
    assert second.codes == [0] and "training:" not in second.stderrs[0], second.output
    assert json.loads(second.stdouts[0].splitlines()[-1]) == record
    assert len(list((tmp_path / "out").glob("cognition-*.json"))) == 1
