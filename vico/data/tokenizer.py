"""The sentencepiece tokenizer, seen as the method needs it: ids, where each piece ends in the text, and three special ids."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from vico.errors import UserError
from vico.safeload import disguise


class Tokenizer:
    """Encodes text without BOS and EOS. Raises UserError for a file that is no tokenizer, or lacks BOS, EOS or a newline."""

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as problem:
            raise UserError(f"{path}: {problem.strerror}; --llama_model_path must name the folder that holds tokenizer.model") from None
        if found := disguise(data[:512], len(data)):
            raise UserError(f"{path}: the tokenizer is {found}")
        self._path = path
        try:
            self._pieces = SentencePieceProcessor(model_proto=data or b"empty")  # which would be no model without a word
        except Exception:  # sentencepiece's own, and what damaged bytes run into
            raise UserError(f"{path}: not a sentencepiece model; copy tokenizer.model of the LLaMA weights again") from None
        self.num_pieces: int = self._pieces.vocab_size()
        self.bos: int = self._pieces.bos_id()
        self.eos: int = self._pieces.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise UserError(f"{path}: the tokenizer has no BOS or no EOS piece; a LLaMA tokenizer has both")
        self.newline = self._newline()

    def _newline(self) -> int:
        ids = self.encode("\n")
        if not ids or self._pieces.decode(ids[-1:]) != "\n":
            raise UserError(f"{self._path}: the tokenizer has no newline piece; a LLaMA tokenizer has one")
        return ids[-1]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text)
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, ends): `ends[i]` is the character of `text` before which piece i ends."""
        pieces = self._pieces.encode(text, return_type="offset_mapping")  # characters, not bytes: sentencepiece >= 0.2.3
        return pieces["ids"], [end for _, end in pieces["offsets"]]

    def decode(self, ids: list[int]) -> str:
        text: str = self._pieces.decode(ids)
        return text

    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]
