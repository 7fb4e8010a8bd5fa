"""What each sentinel looks for: functions of one step, its metrics and the lines before, which say what is wrong."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

import numpy as np

from unirl.config import RlConfig
from unirl.monitoring.step_data import StepData
from unirl.types import TASKS

Line = Mapping[str, float | None]
"""Metrics of a step; None where a value was not finite."""

FLAT_STEPS, FLAT_PAIRS = 3, 12
"""Steps without a signal in a row before a task counts as silent, more where they are of few pairs: as many as sample
so many. Near the end single steps are silent."""
COUPLED = 0.8
"""Rank correlation from which on a reward is taken to follow the other quantity."""
COUPLED_FREEDOM = 60
"""Completions, less one a group, over which it is measured where there are so many."""
COUPLED_STEPS = 10
"""Most steps that these may be spread over."""
BY_CHANCE = 4.5
"""Standard deviations that a coupling by chance stays below."""
DOMINANT = 30.0
"""Times that one task's gradient may be longer than the other's."""
SPIKE = 30.0
"""Times that a gradient may be longer than usual."""
COLLAPSED = 0.1
"""Share of the entropy of the first steps, or of the last ones, below which it has collapsed."""
CUT_OFF = 0.2
"""Share of answers that may be cut off."""
CAPPED = 0.2
"""Share of tokens of older weights whose weight may be the cap."""
MEAN_GAP = 0.02
"""Of the nats by which sampler and learner may differ on a single token, what they may differ by on average: rounding
makes single tokens jump, but not the mean."""
MEAN_RATIO = 0.05
"""Of the same nats in answers, how far the mean ratio may be from 1; guidance, which spreads it, does not move it."""
FAR_KL = 0.5
"""Nats per token between the policy that sampled and the one that learns."""
FALLEN = 0.25
"""Share of the usual range of a step's rewards by which the mean may fall."""
FALLEN_STEPS, USUAL_STEPS = 2, 5
"""Steps running that it must have fallen in, more where they are of few pairs, and most steps before them that it is
compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the run's settings say should hold."""

    rewards: Mapping[str, tuple[str, ...]]
    """Names of the rewards of each task."""
    pairs_per_step: int
    updates_per_step: int
    max_staleness: int
    """Updates since the weights that drew a token."""
    learns_all: bool
    """Whether rows without advantage are learned from, for a KL penalty."""
    logprob_gap: Mapping[str, float]
    """Nats by which sampler and learner may differ on a single token, by modality."""

    @classmethod
    def of(cls, config: RlConfig) -> "Rules":
        """Those of a run."""
        algorithm, overlap = config.algorithm, config.overlap
        spread = 2 * config.rollout.sampling.image.guidance_scale - 1
        steps = {"synchronous": 0, "one_step_off": 1, "bounded_staleness": overlap.max_staleness}[overlap.mode]
        limit = config.monitoring.max_logprob_gap
        own = limit if limit is not None else 1e-3 if config.model.dtype == "float32" else 1.0
        return cls(
            rewards={task: tuple(config.rewards.active(task)) for task in TASKS},
            pairs_per_step=config.rollout.pairs_per_step,
            updates_per_step=algorithm.updates_per_step,
            max_staleness=steps * algorithm.updates_per_step,
            learns_all=algorithm.kl_beta != 0,
            logprob_gap={"text": own, "image": own * max(1.0, spread)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a sentinel is shown."""

    rules: Rules
    data: StepData
    now: Mapping[str, float]
    past: Sequence[Line]
    """Lines of the steps before, oldest first; the newest 50."""
    first: Sequence[Line]
    """The run's first five, without the present one."""
    checksum_before: str
    """Of the weights after the step before; empty when nobody knows."""
    repeated: Callable[[], Sequence[str]]
    """Pairs that came again before their epoch was over."""
    leaked: Callable[[], Sequence[str]]
    """Samples of the step that are held out too."""

    def lasts(self, num_steps: int, holds: Callable[[Line], bool]) -> bool:
        """Whether something holds now and held in all of the `num_steps` - 1 lines before."""
        before = self.past[len(self.past) - num_steps + 1 :] if num_steps > 1 else []
        return len(before) >= num_steps - 1 and holds(self.now) and all(map(holds, before))

    @property
    def flat_steps(self) -> int:
        """Steps in a row that make a task silent."""
        return max(FLAT_STEPS, math.ceil(FLAT_PAIRS / self.rules.pairs_per_step))

    @property
    def is_on_policy(self) -> bool:
        """Whether the weights that sampled are those that learn, in a single update."""
        return self.rules.updates_per_step == 1 and not self.now.get("rollout/staleness_max", 0)


def nonfinite(look: Look) -> Iterator[str]:
    """NaN or infinity in any metric."""
    if bad := [f"{name} is {value}" for name, value in look.now.items() if not math.isfinite(value)]:
        yield ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")


def constant_reward(look: Look) -> Iterator[str]:
    """One reward for everything."""
    for task in TASKS:
        if _is_constant(look, task):
            yield f"every {task} completion of {look.flat_steps} steps earned {look.now[f'reward/{task}']:.3g}"


def zero_variance(look: Look) -> Iterator[str]:
    """No group with a signal."""
    for task in TASKS:
        name = f"reward/{task}/zero_variance_fraction"
        if look.lasts(look.flat_steps, lambda line, name=name: line.get(name) == 1.0) and not _is_constant(look, task):
            yield f"no {task} group of {look.flat_steps} steps carries a signal: all rewards are equal inside each"


def _is_constant(look: Look, task: str) -> bool:
    return look.lasts(look.flat_steps, lambda line: line.get(f"reward/{task}/range") == 0.0)


def disordered_advantages(look: Look) -> Iterator[str]:
    """A better completion with a lower advantage."""
    if share := look.now.get("advantage/disordered_fraction"):
        yield f"in {share:.0%} of the groups advantages do not rise with the rewards, or do not sum to 0"


def wrong_pair_weights(look: Look) -> Iterator[str]:
    """A weight outside [0, 1], or an aligned pair with another than 1."""
    wrong = {
        group.pair.pair_id: group.pair_weight
        for group in look.data.groups
        if not 0.0 <= group.pair_weight <= 1.0 + 1e-6
        or (group.pair.kind == "aligned" and abs(group.pair_weight - 1.0) > 1e-6)
    }
    if wrong:
        name, weight = next(iter(wrong.items()))
        yield f"{len(wrong)} pairs have a weight that eq. 3 cannot give, such as {weight:.3g} of {name}"


def no_gradient(look: Look) -> Iterator[str]:
    """A task with advantages that moves nothing."""
    learner = look.data.learner
    if "learner/loss" not in learner or learner.get("learner/skipped_updates"):
        return
    for task in TASKS:
        teaches = any(g.scored.group.request.task == task and g.advantages.any() for g in look.data.groups)
        if teaches and f"learner/loss/{task}" not in learner:
            yield f"{task} has advantages, and no row of it reached the learner"
        elif teaches and look.is_on_policy and learner.get(f"learner/grad_norm/{task}") == 0.0:
            yield f"{task} has advantages and a gradient of exactly 0"
    if learner.get("learner/grad_norm") == 0.0 and look.is_on_policy:
        yield "the whole gradient is exactly 0"


def lost_rows(look: Look) -> Iterator[str]:
    """Completions that never reached the loss."""
    if "learner/num_rows" not in look.data.learner:
        return
    wanted = sum(
        bool(group.scored.judged[index] and trajectory.loss_mask.any())
        and bool(look.rules.learns_all or group.advantages[index])
        for group in look.data.groups
        for index, trajectory in enumerate(group.scored.group.trajectories)
    )
    if (got := look.data.learner["learner/num_rows"]) != wanted:
        yield f"{wanted} completions have something to teach; {got:g} took part in the update"


def learning_rate_zero(look: Look) -> Iterator[str]:
    """An update that cannot move."""
    if look.now.get("learner/lr") == 0.0:
        yield "the learning rate of the update was 0"


def frozen_weights(look: Look) -> Iterator[str]:
    """An update that did not move."""
    checksum, learner = look.data.weights_checksum, look.data.learner
    moves = learner.get("learner/lr") and learner.get("learner/grad_norm") and not learner["learner/skipped_updates"]
    if moves and checksum and checksum == look.checksum_before:
        yield "an update with a gradient and a learning rate left every published weight as it was"


def stale_sampler(look: Look) -> Iterator[str]:
    """A sampler that keeps old weights."""
    check = look.data.sync_check
    if check.stale:
        yield (
            f"after a sync {', '.join(check.stale)} held other weights than those published, or none that could be "
            f"compared (of the sampler with fewest {check.fewest_compared or 0} were)"
        )


def logprob_gap(look: Look) -> Iterator[str]:
    """Sampler and learner disagree."""
    for modality, limit in look.rules.logprob_gap.items():
        rows = (("logprob_gap_max", f"a {modality} token", limit, 1),
                ("logprob_gap", f"the average {modality} token", MEAN_GAP * limit, 2))  # fmt: skip
        for kind, what, most, num_steps in rows:
            name = f"policy/{kind}/{modality}"
            if look.lasts(num_steps, lambda line, name=name, most=most: (line.get(name) or 0.0) > most):
                gap = look.now[name]
                yield f"sampler and learner differ by {gap:.3g} nats on {what}; expected at most {most:.3g}"


def off_policy_ratio(look: Look) -> Iterator[str]:
    """A ratio far from 1 where old and new policy are the same."""
    if look.now.get("policy/ratio_capped_fraction"):
        yield "log-ratios beyond 20 nats were held there"
    if not look.is_on_policy:
        return
    limits = look.rules.logprob_gap
    widest, mean_off = math.exp(min(2 * max(limits.values()), 700.0)), MEAN_RATIO * limits["text"]
    low, mean, high = (look.now.get(f"policy/ratio_{name}", 1.0) for name in ("min", "mean", "max"))
    is_wide = high > widest or low < 1 / widest
    if is_wide or look.lasts(2, lambda line: abs((line.get("policy/ratio_mean") or 1.0) - 1) > mean_off):
        yield f"before the first update ratios lie in [{low:.3g}, {high:.3g}], on average {mean:.3g}; all should be 1"


def far_kl(look: Look) -> Iterator[str]:
    """Updates that leave the region where ratios mean anything."""
    for name, when in (("policy/kl", "during"), ("policy/kl_update", "after")):
        if (kl := look.now.get(name, 0.0)) > FAR_KL:
            yield f"{when} the updates the policy is {kl:.3g} nats a token from the one that sampled"


def dominating_modality(look: Look) -> Iterator[str]:
    """One task's gradient beside which the other's is nothing."""

    def dominates(line: Line) -> bool:
        norms = [line.get(f"learner/grad_norm/{task}") or 0.0 for task in TASKS]
        return min(norms) > 0 and max(norms) > DOMINANT * min(norms)

    # Where norms cost traffic between ranks, they come in measured steps alone.
    measured = (line for line in reversed(look.past) if all(f"learner/grad_norm/{task}" in line for task in TASKS))
    if dominates(look.now) and (before := next(measured, None)) is not None and dominates(before):
        norms = {task: look.now[f"learner/grad_norm/{task}"] for task in TASKS}
        larger = max(norms, key=norms.__getitem__)
        times = max(norms.values()) / min(norms.values())
        yield f"the gradient of {larger} is {times:.0f} times as long as the other's"


def gradient_spike(look: Look) -> Iterator[str]:
    """A gradient far longer than before."""
    before = [norm for line in look.past[-20:] if (norm := line.get("learner/grad_norm"))]
    norm = look.now.get("learner/grad_norm", 0.0)
    if len(before) >= 2 and norm > SPIKE * median(before):
        yield f"the gradient norm is {norm:.3g}, {norm / median(before):.0f} times its usual {median(before):.3g}"


def entropy_collapse(look: Look) -> Iterator[str]:
    """A policy that always says the same."""
    for modality, kind in product(("text", "image"), ("rollout/surprisal", "policy/entropy")):
        name = f"{kind}/{modality}"
        value = look.now.get(name)
        for what, lines in (("first", look.first), ("last", look.past[-5:])):
            before = [found for line in lines if (found := line.get(name)) is not None]
            if value is not None and len(before) >= 2 and value < COLLAPSED * (usual := median(before)):
                yield f"{name} is {value:.3g} nats, where the {what} steps had {usual:.3g}"
                break


def equal_images(look: Look) -> Iterator[str]:
    """Drawings of one prompt that are copies."""
    if look.now.get("rollout/equal_images_fraction") == 1.0 and look.rules.pairs_per_step > 1:
        yield "all drawings of each prompt are the same, code by code"


def length_coupling(look: Look) -> Iterator[str]:
    """A reward that follows the length of an answer."""
    yield from _coupled(look, "reward/understanding/length_coupling", "length of an answer")


def brightness_coupling(look: Look) -> Iterator[str]:
    """A reward that follows the brightness of a picture."""
    yield from _coupled(look, "reward/generation/brightness_coupling", "brightness of a picture")


def _coupled(look: Look, name: str, what: str) -> Iterator[str]:
    """By chance a rank correlation of n values varies by 1 / (n - 1)."""
    total, freedom = 0.0, 0.0
    for line in (look.now, *look.past[:-COUPLED_STEPS:-1]):
        value, count = line.get(name), line.get(f"{name}_freedom")
        if value is not None and count:
            total, freedom = total + value * count, freedom + count
        if freedom >= COUPLED_FREEDOM:
            break
    if name in look.now and freedom and abs(total / freedom) > COUPLED and abs(total) / math.sqrt(freedom) > BY_CHANCE:
        yield f"reward and {what} have a rank correlation of {total / freedom:.2f} inside the last groups"


def missing_component(look: Look) -> Iterator[str]:
    """A reward that is configured and says nothing, or the same of everything."""
    for task, names in look.rules.rewards.items():
        groups = [group.scored for group in look.data.groups if group.scored.group.request.task == task]
        for name in names if groups else ():
            lacking = sum(name not in scored.components for scored in groups)
            if lacking:
                yield f"{name} is missing from the rewards of {lacking} of {len(groups)} {task} groups"
            elif len(names) > 1 and _says_one_thing(look, task, name):
                yield f"{name} gives every {task} completion the same value"


def _says_one_thing(look: Look, task: str, name: str) -> bool:
    parts = [
        group.scored.components[name]
        for group in look.data.groups
        if group.scored.group.request.task == task and name in group.scored.components
    ]
    values = np.concatenate([scores.values[scores.judged] for scores in parts])
    mean = look.now.get(f"score/{task}/{name}")
    return (
        bool(len(values))
        and float(np.ptp(values)) == 0.0
        and look.lasts(look.flat_steps, lambda line: line.get(f"score/{task}/{name}") == mean)
    )


def unjudged(look: Look) -> Iterator[str]:
    """Completions that no reward could judge."""
    for task in TASKS:
        if share := look.now.get(f"reward/{task}/unjudged_fraction"):
            yield f"{share:.1%} of the {task} completions could not be judged"


def truncated_failures(look: Look) -> Iterator[str]:
    """Answers that ran out of room and are taught as wrong."""
    name = "rollout/truncated_fraction"
    share = look.now.get(name, 0.0)
    cut, mean = look.now.get("reward/understanding/truncated"), look.now.get("reward/understanding")
    if cut is None or mean is None or not look.lasts(2, lambda line: (line.get(name) or 0.0) >= CUT_OFF):
        return
    finished = (mean - share * cut) / (1 - share) if share < 1 else math.inf
    if cut < finished - 0.1 * max(1.0, abs(finished) if math.isfinite(finished) else 1.0):
        yield f"{share:.0%} of the answers were cut off and earned {cut:.3g} on average, as failures do"


def repeated_pairs(look: Look) -> Iterator[str]:
    """Pairs that come twice in an epoch."""
    if repeated := look.repeated():
        yield f"{len(repeated)} pairs came again before the epoch was over, such as {repeated[0]}"


def evaluation_leak(look: Look) -> Iterator[str]:
    """Training on what is held out."""
    if leaked := look.leaked():
        yield f"{len(leaked)} samples of this step are evaluated on as well, such as {leaked[0]}"


def blank_images(look: Look) -> Iterator[str]:
    """Questions about nothing."""
    if num := look.now.get("pairs/num_blank_images"):
        yield f"{num:g} questions of this step are about a picture of one colour"


def staleness(look: Look) -> Iterator[str]:
    """Tokens of weights that are too old, or of none that exist."""
    oldest = look.now.get("rollout/staleness_max", 0.0)
    if oldest > look.rules.max_staleness:
        yield f"tokens were drawn {oldest:g} updates ago; overlap.mode allows {look.rules.max_staleness}"
    if look.now.get("rollout/staleness_min", 0.0) < 0:
        yield "tokens claim to be drawn by weights that do not exist yet"


def importance_capped(look: Look) -> Iterator[str]:
    """Older tokens whose weight is the cap."""
    if (share := look.now.get("policy/importance_capped_fraction", 0.0)) > CAPPED:
        yield f"{share:.0%} of the tokens of older weights have the cap for a weight"


def lost_workers(look: Look) -> Iterator[str]:
    """Processes that were replaced."""
    for pool, what in (("rollout", "rollout workers"), ("reward", "reward workers"), ("learner", "learner ranks")):
        if num := look.now.get(f"{pool}/num_restarts"):
            yield f"{what} that died or hung and were replaced: {num:g}; logs/driver.log says which"


def quarantined(look: Look) -> Iterator[str]:
    """Requests left out."""
    if num := look.now.get("rollout/num_quarantined"):
        yield f"requests that could not be sampled and were left out: {num:g}; quarantine.jsonl names them"


def fallen_reward(look: Look) -> Iterator[str]:
    """A task that was learned, and is not any more: the mean of two steps or more, against that of those before."""
    for task in TASKS:
        name = f"reward/{task}"
        # A step of one pair has no spread: then the steps' own variation counts alone.
        columns = (name, f"{name}/spread", f"{name}/range")
        lines = [[line.get(column) or 0.0 for column in columns] for line in (*look.past, look.now)
                 if line.get(name) is not None and line.get(f"{name}/range") is not None]  # fmt: skip
        num_now = max(FALLEN_STEPS, math.ceil(FLAT_PAIRS / look.rules.pairs_per_step))
        before, now = lines[:-num_now][-USUAL_STEPS:], lines[-num_now:]
        if not before or look.now.get(name) is None:
            continue
        (usual, spread, extent), (value, *_) = np.mean(before, axis=0), np.mean(now, axis=0)
        # By chance a step's mean varies as the prompts do, and at least as it did.
        changes = np.diff([value for value, *_ in lines[:-num_now]])
        varied = float(np.sqrt(np.mean(changes**2) / 2)) if len(changes) else 0.0
        step = max(spread / math.sqrt(look.rules.pairs_per_step), varied)
        by_chance = step * math.sqrt(1 / len(before) + 1 / len(now))
        if usual - value > max(FALLEN * extent, BY_CHANCE * by_chance) > 0:
            yield f"{name} is {value:.3g} in {len(now)} steps, where it was {usual:.3g} before"
