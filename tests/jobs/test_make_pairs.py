from dataclasses import replace

import numpy as np
import pytest

from unirl.config import PairConfig
from unirl.data.atomic import DataError
from unirl.data.records import image_key
from unirl.jobs.assets import resolve_encoder
from unirl.jobs.make_pairs import make_pair_set
from unirl.lab.data import make_generation, make_understanding
from unirl.lab.teacher import Teacher
from unirl.lab.verifier import parse_caption
from unirl.lab.world import is_heldout

CONFIG = PairConfig(num_aligned=40, lab_samples=120)


@pytest.fixture(scope="module")
def sources():
    return make_understanding(120, seed=0), make_generation(120, seed=0)


def pair_up(sources, config=CONFIG, teacher=True):
    return make_pair_set(
        *sources, teacher=Teacher(seed=0) if teacher else None, embed=resolve_encoder("lab"), config=config
    )


@pytest.fixture(scope="module")
def pair_set(sources):
    return pair_up(sources)


def test_an_image_enters_at_most_one_pair(pair_set):
    keys = []
    for pair in pair_set.pairs:
        keys += {image_key(pair.understanding.image), image_key(pair.generation.image)}
    assert len(keys) == len(set(keys))


def test_aligned_pairs_show_one_image_and_retrieved_pairs_two(pair_set):
    kinds = [pair.kind for pair in pair_set.pairs]
    assert kinds.count("aligned") == 40
    assert kinds.count("retrieved") > 20
    for pair in pair_set.pairs:
        same = np.array_equal(pair.understanding.image, pair.generation.image)
        assert same == (pair.kind == "aligned")
        assert pair.similarity == 1.0 if pair.kind == "aligned" else 0.6 <= pair.similarity <= 1 + 1e-6


def test_similarity_is_the_cosine_of_the_two_images(pair_set):
    embed = resolve_encoder("lab")
    for pair in pair_set.pairs:
        u, g = embed([pair.understanding.image, pair.generation.image])
        assert pair.similarity == pytest.approx(float(u @ g), abs=1e-6)


def test_no_held_out_caption_enters(pair_set):
    assert not any(is_heldout(parse_caption(pair.generation.prompt)) for pair in pair_set.pairs)


def test_the_same_inputs_give_the_same_pairs(sources, pair_set):
    again = pair_up(sources)
    assert again.certificate == pair_set.certificate
    assert [p.pair_id for p in again.pairs] == [p.pair_id for p in pair_set.pairs]
    assert [p.generation.id for p in again.pairs] == [p.generation.id for p in pair_set.pairs]


def test_every_left_out_sample_is_named(sources, pair_set):
    kept = len(pair_set.certificate["understanding_ids"]) + len(pair_set.certificate["generation_ids"])
    duplicates = [record for record in pair_set.rejected if record.stage == "duplicate"]
    assert kept + len(duplicates) == 240


def test_without_a_teacher_all_pairs_are_retrieved(sources):
    pair_set = pair_up(sources, teacher=False)
    assert {pair.kind for pair in pair_set.pairs} == {"retrieved"}
    assert pair_set.certificate["clustered_rows"] == []


def test_a_refused_sample_is_never_aligned_but_may_be_matched(sources):
    understanding, generation = sources
    wrong = [replace(sample, answer="ABCD"[("ABCD".index(sample.answer) + 1) % 4]) for sample in understanding]
    pair_set = pair_up((wrong, generation))
    refused = {record.id for record in pair_set.rejected if record.stage == "teacher"}
    assert refused
    aligned = {p.understanding.id for p in pair_set.pairs if p.kind == "aligned"}
    assert not refused & aligned
    assert refused & {p.understanding.id for p in pair_set.pairs if p.kind == "retrieved"}


def test_samples_of_both_tasks_may_share_ids(sources):
    understanding, generation = ([replace(s, id=str(i)) for i, s in enumerate(side)] for side in sources)
    by_id = pair_up((understanding, generation))
    for pair in by_id.pairs:
        if pair.kind == "aligned":
            np.testing.assert_array_equal(pair.understanding.image, pair.generation.image)


def test_prompts_without_an_image_are_left_out_and_named(sources):
    understanding, generation = sources
    blind = [replace(generation[0], image=None), *generation[1:]]
    pair_set = pair_up((understanding, blind))
    (record,) = [record for record in pair_set.rejected if record.stage == "reading"]
    assert record.id == generation[0].id
    assert "got none" in record.reason


def test_no_pair_at_all_is_an_error(sources):
    apart = replace(CONFIG, threshold=1.0, num_aligned=0)
    understanding, generation = sources
    with pytest.raises(DataError, match="expected at least one pair; got none from 1 understanding and 1 generation"):
        pair_up((understanding[:1], generation[1:2]), apart)
    with pytest.raises(DataError, match="expected samples to pair; got none"):
        pair_up(([], []))


def test_the_first_pairs_are_a_fair_sample(pair_set):
    half = [pair.kind for pair in pair_set.pairs[: len(pair_set.pairs) // 2]]
    assert 0.3 < half.count("aligned") / 40 < 0.7


def test_aligned_pairs_may_be_drawn_at_random(sources, pair_set):
    drawn = pair_up(sources, replace(CONFIG, selection="random"))
    again = pair_up(sources, replace(CONFIG, selection="random"))
    other = pair_up(sources, replace(CONFIG, selection="random", seed=1))

    def aligned(made):
        return {pair.generation.id for pair in made.pairs if pair.kind == "aligned"}

    assert len(aligned(drawn)) == 40
    assert aligned(drawn) == aligned(again)
    assert aligned(drawn) != aligned(other)
    assert aligned(drawn) != aligned(pair_set)
