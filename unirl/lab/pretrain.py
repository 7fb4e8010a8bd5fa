"""Makes the lab's base checkpoint from nothing: VQ, clean pre-training, then a noise phase.

Two processes share the work: rank 0 trains on drawing, rank 1 on answering, and gradients are summed. One thread each,
so that equal seeds give equal weights on one kind of machine.
"""

import hashlib
import json
import logging
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import JanusForConditionalGeneration

from unirl.lab.competence import measure_generation, measure_reconstruction, measure_understanding
from unirl.lab.exam import make_exam
from unirl.lab.noise import NoiseRates, noisy_answer, noisy_spec
from unirl.lab.plain_sampling import PaddedText, encode, image_logits, null_prompts, text_logits
from unirl.lab.tiny_janus import CODE_DIM, NUM_CODES, make_model, to_pixels, write_checkpoint
from unirl.lab.tokenizer import completion, generation_prompt, make_tokenizer, understanding_prompt
from unirl.lab.vq_training import build_dictionary, make_codebook, train_decoder, train_encoder
from unirl.lab.world import LETTERS, Question, Scene, caption, make_question, render, sample_scene

logger = logging.getLogger(__name__)

_GENERATION_RANK, _UNDERSTANDING_RANK = 0, 1
_WARMUP_STEPS = 30
_LOG_EVERY_STEPS = 50
_PEER_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of steps with a linearly falling learning rate."""

    name: str
    num_steps: int
    first_rate: float
    last_rate: float
    restart: bool
    """Start with fresh optimizer moments and a warm-up of 30 steps."""
    noisy: bool = False
    """Train on wrong captions and answers at the recipe's rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the weights depend on."""

    seed: int = 0
    num_scenes: int = 14_000
    """Training scenes, drawn once; none has a held-out caption."""
    vq_steps: int = 600
    generation_batch: int = 48
    understanding_batch: int = 40
    caption_dropout: float = 0.1
    """Share of prompts replaced by the null prompt, which guidance needs."""
    letter_weight: float = 3.0
    """Loss weight of an answer's first letter: the letter is the last thing that is learned."""
    noise: NoiseRates = field(default_factory=NoiseRates)
    phases: tuple[Phase, ...] = (
        Phase(name="clean", num_steps=1030, first_rate=3e-3, last_rate=0.81e-3, restart=True),
        Phase(name="clean restart", num_steps=270, first_rate=2.2e-3, last_rate=0.89e-3, restart=True),
        Phase(name="noise", num_steps=160, first_rate=0.89e-3, last_rate=0.11e-3, restart=False, noisy=True),
    )
    exam_size: int = 480
    """Held-out scenes of each measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The training scenes with one question each, their pixels [N, 20, 20, 3] and their codes [N, 25]."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    images: NDArray[np.uint8]
    codes: Tensor


class SummedGradients:
    """One flat buffer that every parameter's gradient is a view of, so that one message sums them over the ranks."""

    def __init__(self, parameters: list[torch.nn.Parameter], num_extra: int) -> None:
        """Keep room for `num_extra` numbers that are summed along."""
        self._flat = torch.zeros(sum(p.numel() for p in parameters) + num_extra)
        self._num_extra = num_extra
        offset = 0
        for parameter in parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero(self) -> None:
        """Forget the last step."""
        self._flat.zero_()

    def reduce(self, extra: list[float]) -> list[float]:
        """Sum gradients and the extra numbers over the ranks; returns the summed numbers."""
        self._flat[-self._num_extra :] = torch.tensor(extra)
        dist.all_reduce(self._flat)
        return self._flat[-self._num_extra :].tolist()


