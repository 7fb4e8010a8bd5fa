"""Faults of samplers, their weights, and what they are given."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unirl.data.pair_source import PairSource
from unirl.jobs import step
from unirl.jobs.assets import resolve_heldout
from unirl.jobs.faults.planting import replaced
from unirl.jobs.local import LocalPublication, LocalRollouts
from unirl.models import janus_pro
from unirl.models.janus_pro import JanusPro
from unirl.models.lumina_prompts import LuminaPrompts
from unirl.models.policy import Policy
from unirl.rollout import torch_sampler, unmasking
from unirl.rollout.torch_sampler import TorchSampler
from unirl.types import PairRecord, RolloutGroup, RolloutRequest, Trajectory


def update_ignored() -> AbstractContextManager[None]:
    """A sampler that notes the version and keeps its old weights."""

    def make(_: Any) -> Any:
        def load(self: TorchSampler, manifest: Any, tensors: Any) -> None:
            self.policy_version = manifest.policy_version

        return load

    return replaced(TorchSampler, "load_weights", make)


def half_loaded() -> AbstractContextManager[None]:
    """A sampler that takes over the first half of the tensors."""

    def make(_: Any) -> Any:
        def load(policy: Policy, manifest: Any, tensors: Any) -> None:
            targets, named = policy.module.state_dict(), list(tensors)
            for name, array in named[: len(named) // 2]:
                targets[name].copy_(torch.from_numpy(np.array(array)))

        return load

    return replaced(torch_sampler, "load_policy_weights", make)


@contextmanager
def weights_not_shown() -> Any:
    """A sampler that keeps its old weights, and shows none that could be compared."""
    with update_ignored(), replaced(TorchSampler, "weight_slices", lambda _: lambda self: {}):
        yield


def published(change: Any) -> AbstractContextManager[None]:
    """What reaches the sampler is `change(publication)`."""

    def make(original: Any) -> Any:
        return lambda self, publication, **settings: original(self, change(publication), **settings)

    return replaced(LocalRollouts, "load_weights", make)


def bit_flipped() -> AbstractContextManager[None]:
    """A publication that is damaged on the way."""

    def change(publication: LocalPublication) -> LocalPublication:
        (name, first), *others = publication.tensors
        array: Any = np.array(first)
        array.reshape(-1)[:1] += 1
        return LocalPublication(publication.manifest, [(name, array), *others])

    return published(change)


def wrong_model() -> AbstractContextManager[None]:
    """A publication of another model: a weight too few."""

    def change(publication: LocalPublication) -> LocalPublication:
        manifest = publication.manifest
        return LocalPublication(replace(manifest, tensors=manifest.tensors[1:]), publication.tensors[1:])

    return published(change)


def drawn(change: Any) -> AbstractContextManager[None]:
    """`_Decoder.draw` gets `change(logits, temperature)` as logits."""

    def make(original: Any) -> Any:
        def draw(self: Any, logits: Any, temperature: float, *offset: int) -> Any:
            return original(self, change(logits, temperature), temperature, *offset)

        return draw

    return replaced(torch_sampler._Decoder, "draw", make)


def hotter_sampler() -> AbstractContextManager[None]:
    """The sampler forgets the temperature that the learner scores with."""
    return drawn(lambda logits, _: logits * 0.7)


def warmer_in_bfloat16() -> AbstractContextManager[None]:
    """In bfloat16, a sampler that is a fifth warmer than the learner thinks."""
    return drawn(lambda logits, _: logits / 1.2)


def unguided_in_bfloat16() -> AbstractContextManager[None]:
    """In bfloat16, a sampler that forgets guidance."""
    return replaced(torch_sampler, "guided_logits", lambda _: lambda cond, uncond, scale: cond)


def positions_shifted_in_bfloat16() -> AbstractContextManager[None]:
    """In bfloat16, a sampler that counts what it drew from one position further on."""

    def make(original: Any) -> Any:
        def run(trunk: Any, embeddings: Any, mask: Any, cache: Any) -> Any:
            is_decoding = cache is not None and cache.get_seq_length() > 0

            def shifted(*, position_ids: Any, **others: Any) -> Any:
                return trunk(position_ids=position_ids + 1, **others)

            return original(shifted if is_decoding else trunk, embeddings, mask, cache)

        return run

    return replaced(janus_pro, "run_trunk", make)


def other_guidance() -> AbstractContextManager[None]:
    """The sampler has another formula of guidance: cond + s (cond - uncond)."""
    return replaced(torch_sampler, "guided_logits", lambda original: lambda c, u, s: original(c, u, s + 1.0))


def other_guidance_of_diffusion() -> AbstractContextManager[None]:
    """The same in the sampler of masked diffusion."""
    return replaced(unmasking, "guided_logits", lambda original: lambda c, u, s: original(c, u, s + 1.0))


@contextmanager
def cold() -> Any:
    """A temperature near 0 in sampler and learner alike."""
    from unirl.models import autoregressive

    def colder(original: Any) -> Any:
        return lambda logits, tokens, temperature, *a, **k: original(logits, tokens, temperature * 0.05, *a, **k)

    def colder_entropy(original: Any) -> Any:
        return lambda logits, temperature, *a, **k: original(logits, temperature * 0.05, *a, **k)

    with ExitStack() as stack:
        stack.enter_context(drawn(lambda logits, _: logits / 0.05))
        stack.enter_context(replaced(autoregressive, "token_logprobs", colder))
        stack.enter_context(replaced(autoregressive, "token_entropies", colder_entropy))
        yield


def one_seed() -> AbstractContextManager[None]:
    """All completions of a prompt are drawn with one seed."""

    def make(original: Any) -> Any:
        return lambda seed, number, pair, task, _: original(seed, number, pair, task, 0)

    return replaced(step, "sample_seed", make)


def sampled(change: Any) -> AbstractContextManager[None]:
    """Each trajectory becomes `change(trajectory)`."""

    def make(original: Any) -> Any:
        def sample(self: Any, requests: Sequence[RolloutRequest], sampling: Any) -> Any:
            for group in original(self, requests, sampling):
                trajectories = tuple(map(change, group.trajectories))
                yield RolloutGroup(request=group.request, trajectories=trajectories)

        return sample

    return replaced(LocalRollouts, "sample", make)


def logprobs_forgotten() -> AbstractContextManager[None]:
    """Log-probabilities are lost between sampler and learner."""
    return sampled(lambda t: replace(t, logprobs=np.zeros_like(t.logprobs)))


def logprobs_shifted() -> AbstractContextManager[None]:
    """Each token has its neighbour's log-probability."""
    return sampled(lambda t: replace(t, logprobs=np.roll(t.logprobs, 1)))


