"""What is said before a fine-tuning run starts."""

from dataclasses import replace

import numpy as np
import pytest

from unirl.config import SftConfig, SftLossConfig
from unirl.data.atomic import DataError
from unirl.jobs.sft_checks import STEPS_LOOKED_AT, changed_rate, find_unlearned, unmoved, what_ends
from unirl.types import TokenKind, TokenSequence


def sequence(*, codes_learned=True, text_learned=True):
    kinds = np.array([TokenKind.TEXT] * 3 + [TokenKind.BEGIN] + [TokenKind.CODE] * 4 + [TokenKind.END], np.uint8)
    in_loss = np.where(kinds == TokenKind.CODE, codes_learned, text_learned)
    return TokenSequence(id="s", ids=np.arange(len(kinds), dtype=np.int32), kinds=kinds, in_loss=in_loss)


BOTH, TEXT, NONE = sequence(), sequence(codes_learned=False), sequence(codes_learned=False, text_learned=False)


class Steps:
    """A mixture of one sequence a step."""

    def __init__(self, *sequences):
        self._sequences, self.steps_per_epoch = sequences, len(sequences)

    def step(self, step):
        return [self._sequences[step % self.steps_per_epoch]]


def said(*sequences, **loss):
    return find_unlearned(replace(SftConfig(), loss=SftLossConfig(**loss)), Steps(*sequences))


def test_nothing_is_said_where_both_modalities_are_learned():
    assert said(BOTH) == said(*[TEXT] * 40, BOTH) == said(TEXT, targets="all") == []


def test_a_weight_of_zero_is_said():
    (message,) = said(BOTH, image_weight=0.0)
    assert message.startswith("no image will be learned: loss.image_weight is 0, set it to 1")


def test_a_modality_without_targets_is_said():
    (message,) = said(TEXT, TEXT)
    assert message.startswith("no image will be learned: the first 4 steps hold no target of it, mark some")
    assert len(said(*[TEXT] * STEPS_LOOKED_AT, BOTH)) == 1


@pytest.mark.parametrize(("sequences", "loss"), [([NONE], {}), ([TEXT], {"text_weight": 0.0})])
def test_learning_nothing_at_all_is_refused(sequences, loss):
    with pytest.raises(DataError, match=r"learned; got neither; of text .*; of image codes"):
        said(*sequences, **loss)


def of_length(*, schedule="cosine", **train):
    config = SftConfig()
    learner = replace(config.learner, schedule=schedule, lr=1e-3)
    return replace(config, learner=learner, train=replace(config.train, **train))


def test_held_out_sequences_that_stay_as_likely_are_said():
    before = {"sft/nats/text": 2.0, "sft/nats/image": 6.0, "sft/accuracy/text": 0.1}
    assert "sft/nats/text was 2 and is 1.999, sft/nats/image was 6" in unmoved(
        before, before | {"sft/nats/text": 1.999}
    )
    assert unmoved(before, before | {"sft/nats/image": 5.9}) == unmoved({}, before) == ""


def test_held_out_sequences_of_other_sources_are_compared_where_they_can_be():
    both, text, image = (
        {f"sft/nats/{name}": 2.0 for name in names} for names in (("text", "image"), ("text",), ("image",))
    )
    assert unmoved(both, text).endswith(": sft/nats/text was 2 and is 2")
    assert unmoved(text, image) == unmoved(both, {}) == ""


def test_the_setting_that_ends_a_run_is_named():
    steps = Steps(*[BOTH] * 10)
    assert what_ends(of_length(num_epochs=3), steps) == ("train.num_epochs", 3)
    assert what_ends(of_length(num_epochs=3, max_steps=40), steps) == ("train.num_epochs", 3)
    assert what_ends(of_length(num_epochs=3, max_steps=25), steps) == ("train.max_steps", 25)


def test_a_longer_schedule_says_what_the_rate_becomes():
    steps, short, long = Steps(*[BOTH] * 10), of_length(num_epochs=2), of_length(num_epochs=4)
    (message,) = changed_rate(short, long, steps, made=20)
    assert message.startswith("the learning rate is 0.000541 in step 21, after 6.82e-06 in step 20: ")
    assert "(cosine) now span 40 steps, not 20" in message
    assert changed_rate(short, long, steps, made=0) == changed_rate(short, short, steps, made=20) == []
    constant = of_length(num_epochs=2, schedule="constant"), of_length(num_epochs=4, schedule="constant")
    assert changed_rate(*constant, steps, made=20) == []
