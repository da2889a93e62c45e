"""Features in other containers than one .pth file, with faults: what the error must say.

What an HDF5 file names outside itself is a pipe here: whoever opens it waits without end.
"""

import importlib.util
import io
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from faults.case import EVAL, Case, flags, refused
from faults.damage import HTML, Damage, Payload, both, cut, gone, pipe, put
from faults.damage_tables import star, star_item
from support.run_fixture import CHECKPOINT, FEATURES, RunFixture
from vico.io.safe_load import load_tensors

VIDEO = "000001"
ZEROS = np.zeros((3, 768), np.float32)
Videos = dict[str, torch.Tensor]


def videos_of(fixture: RunFixture) -> Videos:
    videos = load_tensors(fixture.folder / FEATURES, "the features")
    return {name: value.float().clone() for name, value in videos.items()}


def folder_of(damage: Damage, *parts: str) -> Case:
    """A folder `f` with a .npy file per video, damaged."""

    def write(fixture: RunFixture) -> None:
        (fixture.folder / "f").mkdir()
        for name, value in videos_of(fixture).items():
            np.save(fixture.folder / "f" / f"{name}.npy", value.numpy())

    return refused(both(write, damage), *parts, line="--features {fixture}/f")


def put_npy(name: str, content: Any) -> Damage:
    """A file of this content: bytes, or an array."""
    file = io.BytesIO()
    if not isinstance(content, bytes):
        np.save(file, content, allow_pickle=True)
        content = file.getvalue()
    return put(f"f/{name}", content)


def npy(name: str, content: Any, *parts: str) -> Case:
    """The folder with one file of this content."""
    return folder_of(put_npy(name, content), *parts)


def one_file(name: str, write: Callable[[RunFixture], Any], *parts: str) -> Case:
    return refused(write, *parts, line=f"--features {{fixture}}/{name}")


def safe(**changes: torch.Tensor) -> Damage:
    """f.safetensors with these videos changed."""
    return lambda fixture: save_file(
        {**videos_of(fixture), **changes}, fixture.folder / "f.safetensors"
    )


def narrow(fixture: RunFixture) -> None:
    """All features 512 wide."""
    videos = {name: value[:, :512].clone() for name, value in videos_of(fixture).items()}
    save_file(videos, fixture.folder / "f.safetensors")


def two_files(fixture: RunFixture) -> None:
    path = fixture.folder / FEATURES
    shutil.copy(path, path.with_name("features_a.pth"))
    path.rename(path.with_name("features_b.pth"))


