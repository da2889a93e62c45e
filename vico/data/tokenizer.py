"""A LLaMA's tokenizer, seen as the method needs it: ids, where each piece ends in the text, and three special ids.

Three kinds of files, told apart by their content: sentencepiece (LLaMA-1 and 2), tiktoken's lines of base64 (LLaMA-3 as Meta
gives it) and Hugging Face's tokenizer.json. No kind takes a special token's name in a text for the token.
"""

import base64
import binascii
import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from vico.errors import UserError
from vico.io.atomic import read_bytes
from vico.io.safe_load import failed_download
from vico.io.text import parse_json

NAMES = (
    "tokenizer.model",
    "tokenizer.json",
)  # where both lie, they are the same tokenizer and the first is the original
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# LLaMA-3, as Meta published it: how a text is cut before pieces are merged, and 256 special tokens behind the others.
LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_SPECIAL = 256
BEGIN_AND_END = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"))


class Pieces(Protocol):
    """What each kind of tokenizer gives."""

    vocab_size: int
    bos: int  # negative where there is none
    eos: int

    def encode(self, text: str) -> list[int]: ...

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Encodes text without BOS and EOS. Raises UserError for a file that is no tokenizer, or lacks BOS, EOS or a newline."""

    def __init__(self, path: Path) -> None:
        try:
            data = read_bytes(path)
        except OSError as problem:
            raise UserError(
                f"{path}: {problem.strerror}; --llama_model_path must name the folder that holds tokenizer.model"
            ) from None
        if found := failed_download(data[:512], len(data)):
            raise UserError(f"{path}: the tokenizer is {found}")
        self._path = path
        self._pieces = _open(data, path)
        self.vocab_size, self.bos, self.eos = (
            self._pieces.vocab_size,
            self._pieces.bos,
            self._pieces.eos,
        )
        if self.bos < 0 or self.eos < 0:
            raise UserError(
                f"{path}: the tokenizer has no BOS or no EOS piece; a LLaMA tokenizer has both"
            )
        self.newline = self._newline()

    def _newline(self) -> int:
        ids = self.encode("\n")
        if not ids or self._pieces.decode(ids[-1:]) != "\n":
            raise UserError(
                f"{self._path}: the tokenizer has no newline piece; a LLaMA tokenizer has one"
            )
        return ids[-1]

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, ends): `ends[i]` is the character of `text` before which piece i ends."""
        return self._pieces.encode_with_ends(text)

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)

    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]


def find_tokenizer(llama_folder: Path, model_folder: Path) -> Path:
    """The tokenizer's file, in the folder of all models or in the model's own. Raises UserError where they hold different ones."""
    found = [
        next((f / name for name in NAMES if (f / name).exists()), None)
        for f in (llama_folder, model_folder)
    ]
    shared, own = found
    if shared is None or own is None:
        return shared or own or llama_folder / NAMES[0]
    try:
        same = read_bytes(shared) == read_bytes(own)
    except OSError as problem:
        raise UserError(
            f"{problem.filename}: {problem.strerror}; the tokenizer must be a readable file"
        ) from None
    if not same:
        raise UserError(
            f"{own}: is another tokenizer than {shared}; remove the one that is not this model's, or keep models with different "
            "tokenizers under different --llama_model_path"
        )
    return shared


def _open(data: bytes, path: Path) -> Pieces:
    if LINE.match(data):
        return _Tiktoken(data, path)
    if data.lstrip()[:1] == b"{":
        return _HuggingFace(data, path)
    return _SentencePiece(data, path)


class _SentencePiece:
    def __init__(self, data: bytes, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(
                model_proto=data or b"empty"
            )  # which would be no model without a word
        except Exception:  # sentencepiece's own, and what damaged bytes run into
            raise UserError(
                f"{path}: not a sentencepiece model; copy tokenizer.model of the LLaMA weights again"
            ) from None
        self.vocab_size, self.bos, self.eos = (
            self._model.vocab_size(),
            self._model.bos_id(),
            self._model.eos_id(),
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self._model.encode(
            text, return_type="offset_mapping"
        )  # characters, not bytes: sentencepiece >= 0.2.3
        return pieces["ids"], [end for _, end in pieces["offsets"]]

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text


class _Tiktoken:
    """Each line: a piece in base64, and its rank, which is its id."""

    def __init__(self, data: bytes, path: Path) -> None:
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: a LLaMA-3 tokenizer, and the package tiktoken is not installed; pip install '.[llama3]'"
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
        # A piece can end inside a character's bytes: that character counts.
        sizes = (
            sum(byte & 0xC0 != 0x80 for byte in self._model.decode_single_token_bytes(i))
            for i in ids
        )
        return ids, list(accumulate(sizes))

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i < self.bos])


def _ranks(data: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path.name}:{number}: not a piece in base64 and its rank; copy {path} again"
            ) from None
        if len(ranks) != number or int(rank) != number - 1:
            raise UserError(
                f"{path.name}:{number}: ranks must count from 0, each piece once; copy {path} again"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(
            f"{path}: lacks {len(missing)} of the 256 single bytes, so some texts have no tokens; copy it again"
        )
    return ranks


class _HuggingFace:
    def __init__(self, data: bytes, path: Path) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: needs the package tokenizers, which is not installed; pip install '.[llama3]'"
            ) from None
        try:
            text = data.decode()
        except UnicodeDecodeError as problem:
            raise UserError(
                f"{path}: not UTF-8 (byte offset {problem.start}); copy it again"
            ) from None
        content: dict[str, Any] = parse_json(text, path, 1)
        # BOS and EOS are put by the prompts, nothing is cut or padded, and offsets keep their blanks.
        content |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
            self._model.encode_special_tokens = True
            self._model.encode("A text.")
        except Exception as problem:  # tokenizers raises Exception itself
            reason = (str(problem).splitlines() or [""])[0][:160]
            raise UserError(
                f"{path}: not a tokenizer.json that the package tokenizers reads ({reason}); copy it again"
            ) from None
        self.vocab_size = self._model.get_vocab_size()
        self.bos, self.eos = next(
            (
                (b, e)
                for b, e in (map(self._model.token_to_id, names) for names in BEGIN_AND_END)
                if b is not None and e is not None
            ),
            (-1, -1),
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self._model.encode(text, add_special_tokens=False)
        return pieces.ids, [end for _, end in pieces.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)
