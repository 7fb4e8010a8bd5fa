"""Questions and drawings as prompts of a joint vocabulary, written as the family's conversations are. No model here."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.config import ModelConfig, RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models.autoregressive import CHOICE_TEMPLATE, problems_of_settings, question_text
from unirl.models.interleaved import ChatLayout, Codes
from unirl.models.joint_family import JointFamily
from unirl.models.policy import EncodedPrompt
from unirl.models.tokenizer import OpenTokenizer, open_tokenizer
from unirl.types import GenerationSample, Segment, Turn, UnderstandingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPrompts:
    """Meets `unirl.models.policy.Prompts`."""

    name: str
    """Of the family, in messages."""
    layout: ChatLayout
    tokenizer: OpenTokenizer
    grid: tuple[int, int]
    """Rows and columns of codes of every picture."""
    null: int
    """Id in the place of each word where there is no condition, and left of shorter prompts."""

    @classmethod
    def load(cls, family: JointFamily, config: ModelConfig, path: Path) -> "JointPrompts":
        """Prompts of the checkpoint folder; no weights are read.

        Raises:
            FileNotFoundError: the folder lacks a file, or there is no image tokenizer.
            ValueError: another family, or a tokenizer without its tokens.
        """
        assert family.drawing is not None, "families without one offer no load_prompts"
        layout, tokenizer = family.load_layout(config, path), open_tokenizer(path, {})
        return cls(
            name=family.drawing.name,
            layout=layout,
            tokenizer=tokenizer,
            grid=family.drawing.read_grid(config, path),
            null=next(tokenizer.vocabulary[name] for name in family.drawing.null if name in tokenizer.vocabulary),
        )

    @property
    def num_image_tokens(self) -> int:
        """Codes of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def kept_ids(self) -> tuple[int, ...]:
        """Ids of a prompt that stay without a condition: begin of text and begin of image."""
        return (*self.layout.start, self.layout.image.begin)

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that the family would ignore."""
        return problems_of_settings(config, self.name)

    def encode(
        self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig, codes: Codes | None = None
    ) -> EncodedPrompt:
        """The user's turn and the begin of the assistant's, which for a picture to draw is the begin of the image.

        Args:
            sample: a question or a picture to draw.
            sampling: says how long an answer may be.
            codes: of the question's image, of the prompts' grid; None puts code 0 everywhere.

        Raises:
            ValueError: a text contains a special token.
        """
        if isinstance(sample, UnderstandingSample):
            template = self.tokenizer.tokenizer.init_kwargs.get("choice_template", CHOICE_TEMPLATE)
            segments = (Segment(image=sample.image), Segment(text=question_text(sample, template)))
            shown = np.zeros(self.grid, np.int32) if codes is None else codes
            ids = self._ids(segments, [shown], f"understanding sample {sample.id}")
            return EncodedPrompt(ids, len(ids) + sampling.text.max_tokens)
        ids = self._ids((Segment(text=sample.prompt),), [], f"generation sample {sample.id}")
        begun = np.append(ids, np.int32(self.layout.image.begin))
        return EncodedPrompt(begun, len(begun) + self.num_image_tokens)

    def unconditional(self, prompt_ids: Tensor) -> Tensor:
        """Null condition of generation prompts [..., P]: all but begin of text and begin of image becomes `null`."""
        kept = torch.tensor(self.kept_ids, device=prompt_ids.device)
        return torch.where(torch.isin(prompt_ids, kept), prompt_ids, self.null)

    def _ids(self, segments: tuple[Segment, ...], codes: list[Codes], owner: str) -> NDArray[np.int32]:
        return self.layout.encode([Turn(role="user", segments=segments)], codes, id=owner).ids
