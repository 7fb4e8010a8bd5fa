"""What families that write token after token have in common: padding, the trunk's call, one teacher-forced pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from unirl.algorithms.logprobs import token_entropies, token_logprobs
from unirl.config import RlConfig
from unirl.config_rules import Problem
from unirl.models.policy import AutoregressivePolicy, Scoring, TokenScores
from unirl.types import LearnerRow, UnderstandingSample

CHOICE_TEMPLATE = "{letter} {choice}"
"""How a line of a multiple-choice question reads; a checkpoint overrides it by the key `choice_template` of its
tokenizer_config.json, e.g. "{letter}. {choice}". Blanks only, because a word-level tokenizer has no full stop."""


def question_text(sample: UnderstandingSample, template: str = CHOICE_TEMPLATE) -> str:
    """The question and a line for each choice."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    options = [
        template.format(letter=letter, choice=choice) for letter, choice in zip(letters, sample.choices, strict=False)
    ]
    return "\n".join((sample.question, *options))


def problems_of_settings(config: RlConfig, family: str) -> list[Problem]:
    """Settings that a family would ignore that draws pictures of one size, token after token."""
    one_size = f"must be null for {family}, which draws pictures of one size"
    no_steps = f"must be left out for {family}, which draws token after token"
    settings = (
        ("rollout.sampling.image.size", config.rollout.sampling.image.size, None, one_size),
        ("algorithm.diffusion_steps_per_update", config.algorithm.diffusion_steps_per_update, None, no_steps),
        ("algorithm.diffusion_shrink", config.algorithm.diffusion_shrink, 1, no_steps),
        ("evaluation.approximate_cache", config.evaluation.approximate_cache, False, no_steps),
    )
    return [Problem(key, value, rule, "leave the key out") for key, value, wanted, rule in settings if value != wanted]


def left_padded(prompts: Sequence[NDArray[np.int32]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Prompt ids int64 [B, P] and mask int64 [B, P], padded on the left to the longest."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, longest - len(prompt) :], mask[index, longest - len(prompt) :] = prompt, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def run_trunk(trunk: Any, embeddings: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
    """Last hidden states [B, T, H] of input embeddings [B, T, H].

    Args:
        trunk: transformers' decoder.
        embeddings: new positions; with a cache, those after the cached ones.
        mask: int64 [B, S + T] 1 where a position exists, over cached and new positions; padding is on the left.
        cache: keys and values of S positions, extended in place.
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


def tokens_in_pass(row: LearnerRow, scoring: Scoring) -> int:
    """Tokens that scoring this row puts through the trunk, both streams counted."""
    return (len(row.prompt_ids) + len(row.completion_ids)) * _num_streams(row, scoring)


def score_completions(policy: AutoregressivePolicy, rows: Sequence[LearnerRow], scoring: Scoring) -> TokenScores:
    """Scores of the completions of rows of one task, in one pass; under guidance it holds a second stream.

    Temperature 0 is scored at 1, as `Trajectory.logprobs` records it.

    Raises:
        ValueError: rows of both tasks, an image that is missing or of the wrong length, or an answer with an id
            that no sampler may draw.
    """
    tasks = {row.task for row in rows}
    if len(tasks) != 1:
        raise ValueError(f"score: expected rows of one task; got {sorted(tasks)}; make micro-batches per task")
    score = _score_images if tasks == {"generation"} else _score_text
    return score(policy, rows, scoring)


def _score_text(policy: AutoregressivePolicy, rows: Sequence[LearnerRow], scoring: Scoring) -> TokenScores:
    ids, prompt_mask = policy.pad_prompts([row.prompt_ids for row in rows])
    tokens, mask, scored = _completions(rows, ids.device)
    prompts = policy.embed_prompts(ids, prompt_mask, [row.image for row in rows])
    embeddings = torch.cat([prompts, policy.embed_text(tokens)], dim=1)
    hidden = policy.hidden_states(embeddings, torch.cat([prompt_mask, mask], dim=1))
    logits = policy.text_logits(hidden[:, ids.shape[1] - 1 : -1])
    temperature = scoring.text_temperature or 1.0
    allowed = policy.allowed_text_ids.to(logits.device)
    return TokenScores(
        logprobs=token_logprobs(logits, tokens, temperature, allowed, loss_mask=scored),
        scored=scored,
        entropy=token_entropies(logits, temperature, allowed, loss_mask=scored),
    )


def _score_images(policy: AutoregressivePolicy, rows: Sequence[LearnerRow], scoring: Scoring) -> TokenScores:
    for row in rows:
        if len(row.completion_ids) != policy.num_image_tokens:
            raise ValueError(
                f"score: expected images of {policy.num_image_tokens} codes; got {len(row.completion_ids)}; sample "
                "whole images"
            )
    num_streams = _num_streams(rows[0], scoring)
    ids, prompt_mask = policy.pad_prompts([row.prompt_ids for row in rows])
    tokens, mask, scored = _completions(rows, ids.device)
    prompts = policy.embed_text(torch.cat([ids, policy.unconditional(ids)]) if num_streams == 2 else ids)
    # The last code is predicted, never read.
    codes = policy.embed_codes(tokens[:, :-1]).repeat(num_streams, 1, 1)
    whole_mask = torch.cat([prompt_mask, mask[:, :-1]], dim=1).repeat(num_streams, 1)
    hidden = policy.hidden_states(torch.cat([prompts, codes], dim=1), whole_mask)
    cond, *others = policy.code_logits(hidden[:, ids.shape[1] - 1 :]).split(len(rows))
    temperature = scoring.image_temperature or 1.0
    uncond = others[0] if others else None
    scale = scoring.guidance_scale if others else 1.0
    logprobs = token_logprobs(cond, tokens, temperature, loss_mask=scored, uncond_logits=uncond, guidance_scale=scale)
    entropy = token_entropies(cond, temperature, loss_mask=scored, uncond_logits=uncond, guidance_scale=scale)
    metrics = {}
    if others:
        with torch.no_grad():
            alone = token_logprobs(cond.detach(), tokens, temperature, loss_mask=scored)
            metrics["guidance_gap"] = (logprobs.detach() - alone).abs().sum()
    return TokenScores(logprobs=logprobs, scored=scored, entropy=entropy, metrics=metrics)


def _num_streams(row: LearnerRow, scoring: Scoring) -> int:
    guided = scoring.guidance_scale != 1.0 and scoring.image_logprob == "guided"
    return 2 if row.task == "generation" and guided else 1


def _completions(rows: Sequence[LearnerRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64, which of them exist int64 and which count bool, all [B, T], padded on the right."""
    shape = (len(rows), max(len(row.completion_ids) for row in rows))
    tokens, exists, counts = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        length = len(row.completion_ids)
        tokens[index, :length], exists[index, :length] = row.completion_ids, 1
        counts[index, :length] = row.loss_mask
    on_device = [torch.from_numpy(array).to(device) for array in (tokens, exists, counts)]
    return on_device[0], on_device[1], on_device[2]
