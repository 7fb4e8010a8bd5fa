"""Pictures per second of our engine against the common Hugging Face loop: same weights, threads, prompts and guidance.

Run it by `unirl bench rollout`.
"""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from unirl.benchmarks.hf_loop import decode_pictures, draw_pictures
from unirl.benchmarks.janus_folder import JanusSize, word, write_janus
from unirl.benchmarks.report import GIB, Goal, Report, Row, Table, median_ratio, seconds_of, take_turns
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig
from unirl.models.janus_pro import JanusPro
from unirl.rollout.seeds import sample_seed
from unirl.rollout.vllm_engine import VllmSampler
from unirl.types import GenerationSample, RolloutRequest

WANTED, AT = 3.0, 32
"""Times the loop's pictures per second, and the pictures in flight at which this is asked."""
PROMPT_WORDS = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCase:
    """One model and how it is measured."""

    name: str
    model: JanusSize | Path
    """A random model, or the folder of a Janus checkpoint."""
    concurrency: tuple[int, ...] = (1, 8, AT)
    """Pictures in flight, in groups of at most eight of one prompt."""
    rounds: int = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt: str | None = None
    """Of every picture; None makes up words of the random models, another for each group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """What `unirl bench rollout` measures."""

    cases: tuple[RolloutCase, ...]
    guidance_scale: float = 5.0
    enforce_eager: bool = True


def measure_rollout(bench: RolloutBench) -> Report:
    """Both loops on every model and at every concurrency.

    Raises:
        ValueError: a checkpoint that is no Janus.
    """
    tables, goals = [], []
    for case in bench.cases:
        log.info("%s", case.name)
        with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder:
            model = case.model
            path = model if isinstance(model, Path) else write_janus(Path(folder) / "janus", model, case.dtype)
            table = _measure(case, path, bench)
        tables.append(table)
        for row in table.rows:
            if row["in flight"] == AT:
                text = f"pictures/s against the Hugging Face loop, {AT} in flight, {case.name}"
                goals.append(Goal(text=text, wanted=WANTED, got=float(row["ours to it"] or 0)))
    return Report(name="rollout", command="unirl bench rollout", tables=tables, goals=goals, limits=_LIMITS)


_LIMITS = [
    "Both arms multiply the same matrices: per code and picture, 2 streams of every trunk weight and of the head. What "
    "our engine saves is what stands around them: the copy of the whole cache at every code (torch.cat), attention "
    "over rows that share nothing, calls from Python.",
    "The cache column is what torch.cat reads and writes anew at the last code; `products` is the least time that the "
    "matrix products take at this machine's measured speed, for either arm.",
]


def _measure(case: RolloutCase, path: Path, bench: RolloutBench) -> Table:
    model = ModelConfig(dtype=case.dtype)
    policy = JanusPro.load(model, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(policy.module, device)
    num_codes = policy.num_image_tokens
    most = max(case.concurrency)
    encoded = {one.request_id: policy.encode(one.sample, SamplingConfig()).ids for one in _requests(case, most)}
    (prompt_length,) = {len(ids) for ids in encoded.values()}  # of one length, so that the loop needs no mask
    length = prompt_length + num_codes
    config = _rollout_config(policy, bench, most, length)
    sampler = VllmSampler(model, path, config, "image")
    rows: list[Row] = []
    for size in case.concurrency:
        requests = _requests(case, size)
        prompts = [encoded[request.request_id] for request in requests for _ in request.seeds]
        ids = torch.from_numpy(np.stack(prompts)).long().to(device)

        def theirs(ids: Tensor = ids) -> None:
            codes = draw_pictures(policy, ids, guidance_scale=bench.guidance_scale, num_codes=num_codes)
            decode_pictures(policy, codes)

        def ours(requests: list[RolloutRequest] = requests) -> None:
            sampler.sample(requests, config.sampling)

        seconds = take_turns({"loop": theirs, "ours": ours}, case.rounds, warm=size == case.concurrency[0])
        codes = np.zeros((size, num_codes), np.int32)
        decode_s = seconds_of(lambda codes=codes: policy.decode_images(list(codes)))
        medians = {arm: float(np.median(values)) for arm, values in seconds.items()}
        rows.append(
            {
                "in flight": size,
                "loop pictures/s": size / medians["loop"],
                "our pictures/s": size / medians["ours"],
                "our tokens/s": size * num_codes / medians["ours"],
                "ours to it": median_ratio(seconds["loop"], seconds["ours"]),
                "codes alone": (medians["loop"] - decode_s) / (medians["ours"] - decode_s),
                "decoding s": decode_s,
                "products s": _product_seconds(policy, size) * num_codes,
                "loop s": medians["loop"],
                "our s": medians["ours"],
                "cache GiB": _cache_bytes(policy, length) * size / GIB,
            }
        )
    weights = sum(value.numel() for value in policy.module.parameters()) / 1e6
    title = f"{case.name}, {case.dtype}: {weights:.0f}M weights, {num_codes} codes"
    return Table(title=title, rows=rows)


def _requests(case: RolloutCase, size: int) -> list[RolloutRequest]:
    prompts = [" ".join(word(8 * group + place) for place in range(PROMPT_WORDS)) for group in range(-(-size // 8))]
    groups = [range(start, min(start + 8, size)) for start in range(0, size, 8)]
    return [
        RolloutRequest(
            request_id=str(index),
            pair_id=str(index),
            task="generation",
            sample=GenerationSample(id=str(index), prompt=case.prompt or prompts[index]),
            seeds=tuple(sample_seed(0, 0, str(index), "generation", place) for place in group),
        )
        for index, group in enumerate(groups)
    ]


def _rollout_config(policy: JanusPro, bench: RolloutBench, most: int, length: int) -> RolloutConfig:
    blocks = -(-length // 32) + 1
    memory = blocks * 32 * _cache_bytes(policy, 1) * (most + 1) / GIB
    sampling = SamplingConfig(image=ImageSampling(guidance_scale=bench.guidance_scale))
    return replace(
        RolloutConfig(sampling=sampling, enforce_eager=bench.enforce_eager),
        max_model_len=length,
        max_num_seqs=most,
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