def infinite_logprob() -> AbstractContextManager[None]:
    """A token that could not be drawn."""
    return sampled(lambda t: replace(t, logprobs=np.where(np.arange(len(t.logprobs)) == 0, -np.inf, t.logprobs)))


def old_rollouts() -> AbstractContextManager[None]:
    """Rollouts of weights two updates back are taken for new."""
    return sampled(lambda t: replace(t, policy_version=t.policy_version - 2))


def rollouts_from_tomorrow() -> AbstractContextManager[None]:
    """A version counter that runs ahead."""
    return sampled(lambda t: replace(t, policy_version=t.policy_version + 1))


def pictures_not_counted() -> AbstractContextManager[None]:
    """The loss mask of pictures is all false."""

    def change(t: Trajectory) -> Trajectory:
        return t if t.modality == "text" else replace(t, loss_mask=np.zeros_like(t.loss_mask))

    return sampled(change)


def cut_short() -> AbstractContextManager[None]:
    """Too little room for an answer."""

    def make(original: Any) -> Any:
        return lambda self, requests, sampling: original(
            self, requests, replace(sampling, text=replace(sampling.text, max_tokens=12))
        )

    return replaced(LocalRollouts, "sample", make)


def hangs() -> AbstractContextManager[None]:
    """A sampler that does not answer for a while."""

    def make(original: Any) -> Any:
        def sample(self: Any, requests: Any, sampling: Any) -> Any:
            time.sleep(HANG_S)
            yield from original(self, requests, sampling)

        return sample

    return replaced(LocalRollouts, "sample", make)


HANG_S = 20.0


def pixels_lost() -> AbstractContextManager[None]:
    """The vision tower's features never arrive."""

    def make(original: Any) -> Any:
        return lambda self, images: {key: torch.zeros_like(value) for key, value in original(self, images).items()}

    return replaced(JanusPro, "_image_features", make)


def pixels_not_embedded() -> AbstractContextManager[None]:
    """Placeholders are embedded as the words that they are."""
    return replaced(JanusPro, "embed_prompts", lambda _: lambda self, ids, mask, images: self.embed_text(ids))


def codes_lost() -> AbstractContextManager[None]:
    """A masked-diffusion family forgets the codes of its question's picture."""

    def make(original: Any) -> Any:
        return lambda self, sample, codes, num_cells: original(self, sample, codes * 0, num_cells)

    return replaced(LuminaPrompts, "answering", make)


def pairs(change: Any) -> AbstractContextManager[None]:
    """The batch of a step becomes `change(source, step, batch)`."""

    def make(original: Any) -> Any:
        return lambda self, number: change(self, number, original(self, number))

    return replaced(PairSource, "batch", make)


def same_batch_again() -> AbstractContextManager[None]:
    """A data order that does not move on."""
    first = PairSource.batch
    return pairs(lambda source, _, __: first(source, 0))


def evaluated_pairs() -> AbstractContextManager[None]:
    """Held-out samples among the training pairs."""
    asked, wanted = resolve_heldout("lab:heldout", 4)

    def change(_: Any, __: int, batch: tuple[PairRecord, ...]) -> tuple[PairRecord, ...]:
        own = replace(batch[0], understanding=asked[0], generation=wanted[0])
        return (own, *batch[1:])

    return pairs(change)


def black_pictures() -> AbstractContextManager[None]:
    """Pictures that were not decoded."""

    def change(_: Any, __: int, batch: tuple[PairRecord, ...]) -> tuple[PairRecord, ...]:
        return tuple(
            replace(pair, understanding=replace(pair.understanding, image=np.zeros_like(pair.understanding.image)))
            for pair in batch
        )

    return pairs(change)


def picture_left_behind() -> AbstractContextManager[None]:
    """The row of a question goes to the learner without its picture."""
    from unirl.learner import batching

    return replaced(batching, "_row", lambda original: lambda *arguments: replace(original(*arguments), image=None))
