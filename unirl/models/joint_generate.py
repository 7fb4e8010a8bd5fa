"""Greedy completions of a joint vocabulary by transformers' own classes: no packing, no shared head, no padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from unirl.config import ModelConfig
from unirl.models.joint_family import JointFamily
from unirl.models.joint_prompts import JointPrompts


@dataclass(slots=True)
class JointGenerate:
    """Meets `unirl.models.policy.Independent`.

    Codes are read from the head itself, since Chameleon's own `forward` makes every image logit the least number.
    """

    module: Any
    prompts: JointPrompts

    @torch.inference_mode()
    def answer(self, prompt_ids: NDArray[np.int32], image: NDArray[np.uint8], max_tokens: int) -> NDArray[np.int32]:
        """Ids [T] of the likeliest answer, its end token included; the prompt holds the image's codes."""
        allowed = self.prompts.layout.vocabulary.drawable_text.copy()
        allowed[self.prompts.layout.image.begin] = False
        streams, written = [self._stream(prompt_ids)], list[int]()
        while len(written) < max_tokens and written[-1:] != [self.prompts.layout.end]:
            (logits,) = self._next(streams, written[-1:])
            written.append(int(logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf).argmax()))
        return np.array(written, np.int32)

    @torch.inference_mode()
    def draw(self, prompt_ids: NDArray[np.int32], guidance_scale: float) -> NDArray[np.int32]:
        """Codes [N] of the likeliest picture, code after code."""
        vocabulary = self.prompts.layout.vocabulary
        first, last = vocabulary.first_code, vocabulary.first_code + vocabulary.num_codes
        begun = prompt_ids.copy()
        begun[1:-1] = self.prompts.null
        streams, drawn = [self._stream(prompt_ids), self._stream(begun)], list[int]()
        while len(drawn) < self.prompts.num_image_tokens:
            cond, uncond = (logits[first:last] for logits in self._next(streams, drawn[-1:]))
            drawn.append(first + int((uncond + guidance_scale * (cond - uncond)).argmax()))
        return np.array(drawn, np.int32) - np.int32(first)

    def paint(self, codes: NDArray[np.int32]) -> None:
        """Nothing: transformers' Chameleon has no decoder."""

    def _stream(self, ids: NDArray[np.int32]) -> tuple[Tensor, Any]:
        return torch.from_numpy(ids).long()[None].to(self.module.device), DynamicCache()

    def _next(self, streams: Sequence[tuple[Tensor, Any]], last: Sequence[int]) -> list[Tensor]:
        """Logits [V] of each stream behind its prompt or, once that is read, behind the last id."""
        rows: list[Tensor] = []
        for prompt, cache in streams:
            ids = prompt.new_tensor([last]) if last else prompt
            hidden = self.module.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            rows.append(self.module.lm_head(hidden)[0, -1])
        return rows


def load_independent(family: JointFamily, config: ModelConfig, path: Path) -> JointGenerate:
    """The checkpoint folder's model in transformers' hands, in float32."""
    module: Any = family.module.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    nn.Module.to(module, "cuda" if torch.cuda.is_available() else "cpu")
    return JointGenerate(module.eval(), JointPrompts.load(family, config, path))
