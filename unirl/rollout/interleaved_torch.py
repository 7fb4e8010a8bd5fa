"""The plain sampler of interleaved replies: a whole forward pass for each token; the oracle of the tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.models.interleaved import InterleavedPolicy
from unirl.rollout.gumbel import gumbel_argmax, step_seeds
from unirl.rollout.interleaved_grammar import BatchGrammar
from unirl.rollout.interleaved_law import InterleavedSampling, drawing_logprobs
from unirl.rollout.interleaved_replies import InterleavedRequest, Job, OnDone, Reply, Rules, make_jobs, make_rules


@dataclass(slots=True)
class InterleavedTorch:
    """Samples one sequence after the other with the policy itself, by the engine's own randomness on a CPU."""

    policy: InterleavedPolicy
    max_model_len: int
    """Longest prompt plus reply in tokens."""

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[InterleavedRequest], sampling: InterleavedSampling, on_done: OnDone | None = None
    ) -> list[Reply]:
        """One reply for each seed of each request, in their order; `on_done` sees each as soon as it is finished.

        Raises:
            ValueError: a request or the sampling cannot be served. Nothing has been sampled then.
        """
        rules = make_rules(self.policy.layout, sampling)
        replies: list[Reply] = []
        for job in make_jobs(requests, rules, self.max_model_len, "rollout"):
            for seed in job.request.seeds:
                replies.append(job.reply(rules, seed, *self._written(job, rules, seed)))
                if on_done is not None:
                    on_done(replies[-1])
        return replies

    def _written(self, job: Job, rules: Rules, seed: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        device = next(self.policy.module.parameters()).device
        grammar, generator = BatchGrammar(rules.grammar, device), torch.Generator().manual_seed(seed)
        progress, drawings = rules.progress(job.opened, job.max_tokens), (rules.sampling.text, rules.sampling.image)
        ids, logprobs = list[int](), list[float]()
        while len(ids) < job.max_tokens and ids[-1:] != [rules.grammar.end]:
            hidden = self.policy.hidden_states_of(job.row(ids, device))
            logits = self.policy.logits(hidden[-1:], "both")
            place, may_begin = (torch.tensor([x], device=device) for x in (progress.place, progress.may_begin))
            law = drawing_logprobs(logits, place, may_begin, grammar, drawings)
            drawn = int(gumbel_argmax(law, step_seeds([generator]).to(device)))
            ids.append(drawn)
            logprobs.append(float(law[0, drawn]))
            progress.add(drawn)
        return np.array(ids, np.int32), np.array(logprobs, np.float32)