CONTAINERS: dict[str, Case] = {
    "npy, Python objects": npy(
        f"{VIDEO}.npy", np.array([Payload()], object), "f/000001.npy: an array of Python objects, r"
    ),
    "npy, cut off": npy(
        f"{VIDEO}.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr'", "000001.npy: is no whole .npy file ("
    ),
    "npy, fewer numbers than claimed": folder_of(
        cut(f"f/{VIDEO}.npy", 1000),
        "f/000001.npy: the video feature file claims ",
        "bytes of numbers and holds 872; fetch",
    ),
    "npy, HTML": npy(
        f"{VIDEO}.npy", HTML.encode(), "000001.npy: the video feature file is an HTML"
    ),
    "npy, empty": npy(f"{VIDEO}.npy", b"", "is cut off (0 bytes), no numpy file; copy it again"),
    "npy, texts": npy(f"{VIDEO}.npy", np.array(["a"]), "an array of <U1, not of floating-point"),
    "npy, integers": npy(f"{VIDEO}.npy", ZEROS.astype(np.int32), "'000001' ([3, 768] int32)"),
    "npy, no frame": npy(f"{VIDEO}.npy", ZEROS[:0], "'000001' ([0, 768] float32); extract them"),
    "npy, one dimension": npy(f"{VIDEO}.npy", ZEROS[0], "'000001' ([768] float32); extract them"),
    "npy, patches": npy(f"{VIDEO}.npy", ZEROS[None], "'000001' ([1, 3, 768] float32); extract"),
    "npy, another width": npy(
        f"{VIDEO}.npy",
        ZEROS[:, :512],
        "have features that are no floating-point tensor [frames >= 1, 768], e.g. '000001' ([3, 5",
    ),
    "npy, a pipe": folder_of(
        pipe(f"f/{VIDEO}.npy"),
        "f/000001.npy: the video feature file cannot be opened (a device or a pipe",
    ),
    "npy, one video missing": folder_of(
        gone(f"f/{VIDEO}.npy"),
        "{fixture}/f: 5 of 20 questions (1 videos) have no features, e.g. '000001'; extract them",
    ),
    "npy and pt of one video": npy(
        f"{VIDEO}.pt", b"", "{fixture}/f: 000001.npy and 000001.pt are both of one video; keep one"
    ),
    "npy, a video in two folders": folder_of(
        both(
            gone(f"f/{VIDEO}.npy"),
            put_npy(f"a/{VIDEO}.npy", ZEROS),
            put_npy(f"b/{VIDEO}.mp4.npy", ZEROS),
        ),
        "may both be video '000001'; keep one",
    ),
    "features as .npz": one_file(
        "f.npz", put("f.npz", b""), "f.npz: one array cannot say which video is which; name the fol"
    ),
    "features as text": one_file(
        "f.txt", put("f.txt", "0.1 0.2\n"), "f.txt: the video feature file is cut off or damaged"
    ),
    "features of nowhere": flags(
        "--features {fixture}/nowhere",
        "--features {fixture}/nowhere: no such file or folder, and ",
    ),
    "features of two names": refused(
        two_files, "nextqa: holds features_a.pth and features_b.pth; say which by --features PATH"
    ),
    "features of one data set for two": refused(
        star([star_item()]),
        "must be NAME=PATH[,NAME=PATH], since there are several data sets",
        line=f"--dataset nextqa,star --features {{fixture}}/{FEATURES}",
    ),
    "safetensors features, HTML": one_file(
        "f.safetensors",
        put("f.safetensors", HTML),
        "f.safetensors: the video feature file is an HT",
    ),
    "safetensors features, cut off": one_file(
        "f.safetensors",
        both(safe(), cut("f.safetensors", 9999)),
        "f.safetensors: the video feature file is no safetensors file (",
    ),
    "safetensors features, none": one_file(
        "f.safetensors",
        lambda fixture: save_file({}, fixture.folder / "f.safetensors"),
        "f.safetensors: the video feature file holds no tensor; fetch the right file",
    ),
    "safetensors features, fp8": one_file(
        "f.safetensors",
        safe(**{VIDEO: torch.ones(3, 768).to(torch.float8_e4m3fn)}),
        "e.g. '000001' ([3, 768] float8_e4m3fn)",
    ),
    "features of another width than the checkpoint's": refused(
        narrow,
        "checkpoint-1: was trained on features 768 wide, and these are 512 wide; name those of the",
        line=f"{EVAL}{CHECKPOINT} --features {{fixture}}/f.safetensors",
        code=3,
    ),
    "features at another frame rate": refused(
        star([star_item(start=600, end=620)]),
        "star/clipvitl14.pth: the clips of all 1 questions begin past the end of their videos'",
        "at frame 600 of ",
        line="--dataset star",
    ),
}


# ---- HDF5 ---------------------------------------------------------------------------------------


def h5(change: Callable[[Any, RunFixture], Any], *parts: str) -> Case:
    """f.h5 without VIDEO, changed; beside it lies the pipe `p`."""

    def write(fixture: RunFixture) -> None:
        import h5py

        os.mkfifo(fixture.folder / "p")
        with h5py.File(fixture.folder / "f.h5", "w") as file:
            for name, value in videos_of(fixture).items():
                if name != VIDEO:
                    file[name] = value.numpy()
            change(file, fixture)

    return one_file("f.h5", write, *parts)


def linked(file: Any, fixture: RunFixture) -> None:
    import h5py

    file[VIDEO] = h5py.ExternalLink(str(fixture.folder / "p"), "x")


