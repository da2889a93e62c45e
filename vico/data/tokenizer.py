"""A LLaMA's tokenizer as the method needs it: ids, where pieces end in the text, three special
ids.

The kind of a file is recognised by its content: sentencepiece (LLaMA-1 and 2), tiktoken's lines of
base64 (LLaMA-3 as Meta gives it) or Hugging Face's tokenizer.json. No kind takes a special token's
name in a text for the token.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from vico.data import special_tokens, tokenizer_json
from vico.errors import UserError
from vico.io.digest import digest_chunks
from vico.io.paths import exists, read_bytes
from vico.io.safe_load import failed_download
from vico.io.text import parse_json

# A folder that holds both has the same tokenizer twice; the first is the original.
FILE_NAMES = ("tokenizer.model", "tokenizer.json")
ALL_FILES = FILE_NAMES + special_tokens.FILE_NAMES  # that a tokenizer depends on
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# LLaMA-3 as Meta published it: how a text is cut before pieces are merged...
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ...and how many special tokens follow the others.
LLAMA_3_SPECIAL = 256
# A newline as its own piece: as text, in a byte-level vocabulary, as sentencepiece's byte.
NEWLINES = ("\n", "\u010a", "<0x0A>")


class Backend(Protocol):
    """What each kind of tokenizer provides."""

    vocab_size: int
    bos: int  # negative: there is none
    eos: int
    adds_bos: bool  # whether its makers put BOS before every text

    def encode(self, text: str) -> list[int]: ...

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def find_id(self, piece: str) -> int | None: ...

    def name_of(self, token: int) -> str: ...


class Tokenizer:
    """Encodes text without BOS and EOS.

    Raises UserError for a file that is no tokenizer, or one without EOS or a newline piece. Where
    there is no BOS, `bos` is the id of EOS.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._backend = _open_backend(_read(path), path)
        self.vocab_size = self._backend.vocab_size
        self.bos, self.eos = self._backend.bos, self._backend.eos
        if self.eos < 0:
            raise UserError(
                f"{path}: the tokenizer has no EOS piece; a LLaMA tokenizer has one"
                ", or tokenizer_config.json beside it names one as eos_token"
            )
        self.has_bos = self.bos >= 0
        if not self.has_bos:
            self.bos = self.eos
        self.adds_bos = self.has_bos and self._backend.adds_bos
        self.newline = self._newline()

    def _newline(self) -> int:
        """The last piece of a newline alone, or the vocabulary's piece of one."""
        ids = self.encode("\n")
        if ids and self.decode(ids[-1:]) == "\n":
            return ids[-1]
        for piece in NEWLINES:
            found = self._backend.find_id(piece)
            if found is not None:
                return found
        raise UserError(f"{self._path}: the tokenizer has no newline piece; a LLaMA's has one")

    def name_of(self, special_id: int) -> str:
        """The piece, as the vocabulary holds it; for messages."""
        return self._backend.name_of(special_id)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, ends): piece i ends before character `ends[i]` of `text`."""
        return self._backend.encode_with_ends(text)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]


def find_tokenizer(llama_folder: Path, model_folder: Path) -> Path:
    """The tokenizer's file, in the model's own folder or in that of all models.

    A model in Hugging Face's layout comes with its own, which is taken. In Meta's both folders may
    have one, of the same content: raises UserError if they differ.
    """
    shared, own = _tokenizer_in(llama_folder), _tokenizer_in(model_folder)
    if own is not None and exists(model_folder / "config.json"):
        return own
    if shared is None or own is None:
        return shared or own or llama_folder / FILE_NAMES[0]
    try:
        same = read_bytes(shared) == read_bytes(own)
    except OSError as problem:
        raise UserError(
            f"{problem.filename}: {problem.strerror}; the tokenizer must be a readable file"
        ) from None
    if not same:
        raise UserError(
            f"{own}: is another tokenizer than {shared}; remove the one that is not this model's, "
            "or keep models with different tokenizers under different --llama_model_path"
        )
    return shared


def content_digests(path: Path) -> list[str]:
    """Of what a tokenizer's file says of its function; behind it, one that was recorded earlier.

    Left out are names of files that it was trained from, and what is not used of a tokenizer.json.
    Added is what the files beside a tokenizer.json say of BOS and EOS, where its names do not.
    Raises UserError.
    """
    data = _read(path)
    if not TIKTOKEN_LINE.match(data) and data.lstrip()[:1] == b"{":
        content: dict[str, Any] = parse_json(data.decode(), path, 1)
        model = _HuggingFace(data, path)
        if not model.has_known_names:
            content["special_ids"] = [model.bos, model.eos]
        return [tokenizer_json.digest(content), tokenizer_json.earlier_digest(content)]
    if not TIKTOKEN_LINE.match(data):
        return [digest_chunks(_without_training_files(data))]
    return [digest_chunks([data.replace(b"\r\n", b"\n")])]


def _without_training_files(data: bytes) -> Iterator[bytes]:
    """The fields of a sentencepiece model.

    Its second, trainer_spec, begins with the names of the texts (1) and of the model (2).
    """
    for number, field, value in _protobuf_fields(data):
        if number != 2:
            yield field
            continue
        for inner_number, inner_field, _ in _protobuf_fields(value):
            if inner_number > 2:
                yield inner_field


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, all bytes, value without tag and length) of each field of a message."""
    position = 0
    while position < len(data):
        tag, begin = _varint(data, position)
        kind = tag & 7
        if kind == 2:
            size, begin = _varint(data, begin)
        elif kind == 0:
            size = _varint(data, begin)[1] - begin
        else:
            size = 8 if kind == 1 else 4
        yield tag >> 3, data[position : begin + size], data[begin : begin + size]
        position = begin + size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it) of a protobuf number: 7 bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[position] if position < len(data) else 0
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _tokenizer_in(folder: Path) -> Path | None:
    for name in FILE_NAMES:
        if exists(folder / name):
            return folder / name
    return None


