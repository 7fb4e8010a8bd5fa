"""Trains the tiny VQ from a patch dictionary: every distinct 4 x 4 patch of the world owns one code.

With the codes known, encoder and decoder are two supervised problems that two processes can solve at once.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss, normalize

from unirl.lab.subsets.arrangements import free_corners, scene_of
from unirl.lab.tiny_janus import to_pixels
from unirl.lab.world import CELL_PX, COLORS, GRID, NUM_IMAGE_TOKENS, SHAPES, PlacedObject, render

_BATCH_SIZE = 32
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 20
COSINE_SCALE = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchDictionary:
    """The world's patches, most frequent first; a patch's code is its row."""

    patches: NDArray[np.uint8]
    """[num_patches, 48]."""

    def codes(self, images: NDArray[np.uint8]) -> Tensor:
        """Images uint8 [N, 20, 20, 3] -> codes int64 [N, 25].

        Raises:
            ValueError: an image holds a patch that the dictionary lacks.
        """
        rows = {patch.tobytes(): code for code, patch in enumerate(self.patches)}
        codes = [rows.get(patch.tobytes()) for patch in _patches_of(images)]
        if None in codes:
            raise ValueError(
                f"expected images made of the {len(rows)} known patches; got an unknown patch; "
                "build the dictionary from more scenes of the same world"
            )
        return torch.tensor(codes).view(-1, NUM_IMAGE_TOKENS)


def build_dictionary(images: NDArray[np.uint8], num_codes: int) -> PatchDictionary:
    """The distinct patches of the images uint8 [N, 20, 20, 3].

    Raises:
        ValueError: there are more patches than codes.
    """
    patches = _patches_of(images)
    # Rows as opaque bytes: sorting them is 20 times faster than np.unique(axis=0).
    as_bytes = patches.view(f"V{patches.shape[1]}").ravel()
    _, first, counts = np.unique(as_bytes, return_index=True, return_counts=True)
    patches = patches[first]
    if len(patches) > num_codes:
        raise ValueError(
            f"expected at most {num_codes} distinct patches; got {len(patches)}; place objects on cells or add codes"
        )
    return PatchDictionary(patches=patches[np.argsort(-counts, kind="stable")])


def make_codebook(dictionary: PatchDictionary, num_codes: int, code_dim: int, seed: int) -> Tensor:
    """Unit code vectors [num_codes, code_dim]: like patches get like codes, with noise that keeps them apart."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.from_numpy(dictionary.patches).float()
    projection = torch.randn(patches.shape[1], code_dim, generator=generator)
    noise = normalize(torch.randn(num_codes, code_dim, generator=generator), dim=-1)
    similar = normalize((patches - patches.mean(0)) @ projection, dim=-1)
    noise[: len(patches)] = normalize(similar + 0.7 * noise[: len(patches)], dim=-1)
    return noise


def code_rows(codebook: Tensor, text_rows: Tensor) -> Tensor:
    """First embeddings [num_codes, H] of image tokens, as long as those of text, [N, H] with random directions.

    They have the geometry of the codes [num_codes, code_dim], which resembles that of the patches.
    """
    axes = torch.linalg.qr(text_rows[: codebook.shape[1]].T).Q.T
    return codebook @ axes * text_rows.norm(dim=1).mean()


def shuffled_cells(images: NDArray[np.uint8], codes: Tensor, seed: int) -> tuple[NDArray[np.uint8], Tensor]:
    """The same cells in other places and other pictures: images [N, 20, 20, 3] and codes [N, 25].

    Who learns from both forms cannot let a patch depend on its neighbours, or on what else its picture shows.
    """
    order = np.random.default_rng(seed).permutation(codes.numel())
    patches = _patches_of(images)[order].reshape(-1, GRID, GRID, CELL_PX, CELL_PX, 3)
    shuffled = np.ascontiguousarray(patches.transpose(0, 1, 3, 2, 4, 5)).reshape(images.shape)
    return shuffled, codes.flatten()[torch.from_numpy(order)].view_as(codes)