def linked_softly(file: Any, fixture: RunFixture) -> None:
    """By a soft link to a link to another file."""
    import h5py

    file["away"] = h5py.ExternalLink(str(fixture.folder / "p"), "/")
    file[VIDEO] = h5py.SoftLink(f"/away/{VIDEO}")


def stored_elsewhere(file: Any, fixture: RunFixture) -> None:
    place = [(str(fixture.folder / "p"), 0, ZEROS.nbytes)]
    file.create_dataset(VIDEO, ZEROS.shape, "f4", external=place)


def virtual(file: Any, fixture: RunFixture) -> None:
    import h5py

    layout = h5py.VirtualLayout(ZEROS.shape, "f4")
    layout[:] = h5py.VirtualSource(str(fixture.folder / "p"), "x", ZEROS.shape)
    file.create_virtual_dataset(VIDEO, layout)


def ids_elsewhere(file: Any, fixture: RunFixture) -> None:
    """One dataset of all videos, whose ids lie in another file."""
    file.clear()
    file["features"] = ZEROS[None]
    file.create_dataset("ids", (1,), "S6", external=[(str(fixture.folder / "p"), 0, 6)])


def objects(file: Any, fixture: RunFixture) -> None:
    import h5py

    file.create_dataset(VIDEO, (3,), h5py.vlen_dtype(np.float32))


def filtered(file: Any, fixture: RunFixture) -> None:
    """A chunk that a filter is said to have packed, which no library has."""
    import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(ZEROS.shape)
    properties.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(ZEROS.shape)
    kind = h5py.h5t.IEEE_F32LE
    dataset = h5py.h5d.create(file.id, VIDEO.encode(), kind, space, properties)
    dataset.write_direct_chunk((0, 0), ZEROS.tobytes())


def unpacks_to_much(file: Any, fixture: RunFixture) -> None:
    file.create_dataset(VIDEO, (100_000, 768), "f4", chunks=(1, 768), compression="gzip")


ELSEWHERE = "f.h5: '000001' lies in another file, which is not read; copy it into this one"
MISSING = "f.h5: 5 of 20 questions (1 videos) have no features, e.g. '000001'; extract them"
HDF5: dict[str, Case] = {
    "h5, HTML": one_file("f.h5", put("f.h5", HTML), "f.h5: the video feature file is an HTML page"),
    "h5, text": one_file(
        "f.h5", put("f.h5", "0.1 " * 9), "f.h5: the video feature file is no whole HDF5 file ("
    ),
    "h5, empty of datasets": h5(
        lambda file, _: file.clear(), "f.h5: the video feature file holds no"
    ),
    "h5, a link to another file": h5(linked, MISSING),
    "h5, a soft link to another file": h5(linked_softly, MISSING),
    "h5, numbers in another file": h5(stored_elsewhere, ELSEWHERE),
    "h5, ids in another file": h5(
        ids_elsewhere, "f.h5: 'ids' lies in another file, which is not read; copy it into this one"
    ),
    "h5, a virtual dataset": h5(virtual, ELSEWHERE),
    "h5, a compound type": h5(
        lambda file, _: file.create_dataset(VIDEO, (3, 768), [("x", "f4"), ("y", "f4")]),
        "e.g. '000001' ([3, 768] [('x', '<f4'), ('y', '<f4')])",
    ),
    "h5, objects": h5(objects, "e.g. '000001' ([3] object)"),
    "h5, a filter that is not there": h5(filtered, "f.h5: '000001' cannot be read ("),
    "h5, much from nothing": h5(unpacks_to_much, "f.h5: '000001' claims 307,200,000 bytes and hol"),
    "h5, one dimension": h5(
        lambda file, _: file.create_dataset(VIDEO, data=ZEROS[0]), "e.g. '000001' ([768] float32)"
    ),
}
if importlib.util.find_spec("h5py") is None:  # it comes with an extra
    HDF5.clear()
CONTAINERS |= HDF5