def _read(path: Path) -> bytes:
    try:
        data = read_bytes(path)
    except OSError as problem:
        raise UserError(
            f"{path}: {problem.strerror}; "
            "--llama_model_path must name the folder that holds tokenizer.model"
        ) from None
    if description := failed_download(data, len(data)):
        raise UserError(f"{path}: the tokenizer is {description}")
    return data


def _open_backend(data: bytes, path: Path) -> Backend:
    if TIKTOKEN_LINE.match(data):
        return _Tiktoken(data, path)
    if data.lstrip()[:1] == b"{":
        return _HuggingFace(data, path)
    return _SentencePiece(data, path)


class _SentencePiece:
    adds_bos = True

    def __init__(self, data: bytes, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if not data:
            data = b"empty"  # sentencepiece accepts b"" and then holds no model
        try:
            self._model = SentencePieceProcessor(model_proto=data)
        except Exception:  # sentencepiece's own types, and others for damaged bytes
            raise UserError(
                f"{path}: not a sentencepiece model; "
                "copy tokenizer.model of the LLaMA weights again"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        # Offsets count characters, not bytes, since sentencepiece 0.2.3.
        pieces = self._model.encode(text, return_type="offset_mapping")
        return pieces["ids"], [end for _, end in pieces["offsets"]]

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def find_id(self, piece: str) -> int | None:
        found: int = self._model.piece_to_id(piece)
        return found if self.name_of(found) == piece else None

    def name_of(self, token: int) -> str:
        name: str = self._model.id_to_piece(token)
        return name


class _Tiktoken:
    """LLaMA-3's file. Each line holds a piece in base64 and its rank, which is its id."""

    adds_bos = True

    def __init__(self, data: bytes, path: Path) -> None:
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: a LLaMA-3 tokenizer, and the package tiktoken is not installed; "
                "pip install '.[llama3]'"
            ) from None
        ranks = _ranks(data, path)
        self.bos, self.eos = len(ranks), len(ranks) + 1
        self.vocab_size = len(ranks) + LLAMA_3_SPECIAL
        self._model = tiktoken.Encoding(
            path.name, pat_str=LLAMA_3_WORDS, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode_ordinary(text)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        pieces = [self._model.decode_single_token_bytes(i) for i in ids]
        return ids, list(accumulate(_num_characters(piece) for piece in pieces))

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i < self.bos])

    def find_id(self, piece: str) -> int | None:
        ids = self.encode(piece)
        return ids[0] if len(ids) == 1 else None

    def name_of(self, token: int) -> str:
        names = {self.bos: "<|begin_of_text|>", self.eos: "<|end_of_text|>"}
        return names.get(token) or self.decode([token])


def _num_characters(piece: bytes) -> int:
    """Characters that begin in `piece`. One counts if the piece ends inside its bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def _ranks(data: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        place = f"{path.name}:{number}"
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{place}: not a piece in base64 and its rank; copy {path} again"
            ) from None
        if len(ranks) != number or int(rank) != number - 1:
            raise UserError(f"{place}: ranks must count from 0, each piece once; copy {path} again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: lacks {len(missing)} of the 256 single bytes, "
            "so some texts have no tokens; copy it again"
        )
    return ranks


class _HuggingFace:
    def __init__(self, data: bytes, path: Path) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: needs the package tokenizers, which is not installed; "
                "pip install '.[llama3]'"
            ) from None
        try:
            text = data.decode()
        except UnicodeDecodeError as problem:
            raise UserError(
                f"{path}: not UTF-8 (byte offset {problem.start}); copy it again"
            ) from None
        content: dict[str, Any] = parse_json(text, path, 1)
        self.adds_bos = tokenizer_json.begins_with_special(content)
        # Without the post-processor, offsets keep their blanks.
        content |= tokenizer_json.UNUSED
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
            self._model.encode_special_tokens = True
            self._model.encode("A text.")
        except Exception as problem:  # tokenizers raises plain Exception
            lines = str(problem).splitlines() or [""]
            raise UserError(
                f"{path}: not a tokenizer.json that the package tokenizers reads "
                f"({lines[0][:160]}); copy it again"
            ) from None
        # Ids may have gaps.
        self.vocab_size: int = max(self._model.get_vocab().values(), default=-1) + 1
        special = special_tokens.by_files(path.parent, self.vocab_size, self.find_id)
        self.bos, self.eos = special.bos, special.eos
        self.has_known_names = special == special_tokens.by_known_names(self.find_id)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self._model.encode(text, add_special_tokens=False)
        return pieces.ids, [end for _, end in pieces.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)  # as the other kinds do

    def find_id(self, piece: str) -> int | None:
        found: int | None = self._model.token_to_id(piece)
        return found

    def name_of(self, token: int) -> str:
        return self._model.id_to_token(token) or ""
