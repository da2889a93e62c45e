"""What a checkpoint's files hold, to the byte, and the bounds and words of what is refused."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from support.checkpoints import same
from support.errors import refusal
from vico.checkpoint import published
from vico.checkpoint.format import PublishedOptimizer, TrainState, with_checksum
from vico.checkpoint.read import read
from vico.checkpoint.write import RunIdentity, save
from vico.io.paths import MAX_BYTES

PATH = Path("c.pth")
WEIGHTS, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
OLDER = "use another checkpoint; without this one, its run resumes from its next older one"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- state.json ---------------------------------------------------------------------------------


def test_the_text_of_a_state() -> None:
    """One key a line, and the sum of its one-line form with sorted keys."""
    checksum = sha256(b'{"a": [2], "b": 1}')
    expected = f'{{\n "b": 1,\n "a": [\n  2\n ],\n "sha256": "{checksum}"\n}}'
    assert with_checksum({"b": 1, "a": [2]}) == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of step 3 and run "r"."""
    state = TrainState(3, 8, 2, None, [0.5], [4], True)
    run = RunIdentity("r", {"lr": 0.1}, {"data": "f"})
    save(tmp_path / "checkpoint-3", {"w": torch.ones(2)}, {"w.m": torch.zeros(2)}, state, run)
    return tmp_path / "checkpoint-3"


