from dataclasses import replace

import numpy as np
from PIL import Image

from tests.monitoring.made_run import make_step
from unirl.monitoring.pair_view import used_pairs, write_pairs


def test_unjudged_completions_show_no_reward(tmp_path):
    lines, _ = write_pairs(tmp_path, make_step(1, unjudged=(3,)), 1)
    samples = lines[0]["generation"]["samples"]
    assert [sample["reward"] is None for sample in samples] == [index == 3 for index in range(8)]
    assert samples[3]["parts"]["lab_verifier/exact"] is None
    assert samples[3]["advantage"] == 0.0


def test_the_picture_of_a_prompt_is_shown_as_its_reference(tmp_path):
    data = make_step(1, num_pairs=1)
    lines, _ = write_pairs(tmp_path, data, 1)
    shown = Image.open(tmp_path / lines[0]["generation"]["image"]).convert("RGB")
    assert (np.asarray(shown) == data.groups[1].pair.generation.image).all()


def test_every_pair_is_listed_with_what_it_earned():
    data = make_step(1, num_pairs=5)
    line = used_pairs(data)
    assert [pair["pair_id"] for pair in line["pairs"]] == [f"pair-1-{index}" for index in range(5)]
    assert line["pairs"][2]["understanding"] == float(data.groups[4].scored.rewards.mean())


def test_a_step_shows_no_more_pairs_than_asked(tmp_path):
    lines, names = write_pairs(tmp_path, make_step(1, num_pairs=3), 2)
    assert len(lines) == 2
    assert len(names) == 16
    assert write_pairs(tmp_path, make_step(1), 0) == ([], {})


def test_the_answer_that_a_reward_read_stands_beside_the_text(tmp_path):
    data = make_step(1)
    group = data.groups[0]
    (name, scores), *_ = group.scored.components.items()
    texts = tuple(None if index == 2 else f"answer {index}" for index in range(len(scores.values)))
    told = replace(group.scored, components={name: replace(scores, texts={"extracted": texts})})
    lines, _ = write_pairs(tmp_path, replace(data, groups=(replace(group, scored=told), *data.groups[1:])), 1)
    assert tuple(sample["extracted"] for sample in lines[0]["understanding"]["samples"]) == texts
    assert all("extracted" not in sample for sample in lines[0]["generation"]["samples"])
