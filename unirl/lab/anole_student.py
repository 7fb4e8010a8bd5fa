"""The lab's tiny Anole as pre-training sees it: conversations under the restricted cross-entropy of fine-tuning."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unirl.algorithms.cross_entropy import sliced_cross_entropy
from unirl.lab.lab_model import LabModel
from unirl.lab.letter_loss import letter_weighted
from unirl.lab.noise import Answer
from unirl.lab.plain_conversations import PlainConversations, null_prompts
from unirl.lab.student import Corpus, Recipe
from unirl.lab.subsets.wording import as_request
from unirl.lab.tiny_anole import TOKENS, make_vq, make_weights, write_checkpoint
from unirl.lab.tokenizer import answer_text
from unirl.lab.vq_training import (
    PatchDictionary,
    code_rows,
    crowded_images,
    make_codebook,
    shuffled_cells,
    train_decoder,
    train_encoder,
)
from unirl.lab.world import CODE_DIM, GRID, LETTERS, NUM_CODES, question_with_choices
from unirl.models.joint_policy import JointPolicy
from unirl.types import Segment, TokenSequence, Turn

RECIPE = Recipe(vq_steps=2400)
_LETTER_IDS = torch.tensor([TOKENS.index(letter) for letter in LETTERS])


@dataclass(slots=True)
class AnoleStudent:
    """Meets `Student`."""

    policy: JointPolicy
    vq: Any
    """transformers' image tokenizer with the decoder that it lacks."""
    _dictionary: PatchDictionary = field(init=False)

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self.policy.module

    def image_tokenizer(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder of the VQ."""
        vq = self.vq
        return nn.ModuleList([vq.encoder, vq.quant_conv]), nn.ModuleList([vq.post_quant_conv, vq.decoder])

    def start_image_tokenizer(self, dictionary: PatchDictionary, seed: int) -> None:
        """Write the codebook, and freeze the VQ."""
        self._dictionary = dictionary
        codebook = make_codebook(dictionary, NUM_CODES, CODE_DIM, seed)
        self.vq.requires_grad_(requires_grad=False).quantize.embedding.weight.copy_(codebook)
        table, first = self.policy.module.get_input_embeddings().weight.data, self.policy.layout.vocabulary.first_code
        table[first : first + NUM_CODES] = code_rows(codebook, table[first + NUM_CODES :])

    def train_image_tokenizer(self, side: int, corpus: Corpus, num_steps: int, seed: int) -> float:
        """Train one half of the VQ.

        Chameleon normalises each channel over the picture, so that a patch comes out differently in another company:
        a third of the pictures is crowded, and a third has the cells of all pictures shuffled.
        """
        third = len(corpus.images) // 3
        crowded = crowded_images(third, seed)
        shuffled = shuffled_cells(corpus.images[:third], corpus.codes[:third], seed)
        images = np.concatenate([corpus.images[third : 2 * third], crowded, shuffled[0]])
        codes = torch.cat([corpus.codes[third : 2 * third], self._dictionary.codes(crowded), shuffled[1]])
        if side == 0:
            return train_encoder(self.vq, images, codes, num_steps, seed)
        return train_decoder(self.vq, images, codes, num_steps, seed, fourth_power=16.0)

    def drawing_loss(
        self, captions: Sequence[str], dropped: Sequence[bool], codes: Tensor, rng: random.Random
    ) -> Tensor:
        """Nats per image code, those of its marks included; half the captions stand alone, half as a request."""
        picture, sequences = _blank(in_loss=True), []
        for caption, own in zip(captions, codes, strict=True):
            asked = Segment(text=caption if rng.random() < 0.5 else as_request(caption))
            sequences.append(self._sequence((asked,), picture, own))
        ids, targets = _padded(sequences)
        # The prompt ends where the picture begins.
        prompt = (ids == self.policy.layout.image.begin).cumsum(1) == 0
        empty = torch.tensor(dropped)[:, None] & prompt
        nats = self._nats(null_prompts(self.policy, ids).where(empty, ids), targets)
        return nats.sum() / codes.numel()

    def answering_loss(
        self,
        corpus: Corpus,
        rows: Sequence[int],
        answers: Sequence[Answer],
        letter_weight: float,
        rng: random.Random,
    ) -> tuple[Tensor, float]:
        """Nats per token, the first letter weighted, and the nats of the first letter."""
        sequences = []
        for row, answer in zip(rows, answers, strict=True):
            question = corpus.questions[row]
            asked = Segment(text=question_with_choices(question.text, question.choices))
            reply = Segment(text=answer_text(answer), in_loss=True)
            sequences.append(self._sequence((_blank(), asked), reply, corpus.codes[row]))
        ids, targets = _padded(sequences)
        is_letter = targets & torch.isin(ids, _LETTER_IDS)
        return letter_weighted(self._nats(ids, targets), targets, is_letter, letter_weight)

    def as_model(self) -> LabModel:
        """A copy of the weights behind the plain sampler."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder) / "now")
            return load_model(Path(folder) / "now")

    def write(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the checkpoint folder."""
        write_checkpoint(self.policy.module.state_dict(), self.vq, path, facts)

    def _sequence(self, asked: tuple[Segment, ...], reply: Segment, codes: Tensor) -> TokenSequence:
        """The conversation in ids; its one picture has these codes."""
        turns = Turn(role="user", segments=asked), Turn(role="assistant", segments=(reply,))
        return self.policy.layout.encode(turns, [codes.view(GRID, GRID).numpy().astype(np.int32)])

    def _nats(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats [B, L] of the targets among the ids of their modality, 0 elsewhere."""
        policy, vocabulary = self.policy, self.policy.layout.vocabulary
        embeddings = policy.module.get_input_embeddings()(ids)
        hidden = policy.module.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        before = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)
        is_code = torch.from_numpy(vocabulary.is_code)
        rank = (~is_code).cumsum(0) - 1
        nats = torch.zeros(ids.shape)
        codes, text = targets & is_code[ids], targets & ~is_code[ids]
        nats[codes] = sliced_cross_entropy(
            before[codes], ids[codes] - vocabulary.first_code, lambda rows: policy.logits(rows, "image")
        )[0]
        nats[text] = sliced_cross_entropy(before[text], rank[ids[text]], lambda rows: policy.logits(rows, "text"))[0]
        return nats


def make_student(seed: int) -> AnoleStudent:
    """A tiny Anole with random weights."""
    vq = make_vq(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(make_weights(seed), vq, Path(folder) / "random")
        policy = load_model(Path(folder) / "random").policy
    return AnoleStudent(policy, vq)


def load_model(path: Path) -> PlainConversations:
    """A checkpoint, to be examined."""
    return PlainConversations.load("anole", path)


def _blank(*, in_loss: bool = False) -> Segment:
    """Stands for a picture whose codes are known."""
    return Segment(image=np.zeros((1, 1, 3), np.uint8), in_loss=in_loss)


def _padded(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L] and the targets bool [B, L], the shorter ones before padding that nothing attends to."""
    ids = [torch.from_numpy(sequence.ids).long() for sequence in sequences]
    targets = [torch.from_numpy(sequence.in_loss) for sequence in sequences]
    return pad_sequence(ids, batch_first=True), pad_sequence(targets, batch_first=True)
