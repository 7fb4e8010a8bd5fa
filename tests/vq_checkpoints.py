"""Tiny image tokenizers in the layouts in which they are published, with weights that any machine makes alike.

Each weight is drawn by its official name from integers of NumPy's frozen RandomState, so that numbers recorded from
the official code need no weights beside them.
"""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig

from unirl.models.chameleon_vq import META_CONFIG, META_PICKLE, META_WEIGHTS, Decoder
from unirl.models.emu3_vq import official_name

CHAMELEON_FACTOR, EMU3_FACTOR = 2, 2
"""Pixels per code, as a side."""
EMU3_GAIN = 1.6
"""Without it Emu3's four channels hardly leave their mean, and all squares get the same code."""


def noise(height, width, seed=0):
    """A picture whose colours change over a few pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 3), -(-width // 3), 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(3, 0).repeat(3, 1)[:height, :width])


def known_weight(name, shape, seed=0, gain=1.0):
    """A float32 tensor that depends on nothing but its official name, its shape, the seed and the gain of products."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    state = np.random.RandomState(crc32(name.encode()) ^ seed)
    values = state.randint(-1000, 1001, size=tuple(shape)) / 1000
    if name.endswith("running_var"):
        values = 1 + 0.5 * values
    elif name.endswith(("bias", "running_mean")):
        values = 0.2 * values
    elif len(shape) == 1:
        values = 1 + 0.2 * values
    elif not name.endswith("embedding.weight"):
        values = values * gain * np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def known_weights(shapes, seed=0, gain=1.0):
    return {name: known_weight(name, shape, seed, gain) for name, shape in shapes.items()}


def chameleon_config(size=16, num_codes=48):
    """Numbers of vqgan.yaml with blocks of 32 channels, `size` pixels a side and attention at the lower one."""
    ddconfig = {
        "double_z": False, "z_channels": 8, "resolution": size, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [size // 2], "dropout": 0.0,
    }  # fmt: skip
    return {"embed_dim": 8, "n_embed": num_codes, "ddconfig": ddconfig}


def chameleon_native_config(params):
    """The same numbers for Transformers."""
    numbers = params["ddconfig"]
    return ChameleonVQVAEConfig(
        embed_dim=params["embed_dim"],
        num_embeddings=params["n_embed"],
        latent_channels=numbers["z_channels"],
        resolution=numbers["resolution"],
        base_channels=numbers["ch"],
        channel_multiplier=numbers["ch_mult"],
        num_res_blocks=numbers["num_res_blocks"],
        attn_resolutions=numbers["attn_resolutions"],
    )


def chameleon_weights(params, seed=0):
    config = chameleon_native_config(params)
    with torch.device("meta"):
        module = ChameleonVQVAE(config)
        module.decoder = Decoder(config)
    return known_weights({name: value.shape for name, value in module.state_dict().items()}, seed)


def write_chameleon_vq(folder, *, layout="transformers", size=16, num_codes=48, seed=0, more=None):
    """Write a VQGAN and return its folder.

    Args:
        folder: where; it may hold a checkpoint's other files already.
        layout: "transformers" is config.json with vq_config and model.vqmodel.*, "meta" vqgan.yaml and vqgan.ckpt,
            "meta-safetensors" the latter with vqgan.safetensors.
        size: height and width of every picture, pixels; a code stands for 2 x 2.
        num_codes: size of the codebook.
        seed: of the weights.
        more: other tensors to keep in the same file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = chameleon_config(size, num_codes)
    weights, more = chameleon_weights(params, seed), more or {}
    if layout == "transformers":
        vq = chameleon_native_config(params).to_dict()
        (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": vq}))
        own = {f"model.vqmodel.{name}": value for name, value in weights.items()}
        save_file(own | more, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    (folder / META_CONFIG).write_text(yaml.safe_dump({"model": {"params": params}}))
    if layout == "meta":
        torch.save({"state_dict": weights | more, "global_step": 7}, folder / META_PICKLE)
    else:
        save_file(weights | more, folder / META_WEIGHTS)
    return folder


def emu3_config(num_codes=48):
    """Numbers of the official config.json with blocks of 32 channels and attention at the last level."""
    return {
        "model_type": "Emu3VisionVQ", "codebook_size": num_codes, "embed_dim": 4, "z_channels": 4, "double_z": False,
        "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4, "ch": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [1], "dropout": 0.0,
    }  # fmt: skip


def emu3_native_config(numbers):
    """The same numbers for Transformers."""
    return Emu3VQVAEConfig(
        codebook_size=numbers["codebook_size"],
        base_channels=numbers["ch"],
        channel_multiplier=numbers["ch_mult"],
        num_res_blocks=numbers["num_res_blocks"],
        attn_resolutions=numbers["attn_resolutions"],
        hidden_size=numbers["ch"] * numbers["ch_mult"][-1],
    )


def write_emu3_vq(folder, *, layout="official", num_codes=48, min_pixels=12 * 12, max_pixels=20 * 20, seed=0):
    """Write an Emu3 tokenizer and return its folder; all layouts of a seed hold the same weights.

    Args:
        folder: where; it may hold a checkpoint's other files already.
        layout: "official" is BAAI/Emu3-VisionTokenizer's, "standalone" that of Transformers' Emu3VQVAE,
            "transformers" config.json with vq_config and model.vqmodel.*.
        num_codes: size of the codebook.
        min_pixels: least area of a picture, pixels; a code stands for 2 x 2.
        max_pixels: largest area.
        seed: of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = emu3_config(num_codes)
    native = emu3_native_config(numbers)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Emu3VQVAE(native).state_dict().items()}
    weights = {name: known_weight(official_name(name), shape, seed, EMU3_GAIN) for name, shape in shapes.items()}
    if layout == "official":
        projects = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
        weights = {
            official_name(name): value[..., None, None] if name.endswith(projects) else value
            for name, value in weights.items()
        }
    if layout == "transformers":
        weights = {f"model.vqmodel.{name}": value for name, value in weights.items()}
        config = {"model_type": "emu3", "vq_config": native.to_dict()}
    else:
        config = numbers if layout == "official" else native.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    areas = {"min_pixels": min_pixels, "max_pixels": max_pixels, "spatial_factor": EMU3_FACTOR}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | areas))
    return folder
