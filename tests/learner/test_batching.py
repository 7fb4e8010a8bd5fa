from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import TinyPolicy, tiny_batch
from unirl.config import AlgorithmConfig
from unirl.learner.batching import build_batch, plan_micro_batches, weigh_groups
from unirl.models.policy import Scoring
from unirl.types import (
    GenerationSample,
    PairRecord,
    RewardScores,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    Trajectory,
    UnderstandingSample,
)

QUESTION = UnderstandingSample(
    id="u", image=np.zeros((2, 2, 3), np.uint8), question="how many?", answer="2", answer_type="number"
)
PROMPT = GenerationSample(id="g", prompt="two cubes")


def make_batch(groups, pairs, config):
    return build_batch(weigh_groups(groups, pairs, config), config)


def pair(pair_id="p", kind="retrieved", similarity=0.25):
    return PairRecord(pair_id=pair_id, kind=kind, similarity=similarity, understanding=QUESTION, generation=PROMPT)


def scored(rewards, *, task="understanding", judged=None, pair_id="p", lengths=None, version=0):
    understands = task == "understanding"
    lengths = lengths or [3] * len(rewards)
    trajectories = tuple(
        Trajectory(
            prompt_ids=np.array([1, 2], np.int32),
            completion_ids=np.full(length, index, np.int32),
            loss_mask=np.ones(length, bool),
            logprobs=np.full(length, -0.5, np.float32),
            modality="text" if understands else "image",
            text="x" if understands else None,
            image=None if understands else np.zeros((2, 2, 3), np.uint8),
            finish_reason="stop",
            policy_version=version,
            seed=index,
        )
        for index, length in enumerate(lengths)
    )
    request = RolloutRequest(
        request_id=f"{pair_id}/{task}",
        pair_id=pair_id,
        task=task,
        sample=QUESTION if understands else PROMPT,
        seeds=tuple(range(len(rewards))),
    )
    judged = np.ones(len(rewards), bool) if judged is None else np.array(judged)
    values = np.array(rewards, np.float32)
    return ScoredGroup(
        group=RolloutGroup(request=request, trajectories=trajectories),
        rewards=values,
        judged=judged,
        components={"r": RewardScores(values=values, judged=judged)},
    )


def test_advantage_is_the_group_z_score_times_the_root_of_the_similarity():
    batch = make_batch([scored([1, 0, 0, 1])], [pair(similarity=0.25)], AlgorithmConfig())
    # mean 1/2, sample standard deviation sqrt(4 * 0.25 / 3) = 0.57735; sqrt(0.25) = 0.5
    wanted = 0.5 * 0.5 / (0.57735027 + 1e-4)
    assert [row.advantage for row in batch.rows] == pytest.approx([wanted, -wanted, -wanted, wanted], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "kind", "weight"),
    [
        (AlgorithmConfig(), "aligned", 1.0),
        (AlgorithmConfig(pair_weight="linear"), "retrieved", 0.25),
        (AlgorithmConfig(pair_weight="none"), "retrieved", 1.0),
        (AlgorithmConfig(objective="pairwise"), "retrieved", 1.0),
        (AlgorithmConfig(objective="vanilla_mixed"), "retrieved", 1.0),
    ],
)
def test_pair_weight_follows_kind_rule_and_objective(config, kind, weight):
    batch = make_batch([scored([1, 0])], [pair(kind=kind, similarity=0.25)], replace(config, advantage_std="none"))
    assert [row.advantage for row in batch.rows] == pytest.approx([0.5 * weight, -0.5 * weight])


def test_unjudged_trajectories_are_neither_rows_nor_counted():
    batch = make_batch([scored([1, 0, 0], judged=[True, True, False], lengths=[2, 3, 7])], [pair()], AlgorithmConfig())
    assert len(batch.rows) == 2
    assert batch.num_trajectories == {"understanding": 2, "generation": 0}
    assert batch.num_loss_tokens == {"understanding": 5, "generation": 0}
    # The unjudged zero must not pull the mean: the two judged ones are symmetric.
    assert batch.rows[0].advantage == -batch.rows[1].advantage


def test_rows_without_signal_are_dropped_but_counted_unless_there_is_a_kl_penalty():
    groups = [scored([1, 1]), scored([1, 0], task="generation", lengths=[4, 4])]
    batch = make_batch(groups, [pair()], AlgorithmConfig())
    assert [row.task for row in batch.rows] == ["generation"] * 2
    assert batch.num_trajectories == {"understanding": 2, "generation": 2}
    assert batch.num_loss_tokens == {"understanding": 6, "generation": 8}
    assert len(make_batch(groups, [pair()], AlgorithmConfig(kl_beta=0.01)).rows) == 4


def test_batch_says_pairs_and_oldest_version():
    groups = [scored([1, 0], version=4), scored([1, 0], task="generation", version=3), scored([1, 0], pair_id="q")]
    batch = make_batch(groups[:2], [pair()], AlgorithmConfig())
    assert (batch.num_pairs, batch.policy_version) == (1, 3)
    assert make_batch(groups, [pair(), pair("q")], AlgorithmConfig()).num_pairs == 2


