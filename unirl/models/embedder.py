"""Images -> unit vectors, for pairing. Weights come from a file; nothing is downloaded."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Embedder = Callable[[Sequence[NDArray[np.uint8]]], NDArray[np.float32]]
"""Images uint8 [height, width, 3] of any sizes -> unit rows float32 [N, D]."""


def load_embedder(
    encoder: str, checkpoint: Path | None = None, *, batch_size: int = 32, device: str = "cpu"
) -> Embedder:
    """The image encoder called `encoder`.

    Args:
        encoder: "resnet50" (the paper's choice: ResNet-50 without its classification head, D = 2048, ImageNet V1
            preprocessing).
        checkpoint: weights file of "resnet50": state dict in torchvision's names, .pt, .pth or .safetensors.
        batch_size: images per forward pass.
        device: torch device of "resnet50".

    Raises:
        FileNotFoundError: the weights file is missing.
        ValueError: an unknown encoder, or a file that does not hold ResNet-50 weights.
    """
    match encoder:
        case "resnet50":
            model = _load_resnet50(checkpoint).to(device)
            return lambda images: _embed_with_resnet50(model, images, batch_size)
        case _:
            raise ValueError(
                f"encoder: expected resnet50; got {encoder!r}; correct the name, or add a case to "
                "unirl/models/embedder.py:load_embedder"
            )


def _load_resnet50(checkpoint: Path | None) -> torch.nn.Module:
    from torchvision.models import resnet50

    if checkpoint is None or not checkpoint.is_file():
        raise FileNotFoundError(
            f"encoder_checkpoint: expected a file with ResNet-50 weights; got {checkpoint}; fetch torchvision's "
            "resnet50-0676ba61.pth (IMAGENET1K_V1) and name it"
        )
    state = _read_state_dict(checkpoint)
    model = resnet50()
    model.add_module("fc", torch.nn.Identity())
    try:
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except RuntimeError as error:
        found = ", ".join(sorted(state)[:3])
        raise ValueError(
            f"{checkpoint}: expected the tensors of torchvision's resnet50; got {len(state)} tensors ({found}, ...): "
            f"{_brief(error)}; name a ResNet-50 checkpoint"
        ) from error
    return model.eval().requires_grad_(requires_grad=False)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected a whole file of weights; got one that does not load ({_brief(error)}); fetch it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: expected a dict of tensors; got {type(state).__name__}; save model.state_dict() alone"
        )
    return state


def _embed_with_resnet50(
    model: torch.nn.Module, images: Sequence[NDArray[np.uint8]], batch_size: int
) -> NDArray[np.float32]:
    from PIL import Image
    from torchvision.models import ResNet50_Weights

    preprocess = ResNet50_Weights.IMAGENET1K_V1.transforms()
    device = next(model.parameters()).device
    rows = [np.zeros((0, 2048), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = torch.stack([preprocess(Image.fromarray(image)) for image in images[start : start + batch_size]])
        with torch.inference_mode():
            rows.append(model(batch.to(device)).float().cpu().numpy())
    features = np.concatenate(rows)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if bad.size:
        raise ValueError(
            f"expected a finite feature vector for every image; got {float(norms[bad[0], 0])} as the length of number "
            f"{bad[0]} ({bad.size} in all); check the weights file"
        )
    return features / norms


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
