"""What the files beside an encoder's weights may say, and what is taken where they are silent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("transformers")

import transformers
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from support.encoders import SIDE, SIZES, make_clip, make_siglip
from support.errors import refusal
from vico.video import encoder

PATH = Path("config.json")
KINDS = {
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
}


def settings(kind: str, **vision: Any) -> dict[str, Any]:
    whole = {"model_type": kind, "vision_config": vision}
    alone = {"model_type": f"{kind}_vision_model", **vision}
    found_kind, found = encoder._vision_settings(whole, PATH)
    assert (kind, found) == (found_kind, encoder._vision_settings(alone, PATH)[1])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_are_not_named(kind: str) -> None:
    """Those of transformers."""
    found, theirs = settings(kind), KINDS[kind]().to_dict()
    assert len(found) >= 8 and found == {key: theirs[key] for key in found}
    assert settings(kind, hidden_size=24, num_attention_heads=4)["hidden_size"] == 24


LARGEST = {
    "hidden_size": 16384,
    "intermediate_size": 65536,
    "projection_dim": 16384,
    "num_hidden_layers": 200,
    "num_attention_heads": 1024,
    "image_size": 2048,
    "patch_size": 256,
}


@pytest.mark.parametrize(("key", "largest"), LARGEST.items())
def test_sizes_are_bounded(key: str, largest: int) -> None:
    """A few bytes of a config cannot ask for more memory than the largest encoders take."""
    others = {"hidden_size": 1024, "num_attention_heads": 8, "image_size": 512, "patch_size": 16}
    others.pop(key, None)
    assert settings("clip", **others, **{key: largest})[key] == largest
    for wrong in (largest + 1, 0, -1, True, "8", 8.0, None):
        message = refusal(settings, "clip", **others, **{key: wrong})
        assert f"config.json: {key} is {wrong!r}; a whole number of 1 to {largest:,} is" in message


@pytest.mark.parametrize(
    ("kind", "wrong", "expected"),
    [
        ("clip", {"num_attention_heads": 5}, "num_attention_heads does not divide hidden_size"),
        ("clip", {"patch_size": 33}, "patch_size is larger than image_size"),
        ("clip", {"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; a number between 0 and 1"),
        ("clip", {"layer_norm_eps": 1.0}, "layer_norm_eps is 1.0; a number between 0 and 1"),
        ("clip", {"layer_norm_eps": 1}, "layer_norm_eps is 1; a number between 0 and 1"),
        ("siglip", {"vision_use_head": False}, "vision_use_head is off"),
    ],
)
def test_settings_that_no_encoder_has(kind: str, wrong: dict[str, Any], expected: str) -> None:
    assert settings(kind, **{**SIZES, "patch_size": SIDE})["patch_size"] == SIDE
    assert expected in refusal(settings, kind, **{**SIZES, **wrong})


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def preprocessing(folder: Path, kind: str = "clip") -> tuple[Any, ...]:
    return encoder._preprocessing(folder, kind, SIDE)


def test_preprocessing_that_no_file_names(tmp_path: Path) -> None:
    """OpenAI's for CLIP, and a half for SigLIP."""
    assert preprocessing(tmp_path) == (
        *map(tuple, (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)),
        1 / 255,
        None,
    )
    assert preprocessing(tmp_path, "siglip") == ((0.5,) * 3, (0.5,) * 3, 1 / 255, None)
    write(tmp_path, "preprocessor_config.json", {})
    assert preprocessing(tmp_path)[:2] == (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    assert preprocessing(tmp_path)[2:] == (1 / 255, tmp_path / "preprocessor_config.json")


def test_preprocessing_of_either_file(tmp_path: Path) -> None:
    """transformers 5 writes it into another; the older one is read where both are there."""
    values = {"image_mean": [0.1, 0, 1], "image_std": [0.5, 2, 1e6], "rescale_factor": 0.5}
    expected = ((0.1, 0.0, 1.0), (0.5, 2.0, 1e6), 0.5)
    write(tmp_path, "processor_config.json", {"image_processor": values})
    assert preprocessing(tmp_path) == (*expected, tmp_path / "processor_config.json")
    write(tmp_path, "preprocessor_config.json", {**values, "rescale_factor": 1.0})
    assert preprocessing(tmp_path)[2:] == (1.0, tmp_path / "preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path, "processor_config.json", {"image_processor": 3})
    assert "image_processor is 3, not a JSON object" in refusal(preprocessing, tmp_path)


@pytest.mark.parametrize("key", ["size", "crop_size"])
@pytest.mark.parametrize("form", [None, "number", "shortest_edge", "height"])
def test_the_side_in_every_form(key: str, form: str | None, tmp_path: Path) -> None:
    def said(side: int) -> Any:
        return side if form == "number" else {form: side}

    for side in (SIDE, SIDE + 1):
        write(tmp_path, "preprocessor_config.json", {key: None if form is None else said(side)})
        if side == SIDE or form is None:
            preprocessing(tmp_path)
        else:
            message = refusal(preprocessing, tmp_path)
            assert f"{key} is {SIDE + 1} pixels, where config.json has {SIDE}" in message


POSITIVE = "image_std and rescale_factor must be above 0"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image_mean": [1, 2, 3, 4]}, "image_mean is [1, 2, 3, 4]; three numbers are expected"),
        ({"image_mean": "123"}, "image_mean is '123'; three numbers are expected"),
        ({"image_std": [1, "2", 3]}, "image_std is [1, '2', 3]; three numbers are expected"),
        ({"image_std": [1, True, 3]}, "image_std is [1, True, 3]; three numbers are expected"),
        ({"image_mean": [0, 0, 10**400]}, "three numbers are expected"),
        ({"image_mean": [0, -1.01e6, 0]}, "three numbers are expected"),
        ({"image_std": [1, 0, 1]}, POSITIVE),
        ({"image_std": [1, 1, -1]}, POSITIVE),
        ({"rescale_factor": 0.0}, POSITIVE),
        ({"rescale_factor": 1.01}, POSITIVE),
        ({"rescale_factor": 1}, POSITIVE),
        ({"rescale_factor": "1"}, POSITIVE),
    ],
)
def test_wrong_preprocessing(values: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", values)
    assert expected in refusal(preprocessing, tmp_path)


@pytest.mark.parametrize("has_bar", [True, False])
def test_transformers_speaks_as_before(has_bar: bool) -> None:
    verbosity = logging.get_verbosity()
    (logging.enable_progress_bar if has_bar else logging.disable_progress_bar)()
    try:
        logging.set_verbosity_info()
        with encoder._silent(logging):
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == has_bar
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def test_what_an_encoder_says_of_itself(tmp_path: Path) -> None:
    """Its digest covers every file that decides a feature."""
    folder = make_clip(tmp_path / "clip", width=24)
    found = encoder.load_encoder(folder)
    assert (found.kind, found.size, found.width, found.notes) == ("clip", SIDE, 24, ())
    assert found.mean.shape == found.std.shape == (3, 1, 1) and found.dtype == torch.float32
    assert not found.model.training and found.device == torch.device("cpu")
    digests = {found.digest}
    for name in ("config.json", "preprocessor_config.json"):
        path = folder / name
        path.write_text(path.read_text() + "\n")
        digests.add(encoder.load_encoder(folder).digest)
    assert len(digests) == 3
    write(folder, "adapter_config.json", {})
    assert "holds an adapter" in refusal(encoder.load_encoder, folder)
    (tmp_path / "file").write_bytes(b"x")
    assert "file: a file; name a folder" in refusal(encoder.load_encoder, tmp_path / "file")
    siglip = encoder.load_encoder(make_siglip(tmp_path / "siglip"))
    assert (siglip.kind, siglip.width, len(siglip.notes)) == ("siglip", SIZES["hidden_size"], 1)
