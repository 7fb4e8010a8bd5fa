"""Greedy completions by transformers' own `generate`, which neither embeds prompts nor decodes as our samplers do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, JanusImageProcessor

from unirl.config import ModelConfig
from unirl.models.janus_prompts import JanusPrompts


@dataclass(slots=True)
class JanusGenerate:
    """Meets `unirl.models.policy.Independent`."""

    module: Any
    image_processor: Any
    never: list[int]
    """Text ids that no answer may hold, which is our rule and not transformers'."""

    @torch.inference_mode()
    def answer(self, prompt_ids: NDArray[np.int32], image: NDArray[np.uint8], max_tokens: int) -> NDArray[np.int32]:
        """Ids [T] of the likeliest answer, its end token included."""
        pixels = self.image_processor([np.array(image)], input_data_format="channels_last", return_tensors="pt")
        prompt, mask = self._inputs(prompt_ids)
        pixel_values = pixels.pixel_values.to(self.module.device)
        ids = self.module.generate(
            prompt,
            attention_mask=mask,
            pixel_values=pixel_values,
            do_sample=False,
            max_length=prompt.shape[1] + max_tokens,
            suppress_tokens=self.never,
        )
        return ids[0, prompt.shape[1] :].int().cpu().numpy()

    @torch.inference_mode()
    def draw(self, prompt_ids: NDArray[np.int32], guidance_scale: float) -> NDArray[np.int32]:
        """Codes [N] of the likeliest picture, code after code."""
        prompt, mask = self._inputs(prompt_ids)
        codes = self.module.generate(
            prompt, attention_mask=mask, generation_mode="image", guidance_scale=guidance_scale, do_sample=False
        )
        return codes[0].int().cpu().numpy()

    @torch.inference_mode()
    def paint(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """The picture [height, width, 3] of codes [N]."""
        (painted,) = self.module.decode_image_tokens(torch.from_numpy(codes).long()[None].to(self.module.device))
        return ((painted + 1) * 127.5).clamp(0, 255).round().byte().cpu().numpy()

    def _inputs(self, prompt_ids: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        prompt = torch.from_numpy(prompt_ids).long()[None].to(self.module.device)
        return prompt, torch.ones_like(prompt)


def load_independent(config: ModelConfig, path: Path) -> JanusGenerate:
    """The checkpoint folder's model in transformers' hands, in float32."""
    module: Any = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    nn.Module.to(module, "cuda" if torch.cuda.is_available() else "cpu")
    # What a generation_config.json may bring and a call with its own length, at temperature 0, would warn about.
    for name in ("top_k", "top_p", "temperature", "max_new_tokens"):
        setattr(module.generation_config, name, None)
    image_processor = JanusImageProcessor.from_pretrained(path, local_files_only=True)
    allowed = JanusPrompts.load(path, config.system_prompt).allowed_text_ids(module.config.text_config.vocab_size)
    return JanusGenerate(module.eval(), image_processor, (~allowed).nonzero().flatten().tolist())
