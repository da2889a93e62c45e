"""sha256 digests as hexadecimal text, for checkpoints, caches and comparisons between ranks.

Checkpoints and the user's cache store these values: the digest of a given input must never change.
`length` is the number of hexadecimal digits to keep, at most 64.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from vico.io.paths import open_to_read

FULL_LENGTH = 64
CHUNK_BYTES = 1 << 24  # of a file in memory at a time
SHORT_LENGTH = 8  # enough to tell two versions of a file apart in a message


def digest_chunks(chunks: Iterable[bytes | memoryview], length: int = FULL_LENGTH) -> str:
    """The digest of all chunks joined, without holding them in memory together."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:length]


def digest_bytes(data: bytes | memoryview, length: int = FULL_LENGTH) -> str:
    return digest_chunks([data], length)


def digest_text(text: str, length: int = FULL_LENGTH) -> str:
    """The digest of `text` in UTF-8."""
    return digest_chunks([text.encode()], length)


def digest_json(value: object, length: int = FULL_LENGTH, sort_keys: bool = True) -> str:
    """The digest of `value` as JSON text. Raises TypeError for what JSON cannot hold."""
    return digest_text(json.dumps(value, sort_keys=sort_keys), length)


def digest_files(paths: Iterable[Path], length: int = FULL_LENGTH) -> str:
    """The digest of the contents of all files joined. Raises OSError."""
    return digest_chunks(chain.from_iterable(map(_read_chunks, paths)), length)


def _read_chunks(path: Path) -> Iterator[bytes]:
    with open_to_read(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
