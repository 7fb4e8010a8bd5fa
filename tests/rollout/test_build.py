from dataclasses import replace

import pytest

from tests.rollout.conftest import MODEL, engine_config
from unirl.rollout.build import build_sampler
from unirl.rollout.torch_sampler import TorchSampler


def test_torch_backend_is_the_plain_sampler(plain):
    assert isinstance(plain, TorchSampler)
    assert (plain.max_model_len, plain.max_num_seqs, plain.policy_version) == (128, 128, -1)


def test_unknown_backend_and_family_are_refused_by_name(lab_folder):
    with pytest.raises(ValueError, match="expected 'vllm' or 'torch'; got 'sglang'"):
        build_sampler(MODEL, lab_folder, engine_config(backend="sglang"), "both")
    for backend, words in (
        ("torch", "expected one of janus_pro, lumina_dimoo, .*; got 'emu'"),
        ("vllm", "that vLLM can sample; got model.family emu"),
    ):
        with pytest.raises(ValueError, match=words):
            build_sampler(replace(MODEL, family="emu"), lab_folder, engine_config(backend=backend), "both")