def pretrain(path: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train from nothing and write the checkpoint folder; returns what stands in its lab.json.

    Takes 5 to 15 minutes on two cores with the default recipe. Spawns one process, so call it from a guarded main.

    Raises:
        RuntimeError: the second process died.
        FloatingPointError: a loss or gradient stopped being finite.
    """
    recipe = recipe or Recipe()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        rendezvous = f"file://{scratch}/rendezvous"
        arguments = (_UNDERSTANDING_RANK, recipe, rendezvous)
        peer = torch.multiprocessing.get_context("spawn").Process(target=_run_rank, args=arguments, daemon=True)
        peer.start()
        try:
            model, measured = _run_rank(_GENERATION_RANK, recipe, rendezvous)
            peer.join()
        except RuntimeError as error:
            peer.join(timeout=5)
            raise RuntimeError(
                f"expected both pre-training processes to finish; the second one ended with exit code {peer.exitcode}; "
                "read its traceback above, free memory if it was killed, and start again"
            ) from error
        finally:
            peer.terminate()
    facts = {
        "recipe": asdict(recipe),
        "recipe_hash": recipe_hash(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "wall_s": round(time.monotonic() - begin),
        "measured": measured,
    }
    write_checkpoint(model, path, facts)
    return facts


def recipe_hash(recipe: Recipe) -> str:
    """First 16 hex digits of the sha256 of the recipe's canonical JSON."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]


def make_scenes(num_scenes: int, seed: int) -> tuple[tuple[Scene, ...], tuple[Question, ...]]:
    """Training scenes of all six categories in equal shares, and one question about each."""
    rng = random.Random(seed)
    scenes = tuple(sample_scene(rng) for _ in range(num_scenes))
    return scenes, tuple(make_question(rng, scene) for scene in scenes)


def _run_rank(rank: int, recipe: Recipe, rendezvous: str) -> tuple[JanusForConditionalGeneration, dict[str, Any]]:
    """All of one rank's work; both ranks end with the same model and the same measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=_PEER_TIMEOUT)
    try:
        model = make_model(recipe.seed)
        corpus = _train_vq(rank, model, recipe)
        measured = {}
        for num_done, phase in enumerate(_train(rank, model, corpus, recipe), start=1):
            if num_done == len(recipe.phases):
                # Measure what is shipped: the float16 weights.
                model.half().float()
            if num_done == len(recipe.phases) or recipe.phases[num_done].noisy > phase.noisy:
                measured["noisy_base" if phase.noisy else "clean"] = _measure(rank, model, recipe)
        measured["vq"] = measure_reconstruction(model, make_exam(recipe.exam_size))
    finally:
        dist.destroy_process_group()
    return model, measured


def _train_vq(rank: int, model: JanusForConditionalGeneration, recipe: Recipe) -> Corpus:
    """Train the encoder on rank 0 and the decoder on rank 1; returns the corpus with its codes."""
    scenes, questions = make_scenes(recipe.num_scenes, recipe.seed + 1)
    images = np.stack([render(scene) for scene in scenes])
    dictionary = build_dictionary(images, NUM_CODES)
    codes = dictionary.codes(images)
    vq = model.model.vqmodel.requires_grad_(False)
    codebook = make_codebook(dictionary, NUM_CODES, CODE_DIM, recipe.seed)
    vq.quantize.embedding.weight.copy_(codebook)
    # Image tokens start with the geometry of the codes, which resembles that of the patches.
    model.model.generation_embeddings.weight.data.copy_(codebook)
    train_part = train_encoder if rank == 0 else train_decoder
    last_loss = train_part(vq, images, codes, recipe.vq_steps, recipe.seed)
    logger.info("%s of the VQ: %d steps, last loss %.4f", train_part.__name__, recipe.vq_steps, last_loss)
    for source, part in enumerate(((vq.encoder, vq.quant_conv), (vq.post_quant_conv, vq.decoder))):
        for tensor in (tensor for module in part for tensor in module.state_dict().values()):
            dist.broadcast(tensor, source)
    return Corpus(scenes=scenes, questions=questions, images=images, codes=codes)


def _train(rank: int, model: JanusForConditionalGeneration, corpus: Corpus, recipe: Recipe) -> Iterator[Phase]:
    """Train phase by phase, yielding each phase when it is done."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = SummedGradients(parameters, num_extra=3)
    rng = random.Random(f"{recipe.seed}/{rank}")
    total, done, begin = sum(phase.num_steps for phase in recipe.phases), 0, time.monotonic()
    optimizers = _make_optimizers(model)
    for phase in recipe.phases:
        if phase.restart:
            optimizers = _make_optimizers(model)
        model.train()
        recent: list[list[float]] = []
        for step in range(1, phase.num_steps + 1):
            gradients.zero()
            loss, letter = _loss(rank, model, corpus, recipe, phase.noisy, rng)
            loss.backward()
            recent.append(gradients.reduce([loss.item(), 0.0, 0.0] if rank == 0 else [0.0, loss.item(), letter]))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            rate = _rate(phase, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            done += 1
            if rank == 0 and done % _LOG_EVERY_STEPS == 0:
                drawing, answering, letters = np.mean(recent[-_LOG_EVERY_STEPS:], 0)
                elapsed = time.monotonic() - begin
                logger.info(
                    "pre-training step %d of %d (%s): losses image %.3f, answer %.3f, letter %.3f; %.0f s, eta %.0f s",
                    *(done, total, phase.name, drawing, answering, letters, elapsed, elapsed / done * (total - done)),
                )
        model.eval()
        yield phase


def _rate(phase: Phase, step: int) -> float:
    """Linear from first_rate to last_rate, times a warm-up after a restart."""
    falling = phase.first_rate + (phase.last_rate - phase.first_rate) * step / phase.num_steps
    return falling * min(1.0, step / _WARMUP_STEPS) if phase.restart else falling


def _make_optimizers(model: JanusForConditionalGeneration) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, which then need 2 to 3 times fewer steps; AdamW for the rest."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if parameter.ndim == 2 and ".layers." in name]
    rest = [parameter for name, parameter in trained if not (parameter.ndim == 2 and ".layers." in name)]
    return (
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    )


def _loss(
    rank: int,
    model: JanusForConditionalGeneration,
    corpus: Corpus,
    recipe: Recipe,
    noisy: bool,
    rng: random.Random,
) -> tuple[Tensor, float]:
    """The rank's batch loss in nats per token, and the loss of the letter for rank 1."""
    rates = recipe.noise if noisy else NoiseRates(caption=0.0, belief=0.0, letter=0.0)
    if rank == _GENERATION_RANK:
        rows = [rng.randrange(len(corpus.scenes)) for _ in range(recipe.generation_batch)]
        return _image_loss(model, corpus, rows, rates, recipe.caption_dropout, rng), 0.0
    rows = [rng.randrange(len(corpus.scenes)) for _ in range(recipe.understanding_batch)]
    return _answer_loss(model, corpus, rows, rates, recipe.letter_weight, rng)


def _image_loss(
    model: JanusForConditionalGeneration,
    corpus: Corpus,
    rows: list[int],
    rates: NoiseRates,
    dropout: float,
    rng: random.Random,
) -> Tensor:
    specs = [corpus.scenes[row].spec for row in rows]
    specs = [noisy_spec(rng, spec) if rng.random() < rates.caption else spec for spec in specs]
    prompts = encode([generation_prompt(caption(spec)) for spec in specs], prompts=True)
    dropped = torch.tensor([rng.random() < dropout for _ in rows])[:, None]
    prompts = PaddedText(ids=null_prompts(prompts).ids.where(dropped, prompts.ids), mask=prompts.mask)
    codes = corpus.codes[rows]
    return cross_entropy(image_logits(model, prompts, codes).flatten(0, 1), codes.flatten())


def _answer_loss(
    model: JanusForConditionalGeneration,
    corpus: Corpus,
    rows: list[int],
    rates: NoiseRates,
    letter_weight: float,
    rng: random.Random,
) -> tuple[Tensor, float]:
    pairs = [(corpus.scenes[row], corpus.questions[row]) for row in rows]
    answers = encode([completion(noisy_answer(rng, *pair, rates)) for pair in pairs], prompts=False)
    prompts = encode([understanding_prompt(q.text, q.choices) for _, q in pairs], prompts=True)
    logits = text_logits(model, prompts, to_pixels(corpus.images[rows]), answers)
    nats = cross_entropy(logits.flatten(0, 1), answers.ids.flatten(), reduction="none").view_as(answers.ids)
    is_letter = torch.isin(answers.ids, _LETTER_IDS)
    first_letter = (is_letter & (is_letter.cumsum(1) == 1)).float()
    loss = (nats * answers.mask * (1 + (letter_weight - 1) * first_letter)).sum() / answers.mask.sum()
    return loss, float((nats * first_letter).sum() / first_letter.sum())


_LETTER_IDS = torch.tensor(make_tokenizer().convert_tokens_to_ids(list(LETTERS)))


def _measure(rank: int, model: JanusForConditionalGeneration, recipe: Recipe) -> dict[str, float]:
    """Competence on the held-out exam; each rank measures its own task, both return the whole."""
    exam = make_exam(recipe.exam_size)
    own = measure_generation(model, exam) if rank == _GENERATION_RANK else measure_understanding(model, exam)
    parts: list[dict[str, float]] = [{}, {}]
    dist.all_gather_object(parts, own)
    measured = {"num_prompts": recipe.exam_size, **parts[_UNDERSTANDING_RANK], **parts[_GENERATION_RANK]}
    if rank == 0:
        logger.info("measured %s", json.dumps(measured))
    return measured


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
