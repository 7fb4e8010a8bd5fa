"""What each sentinel looks for in fine-tuning: functions of a step's metrics and the lines before."""

from collections.abc import Iterator
from statistics import median

from unirl.monitoring.detectors import Line, Look

MODALITIES = ("text", "image")
EXPECTED = 20.0
"""Sequences with a target that there should have been, by the steps before, where there is none."""
DOMINANT = 100.0
"""Times that one modality's gradient may be longer than the other's."""
LEARNED = 0.1
"""Nats, and share of the targets, below which little of a modality is left to learn."""
REPEATED = 0.1
"""Share of a step's sequences that may come too often."""
WAITING, LEAST_WAIT_S = 0.5, 0.5
"""Share of a step, and seconds, that a rank may wait for its data."""
FEW_STEPS = 3
LOW_RATE = 0.1
"""Share of the highest learning rate from which on weights must move."""


def no_gradient(look: Look) -> Iterator[str]:
    """A modality that moves nothing."""
    for name in MODALITIES:
        norm = f"sft/grad_norm/{name}"
        if look.now.get(f"sft/num_targets/{name}"):
            if look.now.get(norm) == 0.0 or (norm not in look.now and any(norm in line for line in look.past)):
                yield f"{name} has targets and no gradient at the states that predict them"
        elif (expected := _expected(look, name)) > EXPECTED:
            yield f"no sequence has a target of {name}; by the steps before {expected:.0f} should"


def _expected(look: Look, modality: str) -> float:
    """Sequences with a target of it in this step and those just before that had none either."""
    name, rows = f"sft/num_learned/{modality}", look.now.get("learner/num_rows", 0.0)
    past = list(look.past)
    while past and not past[-1].get(name):
        rows += past.pop().get("learner/num_rows") or 0.0
    total = sum(line.get("learner/num_rows") or 0.0 for line in past)
    return rows * sum(line.get(name) or 0.0 for line in past) / total if total else 0.0


def lost_targets(look: Look) -> Iterator[str]:
    """Targets that never reached the loss."""
    if lost := look.now.get("sft/num_lost_targets"):
        got = sum(look.now.get(f"sft/num_targets/{name}", 0.0) for name in MODALITIES)
        yield f"the step's sequences have {got + lost:g} targets; {got:g} took part in its loss"


def frozen_weights(look: Look) -> Iterator[str]:
    """Updates that did not move. Where a schedule ends, rates are below what bfloat16 can show."""
    rates = [line.get("learner/lr") or 0.0 for line in (*look.first, *look.past, look.now)]

    def stands(line: Line) -> bool:
        has_rate = (line.get("learner/lr") or 0.0) >= LOW_RATE * max(rates) > 0
        return has_rate and bool(line.get("learner/grad_norm")) and line.get("sft/moved_fraction") == 0.0

    if look.lasts(FEW_STEPS, stands):
        yield f"{FEW_STEPS} updates with a gradient and a learning rate left every weight that was looked at as it was"


def dominating_modality(look: Look) -> Iterator[str]:
    """A modality beside which the other is not learned, though there is much of it to learn."""

    def vanishing(line: Line) -> str:
        norms = {name: line.get(f"sft/grad_norm/{name}") or 0.0 for name in MODALITIES}
        least = min(norms, key=norms.__getitem__)
        nats, targets = (
            line.get(f"sft/nats/{least}") or 0.0,
            [line.get(f"sft/num_targets/{m}") or 0 for m in MODALITIES],
        )
        much = nats > LEARNED and (line.get(f"sft/num_targets/{least}") or 0) > LEARNED * sum(targets)
        return least if much and 0 < norms[least] * DOMINANT < max(norms.values()) else ""

    if (least := vanishing(look.now)) and look.lasts(2, lambda line: vanishing(line) == least):
        own, other = sorted(look.now[f"sft/grad_norm/{name}"] for name in MODALITIES)
        yield f"the gradient of {least} is {other / own:.0f} times shorter than the other's"


def loss_spike(look: Look) -> Iterator[str]:
    """A loss far above what it was, in two steps running."""
    for name in (f"sft/nats/{modality}" for modality in MODALITIES):
        before = [nats for line in look.past[-21:-1] if (nats := line.get(name)) is not None]
        if len(before) < 2:
            continue
        usual = median(before)
        limit = max(2 * usual, usual + 1.0, max(before))
        if look.lasts(2, lambda line, name=name, limit=limit: (line.get(name) or 0.0) > limit):
            yield f"{name} is {look.now[name]:.3g}, far above its usual {usual:.3g}"


def flat_loss(look: Look) -> Iterator[str]:
    """A loss that is the same to the last digit."""
    for name in (f"sft/nats/{modality}" for modality in MODALITIES):
        now = look.now.get(name)
        if now and look.lasts(FEW_STEPS, lambda line, name=name, now=now: line.get(name) == now):
            yield f"{name} is {now!r} in {FEW_STEPS} steps running"


def repeated_conversations(look: Look) -> Iterator[str]:
    """Sequences that come too often in an epoch."""
    if (share := look.now.get("sft/repeated_fraction", 0.0)) > REPEATED:
        yield f"{share:.0%} of the sequences came oftener than the epoch is to have them"


def evaluation_leak(look: Look) -> Iterator[str]:
    """Training on what is held out."""
    if num := look.now.get("sft/num_leaked"):
        yield f"sequences of this step whose prompt is held out: {num:g}"


def data_wait(look: Look) -> Iterator[str]:
    """Learners that wait for their data."""

    def waits(line: Line) -> bool:
        wait, update = line.get("sft/data_wait_s") or 0.0, line.get("learner/update_s") or 0.0
        return wait > max(LEAST_WAIT_S, WAITING * (wait + update))

    if look.lasts(FEW_STEPS, waits):
        yield f"the learner waited {look.now['sft/data_wait_s']:.1f} s for its data, longer than it learned"
