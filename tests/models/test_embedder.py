import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unirl.models.embedder import load_embedder

torchvision_models = pytest.importorskip("torchvision.models", reason="torchvision is part of the training set")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = torchvision_models.resnet50().eval()
    # At random initialisation all batch norms are the identity; other statistics make mistakes visible.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet50")
    torch.save(model.state_dict(), folder / "resnet50.pth")
    save_file(model.state_dict(), folder / "resnet50.safetensors")
    return folder


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((300, 400), (256, 256), (90, 60))]


def plain_features(model, image):
    """Shorter side 256, centre 224, ImageNet statistics, pooled features, length 1: written out."""
    picture = Image.fromarray(image)
    scale = 256 / min(picture.size)
    width, height = (int(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = np.asarray(picture, np.float32)[top : top + 224, left : left + 224] / 255
    pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    pooled = []
    hook = model.avgpool.register_forward_hook(lambda _module, _inputs, output: pooled.append(output))
    with torch.no_grad():
        model(torch.from_numpy(pixels.transpose(2, 0, 1))[None])
    hook.remove()
    features = pooled[0].flatten().numpy()
    return features / np.linalg.norm(features)


def test_resnet50_features_equal_a_plain_forward_pass(model, weights, images):
    features = load_embedder("resnet50", weights / "resnet50.pth", batch_size=2)(images)
    assert (features.dtype, features.shape) == (np.float32, (3, 2048))
    for image, row in zip(images, features, strict=True):
        np.testing.assert_allclose(row, plain_features(model, image), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert (features[0] @ features[2]) < 1 - 1e-5


def test_safetensors_and_batch_size_change_nothing(weights, images):
    one = load_embedder("resnet50", weights / "resnet50.safetensors", batch_size=1)(images[:2])
    many = load_embedder("resnet50", weights / "resnet50.pth", batch_size=8)(images[:2])
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_no_images_give_no_rows(weights):
    assert load_embedder("resnet50", weights / "resnet50.pth")([]).shape == (0, 2048)


def test_files_without_resnet50_weights_are_refused(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match=r"resnet50-0676ba61.pth"):
        load_embedder("resnet50", tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="got None"):
        load_embedder("resnet50")
    for suffix in ("pth", "safetensors"):
        short = tmp_path / f"short.{suffix}"
        short.write_bytes((weights / f"resnet50.{suffix}").read_bytes()[:100_000])
        with pytest.raises(ValueError, match="does not load"):
            load_embedder("resnet50", short)
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        load_embedder("resnet50", tmp_path / "nested.pth")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="name a ResNet-50 checkpoint"):
        load_embedder("resnet50", tmp_path / "other.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="does not load"):
        load_embedder("resnet50", tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_broken_weights_are_loud(tmp_path, model, images):
    state = model.state_dict() | {"conv1.weight": torch.full_like(model.conv1.weight, float("nan"))}
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="expected a finite feature vector"):
        load_embedder("resnet50", tmp_path / "nan.pth")(images[:1])


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="expected resnet50; got 'clip'"):
        load_embedder("clip")
