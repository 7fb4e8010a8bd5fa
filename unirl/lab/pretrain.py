"""Makes a base checkpoint of the lab from nothing: image tokenizer, clean pre-training, then a noise phase.

Two processes share the work: rank 0 trains on drawing, rank 1 on answering, and gradients are summed. One thread each,
so that equal seeds give equal weights on one kind of machine. What a family adds is its `Student`.
"""

import hashlib
import importlib
import json
import logging
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from unirl.config import Family
from unirl.lab.competence import measure_generation, measure_reconstruction, measure_understanding
from unirl.lab.exam import make_exam
from unirl.lab.noise import NoiseRates, noisy_answer, noisy_spec
from unirl.lab.student import Corpus, Phase, Recipe, Student
from unirl.lab.vq_training import build_dictionary
from unirl.lab.world import NUM_CODES, Question, Scene, caption, make_question, render, sample_scene

logger = logging.getLogger(__name__)

_GENERATION_RANK, _UNDERSTANDING_RANK = 0, 1
_WARMUP_STEPS = 30
_LOG_EVERY_STEPS = 50
_PEER_TIMEOUT = timedelta(minutes=10)


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


def pretrain(path: Path, family: Family = "janus_pro", recipe: Recipe | None = None) -> dict[str, Any]:
    """Train from nothing and write the checkpoint folder; returns what stands in its lab.json.

    Takes 5 to 30 minutes on two cores with the default recipe. Spawns one process, so call it from a guarded main.

    Args:
        path: new or older checkpoint folder.
        family: which `<family>_student.py`.
        recipe: None takes the family's own.

    Raises:
        RuntimeError: the second process died.
        FloatingPointError: a loss or gradient stopped being finite.
    """
    recipe = _students(family).RECIPE if recipe is None else recipe
    assert isinstance(recipe, Recipe)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        rendezvous = f"file://{scratch}/rendezvous"
        arguments = (_UNDERSTANDING_RANK, family, recipe, rendezvous)
        peer = torch.multiprocessing.get_context("spawn").Process(target=_run_rank, args=arguments, daemon=True)
        peer.start()
        try:
            student, measured = _run_rank(_GENERATION_RANK, family, recipe, rendezvous)
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
        "family": family,
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
    student.write(path, facts)
    return facts


def recipe_hash(recipe: Recipe) -> str:
    """First 16 hex digits of the sha256 of the recipe's canonical JSON."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]


def make_scenes(num_scenes: int, seed: int) -> tuple[tuple[Scene, ...], tuple[Question, ...]]:
    """Training scenes of all six categories in equal shares, and one question about each."""
    rng = random.Random(seed)
    scenes = tuple(sample_scene(rng) for _ in range(num_scenes))
    return scenes, tuple(make_question(rng, scene) for scene in scenes)


def _students(family: Family) -> Any:
    """The family's file: its `make_student` and its RECIPE."""
    return importlib.import_module(f"unirl.lab.{family}_student")


