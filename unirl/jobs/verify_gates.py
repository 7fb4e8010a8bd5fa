"""What must hold between a checkpoint, a sampler and a learner: each gate measures it and compares with its limit.

Gates see families through the Protocols alone. Nothing here is built, chosen or printed; `verify.py` does that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import SamplingConfig
from unirl.jobs.evaluate import at_temperature_0
from unirl.jobs.local import LocalPublication
from unirl.jobs.parts import Learners
from unirl.jobs.verify_bench import Bench, Dtype, Finding
from unirl.learner.learner import scoring_of
from unirl.learner.tally import MODALITIES
from unirl.models.checkpoint import stored_tensors
from unirl.models.named_arrays import checksum
from unirl.models.policy import Independent, Policy, Scoring, load_special_ids
from unirl.models.tokenizer import stated_ids
from unirl.rollout.sampler import NamedArrays
from unirl.types import (
    TASKS,
    LearnerBatch,
    RolloutGroup,
    Task,
    TensorSpec,
    UnderstandingSample,
    WeightsManifest,
)

GUIDANCE_SCALES = (1.0, 3.0, 5.0)
GREEDY_GUIDANCE = 3.0
"""Where greedy images are compared; not every implementation can do without guidance."""
MAX_GAP: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 0.5}
"""Largest |log-prob difference| of a token in nats without guidance. Guidance s mixes two noisy streams by s and s - 1,
and so multiplies the noise by 2s - 1."""
MEAN_GAP: dict[Dtype, float] = {"bfloat16": 0.02}
"""The same for the mean over tokens: bfloat16 keeps 8 bits of a number, so that its largest difference says little."""
RATIO_LIMIT = 1e-5
"""Most that a ratio may be away from 1 where the learner compares with its own log-probabilities."""
PIXEL_LIMIT = 1
"""Most that a pixel may be away from another implementation's, of 255: rounding."""
MOVING_RATE = 1e-4
"""Learning rate of the one update that moves the weights, so that new ones can be told from old ones."""
_LAWS_DIFFER = (
    "sampler and learner hold different laws: compare temperature, precision, masks and positions, and where only "
    "guided images fail, the formula of guidance"
)
_GREEDY_REASONS: dict[Task, str] = {
    "understanding": "the family reads questions otherwise than the other implementation: compare the text head, the "
    "pixels that reach the prompt, and positions",
    "generation": "the family draws otherwise than the other implementation: compare the offset of codes, the null "
    "prompt with its pad id, guidance, and positions",
}


class VerifiedLearner(Learners, Protocol):
    """A learner whose policy can be asked for scores."""

    @property
    def policy(self) -> Policy:
        """The policy that it trains."""
        ...

    @property
    def policy_version(self) -> int:
        """Updates made so far."""
        ...

    def publish_weights(self) -> LocalPublication:
        """A copy of the current weights."""
        ...


def check_layout(bench: Bench, checkpoint: Path) -> Iterator[Finding]:
    """The policy holds the weights of the folder, each of them, in the precision that was asked for.

    A tied head is held under two names: where the files hold a table for each, both are compared.
    """
    stored, held = stored_tensors(checkpoint), bench.policy.module.state_dict()
    names, dtypes = {*bench.policy.shapes, *(stored.shapes.keys() & held.keys())}, set[str]()
    precisions = {getattr(torch, bench.dtype), torch.float32}
    different: list[str] = []
    for name, value in stored.read(names):
        dtypes.add(str(value.dtype).removeprefix("torch."))
        mine = held[name].cpu()
        if mine.dtype not in precisions or not torch.equal(mine, value.to(mine.dtype)):
            different.append(name)
    size = sum(held[name].numel() for name in bench.policy.shapes)
    unused = sorted(stored.shapes.keys() - names)
    measured = f"tensors unlike the files', of {len(names)} ({size:,} {'/'.join(sorted(dtypes))})"
    reason = (
        f"the policy does not hold what the files hold, in {bench.dtype}, in {', '.join(different[:3])}; mend the "
        "family's load(): names, tied heads, precision"
    )
    yield bench.finding("layout", measured, len(different), 0, reason)
    if unused:
        measured = "tensors that the model has no place for"
        reason = f"{', '.join(unused[:3])}: training neither reads nor writes them"
        yield bench.information("layout", measured, len(unused), reason)