def crowded_images(num_images: int, seed: int) -> NDArray[np.uint8]:
    """Pictures [N, 20, 20, 3] of three or four objects of any kinds, which the lab's captions seldom ask for."""
    rng, images = random.Random(seed), []
    for _ in range(num_images):
        objects: list[PlacedObject] = []
        wanted = rng.choice((3, 4, 4))
        while len(objects) < wanted and (corners := free_corners(objects)):
            row, column = rng.choice(corners)
            objects.append(PlacedObject(shape=rng.choice(SHAPES), color=rng.choice(COLORS), row=row, column=column))
        images.append(render(scene_of(objects)))
    return np.stack(images)


def train_encoder(vq: Any, images: NDArray[np.uint8], codes: Tensor, num_steps: int, seed: int) -> float:
    """Teach the encoder each patch's code in place; returns the last cross-entropy in nats per token.

    Args:
        vq: transformers' image tokenizer of Janus or of Chameleon; the codes have length 1, so that the nearest is the
            one of the largest product.
        images: uint8 [N, 20, 20, 3].
        codes: int64 [N, 25].
        num_steps: of 32 pictures each.
        seed: of their order.
    """
    codebook = vq.quantize.embedding.weight.detach()

    def loss(batch: Tensor) -> Tensor:
        latents = vq.quant_conv(vq.encoder(to_pixels(images[batch.numpy()]))).permute(0, 2, 3, 1)
        logits = COSINE_SCALE * normalize(latents, dim=-1) @ codebook.t()
        return cross_entropy(logits.reshape(-1, len(codebook)), codes[batch].reshape(-1))

    return train_part(nn.ModuleList([vq.encoder, vq.quant_conv]), loss, len(images), num_steps, seed)


def train_decoder(
    vq: Any, images: NDArray[np.uint8], codes: Tensor, num_steps: int, seed: int, *, fourth_power: float = 0.0
) -> float:
    """Teach the decoder each code's patch in place; returns the last loss.

    That is L1 + squared error, pixels in [-1, 1], plus `fourth_power` times the fourth power of the error, which falls
    on the few pixels that would be taken for another colour. The other arguments are those of `train_encoder`.
    """
    codebook = normalize(vq.quantize.embedding.weight.detach(), dim=-1)

    def loss(batch: Tensor) -> Tensor:
        entries = codebook[codes[batch]].view(-1, GRID, GRID, codebook.shape[1])
        latents = vq.post_quant_conv(entries.permute(0, 3, 1, 2).contiguous())
        pixels, target = vq.decoder(latents), to_pixels(images[batch.numpy()])
        error = l1_loss(pixels, target) + mse_loss(pixels, target)
        return error + fourth_power * (pixels - target).pow(4).mean() if fourth_power else error

    return train_part(nn.ModuleList([vq.post_quant_conv, vq.decoder]), loss, len(images), num_steps, seed)


def train_part(part: nn.Module, loss: Callable[[Tensor], Tensor], num_images: int, num_steps: int, seed: int) -> float:
    """Minimise `loss`, a function of image numbers int64 [B], over the weights of `part`; returns its last value."""
    generator = torch.Generator().manual_seed(seed)
    part.requires_grad_(True)
    optimizer = torch.optim.AdamW(part.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS) * (0.5 * (1 + np.cos(np.pi * step / num_steps)) + 0.02)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    value = torch.tensor(float("nan"))
    for _ in range(num_steps):
        value = loss(torch.randint(num_images, (_BATCH_SIZE,), generator=generator))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    part.requires_grad_(False)
    return float(value.detach())


def _patches_of(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [N, 20, 20, 3] -> patches [N * 25, 48] in token order."""
    cells = images.reshape(-1, GRID, CELL_PX, GRID, CELL_PX, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cells.reshape(-1, CELL_PX * CELL_PX * 3))
