import random

import numpy as np
import pytest
import torch

from unirl.lab.tiny_janus import make_model
from unirl.lab.verifier import detect
from unirl.lab.vq_training import (
    build_dictionary,
    crowded_images,
    make_codebook,
    shuffled_cells,
    train_decoder,
    train_encoder,
)
from unirl.lab.world import CODE_DIM, NUM_CODES, render, sample_scene


@pytest.fixture(scope="module")
def images():
    rng = random.Random(0)
    return np.stack([render(sample_scene(rng)) for _ in range(2000)])


@pytest.fixture(scope="module")
def dictionary(images):
    return build_dictionary(images, NUM_CODES)


def test_codes_point_back_at_their_patches(images, dictionary):
    codes = dictionary.codes(images[:50])
    patches = dictionary.patches[codes.numpy()].reshape(50, 5, 5, 4, 4, 3)
    assert (patches.transpose(0, 1, 3, 2, 4, 5).reshape(50, 20, 20, 3) == images[:50]).all()


def test_the_background_is_the_most_frequent_patch(dictionary):
    assert (dictionary.patches[0] == 235).all()


def test_an_unknown_patch_is_an_error(dictionary):
    with pytest.raises(ValueError, match="unknown patch"):
        dictionary.codes(np.zeros((1, 20, 20, 3), np.uint8))


def test_too_many_patches_for_the_codebook_are_an_error(images):
    with pytest.raises(ValueError, match="at most 10 distinct patches"):
        build_dictionary(images, 10)


def test_codes_are_distinct_unit_vectors(dictionary):
    codebook = make_codebook(dictionary, NUM_CODES, CODE_DIM, seed=0)
    assert torch.allclose(codebook.norm(dim=-1), torch.ones(NUM_CODES))
    cosines = codebook @ codebook.t() - torch.eye(NUM_CODES)
    assert cosines.max() < 0.99


def test_a_few_steps_teach_the_codes_and_only_the_trained_half_moves(images, dictionary):
    vq = make_model(0).model.vqmodel.requires_grad_(False)
    vq.quantize.embedding.weight.copy_(make_codebook(dictionary, NUM_CODES, CODE_DIM, seed=0))
    codes = dictionary.codes(images)
    before = {name: tensor.clone() for name, tensor in vq.state_dict().items()}
    losses = [train_encoder(vq, images, codes, num_steps=n, seed=0) for n in (1, 4)]
    assert losses[1] < losses[0]
    moved = {name.split(".")[0] for name, tensor in vq.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"encoder", "quant_conv"}
    losses = [train_decoder(vq, images, codes, num_steps=n, seed=0) for n in (1, 4)]
    assert losses[1] < losses[0]
    assert torch.equal(vq.quantize.embedding.weight, before["quantize.embedding.weight"])


def test_shuffled_cells_keep_their_codes_and_their_number(images, dictionary):
    codes = dictionary.codes(images)
    shuffled, moved = shuffled_cells(images, codes, seed=0)
    assert torch.equal(dictionary.codes(shuffled), moved)
    assert torch.equal(moved.flatten().sort()[0], codes.flatten().sort()[0])
    assert (moved == codes).float().mean() < 0.9


def test_crowded_pictures_show_three_or_four_objects_made_of_known_patches(dictionary):
    crowded = crowded_images(30, seed=0)
    dictionary.codes(crowded)
    assert {len(detect(image).objects) for image in crowded} == {3, 4}
    assert np.array_equal(crowded, crowded_images(30, seed=0))