def test_what_a_state_holds(folder: Path) -> None:
    record = json.loads((folder / "state.json").read_text())
    record.pop("sha256")
    files = {}
    for name in (WEIGHTS, OPTIMIZER):
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": sha256(data)}
    assert list(record.items()) == [
        ("format", 1),
        ("run", "r"),
        (
            "progress",
            {
                "step": 3,
                "questions_per_step": 8,
                "num_updates": 2,
                "best_accuracy": None,
                "epoch_loss_sums": [0.5],
                "epoch_target_counts": [4],
                "evaluation_due": True,
            },
        ),
        ("settings", {"lr": 0.1}),
        ("fingerprints", {"data": "f"}),
        ("files", files),
    ]
    found = read(folder, "r")
    assert (found.settings, found.fingerprints) == ({"lr": 0.1}, {"data": "f"})
    assert found.digest == sha256(json.dumps(record, sort_keys=True).encode())
    assert read(folder).state == TrainState(3, 8, 2, None, [0.5], [4], True)
    assert read(folder / WEIGHTS).digest == files[WEIGHTS]["sha256"]


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries of the state, with a right checksum; None: leave it out."""
    record = json.loads((folder / "state.json").read_text())
    record.pop("sha256")
    record = {k: v for k, v in {**record, **changes}.items() if v is not None}
    (folder / "state.json").write_text(with_checksum(record))


def test_whose_checkpoint_it_is(folder: Path) -> None:
    """One that records no run may be of any, and one that records no fingerprints has none."""
    message = refusal(read, folder, "s")
    where = "so it was copied here; move it away"
    assert message == f"{folder}: is of another run ('r' and not s), {where}"
    rewrite(folder, run=None, fingerprints=None)
    assert read(folder, "s").fingerprints == {}


PROGRESS = {"step": 3, "questions_per_step": 8, "num_updates": 2, "best_accuracy": None}
PROGRESS |= {"epoch_loss_sums": [], "epoch_target_counts": [], "evaluation_due": False}
BAD_STATES: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "'format' is 2 and not 1, so another version wrote it"),
    ({"format": None}, "'format' is None and not 1, so another version wrote it"),
    ({"settings": 3}, "'settings' is 3 and must be an object"),
    ({"files": [1]}, "'files' is [1] and must be an object"),
    ({"fingerprints": "x"}, "'fingerprints' is 'x' and must be an object"),
    ({"progress": None}, "'progress' is None and must be an object"),
    ({"progress": {**PROGRESS, "step": -1}}, "the entry 'step' is missing, unknown or of another"),
    ({"progress": {**PROGRESS, "more": 1}}, "the entry 'more' is missing, unknown or of another"),
    ({"progress": {"step": 3}}, "the entry 'questions_per_step' is missing, unknown or of another"),
    ({"files": {WEIGHTS: {}}}, f"the entry '{OPTIMIZER}' is missing, unknown or of another"),
    ({"files": {OPTIMIZER: {}}}, f"the entry '{WEIGHTS}' is missing, unknown or of another"),
    ({"fingerprints": {"a": "x", "b": 1}}, "the entry 'b' is missing, unknown or of another"),
]


@pytest.mark.parametrize(("changes", "said"), BAD_STATES, ids=str)
def test_entries_of_a_state(folder: Path, changes: dict[str, Any], said: str) -> None:
    rewrite(folder, **changes)
    kind = " kind" if said.endswith("another") else ""
    assert refusal(read, folder) == f"{folder / 'state.json'}: {said}{kind}; {OLDER}"


def test_a_damaged_folder(folder: Path) -> None:
    """By size, sum and content; a hidden file is no part of it, and any other is one too many."""
    (folder / ".nfs1").write_text("")
    assert read(folder).state.step == 3
    (folder / "b").write_text("")
    (folder / "a").write_text("")
    said = "holds 'a', which is no part of a checkpoint; move it away"
    assert refusal(read, folder) == f"{folder}: {said}"
    for name in "ab":
        (folder / name).unlink()
    path = folder / WEIGHTS
    data = path.read_bytes()
    for other, fault in (
        (data[:-1], f"{len(data) - 1} of {len(data)} bytes"),
        (data[:-1] + b"x", "its sha256 is not the recorded one"),
        (data + b"x", f"{len(data) + 1:,} bytes, where at most {len(data):,} are expected"),
    ):
        path.write_bytes(other)
        assert refusal(read, folder) == f"{path}: damaged ({fault}); {OLDER}"
    path.unlink()
    assert refusal(read, folder) == f"{path}: damaged (No such file or directory); {OLDER}"
    (folder / "state.json").write_text((folder / "state.json").read_text() + "\n")
    damaged = "damaged (its sha256 is not the recorded one)"
    assert refusal(read, folder) == f"{folder / 'state.json'}: {damaged}; {OLDER}"


def test_a_size_that_no_file_has(folder: Path) -> None:
    """A recorded size that is none, or more than is ever read, allows what any file may have."""
    path = folder / WEIGHTS
    for size in ("x", MAX_BYTES + 1):
        rewrite(folder, files={WEIGHTS: {"bytes": size}, OPTIMIZER: {}})
        fault = f"{path.stat().st_size} of {size!r} bytes"
        assert refusal(read, folder) == f"{path}: damaged ({fault}); {OLDER}"
    rewrite(folder, files={WEIGHTS: {"bytes": MAX_BYTES + 1}, OPTIMIZER: {}})
    os.truncate(path, MAX_BYTES + 1)
    fault = f"{MAX_BYTES + 1:,} bytes, where at most {MAX_BYTES:,} are expected"
    assert refusal(read, folder) == f"{path}: damaged ({fault}); {OLDER}"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    hint = "--resume takes a checkpoint folder or a .pth file"
    assert refusal(read, path) == f"{path}: no such checkpoint; {hint}"
    path.mkdir()
    said = f"{path / 'state.json'}: no such file; "
    assert refusal(read, path) == f"{said}a checkpoint is a folder with state.json"
    (path / "args.json").write_text("{}")
    assert refusal(read, path) == f"{said}this run has saved no checkpoint"


# ---- exports ------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {"format": 1, "settings": {}, "fingerprints": {}, "files": {}}
EXPORT = "fetch or export it again"
BAD_EXPORTS: list[tuple[dict[str, Any], str]] = [
    (
        {"peft_type": "LORA"},
        "is of another kind of adapter ('peft_type' is 'LORA'): it has no 'vico' in "
        "'auto_mapping'; name a folder of `vico export`",
    ),
    (
        {"auto_mapping": {"vico": {**RECORD, "format": 2}}},
        "'format' is 2 and not 1, so another version wrote it; export again with this one",
    ),
    (
        {"auto_mapping": {"vico": {**RECORD, "files": None}}},
        f"'files' is None and must be an object; {EXPORT}",
    ),
    (
        {"auto_mapping": {"vico": RECORD}},
        f"'{WEIGHTS}' is None and must be an object; {EXPORT}",
    ),
    (
        {"auto_mapping": {"vico": {**RECORD, "files": {WEIGHTS: {}}, "settings": 1}}},
        f"'settings' is 1 and must be an object; {EXPORT}",
    ),
    (
        {"auto_mapping": {"vico": {**RECORD, "files": {WEIGHTS: {}}, "fingerprints": {"a": 1}}}},
        f"'a' is no text; {EXPORT}",
    ),
]


@pytest.mark.parametrize(("content", "said"), BAD_EXPORTS, ids=["kind", *"12345"])
def test_bad_exports(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(content))
    assert refusal(read, tmp_path) == f"{config}: {said}"


def test_a_good_export(tmp_path: Path) -> None:
    data = safetensors.torch.save({"w": torch.ones(2)})
    (tmp_path / WEIGHTS).write_bytes(data)
    files = {WEIGHTS: {"bytes": len(data), "sha256": sha256(data)}}
    record = {**RECORD, "settings": {"lr": 1}, "fingerprints": {"a": "f"}, "files": files}
    config = {"auto_mapping": {"vico": record}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read(tmp_path)
    assert (found.settings, found.fingerprints, found.moments) == ({"lr": 1}, {"a": "f"}, None)
    assert found.digest == sha256(json.dumps(record, sort_keys=True).encode())
    assert same(found.weights, {"w": torch.ones(2)})


# ---- published files ----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [-1, 10**6, True, 1.0, "1"])
def test_epochs_that_are_none(epoch: Any) -> None:
    said = f"c.pth: 'epoch' is {epoch!r}, not a whole number below 1,000,000"
    assert refusal(published._optimizer, {"optimizer": {}, "epoch": epoch}, PATH) == said


def test_which_optimizers_are_taken() -> None:
    for epoch in (0, 10**6 - 1):
        found, notes = published._optimizer({"optimizer": {}, "epoch": epoch}, PATH)
        assert found == PublishedOptimizer(epoch, {}) and notes == ()
    assert published._optimizer({"epoch": -1}, PATH) == (None, ())
    without = "the file has no 'epoch', which says where to go on"
    note = f"c.pth: its 'optimizer' is not used: {without}; training starts anew from 'model'"
    assert published._optimizer({"optimizer": {}}, PATH) == (None, (note,))


def adam(*steps: int, shape: tuple[int, ...] = (2,)) -> dict[int, dict[str, Any]]:
    """A state of AdamW for each of these steps."""
    zeros = torch.zeros(shape)
    return {i: {"step": n, "exp_avg": zeros, "exp_avg_sq": zeros} for i, n in enumerate(steps)}


def moments_of(*steps: int, **options: Any) -> Any:
    names = [str(i) for i, _ in enumerate(steps)]
    states = adam(*steps, **options)
    optimizer = {"param_groups": [{"params": [i]} for i in states], "state": states}
    weights = {name: torch.zeros(2) for name in names}
    return published.adam_moments(PublishedOptimizer(1, optimizer), names, weights)


def test_steps_of_an_optimizer() -> None:
    """One of all tensors, and a number that a run can reach."""
    for step in (1, 10**12 - 1):
        moments, num_updates = moments_of(step, step)
        assert num_updates == step
        assert sorted(moments) == ["0.exp_avg", "0.exp_avg_sq", "1.exp_avg", "1.exp_avg_sq"]
    for steps in ([0], [10**12], [3, 4], [1, 2, 3, 4, 5]):
        assert moments_of(*steps) == f"it holds states of steps {steps}, not of one"
    assert moments_of(7, 6, 5, 4, 3, 2) == "it holds states of steps [2, 3, 4, 5, 6], not of one"


def test_states_that_are_not_adams() -> None:
    none = "it holds no state of AdamW, because it is empty"
    assert moments_of() == none
    wrong = "the exp_avg of 0 has shape [3], and the tensor [2]"
    assert moments_of(1, shape=(3,)) == wrong
    of_other = "it holds no state of AdamW for the tensors of 'model'"
    assert published.adam_moments(PublishedOptimizer(1, [1]), ["a"], {}) == of_other
    state = adam(1)
    optimizer = PublishedOptimizer(1, {"param_groups": [{"params": [0]}], "state": state})
    assert published.adam_moments(optimizer, "ab", {}) == "it is of 1 tensors, and 'model' has 2"
    lacks = published.adam_moments(optimizer, "a", {"b": torch.zeros(2)})
    assert lacks == "it lacks the state of b"
    for changed in ({**state[0], "max_exp_avg_sq": 0}, {"step": 1, "exp_avg": 0}):
        state[0] = changed
        said = f"it holds {', '.join(changed)} where AdamW's has step, exp_avg, exp_avg_sq"
        assert published.adam_moments(optimizer, "a", {"a": torch.zeros(2)}) == said


def test_the_order_of_a_published_file() -> None:
    """Gates by the number of their layer; each tensor has a storage of its own."""
    first = ["adapter_query.weight", "visual_proj.weight", "temporal_emb.weight"]
    gates = [f"layers.{i}.attention.gate{j}" for i in (2, 10) for j in (1, 2)]
    whole = torch.arange(14.0).reshape(7, 2)
    weights = {name: whole[i] for i, name in enumerate(reversed([*first, *gates]))}
    ordered = published.in_published_order(weights)
    assert list(ordered) == [*first, *gates] and same(ordered, weights)
    assert {tensor.untyped_storage().nbytes() for tensor in ordered.values()} == {8}
    args = published._plain_settings({"a": 1, "b": [1], 3: "c", "d": None, "e": "x", "f": True})
    assert args == {"a": 1, "e": "x", "f": True} and published._plain_settings([1]) == {}
