"""Tiny joint-vocabulary checkpoints with their image tokenizers, and requests to them, for reinforcement learning."""

import json

import numpy as np
from safetensors.torch import load_file

from tests.joint_checkpoints import WORDS, read_config, write_anole, write_liquid
from tests.vq_checkpoints import noise, write_chameleon_vq
from unirl.config import ModelConfig
from unirl.types import GenerationSample, RolloutRequest, UnderstandingSample

NUM_CODES, SIZE = 16, 8
"""Of the codebook, and pixels a side: 4 x 4 codes a picture."""
CASES = ("anole", "liquid", "liquid tied")


def write_case(folder, case, size=SIZE):
    """Settings and folder of a checkpoint; Anole's image tokenizer is in its file, Liquid's in a folder of its own."""
    if case == "anole":
        write_anole(folder, num_codes=NUM_CODES, words=(*WORDS, "A", "B"))
        keep_image_tokenizer_in(folder, size)
        return ModelConfig(family="anole", frozen=()), folder
    # Heads of a size that the engine's kernels take on a CPU.
    write_liquid(folder, num_codes=NUM_CODES, head_dim=32, tied=case == "liquid tied")
    tokenizer = write_chameleon_vq(folder / "vqgan", layout="meta-safetensors", size=size, num_codes=NUM_CODES)
    return ModelConfig(family="liquid", frozen=(), image_tokenizer=str(tokenizer)), folder


def keep_image_tokenizer_in(folder, size):
    """Replace the image tokenizer of an Anole checkpoint by one that can draw."""
    config, state = read_config(folder), load_file(folder / "model.safetensors")
    language_model = {name: value for name, value in state.items() if not name.startswith("model.vqmodel.")}
    write_chameleon_vq(folder, layout="transformers", size=size, num_codes=NUM_CODES, more=language_model)
    config["vq_config"] = read_config(folder)["vq_config"]
    (folder / "config.json").write_text(json.dumps(config))


def make_requests(num_questions, num_drawings, seeds=3):
    """Prompts of several lengths, most of which start alike."""
    requests = []
    words = ["what", "color", "is", "a", "red", "circle", "and", "a", "green", "square", "?"]
    for index in range(max(num_questions, num_drawings)):
        text = " ".join(words + words[: 1 + index])
        question = UnderstandingSample(
            id=f"q{index}", image=noise(9, 12, index), question=text, choices=("red", "green"), answer="A"
        )
        drawing = GenerationSample(id=f"g{index}", prompt=text)
        wanted = (("understanding", question, num_questions), ("generation", drawing, num_drawings))
        requests += [
            RolloutRequest(
                request_id=f"{index}/{task}", pair_id=str(index), task=task, sample=sample,
                seeds=tuple(range(100 * index, 100 * index + seeds)),
            )
            for task, sample, count in wanted if index < count
        ]  # fmt: skip
    return sorted(requests, key=lambda request: request.task, reverse=True)


def random_images(count, seed=0):
    """Codes [N] of random pictures."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, NUM_CODES, (SIZE // 2) ** 2).astype(np.int32) for _ in range(count)]