def test_question_image_travels_with_understanding_rows_only():
    batch = make_batch([scored([1, 0]), scored([1, 0], task="generation")], [pair()], AlgorithmConfig())
    assert [row.image is None for row in batch.rows] == [False, False, True, True]
    assert batch.rows[0].image is batch.rows[1].image


def test_group_of_an_unknown_pair_is_refused():
    with pytest.raises(ValueError, match=r"group q/understanding of pair q; pass the pairs"):
        make_batch([scored([1, 0], pair_id="q")], [pair()], AlgorithmConfig())


def test_step_without_groups_is_refused():
    with pytest.raises(ValueError, match="got none"):
        make_batch([], [pair()], AlgorithmConfig())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [26, 60, 1000])
def test_plan_covers_every_row_once_and_keeps_ranks_in_step(masked, num_ranks, max_tokens):
    policy, scoring = TinyPolicy(masked=masked), Scoring(guidance_scale=3.0)
    rows = tiny_batch(policy, scoring, num_rows=13).rows
    plan = plan_micro_batches(rows, policy=policy, scoring=scoring, max_tokens=max_tokens, num_ranks=num_ranks)
    assert sorted(i for part in plan for micro in part if micro.counted for i in micro.indices) == list(range(13))
    for position in zip(*plan, strict=True):
        assert len({rows[i].task for micro in position for i in micro.indices}) == 1
        assert len({micro.num_passes for micro in position}) == 1
        for micro in position:
            longest = max(policy.tokens_per_row(rows[i], scoring) for i in micro.indices)
            assert longest * len(micro.indices) <= max_tokens
            assert micro.own_passes == max(policy.passes_per_row(rows[i], scoring) for i in micro.indices)
            assert micro.own_passes <= micro.num_passes
    again = plan_micro_batches(rows, policy=policy, scoring=scoring, max_tokens=max_tokens, num_ranks=num_ranks)
    assert again == plan


def test_fewer_rows_than_ranks_leave_fillers_that_do_not_count():
    policy, scoring = TinyPolicy(), Scoring()
    rows = tiny_batch(policy, scoring, num_rows=1).rows
    plan = plan_micro_batches(rows, policy=policy, scoring=scoring, max_tokens=1000, num_ranks=2)
    assert [[micro.counted for micro in part] for part in plan] == [[True], [False]]


def test_no_rows_give_no_micro_batches():
    assert plan_micro_batches([], policy=TinyPolicy(), scoring=Scoring(), max_tokens=1, num_ranks=2) == [[], []]


def test_row_above_the_budget_says_what_to_set():
    policy, scoring = TinyPolicy(), Scoring()
    rows = tiny_batch(policy, scoring).rows
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch.* got 5 .* set it to 1\d or more"):
        plan_micro_batches(rows, policy=policy, scoring=scoring, max_tokens=5, num_ranks=1)


def test_kinds_of_pairs_have_micro_batches_of_their_own_unless_that_costs():
    policy, scoring = TinyPolicy(), Scoring(guidance_scale=3.0)
    drawn = [row for row in tiny_batch(policy, scoring, num_rows=16).rows if row.task == "generation"]
    # One length, five of one kind and three of the other.
    rows = [replace(drawn[0], pair_kind="aligned" if index < 5 else "retrieved") for index in range(8)]

    def plan(num_ranks, rows=rows, **costs):
        return plan_micro_batches(rows, policy=policy, scoring=scoring, max_tokens=1000, num_ranks=num_ranks, **costs)

    assert [(micro.kind, micro.indices) for micro in plan(1)[0]] == [
        ("aligned", (0, 1, 2, 3, 4)),
        ("retrieved", (5, 6, 7)),
    ]
    # Apart, the first of four ranks would score three rows instead of two.
    assert [[(micro.kind, len(micro.indices)) for micro in part] for part in plan(4)] == [[(None, 2)]] * 4
    # A second pass in which ranks exchange weights costs far more than these rows, and little beside very many.
    assert [micro.kind for micro in plan(1, exchanges=True)[0]] == [None]
    assert {micro.kind for micro in plan(1, rows=rows * 1000, exchanges=True)[0]} == {"aligned", "retrieved"}
    # Rows that differ in length are at most so many tokens with fillers and padding either way.
    assert {micro.kind for part in plan(8) for micro in part} == {None}


def test_a_batch_of_one_kind_is_divided_as_one_without():
    policy, scoring = TinyPolicy(), Scoring(guidance_scale=3.0)
    rows = tiny_batch(policy, scoring, num_rows=13).rows
    kind = [replace(row, pair_kind="retrieved") for row in rows]
    plans = [
        plan_micro_batches(own, policy=policy, scoring=scoring, max_tokens=60, num_ranks=2) for own in (rows, kind)
    ]
    assert [[replace(micro, kind="retrieved") for micro in part] for part in plans[0]] == plans[1]
