"""A checkpoint's tokenizer with the special tokens that a family needs, by their strings."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unirl.models.checkpoint import read_json


@dataclass(frozen=True, slots=True)
class OpenTokenizer:
    """A tokenizer and what a family asks of it."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: dict[str, int]
    """Id of every token string."""
    special: dict[str, int]
    """Id of each special token by the family's name for it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without anything before or behind it.

        Raises:
            ValueError: the vocabulary lacks a word of it.
        """
        ids = self._known_ids(text)
        if ids is None and (lacking := [word for word in dict.fromkeys(text.split()) if self._known_ids(word) is None]):
            raise ValueError(
                f"expected words of the checkpoint's vocabulary; got words that it lacks: {', '.join(lacking[:10])}; "
                "use others, or write these as it does: the lab's are in lower case, with blanks around . and ?"
            )
        return self._ids(text) if ids is None else ids

    def _known_ids(self, text: str) -> list[int] | None:
        """Ids of a text; None where one of them stands for what the vocabulary lacks, or nothing does."""
        try:
            ids = self._ids(text)
        except Exception as error:
            # The library raises nothing narrower where the token for unknown words is itself unknown.
            if "[UNK]" not in str(error):
                raise
            return None
        return None if self.tokenizer.unk_token_id in ids and text != self.tokenizer.unk_token else ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text of ids, special tokens kept."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def decode_plain(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def plain(self, size: int) -> NDArray[np.bool_]:
        """Which of `size` ids are ordinary text, bool [size]: known to the tokenizer, and special to nobody.

        Raises:
            ValueError: the tokenizer gives larger ids.
        """
        if (largest := max(self.vocabulary.values())) >= size:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: expected token ids below vocab_size {size} of config.json; got "
                f"{largest}; tokenizer and config.json are of two checkpoints"
            )
        known = np.zeros(size, np.bool_)
        known[list(self.vocabulary.values())] = True
        marked = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        known[sorted({*self.special.values(), *self.tokenizer.all_special_ids, *marked})] = False
        return known

    def fingerprint(self, *facts: object) -> str:
        """Sixteen hex digits that change when the tokenizer or one of these facts does."""
        words = json.dumps([sorted(self.vocabulary.items()), facts], default=str)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else self.tokenizer.__class__.__name__
        return hashlib.sha256((words + rules).encode()).hexdigest()[:16]


def code_range(found: Mapping[int, int], folder: Path, first_name: str) -> tuple[int, int]:
    """First id and number of the image codes.

    Args:
        found: id of each code that has a name in the tokenizer.
        folder: where the tokenizer was found.
        first_name: name of code 0.

    Raises:
        ValueError: there are none, or code c is not id `first + c`.
    """
    first = found.get(0, -1)
    if not found or any(found.get(code) != first + code for code in range(len(found))):
        raise ValueError(
            f"{folder}: expected image codes named {first_name} and on, with consecutive ids; got {len(found)} names "
            f"from id {first}; take the tokenizer files of the converted checkpoint"
        )
    return first, len(found)


def open_tokenizer(folder: Path, special: Mapping[str, str]) -> OpenTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: Hugging Face checkpoint.
        special: string of each special token by the family's name for it.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: only code of the checkpoint could read it, or a special token is absent.
    """
    read_json(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder}: expected a tokenizer that transformers reads by itself; got one that it does not ({error}); "
            "code of a checkpoint is never run: take the tokenizer files of its conversion for transformers"
        ) from error
    vocabulary = tokenizer.get_vocab()
    missing = [text for text in special.values() if text not in vocabulary]
    if missing:
        raise ValueError(
            f"{folder}: expected the family's special tokens in the tokenizer; got none for {', '.join(missing)}; take "
            "the tokenizer files of the checkpoint that model.family names"
        )
    return OpenTokenizer(tokenizer, vocabulary, {name: vocabulary[text] for name, text in special.items()})


def stated_ids(folder: Path, roles: Iterable[str]) -> list[tuple[str, str, int]]:
    """Where a checkpoint folder states the id of a special token, the token's role, and the id.

    Args:
        folder: Hugging Face checkpoint.
        roles: transformers' names, such as "pad"; one that no file states, or as several ids, is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    generation |= generation.get("generation_kwargs") or {}
    stated: list[tuple[str, str, int]] = []
    for role in roles:
        key = f"{role}_token_id"
        for where, found in (("the tokenizer", getattr(tokenizer, key, None)), (file.name, generation.get(key))):
            stated += [(where, role, found)] if isinstance(found, int) else []
    return stated
