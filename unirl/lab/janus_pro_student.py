"""The lab's tiny Janus as pre-training sees it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import JanusForConditionalGeneration

from unirl.config import ModelConfig, SamplingConfig, TextSampling
from unirl.lab.lab_model import LabModel
from unirl.lab.letter_loss import letter_weighted
from unirl.lab.noise import Answer
from unirl.lab.plain_sampling import PaddedText, PlainJanus, encode, image_logits, null_prompts, text_logits
from unirl.lab.sampled_model import SampledModel
from unirl.lab.student import Corpus, Recipe
from unirl.lab.tiny_janus import make_model, to_pixels, write_checkpoint
from unirl.lab.tokenizer import completion, generation_prompt, make_tokenizer, understanding_prompt
from unirl.lab.vq_training import PatchDictionary, make_codebook, train_decoder, train_encoder
from unirl.lab.world import CODE_DIM, LETTERS, NUM_CODES

RECIPE = Recipe()
_LETTER_IDS = torch.tensor(make_tokenizer().convert_tokens_to_ids(list(LETTERS)))


@dataclass(slots=True)
class JanusStudent:
    """Meets `Student`."""

    module: JanusForConditionalGeneration

    def image_tokenizer(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder of the VQ."""
        vq = self.module.model.vqmodel
        return nn.ModuleList([vq.encoder, vq.quant_conv]), nn.ModuleList([vq.post_quant_conv, vq.decoder])

    def start_image_tokenizer(self, dictionary: PatchDictionary, seed: int) -> None:
        """Write the codebook, and freeze the VQ."""
        codebook = make_codebook(dictionary, NUM_CODES, CODE_DIM, seed)
        self.module.model.vqmodel.requires_grad_(False).quantize.embedding.weight.copy_(codebook)
        # Image tokens start with the geometry of the codes, which resembles that of the patches.
        self.module.model.generation_embeddings.weight.data.copy_(codebook)

    def train_image_tokenizer(self, side: int, corpus: Corpus, num_steps: int, seed: int) -> float:
        """Train one half of the VQ."""
        train = (train_encoder, train_decoder)[side]
        return train(self.module.model.vqmodel, corpus.images, corpus.codes, num_steps, seed)

    def drawing_loss(
        self, captions: Sequence[str], dropped: Sequence[bool], codes: Tensor, rng: random.Random
    ) -> Tensor:
        """Nats per image code."""
        prompts = encode([generation_prompt(caption) for caption in captions], prompts=True)
        empty = torch.tensor(dropped)[:, None]
        prompts = PaddedText(ids=null_prompts(prompts).ids.where(empty, prompts.ids), mask=prompts.mask)
        return cross_entropy(image_logits(self.module, prompts, codes).flatten(0, 1), codes.flatten())

    def answering_loss(
        self,
        corpus: Corpus,
        rows: Sequence[int],
        answers: Sequence[Answer],
        letter_weight: float,
        rng: random.Random,
    ) -> tuple[Tensor, float]:
        """Nats per token, the first letter weighted, and the nats of the first letter."""
        texts = encode([completion(answer) for answer in answers], prompts=False)
        questions = [corpus.questions[row] for row in rows]
        prompts = encode([understanding_prompt(q.text, q.choices) for q in questions], prompts=True)
        logits = text_logits(self.module, prompts, to_pixels(corpus.images[list(rows)]), texts)
        nats = cross_entropy(logits.flatten(0, 1), texts.ids.flatten(), reduction="none").view_as(texts.ids)
        return letter_weighted(nats, texts.mask, torch.isin(texts.ids, _LETTER_IDS), letter_weight)

    def as_model(self) -> LabModel:
        """The plain sampler around the weights."""
        return PlainJanus(self.module)

    def write(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the checkpoint folder."""
        write_checkpoint(self.module, path, facts)


def make_student(seed: int) -> JanusStudent:
    """A tiny Janus with random weights."""
    return JanusStudent(make_model(seed))


def load_model(path: Path) -> SampledModel:
    """A checkpoint as a run samples it."""
    sampling = SamplingConfig(text=TextSampling(max_tokens=20))
    return SampledModel.load(ModelConfig(family="janus_pro"), path, sampling)
