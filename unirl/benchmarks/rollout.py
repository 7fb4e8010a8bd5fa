"""Pictures per second of our engine against the common Hugging Face loop: same weights, threads, prompts and guidance.

Run it by `unirl bench rollout`.
"""

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unirl.benchmarks.hf_loop import decode_pictures, draw_pictures
from unirl.benchmarks.janus_folder import JanusSize, word, write_janus
from unirl.benchmarks.report import GIB, Goal, Report, Table, median_ratio, seconds_of, take_turns
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig
from unirl.models.janus_pro import JanusPro
from unirl.rollout.seeds import sample_seed
from unirl.rollout.vllm_engine import VllmSampler
from unirl.types import GenerationSample, RolloutRequest

WANTED, AT = 3.0, 32
"""Times the loop's pictures per second, and the pictures in flight at which this is asked."""
PROMPT_WORDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """What `unirl bench rollout` measures."""

    checkpoint: Path | None = None
    """A Janus checkpoint; None makes up random ones of `sizes`."""
    sizes: tuple[tuple[str, JanusSize, int], ...] = ()
    """Name, random model, rounds."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    """Pictures in flight, in groups of at most eight of one prompt."""
    guidance_scale: float = 5.0
    dtype: str = "float32"
    enforce_eager: bool = True
    rounds: int = 3


def measure_rollout(bench: RolloutBench) -> Report:
    """Both loops on every checkpoint and at every concurrency.

    Raises:
        ValueError: a checkpoint that is no Janus.
    """
    tables, goals = [], []
    models: list[tuple[str, JanusSize | Path, int]] = [*bench.sizes]
    if bench.checkpoint is not None:
        models.insert(0, (bench.checkpoint.name, bench.checkpoint, bench.rounds))
    for name, model, rounds in models:
        with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder:
            path = model if isinstance(model, Path) else write_janus(Path(folder) / "janus", model, bench.dtype)
            table = _measure(name, path, bench, rounds)
        tables.append(table)
        for row in table.rows:
            if row["in flight"] == AT:
                text = f"pictures/s against the Hugging Face loop, {AT} in flight, {name}"
                goals.append(Goal(text=text, wanted=WANTED, got=float(row["ours to it"] or 0)))
    return Report(name="rollout", command="unirl bench rollout", tables=tables, goals=goals, limits=_LIMITS)


_LIMITS = [
    "Both arms multiply the same matrices: per code and picture, 2 streams of every trunk weight and of the head. What "
    "our engine saves is what stands around them: the copy of the whole cache at every code (torch.cat), attention "
    "over rows that share nothing, calls from Python.",
    "The cache column is what torch.cat reads and writes anew at the last code; `products` is the least time that the "
    "matrix products take at this machine's measured speed, for either arm.",
]


def _measure(name: str, path: Path, bench: RolloutBench, rounds: int) -> Table:
    policy = JanusPro.load(ModelConfig(dtype=bench.dtype), path)  # pyright: ignore[reportArgumentType]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(policy.module, device)
    num_codes = policy.num_image_tokens
    prompts = [" ".join(word(8 * group + place) for place in range(PROMPT_WORDS)) for group in range(max(
        1, max(bench.concurrency) // 8))]  # fmt: skip
    lengths = {len(policy.prompts.encode_generation(GenerationSample(id="", prompt=prompt))) for prompt in prompts}
    assert len(lengths) == 1, f"prompts of one length take no mask; got {lengths}"
    config = _rollout_config(policy, bench, max(lengths) + num_codes)
    sampler = VllmSampler(ModelConfig(dtype=bench.dtype), path, config, "image")  # pyright: ignore[reportArgumentType]
    rows = []
    for size in bench.concurrency:
        requests = _requests(prompts, size)
        ids = torch.from_numpy(
            np.stack([policy.prompts.encode_generation(r.sample) for r in requests for _ in r.seeds])  # pyright: ignore[reportArgumentType]
        ).long()

        def theirs(ids: Any = ids.to(device)) -> None:
            codes = draw_pictures(policy, ids, guidance_scale=bench.guidance_scale, num_codes=num_codes)
            decode_pictures(policy, codes)

        def ours(requests: Any = requests) -> None:
            sampler.sample(requests, config.sampling)

        seconds = take_turns({"loop": theirs, "ours": ours}, rounds)
        codes = np.zeros((size, num_codes), np.int32)
        decode_s = seconds_of(lambda codes=codes: policy.decode_images(list(codes)))
        medians = {arm: float(np.median(values)) for arm, values in seconds.items()}
        rows.append(
            {
                "model": name,
                "in flight": size,
                "loop pictures/s": size / medians["loop"],
                "our pictures/s": size / medians["ours"],
                "our tokens/s": size * num_codes / medians["ours"],
                "ours to it": median_ratio(seconds["loop"], seconds["ours"]),
                "decoding s": decode_s,
                "products s": _product_seconds(policy, size) * num_codes,
                "loop s": medians["loop"],
                "our s": medians["ours"],
                "cache GiB": _cache_bytes(policy, max(lengths) + num_codes) * size / GIB,
            }
        )
    with suppress(AttributeError):
        del sampler
    title = f"{name}: {sum(v.numel() for v in policy.module.parameters()) / 1e6:.0f}M weights, {num_codes} codes"
    return Table(title=title, rows=rows)


def _requests(prompts: list[str], size: int) -> list[RolloutRequest]:
    groups = [range(start, min(start + 8, size)) for start in range(0, size, 8)]
    return [
        RolloutRequest(
            request_id=str(index),
            pair_id=str(index),
            task="generation",
            sample=GenerationSample(id=str(index), prompt=prompts[index]),
            seeds=tuple(sample_seed(0, 0, str(index), "generation", place) for place in group),
        )
        for index, group in enumerate(groups)
    ]


def _rollout_config(policy: JanusPro, bench: RolloutBench, length: int) -> RolloutConfig:
    blocks = -(-length // 32) + 1
    memory = blocks * 32 * _cache_bytes(policy, 1) * (max(bench.concurrency) + 1) / GIB
    sampling = SamplingConfig(image=ImageSampling(guidance_scale=bench.guidance_scale))
    return replace(
        RolloutConfig(sampling=sampling, enforce_eager=bench.enforce_eager),
        max_model_len=length,
        max_num_seqs=max(bench.concurrency),
        kv_cache_memory_gib=memory,
    )


def _cache_bytes(policy: JanusPro, length: int) -> int:
    """Of keys and values of one picture in two streams."""
    text = policy.config.text_config
    width = text.num_key_value_heads * text.head_dim
    return 2 * 2 * text.num_hidden_layers * width * length * policy.module.dtype.itemsize


def _product_seconds(policy: JanusPro, size: int) -> float:
    """Seconds of one step's matrix products for `size` pictures, measured on the largest of them."""
    text = policy.config.text_config
    layer = policy.module.model.language_model.layers[0]
    weight = layer.mlp.gate_proj.weight
    states = torch.randn(2 * size, text.hidden_size, dtype=weight.dtype, device=weight.device)
    count = 20
    with torch.inference_mode():
        seconds = min(seconds_of(lambda: [nn.functional.linear(states, weight) for _ in range(count)]) for _ in "123")
    per_weight = seconds / count / weight.numel()
    layers = sum(p.numel() for p in policy.module.model.language_model.layers.parameters())
    head = sum(p.numel() for p in policy.module.model.generation_head.parameters())
    return per_weight * (layers + head)