def check_ids(bench: Bench, checkpoint: Path) -> Iterator[Finding]:
    """Tokenizer and generation_config.json give each special token the id by which the family knows it.

    Nothing where the family states no ids. An id that a file leaves out is nobody's claim.
    """
    used = load_special_ids(bench.config.model, checkpoint)
    if not used:
        return
    stated = stated_ids(checkpoint, used)
    wrong = [f"{where} says {role} {id}, not {used[role]}" for where, role, id in stated if id != used[role]]
    reason = f"{', '.join(wrong[:3])}; take tokenizer and generation_config.json of the checkpoint itself"
    yield bench.finding("special ids", f"ids stated otherwise, of {len(stated)}", len(wrong), 0, reason)


def check_agreement(bench: Bench) -> Iterator[Finding]:
    """The sampler reports the log-probabilities that the learner computes, with and without guidance."""
    questions, drawings = ([r for r in bench.requests if r.task == task] for task in TASKS)
    groups = bench.sample(questions, bench.sampling)
    yield from _gaps(bench, "agreement", groups, _guided(bench, bench.sampling), _LAWS_DIFFER)
    for scale in GUIDANCE_SCALES:
        sampling = _guided_by(bench.sampling, scale)
        groups, scoring = bench.sample(drawings, sampling), _guided(bench, sampling)
        yield from _gaps(bench, "agreement", groups, scoring, _LAWS_DIFFER)
        if scale != 1.0 and bench.dtype == "float32":
            gap = bench.gap(bench.batch(groups).rows, replace(scoring, image_logprob="conditional"))
            measured = f"mean |guided - conditional| in nats, s = {scale:g}"
            reason = "what algorithm.image_logprob=conditional leaves out of the loss; 0 would be exact"
            yield bench.information("conditional loss", measured, float(gap.mean()), reason)


def check_greedy(bench: Bench, independent: Independent | None) -> Iterator[Finding]:
    """At temperature 0 the sampler's completions are those of an implementation that shares no code with it.

    So are the pictures that it makes of the codes, where that implementation has a decoder.
    """
    if independent is None:
        reason = f"nobody else's implementation of {bench.config.model.family} is installed to compare with"
        yield Finding(gate="greedy tokens", dtype=bench.dtype, measured="", verdict="not applicable", reason=reason)
        return
    greedy = at_temperature_0(_guided_by(bench.sampling, GREEDY_GUIDANCE))
    groups = bench.sample([replace(r, seeds=r.seeds[:1]) for r in bench.requests], greedy)
    different = dict.fromkeys(TASKS, 0)
    off: list[int] = []
    for group in groups:
        (ours,), sample = group.trajectories, group.request.sample
        if isinstance(sample, UnderstandingSample):
            theirs = independent.answer(ours.prompt_ids, sample.image, greedy.text.max_tokens)
        else:
            theirs = independent.draw(ours.prompt_ids, greedy.image.guidance_scale)
            if ours.image is not None and (painted := independent.paint(ours.completion_ids)) is not None:
                off.append(int(np.abs(ours.image.astype(int) - painted).max()))
        different[group.request.task] += not np.array_equal(ours.completion_ids, theirs)
    for task in TASKS:
        what = f"images (s = {GREEDY_GUIDANCE:g})" if task == "generation" else "answers"
        measured = f"{what} unlike the other implementation's, of {len(groups) // 2}"
        yield bench.finding("greedy tokens", measured, different[task], 0, _GREEDY_REASONS[task])
    if off:
        reason = "codes become other pictures: compare the offset of codes, the codebook and the range of pixels"
        measured = f"most that a pixel is off, of 255, in {len(off)} pictures"
        yield bench.finding("pictures", measured, max(off), PIXEL_LIMIT, reason)


