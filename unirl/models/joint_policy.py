"""Causal language models whose one vocabulary holds text and image codes: what Anole, Emu3 and Liquid have in common.

A family's file says how to read its configuration, how to write its conversations, and which image tokenizer it uses.
The image tokenizer is no part of the module: it is never trained, and `save` copies it from where it was loaded.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.initialization import no_init_weights

from unirl.config import ModelConfig
from unirl.models.checkpoint import (
    StoredTensors,
    copy_into,
    read_json,
    start_folder,
    stored_tensors,
    write_weights,
)
from unirl.models.interleaved import ChatLayout, PackedRow, Part
from unirl.models.packed_attention import document_arguments, use_packed_attention

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
        rows = [row for row in rows if len(row)]
        # Of weights and logits what is smaller is put together.
        if len(rows) > 1 and hidden.numel() > hidden.shape[-1] ** 2:
            rows = [torch.cat(rows)]
        logits = [functional.linear(hidden, row.to(hidden.dtype)) for row in rows]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)


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
    naming: Mapping[str, str]
    """How the checkpoint names the weights; see `JointFamily.namings`."""

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
        naming = next((each for each in family.namings if stored_name(EMBEDDING, each) in stored.shapes), {})
        settings.tie_word_embeddings = _is_tied(settings, stored, naming)
        with torch.device("cpu" if weights else "meta"):
            module = _empty_module(family, settings, getattr(torch, config.dtype), layout)
        targets = module.state_dict()
        shapes = {
            name: tuple(value.shape)
            for name, value in targets.items()
            if not (settings.tie_word_embeddings and name == HEAD)
        }
        names = {stored_name(name, naming): name for name in shapes}
        stored.check({source: shapes[name] for source, name in names.items()})
        for source, value in stored.read(set(names) if weights else set()):
            copy_into(targets, names[source], value)
        use_packed_attention(module)
        return cls(module=module, config=settings, layout=layout, folder=path, shapes=shapes, naming=naming)

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
        tied = self.config.tie_word_embeddings
        state = {name: value for name, value in state.items() if not (tied and name == HEAD)}
        start_folder(folder, self.folder, state, self.shapes)
        renamed = {stored_name(name, self.naming): value for name, value in state.items()}
        stored = stored_tensors(self.folder)
        others = stored.shapes.keys() - renamed.keys() - {stored_name(HEAD, self.naming)}
        write_weights(folder, renamed | dict(stored.read(others)))
        precision = str(state[EMBEDDING].dtype).removeprefix("torch.")
        raw = read_json(self.folder / "config.json")
        raw |= {key: precision for key in {"dtype", "torch_dtype"} & raw.keys() or {"dtype"}}
        raw["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def stored_name(name: str, naming: Mapping[str, str]) -> str:
    """Name in a checkpoint of a weight of the module."""
    for ours, theirs in naming.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _is_tied(settings: Any, stored: StoredTensors, naming: Mapping[str, str]) -> bool:
    """Whether head and embedding are one table: config.json says so, and no head is stored that says otherwise.

    The key is often absent, and then transformers' class decides; a head that differs was trained apart.
    """
    head, table = stored_name(HEAD, naming), stored_name(EMBEDDING, naming)
    if not settings.tie_word_embeddings or head not in stored.shapes or table not in stored.shapes:
        return bool(settings.tie_word_embeddings)
    values = dict(stored.read({head, table}))
    return torch.equal(values[head], values[table])


def _empty_module(family: JointFamily, settings: Any, dtype: torch.dtype, layout: ChatLayout) -> Any:
    """The language model in its final precision, its memory reserved and not yet touched."""
    with no_init_weights():
        module = family.module._from_config(settings, dtype=dtype)
    for name in family.drop:
        setattr(module.model, name, None)
    if settings.tie_word_embeddings:
        module.tie_weights()
    vocabulary = layout.vocabulary
    module.lm_head.__class__ = JointHead
    module.lm_head.codes = slice(vocabulary.first_code, vocabulary.first_code + vocabulary.num_codes)
    return module.eval()