def _run_rank(rank: int, family: Family, recipe: Recipe, rendezvous: str) -> tuple[Student, dict[str, Any]]:
    """All of one rank's work; both ranks end with the same model and the same measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=_PEER_TIMEOUT)
    try:
        student = _students(family).make_student(recipe.seed)
        corpus = _train_image_tokenizer(rank, student, recipe)
        measured = {}
        for num_done, phase in enumerate(_train(rank, student, corpus, recipe), start=1):
            if num_done == len(recipe.phases):
                # Measure what is shipped: the float16 weights.
                student.module.half().float()
            if num_done == len(recipe.phases) or recipe.phases[num_done].noisy > phase.noisy:
                measured["noisy_base" if phase.noisy else "clean"] = _measure(rank, student, recipe)
        measured["vq"] = measure_reconstruction(student.as_model(), make_exam(recipe.exam_size))
    finally:
        dist.destroy_process_group()
    return student, measured


def _train_image_tokenizer(rank: int, student: Student, recipe: Recipe) -> Corpus:
    """Train the encoder on rank 0 and the decoder on rank 1; returns the corpus with its codes."""
    scenes, questions = make_scenes(recipe.num_scenes, recipe.seed + 1)
    images = np.stack([render(scene) for scene in scenes])
    dictionary = build_dictionary(images, NUM_CODES)
    corpus = Corpus(scenes=scenes, questions=questions, images=images, codes=dictionary.codes(images))
    student.start_image_tokenizer(dictionary, recipe.seed)
    last_loss = student.train_image_tokenizer(rank, corpus, recipe.vq_steps, recipe.seed)
    side = ("encoder", "decoder")[rank]
    logger.info("%s of the VQ: %d steps, last loss %.4f", side, recipe.vq_steps, last_loss)
    for source, part in enumerate(student.image_tokenizer()):
        for tensor in part.state_dict().values():
            dist.broadcast(tensor, source)
    return corpus


def _train(rank: int, student: Student, corpus: Corpus, recipe: Recipe) -> Iterator[Phase]:
    """Train phase by phase, yielding each phase when it is done."""
    parameters = [p for p in student.module.parameters() if p.requires_grad]
    gradients = SummedGradients(parameters, num_extra=3)
    rng = random.Random(f"{recipe.seed}/{rank}")
    total, done, begin = sum(phase.num_steps for phase in recipe.phases), 0, time.monotonic()
    optimizers = _make_optimizers(student)
    for phase in recipe.phases:
        if phase.restart:
            optimizers = _make_optimizers(student)
        student.module.train()
        recent: list[list[float]] = []
        for step in range(1, phase.num_steps + 1):
            gradients.zero()
            loss, letter = _loss(rank, student, corpus, recipe, phase.noisy, rng)
            loss.backward()
            own = loss.item()
            recent.append(gradients.reduce([own, 0.0, 0.0] if rank == 0 else [0.0, own, letter]))
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
        student.module.eval()
        yield phase


def _rate(phase: Phase, step: int) -> float:
    """Linear from first_rate to last_rate, times a warm-up after a restart."""
    falling = phase.first_rate + (phase.last_rate - phase.first_rate) * step / phase.num_steps
    return falling * min(1.0, step / _WARMUP_STEPS) if phase.restart else falling


def _make_optimizers(student: Student) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, which then need 2 to 3 times fewer steps; AdamW for the rest."""
    trained = [(name, parameter) for name, parameter in student.module.named_parameters() if parameter.requires_grad]
    layers = (".layers.", ".blocks.")
    names = {
        name
        for name, parameter in trained
        if parameter.ndim == 2 and "norm" not in name and any(part in name for part in layers)
    }
    matrices = [parameter for name, parameter in trained if name in names]
    rest = [parameter for name, parameter in trained if name not in names]
    return (
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    )


def _loss(
    rank: int, student: Student, corpus: Corpus, recipe: Recipe, noisy: bool, rng: random.Random
) -> tuple[Tensor, float]:
    """The rank's batch loss in nats per token, and the loss of the letter for rank 1."""
    rates = recipe.noise if noisy else NoiseRates(caption=0.0, belief=0.0, letter=0.0)
    size = recipe.generation_batch if rank == _GENERATION_RANK else recipe.understanding_batch
    rows = [rng.randrange(len(corpus.scenes)) for _ in range(size)]
    if rank == _GENERATION_RANK:
        specs = [corpus.scenes[row].spec for row in rows]
        specs = [noisy_spec(rng, spec) if rng.random() < rates.caption else spec for spec in specs]
        dropped = [rng.random() < recipe.caption_dropout for _ in rows]
        return student.drawing_loss([caption(spec) for spec in specs], dropped, corpus.codes[rows], rng), 0.0
    answers = [noisy_answer(rng, corpus.scenes[row], corpus.questions[row], rates) for row in rows]
    return student.answering_loss(corpus, rows, answers, recipe.letter_weight, rng)


def _measure(rank: int, student: Student, recipe: Recipe) -> dict[str, float]:
    """Competence on the held-out exam; each rank measures its own task, both return the whole."""
    exam, model = make_exam(recipe.exam_size), student.as_model()
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
