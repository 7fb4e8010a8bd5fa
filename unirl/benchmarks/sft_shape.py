"""Time, FLOP utilisation and memory of a fine-tuning step of a Chameleon of any shape with random weights.

What a GPU does with the 7B model can so be measured without its weights, on a few of its layers where all do not fit.
Run it by `unirl bench sft-shape`.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.initialization import no_init_weights

from unirl.algorithms.cross_entropy import sliced_cross_entropy
from unirl.config_rules import OptionError
from unirl.models.joint_policy import JointHead
from unirl.models.packed_attention import document_arguments, use_packed_attention

GIB = 1 << 30
FIRST_CODE, NUM_CODES = 4, 8192
WHOLE_LAYERS = 32
"""Of Anole-7B."""
DENSE_TFLOPS: dict[str, float] = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "4090": 165.2,
}
"""Peak of bfloat16 tensor cores without sparsity, 10^12 operations a second, from the makers' data sheets, by a part of
the device's name; the first that fits counts."""
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SftShape:
    """A network, a row of tokens, and how it is learned; the defaults are Anole-7B's."""

    width: int = 4096
    layers: int = WHOLE_LAYERS
    heads: int = 32
    inner: int = 11008
    vocabulary: int = 65536
    length: int = 4096
    """Tokens of the row, one conversation; half of the targets are image codes."""
    rows_at_once: int = 1024
    steps: int = 5
    dtype: Dtype = "bfloat16"
    optimizer: bool = True
    """Take AdamW's step, its two moments in the weights' precision."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is built.

        Raises:
            OptionError: heads that do not divide the width, no room for the codes, or another precision.
        """
        wrong = (
            (self.width % self.heads != 0, f"expected --heads to divide --width {self.width}; got {self.heads}"),
            (self.width // self.heads % 2 != 0, f"expected an even width of a head; got {self.width // self.heads}"),
            (self.vocabulary < FIRST_CODE + NUM_CODES + 1, f"expected --vocabulary above {FIRST_CODE + NUM_CODES}; got "
             f"{self.vocabulary}"),
            (self.dtype not in get_args(Dtype), f"expected --dtype {' or '.join(get_args(Dtype))}; got {self.dtype}"),
        )  # fmt: skip
        for is_wrong, message in wrong:
            if is_wrong:
                raise OptionError(f"bench sft-shape: {message}; correct the option")

    @property
    def layer_weights(self) -> int:
        """Of one layer's matrices."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def weights(self) -> int:
        """Of all layers, embedding and head."""
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.width

    @property
    def flops(self) -> float:
        """Operations of a step that the mathematics asks for: 6 a token and weight of a product, and attention.

        A product of a token with a weight is a multiplication and an addition, forward once and backward twice. Causal
        attention of a token sees length / 2 others on average, in two products of the width, so a layer adds
        6 * length * width. Each target has a head of its own modality only. Recomputation is not counted, nor the
        embedding, which is looked up.
        """
        text = self.vocabulary - NUM_CODES
        head = self.width * (text + NUM_CODES) / 2
        a_token = 6 * (self.layers * self.layer_weights + head) + 6 * self.layers * self.length * self.width
        return float(self.length) * a_token


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeSpeed:
    """What a step took; null where this device gives no such figure."""

    device: str
    weights: int
    seconds: float
    """Median of the steps after the first, optimizer included."""
    optimizer_s: float
    tokens_per_s: float
    layer_s: float
    """Of one layer: forward, recomputation and backward, by the difference to a network of half as many layers."""
    model_flops: float
    """Of a step, recomputation not counted."""
    peak_tflops: float | None
    """Of the device, as the table of data sheets has it; bfloat16 only."""
    mfu: float | None
    """model_flops a second of the step, of the device's peak."""
    peak_gib: float | None
    """Most GPU memory that was held."""
    extrapolated_s: float | None
    """Of a step of all 32 layers where fewer ran: this step and a layer's time for each that is missing, optimizer in
    proportion to the weights. Not measured."""


def measure_sft_shape(shape: SftShape) -> ShapeSpeed:
    """Steps on one row with recomputed activations, restricted loss in parts, and AdamW.

    Raises:
        RuntimeError: the device has too little memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = _model(shape, device)
    layers: Any = model.model.layers
    whole, moved = _steps(model, shape, device)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    kept = max(1, shape.layers // 2) if shape.layers > 1 else 0
    model.model.layers = nn.ModuleList(list(layers)[:kept])
    half, half_moved = _steps(model, shape, device)
    layer_s = max(0.0, (whole - moved) - (half - half_moved)) / (shape.layers - kept)
    tflops = _peak_tflops(shape, device)
    missing = max(0, WHOLE_LAYERS - shape.layers)
    more = missing * (layer_s + moved * shape.layer_weights / shape.weights)
    return ShapeSpeed(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        weights=shape.weights,
        seconds=whole,
        optimizer_s=moved,
        tokens_per_s=shape.length / whole,
        layer_s=layer_s,
        model_flops=shape.flops,
        peak_tflops=tflops,
        mfu=shape.flops / whole / (tflops * 1e12) if tflops else None,
        peak_gib=peak,
        extrapolated_s=whole + more if missing else None,
    )


def memory_plan(shape: SftShape) -> dict[str, float]:
    """GiB of weights, gradients and AdamW's moments by recipe; activations come on top."""
    whole = shape.weights / GIB
    return {
        "all in bfloat16, as measured here (2 + 2 + 4 bytes a weight)": 8 * whole,
        "bfloat16 with float32 moments (2 + 2 + 8)": 12 * whole,
        "a learner's: float32 copy, gradients and moments too (2 + 4 + 12)": 18 * whole,
        "a learner's with the optimizer offloaded (2 + 2)": 4 * whole,
    }


def _model(shape: SftShape, device: torch.device) -> Any:
    config = ChameleonConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        vocabulary_map={"<image>": 0},
    )
    with torch.device(device), no_init_weights():
        model: Any = ChameleonForConditionalGeneration._from_config(config, dtype=getattr(torch, shape.dtype))
        model.model.vqmodel = None
    # Outside, since nothing is initialised inside, by whomever.
    for name, value in model.named_parameters():
        nn.init.ones_(value) if "norm" in name else nn.init.normal_(value, std=0.02)
    model.lm_head.__class__ = JointHead
    model.lm_head.codes = slice(FIRST_CODE, FIRST_CODE + NUM_CODES)
    use_packed_attention(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _steps(model: Any, shape: SftShape, device: torch.device) -> tuple[float, float]:
    """Median seconds of a step and of the optimizer in it."""
    ids = torch.randint(0, shape.vocabulary, (1, shape.length), device=device)
    half = (shape.length - 1) // 2
    text = torch.randint(0, shape.vocabulary - NUM_CODES, (half,), device=device)
    codes = torch.randint(0, NUM_CODES, (shape.length - 1 - half,), device=device)
    documents = document_arguments([shape.length], device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if shape.optimizer else None

    def loss(hidden: Any, targets: Any, part: str) -> Any:
        num_parts = math.ceil(len(targets) / shape.rows_at_once)
        return sliced_cross_entropy(hidden, targets, lambda rows: model.lm_head(rows, part), num_parts=num_parts)[0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spent: list[tuple[float, float]] = []
    for _ in range(shape.steps + 1):
        started = now()
        hidden = model.model(input_ids=ids, use_cache=False, **documents).last_hidden_state[0, :-1]
        nats = loss(hidden[:half], text, "text").sum() + loss(hidden[half:], codes, "image").sum()
        (nats / (shape.length - 1)).backward()
        learned = now()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
        ended = now()
        spent.append((ended - started, ended - learned))
    # The first step warms up.
    whole, moved = np.median(np.array(spent[1:]), axis=0)
    return float(whole), float(moved)


def _peak_tflops(shape: SftShape, device: torch.device) -> float | None:
    if device.type != "cuda" or shape.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in DENSE_TFLOPS.items() if part in name), None)
