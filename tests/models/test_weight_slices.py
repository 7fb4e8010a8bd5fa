import numpy as np
import pytest
import torch

from unirl.models.named_arrays import SLICE, compare, slice_checksum, slice_checksums
from unirl.types import TensorSpec, WeightsManifest

SHAPES = {"a": (200,), "b": (3, 5)}


@pytest.fixture
def weights():
    return {"a": torch.arange(200.0), "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0))}


def manifest_of(weights):
    specs = tuple(TensorSpec(name=n, shape=tuple(w.shape), dtype=str(w.dtype)) for n, w in weights.items())
    slices = tuple(slice_checksum(weight) for weight in weights.values())
    return WeightsManifest(policy_version=1, tensors=specs, checksum="", slices=slices)


def test_a_weight_that_moved_is_named(weights):
    manifest = manifest_of(weights)
    same = compare(manifest, slice_checksums(weights, SHAPES))
    assert (same.num_compared, same.differing, same.is_stale) == (2, (), False)
    moved = weights | {"b": weights["b"] * (1 + 1e-6)}
    other = compare(manifest, slice_checksums(moved, SHAPES))
    assert (other.num_compared, other.differing, other.is_stale) == (2, ("b",), True)


def test_precision_and_form_do_not_matter_but_what_is_fused_or_empty_is_left_out(weights):
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    manifest = manifest_of(half)
    assert not compare(manifest, slice_checksums({n: w.float() for n, w in half.items()}, SHAPES)).is_stale
    held = {"a": torch.empty(0), "b": torch.empty(3, 5, device="meta"), "fused": torch.zeros(600)}
    assert slice_checksums(held, SHAPES) == {}


@pytest.mark.parametrize("held", [{}, {"unknown": "0"}])
def test_where_nothing_can_be_compared_nothing_is_taken_for_the_same(weights, held):
    found = compare(manifest_of(weights), held)
    assert (found.num_compared, found.differing, found.is_stale) == (0, (), True)


def test_a_manifest_without_slices_says_nothing(weights):
    specs = manifest_of(weights).tensors
    assert compare(WeightsManifest(policy_version=1, tensors=specs, checksum=""), {"a": "0"}).is_stale


def test_the_middle_of_a_large_weight_counts(weights):
    moved = weights["a"].clone()
    moved[100 - SLICE // 2] += 1
    assert slice_checksum(moved) != slice_checksum(weights["a"])
    assert slice_checksum(torch.from_numpy(np.arange(200.0))) == slice_checksum(weights["a"])
