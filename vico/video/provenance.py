"""What made a file of features: FEATURES.encoder.json beside it, as `vico extract` writes it.

The features stay a plain dict of tensors, which other programs read. Without this file nothing is
known of them.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from vico.errors import fail, show
from vico.io.atomic import write_json
from vico.io.paths import exists, is_folder
from vico.io.text import read_json_object

SUFFIX = ".encoder.json"


@dataclass(frozen=True)
class Provenance:
    """`digest`: sha256 of the encoder's files. `fps`: frames per second."""

    encoder: str  # the name of its folder
    digest: str
    fps: Fraction


def path_of(features: Path) -> Path:
    return features.with_name(features.name + SUFFIX)


def write(features: Path, made: Provenance) -> None:
    """For features that have been written. Raises DiskError."""
    values = {"encoder": made.encoder, "encoder_sha256": made.digest, "fps": str(made.fps)}
    write_json(path_of(features), {**values, "bytes": _num_bytes(features)})


def read(features: Path) -> Provenance | None:
    """None where nothing is known: no record, or one of other features under this name.

    Raises UserError for a damaged record.
    """
    path = path_of(features)
    if not exists(path) or not exists(features):
        return None
    values = read_json_object(path, "the record of the features' encoder")
    try:
        made = Provenance(
            str(values["encoder"]), str(values["encoder_sha256"]), Fraction(values["fps"])
        )
        num_bytes = values["bytes"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
        fail(
            f"{path}: {show(str(problem))}: encoder, encoder_sha256, fps and bytes are expected; "
            "remove it, or extract the features again"
        )
    return made if num_bytes == _num_bytes(features) else None


def _num_bytes(features: Path) -> int | None:
    """None of a folder."""
    return None if is_folder(features) else features.stat().st_size
