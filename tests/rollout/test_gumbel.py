import pytest
import torch

from unirl.rollout.gumbel import gumbel_argmax, step_seeds


@pytest.mark.parametrize("vocabulary", [7, 160, 16384])
def test_draws_equal_the_engines_own_kernel(vocabulary):
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(256, vocabulary, generator=generator) * 3
    logits[:, ::3] = -torch.inf
    seeds = torch.randint(0, 2**31, (256,), generator=generator)
    joint = torch.cat([torch.full((256, 50), -torch.inf), logits], dim=1)
    assert torch.equal(gumbel_argmax(logits, seeds), torch.ops._C.fused_gumbel_argmax(logits, seeds))
    assert torch.equal(gumbel_argmax(logits, seeds, 50) + 50, torch.ops._C.fused_gumbel_argmax(joint, seeds))


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, -0.5, -1.0, -2.0, -torch.inf])
    draws = gumbel_argmax(logits.expand(40_000, -1), torch.arange(40_000))
    counts = torch.bincount(draws, minlength=5).double()
    wanted = logits.double().softmax(0) * 40_000
    assert counts[4] == 0
    statistic = ((counts - wanted)[:4] ** 2 / wanted[:4]).sum()
    assert torch.special.gammaincc(torch.tensor(1.5, dtype=torch.double), statistic / 2) > 1e-3


def test_sequences_own_their_randomness():
    first, second = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    together = [step_seeds([first, second])[1].item() for _ in range(3)]
    alone = torch.Generator().manual_seed(4)
    assert together == [step_seeds([alone]).item() for _ in range(3)]
