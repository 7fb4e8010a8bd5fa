from dataclasses import replace

import numpy as np
import pytest

from tests.rollout.conftest import publication, sampling_with
from unirl.rollout.completions import encode_prompts, verified_weights


@pytest.fixture
def named(plain):
    return publication(plain.policy, plain.policy.module.state_dict(), 3)


def test_long_prompt_is_refused_with_the_length_that_would_do(plain, lab_requests):
    (request,) = lab_requests(1, 0)
    length = len(plain.policy.prompts.encode_understanding(request.sample))
    with pytest.raises(
        ValueError, match=rf"within rollout.max_model_len {length + 23}.*got up to {length + 24}; set rollout"
    ):
        encode_prompts(plain.policy, [request], sampling_with(), length + 23)
    encode_prompts(plain.policy, [request], sampling_with(), length + 24)


def test_whole_publication_passes(plain, named):
    manifest, arrays = named
    assert verified_weights(manifest, iter(arrays), plain.policy.shapes) == arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, a: (replace(m, tensors=m.tensors[1:]), a[1:]), "manifest that differs in"),
        (lambda m, a: (replace(m, tensors=(replace(m.tensors[0], name="x"), *m.tensors[1:])), a), "differs in"),
        (lambda m, a: (replace(m, tensors=(replace(m.tensors[0], shape=(1,)), *m.tensors[1:])), a), "differs in"),
        (lambda m, a: (m, a[:-1]), "in its order; got"),
        (lambda m, a: (m, [a[1], a[0], *a[2:]]), "in its order; got"),
        (lambda m, a: (m, [(a[0][0], a[0][1] + 1), *a[1:]]), "expected checksum"),
    ],
)
def test_publication_that_does_not_fit_is_refused(plain, named, change, message):
    manifest, arrays = change(*named)
    with pytest.raises(ValueError, match=f"weights of version 3: .*{message}"):
        verified_weights(manifest, arrays, plain.policy.shapes)


def test_diverged_weights_are_refused(plain):
    state = dict(plain.policy.module.state_dict())
    name = "model.generation_embeddings.weight"
    state[name] = state[name] * np.inf
    with pytest.raises(
        ValueError, match=rf"expected finite values; got NaN or infinity in {name}; the learner diverged"
    ):
        verified_weights(*publication(plain.policy, state, 3), plain.policy.shapes)
