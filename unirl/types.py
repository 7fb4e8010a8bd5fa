"""Records that cross rooms: samples, pairs, rollouts, scores, learner batches, weight manifests.

numpy only, so that Ray ships them without a copy. `__post_init__` checks lengths: a record that exists is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Task = Literal["understanding", "generation"]
PairKind = Literal["aligned", "retrieved"]
Modality = Literal["text", "image"]
AnswerType = Literal["choice", "number", "math", "text"]
FinishReason = Literal["stop", "length"]
Role = Literal["system", "user", "assistant"]

TASKS: tuple[Task, ...] = get_args(Task)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_image(image: NDArray[np.uint8], owner: str) -> None:
    _check(
        isinstance(image, np.ndarray)  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3,
        f"{owner}: expected an RGB image, uint8 [height, width, 3] with pixels in 0..255; got "
        f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}; decode it to RGB first",
    )
    _check(image.size > 0, f"{owner}: expected an image with pixels; got shape {image.shape}; drop or repair it")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderstandingSample:
    """One question about one image: (I, Q, A) in PairUni section 2.1."""

    id: str
    image: NDArray[np.uint8]
    """RGB [height, width, 3], any size; the family resizes it."""
    question: str
    choices: tuple[str, ...] = ()
    """Options in the order A, B, C, ...; empty for an open question."""
    answer: str
    """Gold answer: the letter of the right choice, or the text, number or expression."""
    answer_type: AnswerType = "choice"
    category: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.id), "UnderstandingSample: expected an id; got an empty string; number the samples")
        _check_image(self.image, f"understanding sample {self.id}")
        _check(bool(self.question.strip()), f"understanding sample {self.id}: expected a question; got only blanks")
        _check(bool(self.answer.strip()), f"understanding sample {self.id}: expected a gold answer; got only blanks")
        if self.answer_type == "choice":
            letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.choices)]
            _check(
                len(self.choices) >= 2 and self.answer in tuple(letters),
                f"understanding sample {self.id}: expected two or more choices and the letter of the right one; got "
                f"{len(self.choices)} choices and answer {self.answer!r}; use answer_type='text' for open questions",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSample:
    """One prompt to draw: (I, C) in PairUni section 2.1; the image is the reference, used for pairing and display."""

    id: str
    prompt: str
    image: NDArray[np.uint8] | None = None
    class_name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.id), "GenerationSample: expected an id; got an empty string; number the samples")
        _check(bool(self.prompt.strip()), f"generation sample {self.id}: expected a prompt; got only blanks")
        if self.image is not None:
            _check_image(self.image, f"generation sample {self.id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of text or one image inside a turn."""

    text: str | None = None
    image: NDArray[np.uint8] | None = None
    """RGB [height, width, 3], any size; the family resizes it."""
    in_loss: bool = False
    """Whether it is to be learned, and not only read."""

    def __post_init__(self) -> None:
        _check(
            (self.text is None) != (self.image is None),
            "segment: expected a text or an image; got both or none; give each a segment of its own",
        )
        _check(self.text != "", "segment: expected a text; got an empty one; leave the segment out")
        if self.image is not None:
            _check_image(self.image, "segment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side says: text and images in their order."""

    role: Role
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        _check(
            self.role in get_args(Role),
            f"turn: expected a role of {', '.join(get_args(Role))}; got {self.role!r}; correct it",
        )
        _check(
            bool(self.segments), f"{self.role} turn: expected text or an image; got neither; drop the turn or fill it"
        )

    @property
    def images(self) -> tuple[NDArray[np.uint8], ...]:
        """Its images in their order."""
        return tuple(segment.image for segment in self.segments if segment.image is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedSample:
    """A conversation in which text and images alternate: UnifiedVisual sections 3.1 and 3.2, appendix G."""

    id: str
    turns: tuple[Turn, ...]
    """An optional system turn, then user and assistant in alternation from user to assistant."""
    subset: str = ""
    """Which part of the data it belongs to, such as image_editing; mixtures choose by it."""
    source: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.id), "InterleavedSample: expected an id; got an empty string; number the samples")
        roles = [turn.role for turn in self.turns if turn.role != "system"]
        _check(
            bool(roles)
            and roles == ["user", "assistant"] * (len(roles) // 2)
            and "system" not in [turn.role for turn in self.turns[1:]],
            f"interleaved sample {self.id}: expected user and assistant in turn, from a user's turn to an assistant's, "
            f"after at most one system turn; got {[turn.role for turn in self.turns]}; merge or drop turns",
        )


class TokenKind(IntEnum):
    """What a token of a sequence stands for."""

    TEXT = 0
    CODE = 1
    """An image code."""
    BEGIN = 2
    """Begin of an image: what makes a sampler draw."""
    GEOMETRY = 3
    """Between an image's begin and its first code, where the family writes the size there."""
    ROW_END = 4
    """Inside an image, given by its size: end of a row or of all rows."""
    END = 5
    """End of an image."""
    PLACEHOLDER = 6
    """Where a feature of an image goes that is seen by its pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A conversation as ids of one family, over its joint vocabulary of text and image codes."""

    id: str
    ids: NDArray[np.int32]
    """[L] with every image whole."""
    kinds: NDArray[np.uint8]
    """[L] `TokenKind` of each id."""
    in_loss: NDArray[np.bool_]
    """[L] true where the token belongs to something to be learned, markup that ends it included."""
    pixels: Sequence[NDArray[np.uint8]] = ()
    """RGB images [height, width, 3] of the placeholders, in their order; empty where a family sees codes."""
    subset: str = ""

    def __post_init__(self) -> None:
        for name in ("kinds", "in_loss"):
            _check(
                getattr(self, name).shape == self.ids.shape,
                f"sequence {self.id}: expected {name} of shape {self.ids.shape} like ids; got "
                f"{getattr(self, name).shape}; give one value per token",
            )
        _check(self.ids.ndim == 1 and len(self.ids) > 0, f"sequence {self.id}: expected ids [L]; got {self.ids.shape}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """An understanding-generation pair (UG pair) and how alike its two images are."""

    pair_id: str
    kind: PairKind
    similarity: float
    """Cosine of the two images' unit features, in [-1, 1]; 1 for an aligned pair."""
    understanding: UnderstandingSample
    generation: GenerationSample

    def __post_init__(self) -> None:
        _check(
            -1.0 - 1e-5 <= self.similarity <= 1.0 + 1e-5,
            f"pair {self.pair_id}: expected a cosine similarity in [-1, 1]; got {self.similarity}; normalise features",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """Sample `len(seeds)` completions of one prompt. Equal requests give equal tokens, whoever serves them."""

    request_id: str
    """Unique inside a step; "<pair_id>/<task>" in training."""
    pair_id: str
    task: Task
    sample: UnderstandingSample | GenerationSample
    seeds: tuple[int, ...]
    """One per completion, in [0, 2**31); keyed by run seed, step, pair, task and sample, never by worker or order."""

    def __post_init__(self) -> None:
        _check(bool(self.seeds), f"request {self.request_id}: expected at least one seed; got none")
        wanted = UnderstandingSample if self.task == "understanding" else GenerationSample
        _check(
            isinstance(self.sample, wanted),  # pyright: ignore[reportUnnecessaryIsInstance] - it is the task's kind
            f"request {self.request_id}: expected a {wanted.__name__} for {self.task}; got a "
            f"{type(self.sample).__name__}; pair the task with its own kind of sample",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampled completion."""

    prompt_ids: NDArray[np.int32]
    """[P] ids the family made of the prompt, image placeholders expanded."""
    completion_ids: NDArray[np.int32]
    """[T] text ids, or image codes counted from 0."""
    loss_mask: NDArray[np.bool_]
    """[T] true where the token counts in the loss."""
    logprobs: NDArray[np.float32]
    """[T] nats, under the distribution the token was drawn from: temperature, allowed ids and guidance included.
    At temperature 0 under the same distribution at temperature 1."""
    modality: Modality
    text: str | None = None
    """Decoded completion, special tokens kept; None for an image."""
    image: NDArray[np.uint8] | None = None
    """Decoded picture [height, width, 3]; None for text, and for a picture known by its codes alone, from a journal."""
    finish_reason: FinishReason
    """Why it ended; "length" means that the text was cut off before its end token."""
    policy_version: int
    seed: int
    unmask_step: NDArray[np.int16] | None = None
    """[T] step that revealed each token; masked-diffusion families only."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(first token, version) of each stretch that one version sampled, from token 0 on, when weights were updated
    in mid-completion; `policy_version` is then the oldest. Empty when one version sampled all of it."""

    def __post_init__(self) -> None:
        length = len(self.completion_ids)
        starts = [start for start, _ in self.version_spans]
        _check(
            not starts
            or (
                starts == sorted({0, *starts})
                and starts[-1] < length
                and self.policy_version == min(version for _, version in self.version_spans)
            ),
            f"trajectory: expected spans that part its {length} tokens, and policy_version the oldest of them; got "
            f"{self.version_spans} and {self.policy_version}; note (first token, version) wherever the version changes",
        )
        for name in ("loss_mask", "logprobs", "unmask_step"):
            value = getattr(self, name)
            _check(
                value is None or value.shape == (length,),
                f"trajectory: expected {name} of shape ({length},) like completion_ids; got "
                f"{getattr(value, 'shape', None)}; give one value per token",
            )
        is_text = self.modality == "text"
        _check(
            is_text == (self.text is not None) and not (is_text and self.image is not None),
            f"trajectory: expected a text, or an image, as modality {self.modality!r} says; got the other or both",
        )
        _check(
            bool(np.isfinite(self.logprobs).all()),
            "trajectory: expected finite log-probabilities; got NaN or infinity; the sampler's logits are broken",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one request, in the order of its seeds."""

    request: RolloutRequest
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        _check(
            tuple(t.seed for t in self.trajectories) == self.request.seeds,
            f"group {self.request.request_id}: expected one trajectory per seed in the request's order; got seeds "
            f"{tuple(t.seed for t in self.trajectories)} for {self.request.seeds}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedRequest:
    """A request that failed alone as often as it may: it has no group, and the run went on without it."""

    request_id: str
    pair_id: str
    task: Task
    num_completions: int
    attempts: int
    """Tries of it alone."""
    error: str
    """What the last try said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScores:
    """What one reward says about G completions. An unjudged completion is masked, never scored 0."""

    values: NDArray[np.float32]
    """[G] finite; meaningless where `judged` is false."""
    judged: NDArray[np.bool_]
    """[G] false where the reward failed or could not judge."""
    details: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Named parts of the score for logs and evaluation, [G] each, e.g. {"exact": ...}."""
    problem: str = ""
    """Why something was not judged; empty when all was."""
    texts: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    """Named texts for whoever looks at the completions, [G] each, e.g. {"extracted": ...}: the answer that was read."""

    def __post_init__(self) -> None:
        for name, value in (("judged", self.judged), *self.details.items()):
            _check(value.shape == self.values.shape, f"reward: expected {name} of shape {self.values.shape}")
        for name, texts in self.texts.items():
            _check(len(texts) == len(self.values), f"reward: expected {len(self.values)} texts {name}")
        finite = np.isfinite(self.values[self.judged]).all()
        _check(bool(finite), "reward: expected finite values where judged; got NaN or infinity; mark them unjudged")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its scalar rewards (weighted sums) and each component by reward name."""

    group: RolloutGroup
    rewards: NDArray[np.float32]
    """[G] weighted sum over the components; 0 where not judged."""
    judged: NDArray[np.bool_]
    """[G] true where every component judged."""
    components: dict[str, RewardScores]

    def __post_init__(self) -> None:
        size = len(self.group.trajectories)
        _check(
            self.rewards.shape == (size,) and self.judged.shape == (size,),
            f"scored group {self.group.request.request_id}: expected {size} rewards; got {self.rewards.shape}",
        )
        _check(
            bool(np.isfinite(self.rewards).all()),
            f"scored group {self.group.request.request_id}: expected finite rewards; got {self.rewards}; mark what "
            "could not be judged",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A scored group with what the algorithm made of its rewards."""

    scored: ScoredGroup
    pair: PairRecord
    pair_weight: float
    """Factor that the advantages of this group already hold."""
    advantages: NDArray[np.float64]
    """[G] group-relative advantages times `pair_weight`; 0 where not judged."""

    def __post_init__(self) -> None:
        request = self.scored.group.request
        _check(
            self.pair.pair_id == request.pair_id,
            f"weighted group {request.request_id}: expected its own pair {request.pair_id}; got {self.pair.pair_id}; "
            "look pairs up by pair_id",
        )
        _check(
            self.advantages.shape == self.scored.rewards.shape and bool(np.isfinite(self.advantages).all()),
            f"weighted group {request.request_id}: expected {len(self.scored.rewards)} finite advantages; got "
            f"{self.advantages}; compute them with unirl.algorithms.advantages",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRow:
    """One trajectory as the learner needs it."""

    task: Task
    prompt_ids: NDArray[np.int32]
    image: NDArray[np.uint8] | None
    """The question's image; None for generation. Rows of one group share the array."""
    completion_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    old_logprobs: NDArray[np.float32]
    advantage: float
    """Group-relative advantage with the pair weight applied."""
    unmask_step: NDArray[np.int16] | None = None
    pair_kind: PairKind | None = None
    """Of the pair that the prompt is a side of; None where nobody asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerBatch:
    """All rows of one step. Rows without a signal (advantage 0) may be absent; the counts still include them."""

    rows: tuple[LearnerRow, ...]
    num_trajectories: dict[str, int]
    """Judged trajectories per task, over all ranks."""
    num_loss_tokens: dict[str, int]
    """Loss tokens of the judged trajectories per task, over all ranks."""
    num_pairs: int
    """Pairs that gave the trajectories."""
    policy_version: int
    """Oldest version that sampled any of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one weight, as in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsManifest:
    """What a publication of weights holds. A sampler refuses one that does not match its own by name and shape."""

    policy_version: int
    tensors: tuple[TensorSpec, ...]
    checksum: str
    """BLAKE3 over names and bytes in order."""
    slices: tuple[str, ...] = ()
    """Checksum of a few values of each tensor, by which a sampler is seen to hold them; empty when nobody took any."""
