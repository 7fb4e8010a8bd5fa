"""What a family with one vocabulary of text and image codes states about its checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unirl.config import ModelConfig
from unirl.models.interleaved import ChatLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class JointDrawing:
    """What reinforcement learning takes besides: how pictures become codes, and what stands for no prompt."""

    name: str
    """Of the family, in messages."""
    load_codec: Callable[[ModelConfig, Path], Any]
    """The image tokenizer; see `unirl.models.policy.load_codec`."""
    read_grid: Callable[[ModelConfig, Path], tuple[int, int]]
    """Rows and columns of codes of every picture; reads no weights."""
    null: tuple[str, ...]
    """Token in the place of each word where there is no condition: the first of these that the tokenizer knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointFamily:
    """What one family states about its checkpoints."""

    module: Any
    """transformers' class of the language model: has `model`, the trunk, and `lm_head`."""
    read_config: Callable[[Path], Any]
    """The language model's transformers configuration of a checkpoint folder."""
    load_layout: Callable[[ModelConfig, Path], ChatLayout]
    """How a checkpoint folder's tokenizer writes conversations."""
    namings: tuple[Mapping[str, str], ...] = ({},)
    """How checkpoints of the family may name the language model's weights: by beginnings of the module's names, what
    stands in their place. A checkpoint has the first under which its embedding is found."""
    drop: tuple[str, ...] = ()
    """Parts of the trunk that do not belong to the language model."""
    drawing: JointDrawing | None = None
    """None where the family is fine-tuned only."""
