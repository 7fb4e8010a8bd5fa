"""Small real parts that meet the Protocols: a policy with text and image heads, in one pass or several."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from unirl.algorithms.logprobs import token_entropies, token_logprobs
from unirl.config import RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.jobs.parts import Rollouts
from unirl.models.policy import EncodedPrompt, Scoring, TokenScores
from unirl.monitoring.phases import Activity
from unirl.monitoring.step_data import SyncCheck
from unirl.types import (
    GenerationSample,
    LearnerBatch,
    LearnerRow,
    QuarantinedRequest,
    RolloutGroup,
    RolloutRequest,
    Task,
    UnderstandingSample,
)

NUM_WORDS, NUM_CODES, NUM_CODES_PER_IMAGE, IMAGE_SIDE = 24, 16, 6, 4


class TinyNet(nn.Module):
    """Embeddings, a trunk over the mean of what is visible, one head for words (tied) and one for codes.

    The trunk's matrices hold more than 10^5 elements, so that ZeRO-3 really partitions them.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, width)
        self.codes = nn.Embedding(NUM_CODES, width)
        self.positions = nn.Embedding(32, width)
        self.vision = nn.Linear(3, width)
        self.trunk = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.word_head = nn.Linear(width, NUM_WORDS, bias=False)
        self.word_head.weight = self.words.weight
        self.image_head = nn.Linear(width, NUM_CODES)
        for table in (self.words, self.codes, self.positions):
            nn.init.normal_(table.weight, std=0.3)
        self.register_buffer("version", torch.tensor(3, dtype=torch.int32))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.recompute = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        """As transformers' models have it."""
        assert not gradient_checkpointing_kwargs["use_reentrant"]
        self.recompute = True

    def think(self, state: Tensor) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self.trunk, state, use_reentrant=False)
        return self.trunk(state)


