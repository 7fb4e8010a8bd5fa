from dataclasses import replace

import numpy as np
import pytest

from tests.data.test_pair_store import pair
from unirl.data.pair_store import PairSet, write_pair_set
from unirl.data.prompts import read_prompts


@pytest.mark.parametrize(("max_pairs", "wanted"), [(None, 3), (2, 2)])
def test_every_text_of_the_first_pairs_comes_back_without_its_image(tmp_path, max_pairs, wanted):
    pairs = [pair(number) for number in range(3)]
    write_pair_set(tmp_path / "set", PairSet(pairs=tuple(pairs), weights=(1.0,) * 3, settings={}))
    blank = np.zeros((1, 1, 3), np.uint8)
    samples = list(read_prompts(tmp_path / "set", max_pairs))
    assert [replace(sample, image=None) for sample in samples[wanted:]] == [
        replace(p.generation, image=None) for p in pairs[:wanted]
    ]
    for sample, p in zip(samples[:wanted], pairs, strict=False):
        assert np.array_equal(sample.image, blank)
        assert replace(sample, image=p.understanding.image) == p.understanding
