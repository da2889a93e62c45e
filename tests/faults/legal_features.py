"""Features in the containers that people have: the same numbers as the feature file's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from faults.damage import Damage, pth
from support.run_fixture import FEATURES, RunFixture
from vico.io.safe_load import load_tensors

SAFE = "features.safetensors"


def features_as(change: Callable[[torch.Tensor], Any]) -> Damage:
    return pth(FEATURES, lambda videos: {name: change(value) for name, value in videos.items()})


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


def elsewhere(write: Callable[[dict[str, torch.Tensor], Path], object]) -> Damage:
    """The features in another container, without the file of the known name."""

    def damage(fixture: RunFixture) -> None:
        path = fixture.folder / FEATURES
        videos = load_tensors(path, "the features")
        write({name: value.clone() for name, value in videos.items()}, path.parent)
        path.unlink()

    return damage


def as_npy(videos: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "features").mkdir()
    for name, value in videos.items():
        np.save(folder / "features" / f"{name}.npy", value.numpy())


FEATURE_FORMATS: dict[str, Damage] = {
    "features, numpy arrays": features_as(lambda v: v.numpy()),
    "features, numpy arrays of the other byte order": features_as(lambda v: swapped(v.numpy())),
    "features, lists of frames": features_as(list),
    "features, lists of numpy arrays": features_as(lambda v: list(v.numpy())),
    "features, ids with folder and extension": pth(
        FEATURES, lambda videos: {f"0101/{name}.mp4": value for name, value in videos.items()}
    ),
    "features, a folder of each video": pth(
        FEATURES, lambda videos: {f"{name}/features": value for name, value in videos.items()}
    ),
    "features, safetensors": elsewhere(lambda videos, folder: save_file(videos, folder / SAFE)),
    "features, a folder of .npy": elsewhere(as_npy),
}
