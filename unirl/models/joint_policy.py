"""Causal language models whose one vocabulary holds text and image codes: what Anole, Emu3 and Liquid have in common.

A family's file says how to read its configuration, how to write its conversations, and which image tokenizer it uses.
The image tokenizer is no part of the module: it is never trained, and `save` copies it from where it was loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.initialization import no_init_weights

from unirl.config import ModelConfig
from unirl.models.checkpoint import copy_into, start_folder, stored_tensors, write_weights
from unirl.models.interleaved import ChatLayout, PackedRow, Part
from unirl.models.packed_attention import document_arguments, use_packed_attention

HEAD = "lm_head.weight"


class JointHead(nn.Linear):
    """A head over text ids and image codes, which can yield the logits of one modality alone."""

    codes: slice
    """Rows of the image codes."""

    def forward(self, input: Tensor, part: Part = "both", dtype: torch.dtype | None = None) -> Tensor:
        """Logits [..., C] of hidden states [..., H], the product taken in `dtype`; None: in the weights' own."""
        weight = self.weight
        rows = {
            "both": [weight],
            "image": [weight[self.codes]],
            "text": [weight[: self.codes.start], weight[self.codes.stop :]],
        }[part]
        hidden = input.to(dtype or weight.dtype)
        return torch.cat([functional.linear(hidden, row.to(hidden.dtype)) for row in rows], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class JointFamily:
    """What one family states about its checkpoints."""

    module: Callable[[Any], Any]
    """Class of the language model: has `model`, the trunk, and `lm_head`."""
    read_config: Callable[[Path], Any]
    """The language model's transformers configuration of a checkpoint folder."""
    load_layout: Callable[[ModelConfig, Path], ChatLayout]
    """How a checkpoint folder's tokenizer writes conversations."""
    stored_name: Callable[[str], str] = lambda name: name
    """Name in the checkpoint of a weight of the language model."""
    drop: tuple[str, ...] = ()
    """Parts of the trunk that do not belong to the language model."""


@dataclass(slots=True)
class JointPolicy:
    """Meets `unirl.models.interleaved.InterleavedPolicy`."""

    module: Any
    config: Any
    """transformers configuration of the language model."""
    layout: ChatLayout
    folder: Path
    """Where it was loaded from."""
    shapes: dict[str, tuple[int, ...]]
    family: JointFamily

    @classmethod
    def load(cls, family: JointFamily, config: ModelConfig, path: Path, *, weights: bool = True) -> "JointPolicy":
        """The checkpoint folder's language model on the CPU, in evaluation mode.

        Args:
            family: what it states about its checkpoints.
            config: precision, system prompt.
            path: Hugging Face folder with weights in safetensors form.
            weights: False reads none: for a process whose engine holds them already.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, truncated or unfit weights, or a tokenizer without the family's tokens.
        """
        layout, settings = family.load_layout(config, path), family.read_config(path)
        stored = stored_tensors(path)
        tied = bool(settings.tie_word_embeddings) and family.stored_name(HEAD) not in stored.shapes
        settings.tie_word_embeddings = tied
        with torch.device("cpu" if weights else "meta"):
            module = _empty_module(family, settings, getattr(torch, config.dtype), layout)
        shapes = {
            name: tuple(value.shape) for name, value in module.state_dict().items() if not (tied and name == HEAD)
        }
        names = {family.stored_name(name): name for name in shapes}
        stored.check({source: shapes[name] for source, name in names.items()})
        targets = module.state_dict()
        for source, value in stored.read(set(names) if weights else set()):
            copy_into(targets, names[source], value)
        use_packed_attention(module)
        return cls(module=module, config=settings, layout=layout, folder=path, shapes=shapes, family=family)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def hidden_states_of(self, row: PackedRow) -> Tensor:
        """Last hidden states [T, H]; a document sees itself alone."""
        embeddings = self.module.get_input_embeddings()(row.ids[None])
        arguments = document_arguments(row.lengths, row.ids.device)
        return self.module.model(inputs_embeds=embeddings, use_cache=False, **arguments).last_hidden_state[0]

    def logits(self, hidden: Tensor, part: Part) -> Tensor:
        """Logits [N, C] of hidden states [N, H]: over codes, over text ids, or over the joint vocabulary."""
        return self.module.lm_head(hidden, part)

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint folder in the layout it was loaded from; what is no language model is copied from there.

        Raises:
            ValueError: the names or shapes of `state` are not those of the language model.
        """
        start_folder(folder, self.folder, state, self.shapes)
        renamed = {self.family.stored_name(name): value for name, value in state.items()}
        stored = stored_tensors(self.folder)
        others = dict(stored.read(stored.shapes.keys() - renamed.keys()))
        (folder / "config.json").write_bytes((self.folder / "config.json").read_bytes())
        write_weights(folder, renamed | others)


def _empty_module(family: JointFamily, settings: Any, dtype: torch.dtype, layout: ChatLayout) -> Any:
    with no_init_weights():
        module = family.module(settings)
    for name in family.drop:
        setattr(module.model, name, None)
    module = module.to(dtype)
    if settings.tie_word_embeddings:
        module.tie_weights()
    vocabulary = layout.vocabulary
    module.lm_head.__class__ = JointHead
    module.lm_head.codes = slice(vocabulary.first_code, vocabulary.first_code + vocabulary.num_codes)
    if module.lm_head.weight.shape[0] != vocabulary.size:
        raise ValueError(
            f"expected a head of {vocabulary.size} rows, as the tokenizer says; config.json says vocab_size "
            f"{module.lm_head.weight.shape[0]}; tokenizer and config.json are of two checkpoints"
        )
    return module.eval()