def check_company(bench: Bench) -> Iterator[Finding]:
    """The same prompts and seeds give the same tokens alone, all together beside shorter prompts, and in reverse."""
    requests = bench.uneven_requests
    together = _tokens(bench.sample(requests, bench.sampling))
    reverse = _tokens(bench.sample(requests[::-1], bench.sampling))
    alone = _tokens([group for request in requests for group in bench.sample([request], bench.sampling)])
    different = sum(together[key] != other[key] for other in (reverse, alone) for key in together)
    measured = f"sequences that differ alone or reversed, of {2 * len(together)}"
    if bench.dtype == "float32":
        reason = "what a prompt is batched with decides its tokens: look at seeds, padding and cached prefixes"
        yield bench.finding("batch company", measured, different, 0, reason)
        return
    reason = "no limit in bfloat16: kernels round a row by the shape of its batch, and near-ties flip"
    yield bench.information("batch company", measured, different, reason)


def check_padding(bench: Bench) -> Iterator[Finding]:
    """The learner scores a row that is padded to the length of others as it scores it alone."""
    scoring = _guided(bench, bench.sampling)
    for task in TASKS:
        requests = [request for request in bench.uneven_requests if request.task == task]
        rows = bench.batch(bench.sample(requests, bench.sampling)).rows
        together, alone = bench.score(rows, scoring), [bench.score([row], scoring)[0] for row in rows]
        gaps = [np.abs(one - two)[row.loss_mask] for one, two, row in zip(together, alone, rows, strict=True)]
        scale = scoring.guidance_scale if task == "generation" else 1.0
        gap = np.concatenate([np.zeros(0, np.float32), *gaps])
        what = f"{len(gap)} {MODALITIES[task]} tokens, padded or alone"
        reason = "a row is scored otherwise beside longer ones: padding is attended to, or its positions count"
        yield from _limited(bench, "padding", gap, what, scale, reason)


def check_same_weights(bench: Bench, learner: VerifiedLearner) -> Iterator[Finding]:
    """Weights that go from the learner to the sampler unchanged change no token and no log-probability."""
    built = bench.sample(bench.requests, bench.sampling)
    first, second = (_sample_published(bench, learner) for _ in range(2))
    measured = f"sequences that the same weights, sent, changed, of {len(_tokens(built))}"
    reason = "publishing or loading alters weights: compare names, order and precision on both sides"
    if bench.dtype == "float32":
        yield bench.finding("weight sync", measured, _different(built, first), 0, reason)
    else:
        # Every run publishes before its first step, so that both sides start from the same rounding.
        reason = (
            "an engine may hold parts of the files unrounded until the first publication, which a run makes at once"
        )
        yield bench.information("weight sync", measured, _different(built, first), reason)
    measured = f"sequences that sending them again changed, of {len(_tokens(built))}"
    yield bench.finding("weight sync", measured, _different(first, second), 0, reason)


def check_moved_weights(bench: Bench, learner: VerifiedLearner) -> Iterator[Finding]:
    """After an update the sampler, given the new weights, samples from the learner's new policy."""
    before = bench.sample(bench.requests, bench.sampling)
    learner.update(_current(bench.batch(before), learner), 1)
    after = _sample_published(bench, learner)
    scoring = _guided(bench, bench.sampling)
    measured = f"sequences that an update, sent, changed, of {len(_tokens(after))}"
    reason = "the learner does not move its weights, or the sampler keeps its old ones"
    yield bench.above_0("weight sync", measured, _different(before, after), reason)
    for task in TASKS:
        own = [group for group in after if group.request.task == task]
        reason = "the sampler holds other weights than the learner: load every one, under its own name, in full"
        yield from _gaps(bench, "weight sync", own, scoring, reason, when="after it, ")


