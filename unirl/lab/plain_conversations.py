"""Drawing and answering in conversations with a joint vocabulary, in plain torch: how the lab examines Anole.

Prompts are written by the family's own layout and padded on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from unirl.config import Family, ModelConfig
from unirl.lab.lab_model import SamplingPlan
from unirl.lab.plain_sampling import PaddedText, draw_tokens, hidden_states
from unirl.lab.tokenizer import EOS
from unirl.lab.world import GRID, NUM_IMAGE_TOKENS, Question, question_with_choices
from unirl.models.image_codec import ImageCodec
from unirl.models.interleaved import Codes
from unirl.models.joint_policy import JointPolicy
from unirl.models.policy import load_codec, load_interleaved
from unirl.models.tokenizer import OpenTokenizer, open_tokenizer
from unirl.types import Segment, Turn

MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainConversations:
    """Meets `LabModel`."""

    policy: JointPolicy
    codec: ImageCodec
    tokenizer: OpenTokenizer

    @classmethod
    def load(cls, family: Family, path: Path) -> "PlainConversations":
        """The checkpoint folder's model, in float32.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, or unfit weights.
        """
        config = ModelConfig(family=family, dtype="float32")
        policy = load_interleaved(config, path)
        assert isinstance(policy, JointPolicy), f"{family} has no joint vocabulary"
        return cls(policy=policy, codec=load_codec(config, path), tokenizer=open_tokenizer(path, {}))

    def draw(self, captions: Sequence[str], plan: SamplingPlan) -> NDArray[np.uint8]:
        """Pictures [N, 20, 20, 3], one per caption."""
        begin = self.policy.layout.image.begin
        codes = self._sample_codes(_stacked([[*self.prompt(caption), begin] for caption in captions]), plan)
        return np.stack(self.codec.decode(codes.view(-1, GRID, GRID).int().numpy()))

    def answer(self, images: NDArray[np.uint8], questions: Sequence[Question], plan: SamplingPlan) -> list[str]:
        """Answer texts; one that was ended, not cut off, ends in the lab's end token whatever the family's."""
        asked = zip(images, self.codec.encode(images), questions, strict=True)
        prompts = [self.prompt(question_with_choices(q.text, q.choices), image, own) for image, own, q in asked]
        return self._sample_answers(_stacked(prompts), plan)

    def reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pictures after they were encoded and decoded."""
        return np.stack(self.codec.decode(self.codec.encode(images)))

    def prompt(self, text: str, image: NDArray[np.uint8] | None = None, codes: Codes | None = None) -> list[int]:
        """Ids up to the assistant's turn of what the user says, after an image where there is one."""
        shown = () if image is None else (Segment(image=image),)
        turn = Turn(role="user", segments=(*shown, Segment(text=text)))
        return self.policy.layout.encode((turn,), () if codes is None else (codes,)).ids.tolist()

    @torch.no_grad()
    def _sample_codes(self, prompts: PaddedText, plan: SamplingPlan) -> Tensor:
        """Image codes int64 [B, 25] after prompts that end in the begin of an image."""
        module, vocabulary, guided = self.policy.module, self.policy.layout.vocabulary, plan.guidance != 1.0
        streams = (prompts.ids, null_prompts(self.policy, prompts.ids)) if guided else (prompts.ids,)
        mask, new = prompts.mask.repeat(len(streams), 1), torch.cat(streams)
        generator, cache, codes = torch.Generator().manual_seed(plan.seed), DynamicCache(), []
        for _ in range(NUM_IMAGE_TOKENS):
            hidden = hidden_states(module.model, module.get_input_embeddings()(new), mask, cache)
            logits = self.policy.logits(hidden[:, -1], "image")
            if guided:
                conditional, null = logits.chunk(2)
                logits = null + plan.guidance * (conditional - null)
            codes.append(draw_tokens(logits, plan, generator))
            new = (codes[-1] + vocabulary.first_code).repeat(len(streams))[:, None]
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return torch.stack(codes, 1)

    @torch.no_grad()
    def _sample_answers(self, prompts: PaddedText, plan: SamplingPlan) -> list[str]:
        """Texts, cut after MAX_ANSWER_TOKENS; only words and the end of an answer can be drawn."""
        module, layout = self.policy.module, self.policy.layout
        text_ids = torch.from_numpy(layout.vocabulary.text_ids)
        drawable = torch.from_numpy(layout.plain)[text_ids] | (text_ids == layout.end)
        generator, cache, columns = torch.Generator().manual_seed(plan.seed), DynamicCache(), []
        new, mask, open_rows = prompts.ids, prompts.mask, torch.ones(len(prompts.ids), dtype=torch.bool)
        while open_rows.any() and len(columns) < MAX_ANSWER_TOKENS:
            hidden = hidden_states(module.model, module.get_input_embeddings()(new), mask, cache)
            logits = self.policy.logits(hidden[:, -1], "text").masked_fill(~drawable, -torch.inf)
            columns.append(text_ids[draw_tokens(logits, plan, generator)].where(open_rows, layout.end))
            open_rows &= columns[-1] != layout.end
            new = columns[-1][:, None]
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return [self._text(row) for row in torch.stack(columns, 1).int().numpy()]

    def _text(self, ids: NDArray[np.int32]) -> str:
        ended = np.flatnonzero(ids == self.policy.layout.end)
        if not len(ended):
            return self.tokenizer.decode(ids)
        return f"{self.tokenizer.decode(ids[: ended[0]])} {EOS}".strip()


def null_prompts(policy: JointPolicy, ids: Tensor) -> Tensor:
    """Prompts [B, L] without a condition: all but the conversation's start and the image's begin becomes padding.

    As Janus-Pro does it: the length stays, and the padding is attended to.
    """
    layout = policy.layout
    keep = torch.isin(ids, torch.tensor([*layout.start, layout.image.begin]))
    return ids.where(keep, policy.config.pad_token_id)


def _stacked(rows: Sequence[Sequence[int]]) -> PaddedText:
    """Rows of ids side by side, the shorter ones behind what the mask hides."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    return PaddedText(ids=ids, mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]))
