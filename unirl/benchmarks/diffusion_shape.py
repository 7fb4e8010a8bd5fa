"""Time and memory of a masked-diffusion network of any shape with random weights: one picture sampled, one update.

What a GPU must hold to train the 8B model can so be measured without its weights. Run it by `unirl bench shape`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np
import torch

from unirl.config_rules import OptionError
from unirl.models.canvases import CellLaw, score_canvases
from unirl.models.llada import LladaConfig, LladaForDiffusion
from unirl.models.lumina_prompts import PUBLIC_IDS
from unirl.rollout.unmasking import draw_images

GIB = 1 << 30
PROMPT_TOKENS = 60
FACTOR, NUM_CODES = 16, 8192
MASK, NEWLINE, FIRST_CODE = (PUBLIC_IDS[role] for role in ("mask", "newline", "first_code"))
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A network, a picture, and how it is revealed and learned from."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 12288
    side: int = 512
    """Height and width of the picture in pixels; a code covers 16 x 16."""
    steps: int = 35
    guidance: float = 5.0
    update_steps: int = 35
    """Steps of the picture that the update learns from."""
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is built.

        Raises:
            OptionError: a side that is no whole number of codes, more steps than codes, or another precision.
        """
        cells = (self.side // FACTOR) ** 2
        wrong = (
            (self.side % FACTOR != 0, f"expected --side to be a multiple of {FACTOR}; got {self.side}"),
            (self.steps > cells, f"expected --steps of at most {cells}, the picture's codes; got {self.steps}"),
            (self.dtype not in get_args(Dtype), f"expected --dtype {' or '.join(get_args(Dtype))}; got {self.dtype}"),
            (self.width % self.heads != 0, f"expected --heads to divide --width {self.width}; got {self.heads}"),
        )
        for is_wrong, message in wrong:
            if is_wrong:
                raise OptionError(f"bench shape: {message}; correct the option")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One part's wall time, and the most memory that it held on the GPU (0 without one)."""

    part: str
    seconds: float
    peak_gib: float


def measure_shape(shape: Shape) -> list[Spent]:
    """Load, sample one picture, take one AdamW step with recomputed activations, all in the weights' own precision.

    A learner of a run keeps float32 copies and moments too, sharded over its ranks: see the plan of --dry-run.

    Raises:
        RuntimeError: the device has too little memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spent: list[Spent] = []
    measured = _measure_on(device, spent)
    config = LladaConfig(
        d_model=shape.width,
        n_heads=shape.heads,
        n_layers=shape.layers,
        mlp_hidden_size=shape.inner,
        vocab_size=FIRST_CODE + NUM_CODES,
        init_std=0.02,
    )
    with measured("weights"), torch.device(device):
        model = LladaForDiffusion._from_config(config, dtype=getattr(torch, shape.dtype)).eval()
    cells = shape.side // FACTOR
    rows = np.full((cells, cells + 1), MASK, np.int32)
    rows[:, -1] = NEWLINE
    prompt = np.arange(1, PROMPT_TOKENS + 1, dtype=np.int32)
    canvas, null = np.concatenate([prompt, rows.ravel()]), np.concatenate([prompt[:20], rows.ravel()])
    law = CellLaw(mask_id=MASK, start=FIRST_CODE, stop=FIRST_CODE + NUM_CODES, guidance_scale=shape.guidance)
    with measured(f"sampling {shape.side} x {shape.side} in {shape.steps} steps"):
        ((row, _),) = draw_images(model, [canvas], [null], [0], law, shape.steps)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
    with measured(f"update on {shape.update_steps} of {shape.steps} steps"):
        for scores in islice(score_canvases(model, [row], law), shape.update_steps):
            (-scores.logprobs.sum() / len(row.values)).backward()
        optimizer.step()
    return spent


def _measure_on(device: torch.device, spent: list[Spent]) -> Callable[[str], AbstractContextManager[None]]:
    """Context managers that append what their block spent."""

    @contextmanager
    def measured(part: str) -> Iterator[None]:
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
        spent.append(Spent(part=part, seconds=time.perf_counter() - started, peak_gib=peak))

    return measured
