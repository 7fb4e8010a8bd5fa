"""What a family must offer: the Protocol that sampler and learner see, and how a family is found by its name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache

from unirl.config import Family, ModelConfig, RlConfig, SamplingConfig, SftConfig
from unirl.config_rules import ConfigError, Problem
from unirl.models.checkpoint import read_json
from unirl.models.conversation_encoder import ConversationEncoder
from unirl.models.image_codec import ImageCodec
from unirl.models.interleaved import ChatLayout, InterleavedPolicy
from unirl.types import GenerationSample, LearnerRow, Task, UnderstandingSample

if TYPE_CHECKING:
    from unirl.models.canvases import CellLaw
    from unirl.models.llada import LladaForDiffusion


MODEL_TYPES: dict[str, Family] = {
    "janus": "janus_pro",
    "llada": "lumina_dimoo",
    "chameleon": "anole",
    "Emu3": "emu3",
    "emu3": "emu3",
    "gemma": "liquid",
}
"""Family by model_type in config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The distribution under which tokens are scored; the same values that the sampler used."""

    text_temperature: float = 1.0
    image_temperature: float = 1.0
    guidance_scale: float = 1.0
    image_logprob: Literal["guided", "conditional"] = "guided"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of some completion tokens of a micro-batch.

    logprobs: float32 [B, T] nats, with gradient; completions padded on the right to the longest.
    scored: bool [B, T] tokens that this pass scored. Over all passes each token of the loss is scored exactly once.
    entropy: float32 [B, T] nats, detached, of the distribution each scored token was drawn from.
    metrics: detached sums over scored tokens by name, e.g. {"guidance_gap": sum |guided - conditional|}.
    """

    logprobs: Tensor
    scored: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What a family makes of a sample."""

    ids: NDArray[np.int32]
    """[P] image placeholders expanded; of a masked-diffusion family the whole canvas, a mask in every cell."""
    longest: int
    """Most tokens that prompt and completion take together."""


class Prompts(Protocol):
    """A family's prompts, which need its tokenizer and no weights."""

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that this checkpoint cannot serve, such as a size or a number of steps, or would ignore."""
        ...

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The prompt of a question or of a picture to draw.

        Without weights, image codes stand as code 0, and `longest` counts the largest image where its size decides.

        Raises:
            ValueError: the sample's text cannot be a prompt.
        """
        ...


class Policy(Prompts, Protocol):
    """A unified model: one set of weights that answers and draws.

    Nothing here assumes an order of generation: an autoregressive family scores in one pass, a masked-diffusion family
    in one pass per canvas, each pass with its own backward, so that one canvas of activations is held at a time.
    """

    @property
    def module(self) -> nn.Module:
        """Parameters under the checkpoint's own names; frozen parts have requires_grad False."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that sampler and learner exchange; tied ones once."""
        ...

    def decode_text(self, ids: NDArray[np.int32]) -> str:
        """Text of completion ids, special tokens kept."""
        ...

    def decode_images(
        self, codes: Sequence[NDArray[np.int32]], prompts: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.uint8]]:
        """Pictures [height, width, 3] of image codes [N] each, drawn under these prompts."""
        ...

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> Iterator[TokenScores]:
        """Score the completions of rows of one task; each yielded pass may be backpropagated before the next.

        Every token of the loss masks is scored; others may be.
        """
        ...

    def tokens_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Tokens that scoring this row puts through the trunk in one pass, all streams counted."""
        ...

    def passes_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Passes that `score` will make for a batch with this row; 1 for autoregressive families."""
        ...

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write a checkpoint folder in the family's public layout with these weights, loadable by `load_policy`."""
        ...


