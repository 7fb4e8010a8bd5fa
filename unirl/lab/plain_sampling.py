"""Teacher-forced logits and sampling with the tiny Janus in plain torch: what pre-training needs.

Prompts are padded on the left, completions on the right; positions count real tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, JanusForConditionalGeneration

from unirl.lab.lab_model import SamplingPlan
from unirl.lab.tiny_janus import decode_codes, encode_images, to_pixels
from unirl.lab.tokenizer import (
    BEGIN_OF_IMAGE,
    BOS,
    EMBEDDING_ROWS,
    EOS,
    IMAGE_PLACEHOLDER,
    PAD,
    SPECIAL_TOKENS,
    generation_prompt,
    make_tokenizer,
    understanding_prompt,
)
from unirl.lab.world import NUM_IMAGE_TOKENS, Question

MAX_ANSWER_TOKENS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedText:
    """Token ids int64 [B, L] and their mask int64 [B, L], 1 on real tokens."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class PlainJanus:
    """A tiny Janus as a `LabModel`."""

    model: JanusForConditionalGeneration

    def draw(self, captions: Sequence[str], plan: SamplingPlan) -> NDArray[np.uint8]:
        """Pictures [N, 20, 20, 3], one per caption."""
        prompts = encode([generation_prompt(caption) for caption in captions], prompts=True)
        return decode_codes(self.model, sample_codes(self.model, prompts, plan))

    def answer(self, images: NDArray[np.uint8], questions: Sequence[Question], plan: SamplingPlan) -> list[str]:
        """Answer texts with their end token."""
        prompts = encode([understanding_prompt(q.text, q.choices) for q in questions], prompts=True)
        return sample_answers(self.model, prompts, to_pixels(images), plan)

    def reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pictures after VQ encode and decode."""
        return decode_codes(self.model, encode_images(self.model, images))


def encode(texts: list[str], *, prompts: bool) -> PaddedText:
    """Texts as padded ids: prompts get BOS and left padding, completions neither."""
    side = "left" if prompts else "right"
    batch = _TOKENIZER(texts, add_special_tokens=prompts, padding=True, padding_side=side, return_tensors="pt")
    return PaddedText(ids=batch["input_ids"], mask=batch["attention_mask"])


def null_prompts(prompts: PaddedText) -> PaddedText:
    """The unconditional prompts of Janus: all but BOS and begin-of-image becomes padding, the mask stays."""
    keep = (prompts.ids == _IDS[BOS]) | (prompts.ids == _IDS[BEGIN_OF_IMAGE])
    return PaddedText(ids=prompts.ids.where(keep, torch.tensor(_IDS[PAD])), mask=prompts.mask)


def image_logits(model: JanusForConditionalGeneration, prompts: PaddedText, codes: Tensor) -> Tensor:
    """Logits [B, 25, num_codes] of the codes int64 [B, 25] under their prompts."""
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    embeddings = torch.cat([model.get_input_embeddings()(prompts.ids), drawn], 1)
    mask = torch.cat([prompts.mask, torch.ones_like(codes[:, 1:])], 1)
    return model.model.generation_head(
        hidden_states(model.model.language_model, embeddings, mask)[:, -NUM_IMAGE_TOKENS:]
    )


def text_logits(
    model: JanusForConditionalGeneration, prompts: PaddedText, pixels: Tensor, answers: PaddedText
) -> Tensor:
    """Logits [B, T, vocabulary] of the answers under their prompts and pixels float [B, 3, 20, 20]."""
    embeddings = torch.cat([_with_image(model, prompts, pixels), model.get_input_embeddings()(answers.ids)], 1)
    hidden = hidden_states(model.model.language_model, embeddings, torch.cat([prompts.mask, answers.mask], 1))
    return model.lm_head(hidden[:, prompts.ids.shape[1] - 1 : -1])


@torch.no_grad()
def sample_codes(model: JanusForConditionalGeneration, prompts: PaddedText, plan: SamplingPlan) -> Tensor:
    """Image codes int64 [B, 25]."""
    guided = plan.guidance != 1.0
    streams = (prompts, null_prompts(prompts)) if guided else (prompts,)
    mask = torch.cat([stream.mask for stream in streams])
    embeddings = model.get_input_embeddings()(torch.cat([stream.ids for stream in streams]))
    generator, cache, codes = torch.Generator().manual_seed(plan.seed), DynamicCache(), []
    for _ in range(NUM_IMAGE_TOKENS):
        logits = model.model.generation_head(hidden_states(model.model.language_model, embeddings, mask, cache)[:, -1])
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + plan.guidance * (conditional - null)
        codes.append(draw_tokens(logits, plan, generator))
        embeddings = model.prepare_embeddings_for_image_generation(codes[-1].repeat(len(streams))[:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(codes, 1)


@torch.no_grad()
def sample_answers(
    model: JanusForConditionalGeneration, prompts: PaddedText, pixels: Tensor, plan: SamplingPlan
) -> list[str]:
    """Answer texts with their end token, cut after MAX_ANSWER_TOKENS; only words and the end token can be drawn."""
    embeddings, mask = _with_image(model, prompts, pixels), prompts.mask
    generator, cache, columns = torch.Generator().manual_seed(plan.seed), DynamicCache(), []
    open_rows = torch.ones(len(mask), dtype=torch.bool)
    while open_rows.any() and len(columns) < MAX_ANSWER_TOKENS:
        logits = model.lm_head(hidden_states(model.model.language_model, embeddings, mask, cache)[:, -1])
        tokens = draw_tokens(logits.masked_fill(_FORBIDDEN, -torch.inf), plan, generator)
        columns.append(tokens.where(open_rows, torch.tensor(_IDS[PAD])))
        open_rows &= tokens != _IDS[EOS]
        embeddings = model.get_input_embeddings()(columns[-1][:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return [text.replace(PAD, "").strip() for text in _TOKENIZER.batch_decode(torch.stack(columns, 1))]


def hidden_states(trunk: nn.Module, embeddings: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Last hidden states [B, L, H] of a transformers decoder.

    Args:
        trunk: the decoder without its head.
        embeddings: [B, L, H] of the new tokens.
        mask: [B, past + L], 1 on real tokens, those of the cache included; positions count them.
        cache: keys and values of what came before; takes those of the new tokens.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
    output = trunk(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def draw_tokens(logits: Tensor, plan: SamplingPlan, generator: torch.Generator) -> Tensor:
    """Token ids [B] from logits [B, V], at temperature 1 or greedily."""
    if plan.greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


_TOKENIZER = make_tokenizer()
_IDS = _TOKENIZER.get_vocab()
# Spare ids have no word, and a drawn placeholder would ask for image features that do not exist.
_FORBIDDEN = torch.arange(EMBEDDING_ROWS) >= len(_TOKENIZER)
_FORBIDDEN[[_IDS[token] for token in SPECIAL_TOKENS if token != EOS]] = True


def _with_image(model: JanusForConditionalGeneration, prompts: PaddedText, pixels: Tensor) -> Tensor:
    """Prompt embeddings with the picture's features in place of the placeholders."""
    inner: Any = model.model  # its annotations ask for FloatTensor
    features = inner.get_image_features(pixels).pooler_output
    placeholders = (prompts.ids == _IDS[IMAGE_PLACEHOLDER]).unsqueeze(-1)
    embeddings = model.get_input_embeddings()(prompts.ids)
    return embeddings.masked_scatter(placeholders, features.reshape(-1, features.shape[-1]))
