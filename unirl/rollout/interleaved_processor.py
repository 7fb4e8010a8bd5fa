"""Lets one vLLM request alternate between text and images, each modality under its own temperature and cut-offs.

vLLM knows one temperature for a request, so the whole law is applied here and vLLM draws at temperature 1. It is told
to hand back processed logits: what stands here is a log-probability already, also for greedy tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from unirl.rollout.interleaved_grammar import BatchGrammar, Progress
from unirl.rollout.interleaved_law import drawing_logprobs
from unirl.rollout.interleaved_replies import Rules


@dataclass(slots=True)
class _Row:
    rules: Rules
    progress: Progress
    ids: list[int]
    """Of the reply so far; vLLM's own list, which grows."""

    def catch_up(self) -> None:
        for id in self.ids[self.progress.num_tokens :]:
            assert id >= 0, "vLLM shows a token before it is drawn, which it does under asynchronous scheduling"
            self.progress.add(id)


class InterleavedProcessor(LogitsProcessor):
    """Turns logits into log-probabilities of the next id under the rules that a request carries in `extra_args`.

    `rules` is one object for all requests in flight; `opened` are ids of an image that the prompt leaves unfinished.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request without rules.

        Raises:
            ValueError: `extra_args` lacks them.
        """
        if not {"rules", "opened"} <= (sampling_params.extra_args or {}).keys():
            raise ValueError(
                f"request: expected extra_args with rules and opened; got {sampling_params.extra_args}; give both"
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._rules: Rules | None = None

    def is_argmax_invariant(self) -> bool:
        """No: it decides what may be drawn."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and change rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            extra, max_tokens = params.extra_args or {}, params.max_tokens
            self._rows[row] = _Row(extra["rules"], extra["rules"].progress(extra["opened"], max_tokens), output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source), self._rows.pop(target, None)
            self._rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Log-probabilities [B, V] of the next id of each row, -inf on what it may not draw."""
        rows = [self._rows[index] for index in range(len(logits))]
        rules = rows[0].rules
        if rules is not self._rules:
            self._rules, self._grammar = rules, BatchGrammar(rules.grammar, self._device)
        for row in rows:
            assert row.rules is rules, "requests of two calls in one batch"
            row.catch_up()
        places = torch.tensor([row.progress.place for row in rows]).to(self._device)
        may_begin = torch.tensor([row.progress.may_begin for row in rows]).to(self._device)
        drawings = rules.sampling.text, rules.sampling.image
        return drawing_logprobs(logits, places, may_begin, self._grammar, drawings)
