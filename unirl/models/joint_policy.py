"""Causal language models whose one vocabulary holds text and image codes: what Anole, Emu3 and Liquid have in common.

A family's file says how to read its configuration, how to write its conversations, and which image tokenizer it uses.
The image tokenizer is no part of the module: it is never trained, and `save` copies it from where it was loaded.
Conversations are packed into one row; completions of reinforcement learning stand in rows padded on the left.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.initialization import no_init_weights

from unirl.config import ModelConfig, RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models.autoregressive import left_padded, run_trunk, score_completions, tokens_in_pass
from unirl.models.checkpoint import (
    StoredTensors,
    copy_into,
    read_json,
    start_folder,
    stored_tensors,
    write_weights,
)
from unirl.models.interleaved import ChatLayout, Codes, PackedRow, Part
from unirl.models.joint_family import JointFamily
from unirl.models.joint_prompts import JointPrompts
from unirl.models.packed_attention import document_arguments, use_packed_attention
from unirl.models.policy import EncodedPrompt, Scoring, TokenScores
from unirl.types import GenerationSample, LearnerRow, UnderstandingSample

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IMAGES_KEPT = 64
"""Images of questions whose codes are kept at a time."""


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


@dataclass(slots=True)
class JointPolicy:
    """A policy over a joint vocabulary.

    What each method promises is in `unirl.models.policy.AutoregressivePolicy` and, for conversations, in
    `unirl.models.interleaved.InterleavedPolicy`.
    """

    module: Any
    config: Any
    """transformers configuration of the language model."""
    layout: ChatLayout
    folder: Path
    """Where it was loaded from."""
    shapes: dict[str, tuple[int, ...]]
    naming: Mapping[str, str]
    """How the checkpoint names the weights; see `JointFamily.namings`."""
    allowed_text_ids: Tensor
    """Which ids an answer may hold, bool [V]: all that text may, but for the begin of an image."""
    prompts: Callable[[], JointPrompts]
    """Made when first asked for, since conversations need none."""
    codec: Callable[[], Any]
    """The image tokenizer, loaded when first asked for, since a learner needs none."""
    seen: dict[int, tuple[NDArray[np.uint8], Codes]] = field(default_factory=dict)
    """Questions' images by their id(), with their codes."""

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
        allowed = torch.from_numpy(layout.vocabulary.drawable_text.copy())
        allowed[layout.image.begin] = False
        return cls(
            module=module,
            config=settings,
            layout=layout,
            folder=path,
            shapes=shapes,
            naming=naming,
            allowed_text_ids=allowed,
            prompts=functools.cache(functools.partial(JointPrompts.load, family, config, path)),
            codec=functools.cache(functools.partial(_load_codec, family, config, path, layout)),
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def num_image_tokens(self) -> int:
        """Codes of one image."""
        return self.prompts().num_image_tokens

    @property
    def first_code(self) -> int:
        """Id of image code 0."""
        return self.layout.vocabulary.first_code

    @property
    def num_codes(self) -> int:
        """Size of the image vocabulary."""
        return self.layout.vocabulary.num_codes

    @property
    def end_id(self) -> int:
        """Text id that ends an answer."""
        return self.layout.end

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that the family would ignore."""
        return self.prompts().find_problems(config)

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The prompt of a question, its image as codes, or of a picture to draw."""
        codes = self._codes_of(sample.image) if isinstance(sample, UnderstandingSample) else None
        return self.prompts().encode(sample, sampling, codes)

    def decode_text(self, ids: NDArray[np.int32]) -> str:
        """Text of completion ids, special tokens kept."""
        return self.prompts().tokenizer.decode(ids)

    def decode_images(
        self, codes: Sequence[NDArray[np.int32]], prompts: Sequence[NDArray[np.int32]] = ()
    ) -> list[NDArray[np.uint8]]:
        """Pictures [height, width, 3] of image codes [N] each.

        Raises:
            ValueError: codes of another shape or outside the codebook.
        """
        if not len(codes):
            return []
        if wrong := {np.shape(row) for row in codes} - {(self.num_image_tokens,)}:
            raise ValueError(
                f"decode_images: expected codes [{self.num_image_tokens}] each; got {wrong}; sample whole images"
            )
        return self.codec().decode([row.reshape(self.prompts().grid) for row in codes])

    def pad_prompts(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        """Prompt ids int64 [B, P] and mask int64 [B, P], padded on the left to the longest."""
        return left_padded(prompts, self.prompts().null, self.device)

    def unconditional(self, prompt_ids: Tensor) -> Tensor:
        """Null condition of generation prompts [..., P], of the same length."""
        return self.prompts().unconditional(prompt_ids)

    def embed_prompts(self, ids: Tensor, mask: Tensor, images: Sequence[NDArray[np.uint8] | None]) -> Tensor:
        """Input embeddings [B, P, H] of padded prompts, which hold the codes of their images."""
        return self.embed_text(ids)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of ids [...]."""
        return self.module.get_input_embeddings()(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input embeddings [..., H] of image codes [...]."""
        return self.embed_text(codes + self.first_code)

    def hidden_states(self, embeddings: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [B, T, H] of input embeddings [B, T, H] that follow the cached ones."""
        return run_trunk(self.module.model, embeddings, mask, cache)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of the next id, codes among them."""
        return self.module.lm_head(hidden, "both", torch.float32)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., num_codes] of the next image code."""
        return self.module.lm_head(hidden, "image", torch.float32)

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> Iterator[TokenScores]:
        """Scores of the completions of rows of one task, in one pass; see `score_completions`."""
        yield score_completions(self, rows, scoring)

    def tokens_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Tokens that scoring this row puts through the trunk, both streams counted."""
        return tokens_in_pass(row, scoring)

    def passes_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """One."""
        return 1

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

    def _codes_of(self, image: NDArray[np.uint8]) -> Codes:
        """Codes of a question's image; those of the last few images are kept, since questions share them."""
        if id(image) not in self.seen:
            if len(self.seen) == IMAGES_KEPT:
                self.seen.clear()
            (codes,) = self.codec().encode([image])
            self.seen[id(image)] = image, codes
        return self.seen[id(image)][1]


def stored_name(name: str, naming: Mapping[str, str]) -> str:
    """Name in a checkpoint of a weight of the module."""
    for ours, theirs in naming.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _load_codec(family: JointFamily, config: ModelConfig, path: Path, layout: ChatLayout) -> Any:
    """The image tokenizer, on a GPU where there is one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: unfit weights, or a codebook of another size than the vocabulary's.
    """
    assert family.drawing is not None, "families without one offer no load"
    codec = family.drawing.load_codec(config, path)
    if codec.num_codes != layout.vocabulary.num_codes:
        raise ValueError(
            f"model.image_tokenizer: expected a codebook of {layout.vocabulary.num_codes} codes, as {path} has; got "
            f"{codec.num_codes}; name the folder of the tokenizer that the checkpoint was trained with"
        )
    codec.module.to("cuda" if torch.cuda.is_available() else "cpu")
    return codec


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
