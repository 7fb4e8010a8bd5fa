"""Which sequences come again before their epoch is over, and which are held out: known by content, not by name."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from unirl.types import TokenKind, TokenSequence


class SeenSequences:
    """Looks at the sequences of each step of a run, in the order of the steps."""

    def __init__(self, heldout: Iterable[TokenSequence], *, most_uses: int) -> None:
        """Watch a run.

        Args:
            heldout: what evaluations score. A prompt that several of them begin with tells none of them.
            most_uses: times that a sequence may come in an epoch.
        """
        self._most_uses = most_uses
        self._epoch, self._uses = -1, Counter[bytes]()
        self._steps: dict[int, list[bytes]] = {}
        held = list(heldout)
        prompts = Counter(_content(sequence, _prompt_length(sequence)) for sequence in held)
        self._contents = {key for key, count in prompts.items() if count == 1}
        self._contents |= {_content(sequence, len(sequence.ids)) for sequence in held}
        self._beginnings = {_tokens(s, length) for s in held for length in (_prompt_length(s), len(s.ids))}

    def look(self, step: int, epoch: int, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Metrics of a step. One that is made again takes the place of its first making."""
        if epoch != self._epoch:
            self._epoch, self._uses, self._steps = epoch, Counter(), {}
        for later in [known for known in self._steps if known >= step]:
            self._uses.subtract(self._steps.pop(later))
        names = [sequence.id.encode() + b"\0" + sequence.ids.tobytes() for sequence in sequences]
        keys = [_digest(name) for name in names]
        self._uses.update(keys)
        self._steps[step] = keys
        repeated = sum(self._uses[key] > self._most_uses for key in keys)
        return {
            "sft/repeated_fraction": repeated / len(keys),
            "sft/num_leaked": float(sum(map(self._is_heldout, sequences))),
        }

    def _is_heldout(self, sequence: TokenSequence) -> bool:
        lengths = (_prompt_length(sequence), len(sequence.ids)) if self._contents else ()
        # Pictures are decoded only where the words are the same.
        return any(
            _tokens(sequence, length) in self._beginnings and _content(sequence, length) in self._contents
            for length in lengths
        )


def _prompt_length(sequence: TokenSequence) -> int:
    """Tokens before the first that is learned; all where none is."""
    return int(np.argmax(sequence.in_loss)) if sequence.in_loss.any() else len(sequence.ids)


def _tokens(sequence: TokenSequence, length: int) -> bytes:
    return _digest(sequence.ids[:length].tobytes())


def _content(sequence: TokenSequence, length: int) -> bytes:
    """Of the first tokens, and of the pictures among them that are seen by their pixels."""
    places = sequence.kinds[:length] == TokenKind.PLACEHOLDER  # marks stand between those of two pictures
    num_pictures = np.count_nonzero(np.diff(places.astype(np.int8), prepend=0) == 1)
    pixels = (sequence.pixels[index] for index in range(num_pictures))
    pictures = [_digest(repr(image.shape).encode() + image.tobytes()) for image in pixels]
    return b"".join([_tokens(sequence, length), *pictures])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