class AutoregressivePolicy(Policy, Protocol):
    """What a family that draws token after token adds for its samplers. H is the trunk's width."""

    @property
    def num_image_tokens(self) -> int:
        """Codes of one image."""
        ...

    @property
    def allowed_text_ids(self) -> Tensor:
        """Which text ids may be sampled, bool [V]."""
        ...

    @property
    def first_code(self) -> int:
        """Id of image code 0 where an engine numbers text ids and codes as one vocabulary."""
        ...

    @property
    def num_codes(self) -> int:
        """Size of the image vocabulary."""
        ...

    @property
    def end_id(self) -> int:
        """Text id that ends an answer."""
        ...

    def pad_prompts(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        """Prompt ids int64 [B, P] and mask int64 [B, P], padded on the left."""
        ...

    def unconditional(self, prompt_ids: Tensor) -> Tensor:
        """Null condition of generation prompts [..., P], of the same length."""
        ...

    def embed_prompts(self, ids: Tensor, mask: Tensor, images: Sequence[NDArray[np.uint8] | None]) -> Tensor:
        """Input embeddings [B, P, H] of padded prompts with their images."""
        ...

    def embed_text(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of text ids [...]."""
        ...

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input embeddings [..., H] of image codes [...]."""
        ...

    def hidden_states(self, embeddings: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [B, T, H] of input embeddings [B, T, H] that follow the cached ones."""
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of the next text id."""
        ...

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., num_codes] of the next image code."""
        ...


@runtime_checkable
class MaskedDiffusionPolicy(Policy, Protocol):
    """What a family that reveals the cells of a canvas adds for its sampler."""

    @property
    def module(self) -> "LladaForDiffusion":
        """The network, which sees a canvas whole."""
        ...

    def cell_law(self, task: Task, temperature: float, guidance_scale: float = 1.0) -> "CellLaw":
        """The distribution of a cell of an answer or of a picture."""
        ...

    def null_canvas(self, canvas: NDArray[np.int32]) -> NDArray[np.int32]:
        """The same cells after an empty instruction, for guidance."""
        ...

    def end_of(self, ids: NDArray[np.int32]) -> int | None:
        """Place of the first token that ends an answer; None where none does."""
        ...


class Independent(Protocol):
    """Somebody else's implementation of a family, to compare samplers with: greedy, one completion at a time."""

    def answer(self, prompt_ids: NDArray[np.int32], image: NDArray[np.uint8], max_tokens: int) -> NDArray[np.int32]:
        """Ids [T] of an answer to an encoded question about the image, its end token included."""
        ...

    def draw(self, prompt_ids: NDArray[np.int32], guidance_scale: float) -> NDArray[np.int32]:
        """Codes [N] of a picture of an encoded prompt."""
        ...

    def paint(self, codes: NDArray[np.int32]) -> NDArray[np.uint8] | None:
        """The picture [height, width, 3] of codes [N]; None where it has no decoder."""
        ...


def load_policy(config: ModelConfig, path: Path) -> Policy:
    """The policy of `config.family` with the weights of the checkpoint folder `path`.

    Raises:
        FileNotFoundError: the folder lacks a file that the family needs.
        ValueError: the checkpoint is of another family, truncated, or lacks a token string.
    """
    return _offer(config, "load", "can be trained by reinforcement learning")(config, path)


def load_prompts(config: ModelConfig, path: Path) -> Prompts:
    """The prompts of `config.family` with the tokenizer of the checkpoint folder `path`; no weights are read.

    Raises:
        FileNotFoundError: the folder lacks a file of the tokenizer.
        ValueError: the tokenizer lacks a token string.
    """
    return _offer(config, "load_prompts", "can be trained by reinforcement learning")(config, path)


def load_independent(config: ModelConfig, path: Path) -> Independent | None:
    """Another implementation of `config.family` with the checkpoint's weights in float32; None where nobody has one."""
    load = getattr(_family(config), "load_independent", None)
    return load(config, path) if load else None


def load_special_ids(config: ModelConfig, path: Path) -> dict[str, int]:
    """Ids of special tokens by transformers' names of their roles ("pad", "eos", "boi"), as `config.family` knows them.

    Empty where the family leaves them to other checks.
    """
    load = getattr(_family(config), "load_special_ids", None)
    return load(config, path) if load else {}


def load_interleaved(config: ModelConfig, path: Path) -> InterleavedPolicy:
    """The policy of `config.family` for conversations, with the weights of the checkpoint folder `path`.

    Raises:
        FileNotFoundError: the folder lacks a file that the family needs.
        ValueError: the family cannot be fine-tuned on conversations, or the checkpoint is of another family, truncated,
            or lacks a token string.
    """
    return _offer(config, "load_interleaved", "can be fine-tuned on conversations")(config, path)


def load_layout(config: ModelConfig, path: Path) -> ChatLayout:
    """How `config.family` writes conversations, by the tokenizer of the checkpoint folder `path`; no weights are read.

    Raises:
        FileNotFoundError: the folder lacks a file of the tokenizer.
        ValueError: the family cannot be fine-tuned on conversations, the checkpoint is of another family, or its
            tokenizer lacks a token string.
    """
    return _offer(config, "load_layout", "can be fine-tuned on conversations")(config, path)


def load_codec(config: ModelConfig, path: Path) -> ImageCodec:
    """The image tokenizer of `config.family`, from the checkpoint folder `path` or from `config.image_tokenizer`.

    Raises:
        FileNotFoundError: the folder lacks a file that the tokenizer needs.
        ValueError: the family cannot be fine-tuned on conversations, unfit weights, or `config.image_pixels` where
            pictures have one size.
    """
    return _offer(config, "load_codec", "can be fine-tuned on conversations")(config, path)


def load_encoder(config: SftConfig, path: Path, *, on_gpu: bool = True) -> ConversationEncoder:
    """What turns samples into token sequences of `config.model.family`, on a GPU where there is one and it is wanted.

    Raises:
        FileNotFoundError: the folder lacks a file that the tokenizers need.
        ConfigError: one image alone is longer than `data.max_length`.
        ValueError: as `load_layout` and `load_codec`.
    """
    codec: Any = load_codec(config.model, path)
    codec.module.to("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    return ConversationEncoder(
        layout=load_layout(config.model, path),
        codec=codec,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        learns_all=config.loss.targets == "all",
    )


def max_positions(path: Path) -> int | None:
    """Most tokens that the checkpoint folder's language model takes, by its config.json; None where that is silent.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it cannot be read.
    """
    raw = read_json(path / "config.json")
    return (raw.get("text_config") or raw).get("max_position_embeddings")


def family_of(path: Path) -> Family:
    """The family of a checkpoint folder, by model_type in its config.json.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of no family that is known.
    """
    found = read_json(path / "config.json").get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(
            f"{path}: expected a checkpoint of model_type {', '.join(MODEL_TYPES)}; got {found!r}; point elsewhere, or "
            "set model.family"
        )
    return MODEL_TYPES[found]


def check_family(config: ModelConfig, path: Path) -> None:
    """Refuse a checkpoint folder of another family.

    Raises:
        ConfigError: names the family that it is of.
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of no family that is known.
    """
    found = family_of(path)
    if found != config.family:
        rule, fix = f"must be {found}, which {path} is of", f"set model.family={found}, or another model.path"
        raise ConfigError([Problem("model.family", config.family, rule, fix)])


def _offer(config: ModelConfig, name: str, what: str) -> Any:
    """The function `name` of the family's file.

    Raises:
        ValueError: it has none, so that the family is not one that `what`.
    """
    found = getattr(_family(config), name, None)
    if found is None:
        offering = [family for family in get_args(Family) if hasattr(_file_of(family), name)]
        raise ValueError(
            f"model.family: expected a family that {what}; got {config.family}; set it to one of {', '.join(offering)}"
        )
    return found


def _family(config: ModelConfig) -> Any:
    """The file of the family: what it offers it defines under the name of the function here that asks for it."""
    if config.family not in get_args(Family):
        known = ", ".join(get_args(Family))
        raise ValueError(f"model.family: expected one of {known}; got {config.family!r}; correct the key")
    return _file_of(config.family)


def _file_of(family: str) -> Any:
    return import_module(f"unirl.models.{family}")