def check_foreign_weights(bench: Bench, learner: VerifiedLearner) -> Iterator[Finding]:
    """The sampler refuses weights of another model, by name and by shape, and stays as it was."""
    before = bench.sample(bench.requests, bench.sampling)
    publication: LocalPublication = learner.publish_weights()
    name, array = next((name, array) for name, array in publication.tensors if array.ndim > 1)
    taken = []
    for what, stranger in (("name", (f"other.{name}", array)), ("shape", (name, array.reshape(-1)))):
        tensors = [stranger if own == name else (own, value) for own, value in publication.tensors]
        try:
            bench.sampler.load_weights(_manifest(tensors), tensors)
        except ValueError:
            continue
        taken.append(what)
    reason = f"weights with another {' and another '.join(taken)} were taken; compare manifests before loading"
    yield bench.finding("weight sync", "manifests of another model taken, of 2", len(taken), 0, reason)
    after = bench.sample(bench.requests, bench.sampling)
    measured = f"sequences that differ after the refusal, of {len(_tokens(before))}"
    reason = "refused weights left a trace; check the whole manifest before the first weight is written"
    yield bench.finding("weight sync", measured, _different(before, after), 0, reason)


def check_rate_0(bench: Bench, learner: VerifiedLearner) -> Iterator[Finding]:
    """An update at learning rate 0 leaves every weight as it is, to the bit, and every ratio at 1."""
    batch = _current(bench.batch(bench.sample(bench.requests, bench.sampling)), learner)
    # The ratios are then the learner's own affair; the sampler's part is the agreement above.
    scores = bench.score(batch.rows, scoring_of(bench.sampling, bench.config.algorithm))
    rows = [replace(row, old_logprobs=mine) for row, mine in zip(batch.rows, scores, strict=True)]
    before: LocalPublication = learner.publish_weights()
    metrics = learner.update(replace(batch, rows=tuple(rows)), 2)
    if metrics["learner/lr"]:
        # The rate falls to 0 after the first update, and this one was the first.
        reason = "the weight sync gate broke off before the update that moves the weights"
        yield Finding(gate="learning rate 0", dtype=bench.dtype, measured="", verdict="not applicable", reason=reason)
        return
    after: LocalPublication = learner.publish_weights()
    moved = [
        name
        for (name, old), (_, new) in zip(before.tensors, after.tensors, strict=True)
        if not np.array_equal(old.reshape(-1).view(np.uint8), new.reshape(-1).view(np.uint8))
    ]
    measured = f"weights that changed, of {len(after.tensors)}"
    reason = f"an update moved {', '.join(moved[:3])}; look at the optimizer's rate and weight decay"
    yield bench.finding("learning rate 0", measured, len(moved), 0, reason)
    off = max(metrics["policy/ratio_max"] - 1, 1 - metrics["policy/ratio_min"])
    measured = f"max |ratio - 1| over {int(metrics['learner/num_tokens'])} tokens"
    reason = "scoring twice gives two results: something random or stateful is on in the learner's forward pass"
    yield bench.finding("learning rate 0", measured, off, RATIO_LIMIT, reason)


def check_gradients(bench: Bench, learner: VerifiedLearner) -> Iterator[Finding]:
    """Each task, alone in a batch, gives a gradient."""
    groups = bench.sample(bench.requests, bench.sampling)
    for task in TASKS:
        own = [group for group in groups if group.request.task == task]
        norm, problem = 0.0, f"no gradient from {task}: check that model.frozen leaves weights that it passes through"
        try:
            norm = learner.update(_current(bench.batch(own), learner), 3).get("learner/grad_norm", 0.0)
        except RuntimeError as error:
            problem = str(error)
        yield bench.above_0("gradient", f"gradient norm, {len(own)} groups of {MODALITIES[task]} alone", norm, problem)


