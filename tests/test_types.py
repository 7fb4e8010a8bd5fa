from dataclasses import replace

import numpy as np
import pytest

from unirl.types import (
    GenerationSample,
    InterleavedSample,
    PairRecord,
    RewardScores,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    Segment,
    Trajectory,
    Turn,
    UnderstandingSample,
    WeightedGroup,
)

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def question():
    return UnderstandingSample(id="u", image=IMAGE, question="which ?", choices=("red", "blue"), answer="A")


@pytest.fixture
def pair(question):
    drawing = GenerationSample(id="g", prompt="a photo of a circle")
    return PairRecord(pair_id="p", kind="retrieved", similarity=0.5, understanding=question, generation=drawing)


@pytest.fixture
def trajectory():
    return Trajectory(
        prompt_ids=np.arange(3, dtype=np.int32), completion_ids=np.arange(2, dtype=np.int32),
        loss_mask=np.ones(2, np.bool_), logprobs=np.zeros(2, np.float32), modality="text", text="A",
        finish_reason="stop", policy_version=0, seed=7,
    )  # fmt: skip


@pytest.fixture
def scored(question, trajectory):
    request = RolloutRequest(request_id="p/u", pair_id="p", task="understanding", sample=question, seeds=(7,))
    group = RolloutGroup(request=request, trajectories=(trajectory,))
    return ScoredGroup(group=group, rewards=np.ones(1, np.float32), judged=np.ones(1, np.bool_), components={})


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), IMAGE[:0], None])
def test_an_image_without_rgb_pixels_is_refused(question, image):
    with pytest.raises(ValueError, match=r"sample u: expected an (RGB image|image with pixels).*got.*; (decode|drop)"):
        replace(question, image=image)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"answer": "C"}, "letter of the right one"), ({"choices": ("red",)}, "two or more choices"),
     ({"question": " "}, "blanks"), ({"answer": " "}, "gold answer"), ({"id": ""}, "an id")],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_is_refused(question, change, words):
    with pytest.raises(ValueError, match=words):
        replace(question, **change)


def test_a_prompt_of_blanks_and_a_similarity_beyond_1_are_refused(pair):
    with pytest.raises(ValueError, match="expected a prompt"):
        replace(pair.generation, prompt="")
    with pytest.raises(ValueError, match=r"cosine similarity in \[-1, 1\]; got 1.5"):
        replace(pair, similarity=1.5)


def test_a_request_needs_seeds_and_its_own_kind_of_sample(scored, pair):
    with pytest.raises(ValueError, match="at least one seed"):
        replace(scored.group.request, seeds=())
    with pytest.raises(ValueError, match=r"expected a UnderstandingSample.*GenerationSample"):
        replace(scored.group.request, sample=pair.generation)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"logprobs": np.zeros(3, np.float32)}, "one value per token"), ({"text": None}, "a text, or an image"),
     ({"image": IMAGE}, "a text, or an image"), ({"logprobs": np.array([0, np.nan], np.float32)}, "finite log-prob")],
)  # fmt: skip
def test_a_broken_trajectory_does_not_exist(trajectory, change, words):
    with pytest.raises(ValueError, match=words):
        replace(trajectory, **change)


def test_a_group_answers_its_request_seed_by_seed(scored, trajectory):
    with pytest.raises(ValueError, match=r"one trajectory per seed.*\(8,\)"):
        replace(scored.group, trajectories=(replace(trajectory, seed=8),))


def test_only_what_was_judged_must_be_finite():
    values = np.array([np.nan, 1], np.float32)
    RewardScores(values=values, judged=np.array([False, True]))
    with pytest.raises(ValueError, match="finite values where judged"):
        RewardScores(values=values, judged=np.array([True, True]))
    with pytest.raises(ValueError, match="expected part of shape"):
        RewardScores(values=values, judged=np.array([False, True]), details={"part": np.zeros(3, np.float32)})


def test_rewards_fit_their_group(scored):
    with pytest.raises(ValueError, match="expected 1 rewards"):
        replace(scored, rewards=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="expected finite rewards"):
        replace(scored, rewards=np.array([np.inf], np.float32))


def test_a_weighted_group_holds_its_own_pair_and_finite_advantages(scored, pair):
    group = WeightedGroup(scored=scored, pair=pair, pair_weight=0.7, advantages=np.zeros(1))
    with pytest.raises(ValueError, match="expected its own pair p; got q"):
        replace(group, pair=replace(pair, pair_id="q"))
    with pytest.raises(ValueError, match="1 finite advantages"):
        replace(group, advantages=np.array([np.nan]))


def turn(role, *segments):
    return Turn(role=role, segments=tuple(segments) or (Segment(text="hi", in_loss=role == "assistant"),))


def test_an_interleaved_sample_alternates_text_and_images():
    sample = InterleavedSample(
        id="i",
        turns=(
            turn("system"),
            turn("user", Segment(text="draw it"), Segment(image=IMAGE)),
            turn("assistant", Segment(text="here"), Segment(image=IMAGE, in_loss=True)),
        ),
    )
    assert [len(turn.images) for turn in sample.turns] == [0, 1, 1]


@pytest.mark.parametrize(
    "roles",
    [(), ("system",), ("user",), ("assistant",), ("user", "user", "assistant"), ("user", "assistant", "user"),
     ("user", "system", "assistant"), ("system", "system", "user", "assistant")],
)  # fmt: skip
def test_an_interleaved_sample_goes_from_user_to_assistant(roles):
    with pytest.raises(ValueError, match="expected user and assistant in turn"):
        InterleavedSample(id="i", turns=tuple(turn(role) for role in roles))


@pytest.mark.parametrize("content", [{}, {"text": "a", "image": IMAGE}, {"text": ""}, {"image": IMAGE[:, :0]}])
def test_a_segment_is_a_text_or_an_image(content):
    with pytest.raises(ValueError, match="expected"):
        Segment(**content)


def test_an_unknown_role_and_an_empty_turn_are_refused():
    with pytest.raises(ValueError, match=r"expected a role.*got 'human'"):
        turn("human")
    with pytest.raises(ValueError, match="expected text or an image"):
        Turn(role="user", segments=())
