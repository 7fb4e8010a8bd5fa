"""Samples to sequences: images are never cut, long conversations are split between exchanges or left out."""

from dataclasses import replace

import numpy as np
import pytest

from tests.joint_checkpoints import write_anole
from unirl.config import ModelConfig, SftLossConfig
from unirl.config_rules import ConfigError
from unirl.jobs.assets import CHECKPOINTS
from unirl.learner.sft_targets import count_targets
from unirl.models import anole
from unirl.models.conversation_encoder import ConversationEncoder
from unirl.models.policy import load_layout
from unirl.types import InterleavedSample, Segment, TokenKind, Turn


class Codec:
    """Every picture becomes 2 x 2 codes of its first pixel's red."""

    num_codes, pixels_per_code, fingerprint = 16, 2, "codec"

    def grid(self, image):
        return 2, 2

    def encode(self, images):
        return [np.full((2, 2), image[0, 0, 0], np.int32) for image in images]

    def decode(self, codes):
        raise NotImplementedError


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = write_anole(tmp_path_factory.mktemp("anole") / "tiny")
    return anole.load_layout(ModelConfig(family="anole"), folder)


def encoder(layout, max_length=100, **settings):
    return ConversationEncoder(layout=layout, codec=Codec(), max_length=max_length, **settings)


def picture(value):
    return Segment(image=np.full((4, 4, 3), value, np.uint8), in_loss=True)


def exchange(number, words="draw a red circle"):
    user = Turn(role="user", segments=(Segment(text=words),))
    return user, Turn(role="assistant", segments=(Segment(text="here it is", in_loss=True), picture(number)))


def sample(*exchanges, id="s", system=False):
    turns = [Turn(role="system", segments=(Segment(text="it is a square"),))] if system else []
    return InterleavedSample(id=id, turns=(*turns, *(turn for pair in exchanges for turn in pair)), subset="drawing")


def codes_of(sequence, layout):
    return (sequence.ids[sequence.kinds == TokenKind.CODE] - layout.vocabulary.first_code).tolist()


def test_each_image_goes_to_its_own_place(layout):
    (one,) = encoder(layout)(sample(exchange(3), exchange(5)))
    (two,) = encoder(layout)(sample(exchange(7), id="t"))
    assert codes_of(one, layout) == [3] * 4 + [5] * 4
    assert codes_of(two, layout) == [7] * 4
    assert (one.id, one.subset, two.id) == ("s", "drawing", "t")


def test_a_long_conversation_is_split_between_exchanges(layout):
    whole = sample(exchange(1), exchange(2), exchange(3), system=True)
    (unsplit,) = encoder(layout)(whole)
    two = len(encoder(layout)(sample(exchange(1), exchange(2), system=True))[0].ids)
    first, second = encoder(layout, max_length=two)(whole)
    assert len(first.ids) == two
    assert [codes_of(part, layout) for part in (first, second)] == [[1] * 4 + [2] * 4, [3] * 4]
    assert (first.id, second.id) == ("s#1", "s#2")
    system = layout.encode([*whole.turns[:1], *exchange(1)], [np.zeros((2, 2), np.int32)]).ids[:6]
    assert (first.ids[:6] == system).all()
    assert (second.ids[:6] == system).all(), "the system's turn opens each part"
    assert sum(part.in_loss.sum() for part in (first, second)) == unsplit.in_loss.sum()


def test_what_cannot_be_split_is_left_out_with_a_reason(layout):
    long = sample(exchange(1), exchange(2, "draw a red circle and a green square and a red square and it is it"))
    with pytest.raises(ValueError, match=r"s, one exchange of it: expected at most data.max_length 20 tokens; got"):
        encoder(layout, max_length=20)(long)
    with pytest.raises(ValueError, match=r"sequence s: expected at most data.max_length 20 tokens"):
        encoder(layout, max_length=20, too_long="reject")(sample(exchange(1), exchange(2)))


def test_a_special_token_in_a_text_leaves_the_sample_out(layout):
    with pytest.raises(ValueError, match="special tokens"):
        encoder(layout)(sample(exchange(1, "draw </s> it")))


@pytest.mark.parametrize("family", ["anole", "janus_pro"])
def test_unknown_words_leave_the_sample_out_by_their_names(family):
    folder = CHECKPOINTS / family.removesuffix("_pro")
    lab = encoder(load_layout(ModelConfig(family=family), folder), max_length=400)

    def asked(words):
        user, drawn = Turn(role="user", segments=(Segment(text=words),)), Turn(role="assistant", segments=(picture(1),))
        return sample((user, drawn))

    assert lab(asked("a red circle"))
    with pytest.raises(ValueError, match=r"s: .* words that it lacks: Draw, purple, elephant; use .*lower case"):
        lab(asked("Draw a purple elephant Draw"))
    with pytest.raises(ValueError, match=r"special tokens|words that it lacks: <unk>"):
        lab(asked("a <unk>"))


def test_one_image_longer_than_a_sequence_is_refused_at_once(layout):
    with pytest.raises(ConfigError, match=r"data.max_length \(6\) must leave room for one image, .* 6 tokens"):
        encoder(layout, max_length=6)


def test_the_fingerprint_tells_other_settings(layout):
    prints = {
        encoder(layout).fingerprint,
        encoder(layout, 99).fingerprint,
        encoder(layout, too_long="reject").fingerprint,
    }
    assert len(prints) == 3


def unmarked(turns):
    return tuple(replace(turn, segments=tuple(replace(s, in_loss=False) for s in turn.segments)) for turn in turns)


def test_a_sample_without_marks_is_one_only_where_everything_is_learned(layout):
    silent = sample(unmarked(exchange(1)), unmarked(exchange(2)))
    with pytest.raises(ValueError, match=r"s: expected something to learn; .* set loss.targets=all"):
        encoder(layout)(silent)
    (whole,) = encoder(layout, learns_all=True)(silent)
    assert not whole.in_loss.any()
    assert count_targets(whole, SftLossConfig(targets="all"))["image"] == 8
    parts = encoder(layout, max_length=len(whole.ids) - 1, learns_all=True)(silent)
    assert [codes_of(part, layout) for part in parts] == [[1] * 4, [2] * 4]
    assert encoder(layout).fingerprint != encoder(layout, learns_all=True).fingerprint