SAMPLING_GATES: tuple[tuple[str, Callable[[Bench], Iterator[Finding]]], ...] = (
    ("agreement", check_agreement),
    ("batch company", check_company),
    ("padding", check_padding),
)
"""Run in both precisions."""
LEARNING_GATES: tuple[tuple[str, Callable[[Bench, VerifiedLearner], Iterator[Finding]]], ...] = (
    ("weight sync", check_same_weights),
    ("weight sync", check_moved_weights),
    ("weight sync", check_foreign_weights),
    ("learning rate 0", check_rate_0),
    ("gradient", check_gradients),
)
"""Run in the precision that is trained in, in this order: the learner moves in its first update and never after."""


def _guided_by(sampling: SamplingConfig, scale: float) -> SamplingConfig:
    return replace(sampling, image=replace(sampling.image, guidance_scale=scale))


def _guided(bench: Bench, sampling: SamplingConfig) -> Scoring:
    """The law that the sampler draws from, whichever the loss takes."""
    return replace(scoring_of(sampling, bench.config.algorithm), image_logprob="guided")


def _sample_published(bench: Bench, learner: VerifiedLearner) -> list[RolloutGroup]:
    """Every request anew, after the sampler took over the learner's weights."""
    publication: LocalPublication = learner.publish_weights()
    bench.sampler.load_weights(publication.manifest, publication.tensors)
    return bench.sample(bench.requests, bench.sampling)


def _tokens(groups: Sequence[RolloutGroup]) -> dict[tuple[str, int], list[int]]:
    """Completion ids by request and seed."""
    return {(g.request.request_id, t.seed): t.completion_ids.tolist() for g in groups for t in g.trajectories}


def _different(before: Sequence[RolloutGroup], after: Sequence[RolloutGroup]) -> int:
    """Sequences whose tokens or log-probabilities are not the same."""
    return sum(
        not (np.array_equal(old.completion_ids, new.completion_ids) and np.array_equal(old.logprobs, new.logprobs))
        for one, other in zip(before, after, strict=True)
        for old, new in zip(one.trajectories, other.trajectories, strict=True)
    )


def _gaps(
    bench: Bench, gate: str, groups: Sequence[RolloutGroup], scoring: Scoring, reason: str, when: str = ""
) -> Iterator[Finding]:
    """|sampler - learner| log-probability on groups of one task: the largest and, if rounding is coarse, the mean."""
    task = groups[0].request.task
    scale = scoring.guidance_scale if task == "generation" else 1.0
    gap = bench.gap(bench.batch(groups).rows, scoring)
    what = f"{len(gap)} {MODALITIES[task]} tokens" + (f", s = {scale:g}" if task == "generation" else "")
    yield from _limited(bench, gate, gap, what, scale, reason, when)


def _limited(
    bench: Bench, gate: str, gap: NDArray[np.float32], what: str, scale: float, reason: str, when: str = ""
) -> Iterator[Finding]:
    """A gap in nats of each token under guidance `scale` against the limits of the precision."""
    if not len(gap):
        yield bench.above_0(gate, f"{when}tokens of the loss: {what}", 0, "no token")
        return
    for name, figure, limits in (("max", gap.max(), MAX_GAP), ("mean", gap.mean(), MEAN_GAP)):
        if limit := limits.get(bench.dtype):
            measured = f"{when}{name} gap in nats, {what}"
            yield bench.finding(gate, measured, float(figure), limit * (2 * scale - 1), reason)


def _current(batch: LearnerBatch, learner: VerifiedLearner) -> LearnerBatch:
    """The batch as of the learner's version: versions count updates, and those at rate 0 change nothing."""
    return replace(batch, policy_version=learner.policy_version)


def _manifest(tensors: NamedArrays) -> WeightsManifest:
    named = list(tensors)
    specs = tuple(TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype)) for name, array in named)
    return WeightsManifest(policy_version=1_000_000, tensors=specs, checksum=checksum(named))
