"""The encoder of frames: transformers' numbers, from a local folder without code or pickle."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("transformers")

import transformers

from support.encoders import SIDE, make_clip, make_siglip
from support.errors import refusal
from support.videos import make_video
from vico.video.encoder import load_encoder
from vico.video.features import video_features
from vico.video.frames import decode_frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def processed(frames: list[Any], mean: Any, std: Any) -> torch.Tensor:
    """The pixels of transformers' own image processor."""
    side = {"height": SIDE, "width": SIDE}
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=side, image_mean=mean, image_std=std
    )
    return processor(list(frames), return_tensors="pt")["pixel_values"]


def test_clip_as_transformers(clip: Path, tmp_path: Path) -> None:
    """image_embeds of the same frames, by the whole CLIP model and its own image processor."""
    video = make_video(tmp_path / "a.mp4", num_frames=60)
    frames = np.concatenate(list(decode_frames(video, Fraction(10), SIDE)))
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(clip)(
        list(frames), return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.get_image_features(**pixels).pooler_output
    encoder = load_encoder(clip)
    got = encoder.encode(frames)
    assert got.shape == expected.shape == (24, encoder.width)
    assert torch.allclose(got, expected, atol=1e-5)
    features = video_features(video, encoder, Fraction(10))
    assert features.dtype == torch.float16 and features.norm(dim=1).min() > 1.01
    assert torch.cosine_similarity(features.float(), expected).min() > 0.9999


def test_siglip_as_transformers(tmp_path: Path) -> None:
    """The pooled output, with the mean and std of the folder."""
    folder = make_siglip(tmp_path / "siglip")
    frames = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    model = transformers.SiglipVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(processed(list(frames), [0.5] * 3, [0.5] * 3)).pooler_output
    encoder = load_encoder(folder)
    assert "usual" in encoder.notes[0]
    assert torch.allclose(encoder.encode(frames), expected, atol=1e-5)


def test_precision(clip: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    exact = load_encoder(clip).encode(frames)
    encoder = load_encoder(clip, precision="bf16")
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    rounded = encoder.encode(frames)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded).min() > 0.999


def test_all_of_an_encoder_is_on_its_device(clip: Path) -> None:
    """Here one without memory."""
    encoder = load_encoder(clip, device="meta")
    tensors = [*encoder.model.parameters(), encoder.mean, encoder.std]
    assert {tensor.device.type for tensor in tensors} == {"meta"} == {encoder.device.type}


def test_vision_tower_alone(clip: Path, tmp_path: Path) -> None:
    """A folder that holds the tower alone gives the same features."""
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    tower.save_pretrained(tmp_path / "tower")
    frames = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert torch.equal(
        load_encoder(tmp_path / "tower").encode(frames), load_encoder(clip).encode(frames)
    )


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_refused_folders(tmp_path: Path) -> None:
    """One line that says what is needed; no pickle and no code is run."""

    def refused(name: str, **changes: Any) -> str:
        folder = make_clip(tmp_path / name)
        edit(folder, "config.json", **changes)
        return refusal(load_encoder, folder)

    assert "no such folder" in refusal(load_encoder, tmp_path / "none")
    (tmp_path / "ViT-L-14.pt").write_bytes(b"PK")
    assert "TorchScript" in refusal(load_encoder, tmp_path / "ViT-L-14.pt")
    assert "model_type is 'bert'" in refused("type", model_type="bert")
    assert "vision_config is 3" in refused("part", vision_config=3)
    sizes = json.loads((tmp_path / "type" / "config.json").read_text())["vision_config"]
    assert "hidden_size is 10" in refused("huge", vision_config={**sizes, "hidden_size": 10**9})
    assert "cannot be loaded" in refused("other", vision_config={**sizes, "hidden_size": 64})
    folder = make_clip(tmp_path / "bin")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, whose pickle" in refusal(load_encoder, folder)
    folder = make_clip(tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "no whole safetensors file" in refusal(load_encoder, folder)
    folder = make_clip(tmp_path / "size")
    edit(folder, "preprocessor_config.json", crop_size={"height": 7, "width": 7})
    assert "crop_size is 7 pixels, where config.json has" in refusal(load_encoder, folder)
    edit(folder, "preprocessor_config.json", crop_size=SIDE, image_mean=[1, 2])
    assert "image_mean is [1, 2]" in refusal(load_encoder, folder)


def test_missing_projection(clip: Path, tmp_path: Path) -> None:
    """transformers would fill absent weights with random numbers."""
    tower = transformers.CLIPVisionModel.from_pretrained(clip)
    tower.save_pretrained(tmp_path / "tower")
    assert "visual_projection.weight" in refusal(load_encoder, tmp_path / "tower")


def test_not_finite(clip: Path, tmp_path: Path) -> None:
    encoder = load_encoder(clip)
    encoder.model.visual_projection.weight.data *= 1e6
    video = make_video(tmp_path / "a.mp4", num_frames=5)
    assert "not finite" in refusal(video_features, video, encoder, Fraction(1))