class TinyPolicy:
    """Meets `unirl.models.policy.Policy`; deterministic from its seed.

    With `masked` it scores like a masked-diffusion family: a pass shows the tokens revealed before a step and scores
    those revealed at it, one pass for each step that revealed a token of the loss. Else it scores from left to right in
    one pass.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        masked: bool = False,
        frozen: Sequence[str] = ("vision",),
        hidden: int = 1024,
        width: int = 104,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module: nn.Module = TinyNet(width, hidden)
        self.masked = masked
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.module.state_dict().items()}

    def find_problems(self, config: RlConfig) -> list[Problem]:
        return []

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        text = sample.question if isinstance(sample, UnderstandingSample) else sample.prompt
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32) % NUM_WORDS
        return EncodedPrompt(ids, len(ids) + NUM_CODES_PER_IMAGE)

    def decode_text(self, ids: NDArray[np.int32]) -> str:
        return " ".join(str(i) for i in ids)

    def decode_images(
        self, codes: Sequence[NDArray[np.int32]], prompts: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.uint8]]:
        return [np.full((IMAGE_SIDE, IMAGE_SIDE, 3), int(own.mean()), np.uint8) for own in codes]

    def tokens_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        streams = 2 if self._two_streams(row.task, scoring) else 1
        return (len(row.prompt_ids) + len(row.completion_ids)) * streams

    def passes_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        return len(self._steps_of(row)) if self.masked and row.unmask_step is not None else 1

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")

    def _steps_of(self, row: LearnerRow) -> list[int]:
        if not self.masked or row.unmask_step is None:
            return [0]
        return np.unique(row.unmask_step[row.loss_mask]).tolist()

    @staticmethod
    def _two_streams(task: Task, scoring: Scoring) -> bool:
        return task == "generation" and scoring.image_logprob == "guided" and scoring.guidance_scale != 1.0

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> Iterator[TokenScores]:
        net = self.module
        device = next(net.parameters()).device
        image = rows[0].task == "generation"
        assert all((row.task == "generation") == image for row in rows), "rows of one task only"
        length = max(len(row.completion_ids) for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long, device=device)
        real = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
        steps = torch.zeros(len(rows), length, dtype=torch.long, device=device)
        for index, row in enumerate(rows):
            tokens[index, : len(row.completion_ids)] = torch.from_numpy(row.completion_ids.astype(np.int64))
            real[index, : len(row.completion_ids)] = True
            if self.masked and row.unmask_step is not None:
                steps[index, : len(row.completion_ids)] = torch.from_numpy(row.unmask_step.astype(np.int64))
        for index in range(max(self.passes_per_row(row, scoring) for row in rows)):
            before = torch.ones(length, length, dtype=torch.bool, device=device).tril(-1).expand(len(rows), -1, -1)
            # The step of each row that this pass scores; no token has step -1.
            now = torch.tensor([(*self._steps_of(row), *[-1] * (index + 1))[index] for row in rows], device=device)
            if self.masked:
                before = (steps < now[:, None])[:, None, :].expand(-1, length, -1)
            seen = (before & real[:, None, :]).to(net.positions.weight.dtype)
            scored = real & (steps == now[:, None])
            cond = self._logits(rows, tokens, seen, null=False)
            two = self._two_streams(rows[0].task, scoring)
            uncond = self._logits(rows, tokens, seen, null=True) if two else None
            law = {
                "temperature": scoring.image_temperature if image else scoring.text_temperature,
                "loss_mask": scored,
                "uncond_logits": uncond,
                "guidance_scale": scoring.guidance_scale if two else 1.0,
            }
            logprobs = token_logprobs(cond, tokens, **law)
            metrics = {}
            if two:
                plain = token_logprobs(cond.detach(), tokens, law["temperature"], loss_mask=scored)
                metrics["guidance_gap"] = (logprobs.detach() - plain).abs().sum()
            yield TokenScores(
                logprobs=logprobs, scored=scored, entropy=token_entropies(cond.detach(), **law), metrics=metrics
            )

    def _logits(self, rows: Sequence[LearnerRow], tokens: Tensor, seen: Tensor, *, null: bool) -> Tensor:
        net = self.module
        # Every module is called as often whatever the rows: under ZeRO-3 each call is a collective of all ranks.
        prompts = pad_sequence(
            [torch.from_numpy(row.prompt_ids.astype(np.int64)) + 1 for row in rows], batch_first=True
        )
        prompts = prompts.to(tokens.device)
        real = (prompts > 0)[..., None]
        asked = (net.words((prompts - 1).clamp(min=0) * (0 if null else 1)) * real).sum(dim=1) / real.sum(dim=1)
        if rows[0].image is not None:
            pixels = np.stack([row.image.mean(axis=(0, 1)) / 255 for row in rows])
            asked = asked + net.vision(torch.from_numpy(pixels).to(asked))
        image = rows[0].task == "generation"
        embedded = (net.codes if image else net.words)(tokens % (NUM_CODES if image else NUM_WORDS))
        context = seen @ embedded / seen.sum(dim=2, keepdim=True).clamp(min=1)
        place = net.positions(torch.arange(tokens.shape[1], device=tokens.device))
        state = asked[:, None] + context + place
        state = state + net.think(state)
        return net.image_head(state) if image else net.word_head(state)


def tiny_batch(
    policy: TinyPolicy,
    scoring: Scoring,
    *,
    num_rows: int = 6,
    seed: int = 0,
    policy_version: int = 0,
    off_policy: float = 0.0,
) -> LearnerBatch:
    """Rows of both tasks with random tokens and advantages; old log-probabilities are the policy's own, so on-policy.

    `off_policy` adds noise of that size in nats to the old log-probabilities.
    """
    generator = np.random.default_rng(seed)
    rows = [
        _row(policy, scoring, "understanding" if i % 2 == 0 else "generation", generator, off_policy)
        for i in range(num_rows)
    ]
    trajectories = {task: sum(row.task == task for row in rows) + 1 for task in ("understanding", "generation")}
    tokens = {task: sum(int(r.loss_mask.sum()) for r in rows if r.task == task) + 3 for task in trajectories}
    return LearnerBatch(
        rows=tuple(rows),
        num_trajectories=trajectories,
        num_loss_tokens=tokens,
        num_pairs=2,
        policy_version=policy_version,
    )


def _row(
    policy: TinyPolicy, scoring: Scoring, task: Task, generator: np.random.Generator, off_policy: float
) -> LearnerRow:
    length = int(generator.integers(2, 8)) if task == "understanding" else NUM_CODES_PER_IMAGE
    mask = np.ones(length, bool)
    mask[-1] = task == "generation"
    draft = LearnerRow(
        task=task,
        prompt_ids=generator.integers(1, NUM_WORDS, int(generator.integers(2, 6))).astype(np.int32),
        image=generator.integers(0, 255, (IMAGE_SIDE, IMAGE_SIDE, 3)).astype(np.uint8)
        if task == "understanding"
        else None,
        completion_ids=generator.integers(0, NUM_CODES, length).astype(np.int32),
        loss_mask=mask,
        old_logprobs=np.zeros(length, np.float32),
        advantage=float(generator.normal()),
        unmask_step=generator.permutation(np.arange(length) % 3).astype(np.int16) if policy.masked else None,
    )
    logprobs = score_all(policy, draft, scoring) + off_policy * generator.normal(size=length)
    return LearnerRow(
        **{name: getattr(draft, name) for name in draft.__slots__} | {"old_logprobs": logprobs.astype(np.float32)}
    )


@torch.no_grad()
def score_all(policy: TinyPolicy, row: LearnerRow, scoring: Scoring) -> NDArray[np.float32]:
    """Log-probabilities [T] of one row's completion, over all passes."""
    total = np.zeros(len(row.completion_ids), np.float32)
    for scores in policy.score([row], scoring):
        total += torch.where(scores.scored, scores.logprobs, 0.0)[0].float().numpy()
    return total


class LosingRollouts:
    """Meets `unirl.jobs.parts.Rollouts`: samples with what it is given, but for one request, which it quarantines."""

    def __init__(self, rollouts: Rollouts, lost: str) -> None:
        self._rollouts, self._lost = rollouts, lost
        self._quarantined: list[QuarantinedRequest] = []

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterator[RolloutGroup]:
        for request in requests:
            if request.request_id == self._lost:
                self._quarantined.append(
                    QuarantinedRequest(
                        request_id=request.request_id,
                        pair_id=request.pair_id,
                        task=request.task,
                        num_completions=len(request.seeds),
                        attempts=3,
                        error="OSError: made to fail",
                    )
                )
        yield from self._rollouts.sample([r for r in requests if r.request_id != self._lost], sampling)

    def load_weights(self, publication: Any) -> None:
        self._rollouts.load_weights(publication)

    def take_restarts(self) -> int:
        return 0

    def take_sync_check(self) -> SyncCheck:
        return self._rollouts.take_sync_check()

    def take_activities(self) -> list[Activity]:
        return self._rollouts.take_activities()

    def take_quarantined(self) -> list[QuarantinedRequest]:
        taken, self._quarantined = self._quarantined, []
        return taken
