"""Janus-Pro 1B and 7B, and any checkpoint of that layout, on transformers' JanusForConditionalGeneration.

Text and image tokens have separate output heads on one Llama trunk. A row is scored in one teacher-forced pass; under
guidance the pass holds a conditional and an unconditional stream.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, JanusConfig, JanusForConditionalGeneration, JanusImageProcessor
from transformers.initialization import no_init_weights

from unirl.config import ModelConfig, RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models import janus_generate
from unirl.models.autoregressive import left_padded, run_trunk, score_completions, tokens_in_pass
from unirl.models.checkpoint import config_of, copy_into, read_json, start_folder, stored_tensors, write_weights
from unirl.models.image_codec import refuse_area
from unirl.models.interleaved import ChatLayout, PackedRow, Part
from unirl.models.janus_prompts import JanusPrompts
from unirl.models.packed_attention import document_arguments, use_packed_attention
from unirl.models.policy import EncodedPrompt, Scoring, TokenScores
from unirl.types import GenerationSample, LearnerRow, UnderstandingSample

if TYPE_CHECKING:
    from unirl.models.janus_codec import JanusCodec

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
TRUNK = "model.language_model.layers."
VQ = "model.vqmodel."
IMAGES_AT_ONCE = 32
"""Images that the vision tower or the image tokenizer handles in one pass."""


class Float32Linear(nn.Linear):
    """A head whose product is taken in float32 whatever its weights are stored in: guidance amplifies rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., H]."""
        if not input.numel():  # no copy of the table for nothing, and yet a call with a gradient
            return super().forward(input.to(self.weight.dtype)).float()
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input.float(), self.weight.float(), bias)


@dataclass(slots=True)
class JanusPro:
    """A Janus-Pro policy.

    What each method promises is in `unirl.models.policy.AutoregressivePolicy` and, for conversations, in
    `unirl.models.interleaved.InterleavedPolicy`.
    """

    module: JanusForConditionalGeneration
    config: Any
    """JanusConfig of the whole model, also when the trunk was left out; its class types the parts as maybe absent."""
    prompts: JanusPrompts
    image_processor: JanusImageProcessor
    folder: Path
    """Where it was loaded from."""
    tied: bool
    """Whether the text head is the embedding table."""
    shapes: dict[str, tuple[int, ...]]
    """Name and shape of every weight of the whole model, also of a trunk that was not loaded; tied ones once."""
    allowed_text_ids: Tensor
    layout: ChatLayout

    @classmethod
    def load(cls, config: ModelConfig, path: Path, *, trunk: bool = True) -> "JanusPro":
        """The checkpoint folder's model on the CPU, in evaluation mode, with `config.frozen` parts frozen.

        Args:
            config: precision, frozen parts, system prompt.
            path: Hugging Face folder with weights in safetensors form.
            trunk: False leaves the decoder layers out: for a process whose engine holds them already.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, truncated or unfit weights, or a tokenizer without Janus-Pro's tokens.
        """
        raw = _own_config(path)
        stored = stored_tensors(path)
        # The class default is "tied"; the public checkpoints are not, and some conversions do not say so.
        tied = raw.get("tie_word_embeddings") is not False and HEAD not in stored.shapes
        janus: Any = JanusConfig.from_dict(raw)
        janus.tie_word_embeddings = janus.text_config.tie_word_embeddings = tied
        shapes = _weight_shapes(janus)
        stored.check(shapes)
        prompts = JanusPrompts.load(path, config.system_prompt)
        image_processor = _image_processor(path)
        _check_agreement(janus, prompts, image_processor, path)
        module = _empty_module(janus, getattr(torch, config.dtype), trunk=trunk)
        targets = module.state_dict()
        for name, value in stored.read(shapes.keys() & targets.keys()):
            copy_into(targets, name, value)
        _freeze(module, config.frozen)
        use_packed_attention(module.model.language_model)
        return cls(
            module=module,
            config=janus,
            prompts=prompts,
            image_processor=image_processor,
            folder=path,
            tied=tied,
            shapes=shapes,
            allowed_text_ids=prompts.allowed_text_ids(janus.text_config.vocab_size),
            layout=_layout(prompts, janus, image_processor),
        )

    @property
    def num_image_tokens(self) -> int:
        """Codes of one image."""
        return self.prompts.num_image_tokens

    @property
    def first_code(self) -> int:
        """Id of image code 0 in the joint vocabulary."""
        return self.layout.vocabulary.first_code

    @property
    def num_codes(self) -> int:
        """Size of the image vocabulary."""
        return self.config.vq_config.num_embeddings

    @property
    def end_id(self) -> int:
        """Text id that ends an answer."""
        return self.prompts.ids.eos

    @property
    def pad_id(self) -> int:
        """Id that fills the left of shorter prompts."""
        return self.prompts.ids.pad

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that this checkpoint cannot serve or would ignore."""
        return self.prompts.find_problems(config)

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The prompt of a question, image placeholders expanded, or of a picture to draw."""
        return self.prompts.encode(sample, sampling)

    def decode_text(self, ids: NDArray[np.int32]) -> str:
        """Text of completion ids, special tokens kept."""
        return self.prompts.decode(ids)

    def unconditional(self, prompt_ids: Tensor) -> Tensor:
        """Null condition of generation prompts [..., P], of the same length."""
        return self.prompts.unconditional(prompt_ids)

    @torch.no_grad()
    def decode_images(
        self, codes: Sequence[NDArray[np.int32]], prompts: Sequence[NDArray[np.int32]] = ()
    ) -> list[NDArray[np.uint8]]:
        """Pictures [height, width, 3] of image codes [N] each, computed in float32 on unit code vectors.

        Raises:
            ValueError: codes of another shape or outside the codebook.
        """
        if not len(codes):
            return []
        if wrong := {np.shape(row) for row in codes} - {(self.num_image_tokens,)}:
            raise ValueError(
                f"decode_images: expected codes [{self.num_image_tokens}] each; got {wrong}; sample whole images"
            )
        stacked = np.stack(codes).astype(np.int64)
        if not 0 <= stacked.min() <= stacked.max() < self.num_codes:
            raise ValueError(
                f"decode_images: expected codes in 0..{self.num_codes - 1}; got {stacked.min()}..{stacked.max()}; "
                "subtract the offset of the joint vocabulary"
            )
        vq = self._vq()
        chunks = torch.from_numpy(stacked).to(self.device).split(IMAGES_AT_ONCE)
        pictures = [((vq.decode(chunk) + 1) * 127.5).round().clamp(0, 255).byte() for chunk in chunks]
        return list(torch.cat(pictures).permute(0, 2, 3, 1).cpu().numpy())

    @torch.no_grad()
    def encode_images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.int32]:
        """Image codes [B, N] of RGB pictures: the code of the largest cosine at each place.

        transformers' own `encode` compares plain distances; the original normalises both sides, as here.
        """
        vq, processor = self._vq(), self.image_processor
        codebook = functional.normalize(vq.quantize.embedding.weight, dim=-1)
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (processor.image_mean, processor.image_std))
        codes = []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            pixels = (self._pixels(images[start : start + IMAGES_AT_ONCE]) * std + mean) * 2 - 1
            features = vq.quant_conv(vq.encoder(pixels.to(self.device))).permute(0, 2, 3, 1).flatten(1, 2)
            codes.append((functional.normalize(features, dim=-1) @ codebook.T).argmax(-1).int().cpu())
        return torch.cat(codes).numpy()

    def pad_prompts(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        """Prompt ids int64 [B, P] and mask int64 [B, P], padded on the left to the longest."""
        return left_padded(prompts, self.pad_id, self.device)

    def embed_prompts(self, ids: Tensor, mask: Tensor, images: Sequence[NDArray[np.uint8] | None]) -> Tensor:
        """Input embeddings [B, P, H] of padded prompts, features of each image in the places of its placeholders.

        The vision tower sees each distinct array once.

        Raises:
            ValueError: placeholders without an image, an image without placeholders, or an image without pixels.
        """
        embedded = self.embed_text(ids)
        places = (ids == self.prompts.ids.placeholder) & mask.bool()
        for index, (found, image) in enumerate(zip(places.sum(1).tolist(), images, strict=True)):
            if found != (wanted := 0 if image is None else self.num_image_tokens):
                raise ValueError(
                    f"prompt {index}: expected {wanted} image placeholders, {self.num_image_tokens} an image; got "
                    f"{found}; encode the prompt with this family and keep its image with it"
                )
        features = self._image_features([image for image in images if image is not None])
        if not features:
            return embedded
        stacked = torch.cat([features[id(image)] for image in images if image is not None])
        return embedded.masked_scatter(places[..., None], stacked.to(embedded.dtype))

    def embed_text(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of text ids [...]."""
        return self.module.model.language_model.embed_tokens(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input embeddings [..., H] of image codes [...]."""
        return self.module.model.generation_aligner(self.module.model.generation_embeddings(codes))

    def hidden_states(self, embeddings: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [B, T, H] of input embeddings [B, T, H] that follow the cached ones."""
        return run_trunk(self.module.model.language_model, embeddings, mask, cache)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of the next text id."""
        return self.module.lm_head(hidden)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., num_codes] of the next image code."""
        return self.module.model.generation_head(hidden)

    def hidden_states_of(self, row: PackedRow) -> Tensor:
        """Last hidden states [T, H]; a document sees itself alone.

        Raises:
            ValueError: not as many placeholders as the row's images have.
        """
        arguments = document_arguments(row.lengths, row.ids.device)
        trunk = self.module.model.language_model
        return trunk(inputs_embeds=self.embed_row(row)[None], use_cache=False, **arguments).last_hidden_state[0]

    def embed_row(self, row: PackedRow) -> Tensor:
        """Input embeddings [T, H] of text, codes and pictures.

        Whatever the row holds, each module is called once and takes part in the backward pass, because each call is a
        collective of all ranks under ZeRO-3: the tables with no code, the vision tower with a blank image that goes
        nowhere.

        Raises:
            ValueError: not as many placeholders as the row's images have.
        """
        first_code = self.layout.vocabulary.first_code
        is_code, places = row.ids >= first_code, row.ids == self.prompts.ids.placeholder
        embedded = self.embed_text(row.ids.masked_fill(is_code, 0))
        drawn, seen = self.embed_codes(row.ids[is_code] - first_code), self._seen(row.pixels)
        if (found := int(places.sum())) != len(seen):
            raise ValueError(
                f"packed row: expected {len(seen)} image placeholders for {len(row.pixels)} images; got {found}; keep "
                "the pixels of a sequence with its ids"
            )
        for where, values in ((is_code, drawn), (places, seen)):
            embedded = embedded.masked_scatter(where[:, None], values.to(embedded.dtype))
        return embedded

    def logits(self, hidden: Tensor, part: Part) -> Tensor:
        """Logits float32 [N, C] of hidden states [N, H]: over codes, over text ids, or over the joint vocabulary."""
        if part == "both":
            return torch.cat([self.text_logits(hidden), self.code_logits(hidden)], dim=-1)
        return self.text_logits(hidden) if part == "text" else self.code_logits(hidden)

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> Iterator[TokenScores]:
        """Scores of the completions of rows of one task, in one pass; see `score_completions`."""
        yield score_completions(self, rows, scoring)

    def tokens_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Tokens that scoring this row puts through the trunk, both streams counted."""
        return tokens_in_pass(row, scoring)

    def passes_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """One."""
        return 1

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write a checkpoint folder in the public layout with these weights.

        Raises:
            ValueError: the names or shapes of `state` are not those of the model.
        """
        state = {name: value for name, value in state.items() if not (self.tied and name == HEAD)}
        start_folder(folder, self.folder, state, self.shapes)
        config = copy.deepcopy(self.config)
        config.dtype = state[EMBEDDING].dtype
        config.save_pretrained(folder)
        write_weights(folder, state)

    def _seen(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Aligned features [n, H] of images one behind the other; for none, no row of a blank image's."""
        size = self.image_processor.size
        shown = images or [np.zeros((size["height"], size["width"], 3), np.uint8)]
        features = self._image_features(shown)
        return torch.cat([features[id(image)] for image in shown])[: len(images) * self.num_image_tokens]

    def _image_features(self, images: Sequence[NDArray[np.uint8]]) -> dict[int, Tensor]:
        """Aligned features [N, H] of each distinct array, by its id(); only a sampler sees them part by part.

        Every call of a module is a collective of all ranks under ZeRO-3, so a learner makes one, whatever the images.
        """
        distinct = list({id(image): image for image in images}.values())
        model = self.module.model
        trained = any(parameter.requires_grad for parameter in model.vision_model.parameters())
        features = {}
        size = IMAGES_AT_ONCE if torch.is_inference_mode_enabled() else max(len(distinct), 1)
        for start in range(0, len(distinct), size):
            part = distinct[start : start + size]
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                seen = model.vision_model(self._pixels(part).to(self.device)).last_hidden_state
            features |= zip(map(id, part), model.aligner(seen), strict=True)
        return features

    def _pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Normalised float32 [B, 3, S, S]: longest side to S, padded to a square."""
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
                raise ValueError(
                    f"image: expected RGB pixels [height, width, 3]; got shape {image.shape}; repair or drop the record"
                )
        # Copies, because torch takes neither flipped nor, without a warning, read-only arrays.
        copies = [np.array(image, order="C") for image in images]
        return self.image_processor(copies, input_data_format="channels_last", return_tensors="pt").pixel_values

    def _vq(self) -> Any:
        """The image tokenizer in float32; a copy where training holds it in less."""
        vq = self.module.model.vqmodel
        return vq if next(vq.parameters()).dtype == torch.float32 else copy.deepcopy(vq).float()


def _own_config(path: Path) -> dict[str, Any]:
    return config_of(path, "janus_pro", "janus")


def _weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = JanusForConditionalGeneration(copy.deepcopy(config))
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def _empty_module(config: Any, dtype: torch.dtype, *, trunk: bool) -> JanusForConditionalGeneration:
    config = copy.deepcopy(config)
    if not trunk:
        config.text_config.num_hidden_layers = 0
    with no_init_weights():
        module = JanusForConditionalGeneration._from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        module.tie_weights()
    module.model.vqmodel.float()
    head = module.model.generation_head
    for layer in (module.lm_head, head.proj_out, head.vision_head):
        layer.__class__ = Float32Linear
    return module.eval()


def _freeze(module: JanusForConditionalGeneration, names: Sequence[str]) -> None:
    parts = {"vision": module.model.vision_model, "aligner": module.model.aligner, "vq": module.model.vqmodel}
    for name in names:
        if name not in parts:
            raise ValueError(f"model.frozen: expected names among {sorted(parts)}; got {name!r}; correct the key")
        parts[name].requires_grad_(False)


def _image_processor(folder: Path) -> JanusImageProcessor:
    # Without a file the class would silently take CLIP's mean and deviation.
    if not (folder / "preprocessor_config.json").is_file() and "image_processor" not in read_json(
        folder / "processor_config.json"
    ):
        raise FileNotFoundError(
            f"{folder}: expected preprocessor_config.json, which says how images are resized and normalised; got none; "
            "download it with the checkpoint"
        )
    return JanusImageProcessor.from_pretrained(folder, local_files_only=True)


def _check_agreement(config: Any, prompts: JanusPrompts, image_processor: JanusImageProcessor, folder: Path) -> None:
    """Raise ValueError where tokenizer, processors and config.json contradict each other."""
    vision = config.vision_config
    grid = (vision.image_size // vision.patch_size) ** 2
    size = image_processor.size
    for what, got, wanted in (
        ("id of <image_placeholder>", prompts.ids.placeholder, config.image_token_id),
        ("vision_config.num_image_tokens", vision.num_image_tokens, grid),
        ("num_image_tokens of processor_config.json", prompts.num_image_tokens, grid),
        ("image side of the preprocessor", (size["height"], size["width"]), (vision.image_size,) * 2),
        ("vq_config.image_token_embed_dim", config.vq_config.image_token_embed_dim, config.text_config.hidden_size),
    ):
        if got != wanted:
            raise ValueError(
                f"{folder}: expected {what} to be {wanted} as config.json says; got {got}; files of two checkpoints "
                "are mixed: download all of one"
            )
    if (largest := max(prompts.tokenizer.get_vocab().values())) >= config.text_config.vocab_size:
        raise ValueError(
            f"{folder}: expected token ids below text_config.vocab_size {config.text_config.vocab_size}; got "
            f"{largest}; tokenizer and config.json are of two checkpoints"
        )


load = load_interleaved = JanusPro.load
load_independent = janus_generate.load_independent


def load_prompts(config: ModelConfig, path: Path) -> JanusPrompts:
    """The templates alone; see `JanusPrompts.load`."""
    _own_config(path)
    return JanusPrompts.load(path, config.system_prompt)


def load_special_ids(config: ModelConfig, path: Path) -> dict[str, int]:
    """Ids of the tokens that drawing and answering turn on, by their strings."""
    return {role: getattr(load_prompts(config, path).ids, role) for role in ("pad", "bos", "eos", "boi")}


def load_layout(config: ModelConfig, path: Path) -> ChatLayout:
    """How the checkpoint writes conversations; see `JanusPrompts.layout`."""
    janus = JanusConfig.from_dict(_own_config(path))
    return _layout(JanusPrompts.load(path, config.system_prompt), janus, _image_processor(path))


def _layout(prompts: JanusPrompts, config: Any, image_processor: JanusImageProcessor) -> ChatLayout:
    layout = prompts.layout(num_text_ids=config.text_config.vocab_size, num_codes=config.vq_config.num_embeddings)
    return replace(layout, fit=partial(_fitted, image_processor))


def _fitted(image_processor: JanusImageProcessor, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture after resizing and padding, which leave it as it is a second time; a small one stays small."""
    if max(image.shape[:2]) <= image_processor.size["height"]:
        return image
    made = image_processor(
        [np.array(image, order="C")],
        input_data_format="channels_last",
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    )
    return made.pixel_values[0].permute(1, 2, 0).contiguous().numpy()


def load_codec(config: ModelConfig, path: Path) -> "JanusCodec":
    """The checkpoint's own image tokenizer; its pictures have one size."""
    from unirl.models.janus_codec import JanusCodec

    refuse_area(config.image_pixels, "janus_pro")
    return JanusCodec.load(config, path)
