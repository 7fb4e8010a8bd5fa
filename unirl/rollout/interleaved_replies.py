"""What every sampler of interleaved replies does around its engine: check requests, read what was written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.models.interleaved import ChatLayout, PackedRow
from unirl.rollout.interleaved_grammar import Grammar, Progress, ReplySegment
from unirl.rollout.interleaved_law import InterleavedSampling
from unirl.types import FinishReason, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedRequest:
    """Sample `len(seeds)` replies to one prompt. Equal requests and weights give equal tokens in any company."""

    request_id: str
    prompt: TokenSequence
    """Conversation up to the reply, or up to any point of a reply that is to be continued."""
    seeds: tuple[int, ...]
    """In [0, 2**31)."""
    begin_with_image: bool = False
    """The reply begins with an image: what begins one is added to the prompt, unless it ends within one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sampled reply of T tokens."""

    request_id: str
    seed: int
    prompt_ids: NDArray[np.int32]
    """[P] that the reply follows, an added begin of an image included."""
    ids: NDArray[np.int32]
    """[T] over the joint vocabulary."""
    kinds: NDArray[np.uint8]
    """[T] `TokenKind` of each id."""
    logprobs: NDArray[np.float32]
    """[T] nats under the distribution the token was drawn from; where its modality is greedy, under the same at
    temperature 1. Ids that were given have 0."""
    segments: tuple[ReplySegment, ...]
    """Texts and images in their order; empty where the reply is not well formed."""
    finish_reason: FinishReason
    """"length" means that it was cut, always within text."""
    well_formed: bool
    """Whether every image is whole and every id stands where it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the ids of all replies of one call obey."""

    grammar: Grammar
    sampling: InterleavedSampling

    def progress(self, opened: Sequence[int], max_tokens: int) -> Progress:
        """Before the first token of a reply, behind a prompt that leaves these ids of an image unfinished."""
        return Progress.start(self.grammar, max_tokens, self.sampling.max_images, opened)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request whose prompt was found right."""

    request: InterleavedRequest
    prompt_ids: NDArray[np.int32]
    opened: list[int]
    """Ids of an image that the prompt leaves unfinished."""
    max_tokens: int
    """Longest reply."""

    def row(self, ids: list[int], device: torch.device) -> PackedRow:
        """Prompt and the ids so far as a row of one document."""
        history = torch.tensor([*self.prompt_ids.tolist(), *ids], device=device)
        return PackedRow(ids=history, lengths=(len(history),), pixels=tuple(self.request.prompt.pixels))

    def reply(self, rules: Rules, seed: int, ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> Reply:
        """The reply with these ids [T]."""
        grammar, listed = rules.grammar, ids.tolist()
        well_formed = grammar.is_well_formed(listed, self.opened)
        return Reply(
            request_id=self.request.request_id,
            seed=seed,
            prompt_ids=self.prompt_ids,
            ids=ids,
            kinds=grammar.kinds(listed, len(self.opened)),
            logprobs=logprobs,
            segments=grammar.parse(listed, self.opened) if well_formed else (),
            finish_reason="stop" if listed[-1] == grammar.end else "length",
            well_formed=well_formed,
        )


OnDone = Callable[[Reply], None]


def make_rules(layout: ChatLayout, sampling: InterleavedSampling) -> Rules:
    """The rules of a call.

    Raises:
        ValueError: images may be drawn, but of no grid or of an impossible one.
    """
    if sampling.grid is None and sampling.max_images != 0:
        raise ValueError(
            "grid: expected rows and columns of image codes, since images may be drawn; got None; give the grid of "
            "the pictures, or set max_images to 0"
        )
    # Where no image can be drawn, any grid serves.
    return Rules(grammar=Grammar.of(layout, *(sampling.grid or (1, 1))), sampling=sampling)


def make_jobs(requests: Sequence[InterleavedRequest], rules: Rules, max_model_len: int, section: str) -> list[Job]:
    """Each request with the ids of its prompt.

    Args:
        requests: in any number.
        rules: of the call.
        max_model_len: longest prompt plus reply in tokens.
        section: of the configuration, for messages.

    Raises:
        ValueError: prompt and reply are too long together, an image does not fit into a reply, or a prompt ends within
            an image that the rules do not know.
    """
    return [_job(request, rules, max_model_len, section) for request in requests]


def _job(request: InterleavedRequest, rules: Rules, max_model_len: int, section: str) -> Job:
    grammar, sampling, name = rules.grammar, rules.sampling, f"request {request.request_id}"
    ids = request.prompt.ids.tolist()
    opened = grammar.open_image(ids, name)
    if request.begin_with_image and not opened:
        ids, opened = [*ids, grammar.begin], [grammar.begin]
    if opened and sampling.max_images == 0:
        raise ValueError(
            f"{name}: expected max_images above 0, since the reply begins within an image; got 0; raise max_images"
        )
    least = grammar.room(len(opened)) if opened or sampling.max_images != 0 else 1
    wanted = least if sampling.max_tokens is None else sampling.max_tokens
    if wanted < least:
        rows, columns = grammar.grid
        raise ValueError(
            f"{name}: expected {section}.max_tokens of at least {least}, what an image of {rows} x {columns} codes and "
            f"the end of the reply take; got {wanted}; raise it, take a smaller grid or set {section}.max_images to 0"
        )
    if len(ids) + wanted > max_model_len:
        got = f"at least {wanted}" if sampling.max_tokens is None else f"up to {wanted}"
        raise ValueError(
            f"{name}: expected prompt and reply within {section}.max_model_len {max_model_len} tokens; got {len(ids)} "
            f"and {got}; shorten the prompt, lower {section}.max_tokens, or set {section}.max_model_len to "
            f"{len(ids) + wanted} where the checkpoint has as many positions"
        )
    longest = max_model_len - len(ids) if sampling.max_tokens is None else wanted
    return Job(request=request, prompt_ids=np.array(ids, np.int32), opened=opened, max_tokens=longest)
