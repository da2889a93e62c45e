"""`vico export`: a checkpoint as a folder that a model hub takes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vico.checkpoint.convert import check_adapter
from vico.checkpoint.export import export
from vico.checkpoint.format import Checkpoint
from vico.checkpoint.published import in_published_order
from vico.cli.model_card import Facts, model_card
from vico.cli.parser import OneLineParser, path_argument
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.output_dir import OutputDir
from vico.train.identity import NOT_IDENTITY
from vico.train.run_log import read_records
from vico.train.saved_run import read_for_evaluation

DESCRIPTION = (
    "Write the adapter of a checkpoint as a folder that a model hub takes: "
    "adapter_model.safetensors, adapter_config.json and README.md, a model card. --resume takes "
    "the folder. It holds no optimizer, no paths and no backbone. PEFT reads its config, but "
    "cannot load the adapter."
)


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="vico export", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=path_argument,
        help="a checkpoint folder, a published .pth file, or a run's folder: its best checkpoint",
    )
    parser.add_argument("target", metavar="DIR", type=path_argument, help="must not exist yet")
    parser.add_argument(
        "--base_model",
        metavar="ID",
        help="the LLaMA's name on the hub, such as meta-llama/Llama-2-7b (default: the name of its "
        "folder, which the card's metadata leaves out)",
    )
    parser.add_argument("--license", metavar="ID", help="of the adapter, for the card's metadata")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    for flag in ("base_model", "license"):
        value = getattr(flags, flag)
        if value is not None and (not value.strip() or not value.isprintable()):
            raise UserError(f"--{flag} {value!r}: must be a name")
    export_checkpoint(flags.checkpoint, flags.target, flags.base_model, flags.license)
    return 0


def export_checkpoint(
    source: Path, target: Path, base_id: str | None = None, license: str | None = None
) -> None:
    """Write `target`, which must not exist, and print what was done. Raises UserError."""
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; name another target, or remove it")
    require_writable(target.parent, "the target's folder")
    checkpoint = read_for_evaluation(source)
    check_adapter(checkpoint.weights, checkpoint.path)
    checkpoint = replace(checkpoint, weights=in_published_order(checkpoint.weights))
    settings = _settings(checkpoint)
    base_model = base_id or settings.get("model")
    if base_model is None:
        raise UserError(f"{source}: does not say which LLaMA it was trained on; give --base_model")
    facts = _facts(checkpoint, settings, target.absolute().name, base_model, base_id, license)
    export(checkpoint, target, base_model, settings, model_card(facts))
    for note in checkpoint.notes:
        log.info(note)
    log.info(
        f"{target}: {checkpoint.path} for a model hub, {len(checkpoint.weights)} tensors\n"
        f"read it: vico eval --resume {target}\nupload it: hf upload USER/{facts.name} {target}"
    )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that define the run; paths are the user's own and stay behind."""
    settings = {}
    for name, value in checkpoint.settings.items():
        if name not in NOT_IDENTITY and not isinstance(value, Path):
            settings[name] = value
    if model := checkpoint.settings.get("model"):
        settings["model"] = Path(model).name
    return settings


def _facts(
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    name: str,
    base_model: str,
    base_id: str | None,
    license: str | None,
) -> Facts:
    return Facts(
        name=name,
        base_model=base_model,
        base_id=base_id,
        license=license,
        dataset=settings.get("dataset"),
        step=checkpoint.state.step,
        settings=settings,
        fingerprints=checkpoint.fingerprints,
        shapes={name: list(value.shape) for name, value in checkpoint.weights.items()},
        **_results(checkpoint),
    )


def _results(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of Facts on the evaluation of the epoch that ended with this checkpoint.

    From the log of its run, which lies beside it; empty where there is no such line.
    """
    records = read_records(OutputDir(checkpoint.path.parent).epochs)
    ends = [record for record in records if record.get("step") == checkpoint.state.step]
    if not checkpoint.state.step or not ends:
        return {}
    last = ends[-1]
    split = "test" if "test_acc" in last else "val"
    prefix = f"{split}_"
    values = {key.removeprefix(prefix): v for key, v in last.items() if key.startswith(prefix)}
    counts = (values.pop("n", 0), values.pop("n_total", 0))
    accuracies = {k: v for k, v in values.items() if isinstance(v, float)}
    return {"split": split, "accuracies": accuracies, "num_questions": counts}


if __name__ == "__main__":  # `python -m vico.cli.export`, or this file
    from vico.cli.main import console

    console(command="export")
