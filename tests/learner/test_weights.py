import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner.test_learner import SCORING
from unirl.learner.weights import WeightExport
from unirl.models.named_arrays import checksum, to_tensor


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_names_are_the_checkpoints_with_tied_weights_once_and_persistent_buffers(make_learner, zero_stage):
    learner = make_learner(TinyPolicy(), zero_stage=zero_stage)
    named = [pair for bucket in learner.weight_buckets() for pair in bucket]
    manifest = learner.manifest()
    assert [spec.name for spec in manifest.tensors] == [name for name, _ in named]
    fresh = TinyPolicy().module.state_dict()
    del fresh["word_head.weight"]
    assert {name for name, _ in named} == set(fresh)
    assert "scratch" not in fresh
    for (_, array), spec in zip(named, manifest.tensors, strict=True):
        assert tuple(array.shape) == spec.shape
        assert str(array.dtype) == spec.dtype
        assert np.array_equal(array, fresh[spec.name].numpy())


def test_checksum_is_the_one_that_samplers_verify(make_learner):
    learner = make_learner(TinyPolicy())
    named = [pair for bucket in learner.weight_buckets() for pair in bucket]
    by_hand = blake3(b"".join(name.encode() + array.tobytes() for name, array in named)).hexdigest()
    assert learner.manifest().checksum == by_hand == checksum(named)


def test_version_and_values_follow_the_updates_and_old_arrays_stay(make_learner):
    learner = make_learner(TinyPolicy())
    before = dict(pair for bucket in learner.weight_buckets() for pair in bucket)
    kept = {name: array.copy() for name, array in before.items()}
    assert learner.manifest().policy_version == 0
    learner.update(tiny_batch(TinyPolicy(), SCORING), 0)
    after = dict(pair for bucket in learner.weight_buckets() for pair in bucket)
    assert learner.manifest().policy_version == 1
    assert all(np.array_equal(before[name], kept[name]) for name in kept)
    assert not np.array_equal(after["trunk.0.weight"], before["trunk.0.weight"])


def test_lent_buckets_are_the_weights_themselves():
    module = TinyPolicy().module
    lent = WeightExport(module, policy_version=0, holds_arrays=True)
    kept = WeightExport(module, policy_version=0, holds_arrays=True)
    (first, *_), (copied, *_) = lent.buckets(copy=False), kept.buckets()
    with torch.no_grad():
        module.get_parameter(first[0][0]).zero_()
    assert not first[0][1].any()
    assert copied[0][1].any()
    assert lent.manifest().checksum == kept.manifest().checksum


def test_bfloat16_travels_as_uint16_and_comes_back():
    module = TinyPolicy().module.bfloat16()
    export = WeightExport(module, policy_version=3, holds_arrays=True)
    named = dict(pair for bucket in export.buckets() for pair in bucket)
    assert named["words.weight"].dtype == np.uint16
    assert {spec.name: spec.dtype for spec in export.manifest().tensors}["words.weight"] == "bfloat16"
    assert torch.equal(to_tensor(named["words.weight"]), module.words.weight)


def test_buckets_respect_the_limit_unless_one_weight_is_larger():
    module = TinyPolicy().module
    export = WeightExport(module, policy_version=0, holds_arrays=True)
    limit = 40_000
    buckets = list(export.buckets(limit))
    assert len(buckets) > 3
    for bucket in buckets:
        assert len(bucket) == 1 or sum(array.nbytes for _, array in bucket) <= limit


def test_other_ranks_get_empty_buckets():
    export = WeightExport(TinyPolicy().module, policy_version=0, holds_arrays=False)
    assert [len(bucket) for bucket in export.buckets(40_000)] == [0] * len(list(export.buckets(40_000)))


def test_export_writes_the_family_layout(make_learner, tmp_path):
    learner = make_learner(TinyPolicy(), zero_stage=3)
    learner.update(tiny_batch(TinyPolicy(), SCORING), 0)
    learner.export(tmp_path / "policy")
    named = dict(pair for bucket in learner.weight_buckets() for pair in bucket)
    loaded = load_file(tmp_path / "policy" / "model.safetensors")
    assert set(loaded) == set(named)
    assert all(np.array_equal(loaded[name].numpy(), array) for name, array in named.items())
