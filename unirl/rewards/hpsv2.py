"""HPSv2 (PairUni section 2.2: r_gen = R_HPSv2(prompt, image)): cosine of CLIP ViT-H-14 features tuned on human choices.

The network is open_clip's; the preprocessing is written out here, because scores match the original only with it.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from unirl.types import GenerationSample, RewardScores, RolloutGroup

Version = Literal["v2.0", "v2.1"]
Precision = Literal["float32", "float16", "bfloat16"]

PUBLISHED_FILES: dict[Version, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Names of the two checkpoints as published in the hub repository xswu/HPSv2."""

_AUTOCAST = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Hpsv2Reward:
    """Raw cosine of picture and prompt: about 0.23 to 0.29 with v2.0 weights and 0.14 to 0.34 with v2.1.

    The two versions are not comparable, and neither are different prompts.
    """

    def __init__(
        self,
        *,
        checkpoint: Path,
        version: Version = "v2.1",
        device: str = "auto",
        batch_size: int = 16,
        model_name: str = "ViT-H-14",
        precision: Precision = "float32",
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: weights file, .pt with the weights under `state_dict`, or .safetensors.
            version: which of the two trainings the file holds; checked against the published file names.
            device: "cpu", "cuda", "cuda:1" or "auto" (a GPU when this process sees one).
            batch_size: most images encoded at once.
            model_name: open_clip name of the architecture; the published weights are ViT-H-14.
            precision: "float16" and "bfloat16" run the towers under autocast, GPUs only. A group's scores differ by
                about 0.01, so float32 is the safe choice.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an option is wrong, or the file is damaged, unsafe or of another layout.
        """
        self._device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        _check_options(version, checkpoint, batch_size, precision, self._device)
        self._batch_size = batch_size
        self._autocast = _AUTOCAST.get(precision)
        config = open_clip.get_model_config(model_name)
        if config is None:
            raise ValueError(
                f"hpsv2: expected an open_clip architecture; got {model_name!r}; the published is ViT-H-14"
            )
        self._model = _load_model(config, model_name, checkpoint).to(self._device)
        self._tokenizer = open_clip.get_tokenizer(model_name)
        self._side: int = config["vision_cfg"]["image_size"]

    @torch.inference_mode()
    def score(self, group: RolloutGroup) -> RewardScores:
        """Raw cosine per picture, float32 in [-1, 1].

        Raises:
            ValueError: the group holds answers.
        """
        sample = group.request.sample
        images = [t.image for t in group.trajectories if t.image is not None]
        if not isinstance(sample, GenerationSample) or len(images) != len(group.trajectories):
            raise ValueError(
                f"hpsv2: expected pictures drawn from a prompt; got the {group.request.task} request "
                f"{group.request.request_id}; list this reward under rewards.generation"
            )
        values = self._cosines(sample.prompt, images)
        finite = np.isfinite(values)
        problem = "" if finite.all() else "hpsv2: expected finite scores; got NaN or infinity; use precision float32"
        return RewardScores(values=np.where(finite, values, 0).astype(np.float32), judged=finite, problem=problem)

    def _cosines(self, prompt: str, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """One text pass for the prompt, then batches of images; row-wise dot products in float32."""
        enabled = self._autocast is not None
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=enabled):
            tokens = self._tokenizer([prompt]).to(self._device)
            text = self._model.encode_text(tokens, normalize=True).float()
            features = [
                self._model.encode_image(self._batch(images[start : start + self._batch_size]), normalize=True).float()
                for start in range(0, len(images), self._batch_size)
            ]
        return (torch.cat(features) * text).sum(-1).cpu().numpy()

    def _batch(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        return torch.stack([preprocess(image, self._side) for image in images]).to(self._device)


build = Hpsv2Reward


def preprocess(image: NDArray[np.uint8], side: int) -> Tensor:
    """Pixels as HPSv2 wants them, float32 [3, side, side].

    The longest side is scaled to `side` (bicubic, antialiased, not clamped), the shorter one padded equally with zeros
    before normalisation. Departures from the original: a picture whose longest side fits already is padded too (the
    original skips that and fails), and an extreme strip keeps at least one pixel.

    Args:
        image: uint8 [height, width, 3] or [height, width, 4]; alpha is dropped.
        side: input size of the network in pixels.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image[..., :3])).permute(2, 0, 1).float().div(255)
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    if scale != 1.0:
        height, width = (max(1, round(length * scale)) for length in (height, width))
        pixels = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
    left, top = (side - width) // 2, (side - height) // 2
    pixels = F.pad(pixels, (left, side - width - left, top, side - height - top))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return (pixels - mean) / std


def _check_options(version: str, checkpoint: Path, batch_size: int, precision: str, device: torch.device) -> None:
    if version not in PUBLISHED_FILES:
        raise ValueError(f"hpsv2: expected version v2.0 or v2.1; got {version!r}; correct the option")
    wrong = {file: name for name, file in PUBLISHED_FILES.items() if name != version}
    if checkpoint.name in wrong:
        raise ValueError(
            f"hpsv2: expected {PUBLISHED_FILES[version]} for version {version}; got {checkpoint.name}, which holds "
            f"{wrong[checkpoint.name]}; correct version or checkpoint"
        )
    if batch_size < 1:
        raise ValueError(f"hpsv2: expected batch_size of 1 or more; got {batch_size}; correct the option")
    if precision != "float32" and (precision not in _AUTOCAST or device.type != "cuda"):
        raise ValueError(
            f"hpsv2: expected precision float32, or on a GPU float16 or bfloat16; got {precision!r} on {device}; "
            "use float32"
        )


def _load_model(config: dict[str, Any], model_name: str, checkpoint: Path) -> open_clip.CLIP:
    """The network in evaluation mode, float32, on the CPU. Memory peaks at one copy of the weights."""
    state = _read_state(checkpoint)
    # Without storage, so that nothing is initialised only to be overwritten.
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    _check_layout(model.state_dict(), state, model_name, checkpoint)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    # The only tensor that is not in the checkpoint: the causal mask of the text tower.
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"tensors without storage after loading: {left}"
    return model.eval().requires_grad_(False)


def _read_state(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read without running code, or holds no `state_dict`.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"hpsv2: expected a weights file; got nothing at {checkpoint}; download "
            f"{' or '.join(PUBLISHED_FILES.values())} of xswu/HPSv2 and name it in the reward's options as checkpoint"
        )
    try:
        if checkpoint.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(checkpoint)
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"hpsv2: expected tensors and plain values in {checkpoint}; got a damaged file or something that only "
            f"running code could load ({_first_line(error)}); compare its checksum with the published file, or "
            "convert it to .safetensors on a machine that may run it"
        ) from error
    except Exception as error:
        raise ValueError(
            f"hpsv2: expected a whole weights file; got {checkpoint}, {checkpoint.stat().st_size} bytes, unreadable "
            f"({_first_line(error)}); it is truncated or of another kind: fetch "
            "it again"
        ) from error
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = sorted(map(str, loaded))[:5] if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(
            f"hpsv2: expected the weights under the key state_dict in {checkpoint}; got {found}; take a published file"
        )
    return state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _check_layout(wanted: dict[str, Tensor], state: dict[str, Tensor], model_name: str, checkpoint: Path) -> None:
    """Refuse names or shapes that differ, naming some of each."""
    differences = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(differences.values()):
        found = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in differences.items() if names
        )
        raise ValueError(
            f"hpsv2: expected the {len(wanted)} tensors of {model_name} in {checkpoint}; got {found}; choose the "
            "model_name the file was made for, or the published file"
        )
