"""What a fine-tuning run would do, or did, in silence."""

from collections.abc import Mapping

from unirl.cluster.sft_worker import num_steps
from unirl.config import SftConfig
from unirl.data.atomic import DataError
from unirl.data.mixture import Mixture
from unirl.learner.engine import learning_rate
from unirl.learner.sft_targets import MODALITIES, Modality, count_targets

STEPS_LOOKED_AT = 50
"""Steps at the beginning in which each modality is looked for."""
LEFT_OUT = 0.001
"""Share of a source's conversations that may be left out without a word."""
LEAST_STEPS = 20
"""Steps before which none need differ."""
UNMOVED = 0.001
"""Share of their nats by which held-out sequences differ at least from before training."""


def find_unlearned(config: SftConfig, mixture: Mixture) -> list[str]:
    """What to say of each modality of which nothing is learned.

    Raises:
        DataError: nothing is learned at all.
    """
    weights: dict[Modality, float] = {"text": config.loss.text_weight, "image": config.loss.image_weight}
    steps = min(STEPS_LOOKED_AT, num_steps(config, mixture))
    missing = set(MODALITIES)
    for step in range(steps):
        for sequence in mixture.step(step) if missing else ():
            missing -= {name for name, count in count_targets(sequence, config.loss).items() if count}
    reasons = {
        name: f"loss.{name}_weight is 0, set it to 1"
        if name not in missing
        else f"the first {steps} steps hold no target of it, mark some in the data or set loss.targets=all"
        for name in MODALITIES
        if name in missing or not weights[name]
    }
    if len(reasons) == len(MODALITIES):
        raise DataError(
            f"data.sources, loss: expected text or image codes to be learned; got neither; of text {reasons['text']}; "
            f"of image codes {reasons['image']}"
        )
    return [f"no {name} will be learned: {reason}, unless that is meant" for name, reason in reasons.items()]


def left_out(mixture: Mixture) -> list[str]:
    """What to say of each source of which too many conversations could not become sequences."""
    return [
        f"{rejected} of {samples} conversations of source {name} are left out; {folder}/rejected.jsonl has the reasons"
        for name, (rejected, samples, folder) in mixture.rejected().items()
        if rejected > LEFT_OUT * samples
    ]


def unmoved(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What to say of held-out sequences that are as likely after some steps as they were before all; or nothing.

    Modalities of one side alone are passed over: a run may go on with other `evaluation.sources`.
    """
    names = [name for name in (f"sft/nats/{name}" for name in MODALITIES) if name in before and name in after]
    if not names or any(abs(after[name] - before[name]) > UNMOVED * before[name] for name in names):
        return ""
    shown = ", ".join(f"{name} was {before[name]:.5g} and is {after[name]:.5g}" for name in names)
    return f"held-out conversations are as likely as before training: {shown}"


def what_ends(config: SftConfig, mixture: Mixture) -> tuple[str, object]:
    """Key and value of the setting that ends the run."""
    if config.train.max_steps == num_steps(config, mixture):
        return "train.max_steps", config.train.max_steps
    return "train.num_epochs", config.train.num_epochs


def changed_rate(before: SftConfig, config: SftConfig, mixture: Mixture, *, made: int) -> list[str]:
    """What to say of a resumed run of another length, whose learning rate jumps after the `made` steps; or nothing."""
    was, now = num_steps(before, mixture), num_steps(config, mixture)
    expected, rate = (learning_rate(c.learner, made, steps) for c, steps in ((before, was), (config, now)))
    if not made or was == now or expected == rate:
        return []
    last = learning_rate(before.learner, made - 1, was)
    return [
        f"the learning rate is {rate:.3g} in step {made + 1}, after {last:.3g} in step {made}: warm-up and schedule "
        f"({config.learner.schedule}) now span {now} steps, not {was}; if that is not meant, start a new run from the "
        "exported policy"
    ]
