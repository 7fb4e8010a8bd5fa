"""The lab's tiny Lumina-DiMOO as pre-training sees it: masked cross-entropy on canvases."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from unirl.config import ImageSampling, ModelConfig, SamplingConfig, TextSampling
from unirl.lab.lab_model import LabModel
from unirl.lab.noise import Answer
from unirl.lab.sampled_model import SampledModel
from unirl.lab.student import Corpus, Phase, Recipe
from unirl.lab.tiny_lumina import ANSWER_CELLS, make_model, make_vq, write_checkpoint
from unirl.lab.tokenizer import answer_text
from unirl.lab.vq_training import COSINE_SCALE, PatchDictionary, code_rows, make_codebook, train_part
from unirl.lab.world import CODE_DIM, GRID, LETTERS, NUM_CODES
from unirl.models.llada import LladaForDiffusion
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.models.lumina_vq import LuminaVq
from unirl.models.masked_sft import Lesson, answer_lesson, hide_cells, masked_cross_entropy, without_prompt
from unirl.rollout.diffusion_sampler import DiffusionSampler
from unirl.types import GenerationSample, Task, UnderstandingSample

RECIPE = Recipe(
    vq_steps=1200,
    generation_batch=64,
    understanding_batch=48,
    phases=(
        Phase(name="clean", num_steps=2000, first_rate=3e-3, last_rate=0.8e-3, restart=True),
        Phase(name="clean restart", num_steps=600, first_rate=2.2e-3, last_rate=0.6e-3, restart=True),
        Phase(name="noise", num_steps=200, first_rate=0.6e-3, last_rate=0.1e-3, restart=False, noisy=True),
    ),
)
SAMPLING = SamplingConfig(
    text=TextSampling(max_tokens=ANSWER_CELLS, diffusion_steps=2), image=ImageSampling(diffusion_steps=12)
)
"""How it is examined, and sampled in configs/rl/lab_lumina_dimoo.yaml."""


@dataclass(frozen=True, slots=True)
class LuminaModel(SampledModel):
    """Meets `LabModel`."""

    vq: LuminaVq

    def reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pictures after VQ encode and decode."""
        return np.stack(self.vq.decode(self.vq.encode(list(images))))


@dataclass(slots=True)
class LuminaStudent:
    """Meets `Student`."""

    module: LladaForDiffusion
    vq: Any
    _policy: LuminaDimoo = field(init=False)

    def __post_init__(self) -> None:
        """Load canvases and laws from a written folder, as a run would."""
        self._policy = self._loaded()

    def image_tokenizer(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder of the VQ."""
        vq = self.vq
        return nn.ModuleList([vq.encoder, vq.quant_conv]), nn.ModuleList([vq.post_quant_conv, vq.decoder])

    def start_image_tokenizer(self, dictionary: PatchDictionary, seed: int) -> None:
        """Write the codebook."""
        codebook = make_codebook(dictionary, NUM_CODES, CODE_DIM, seed)
        self.vq.requires_grad_(requires_grad=False)
        self.vq.quantize.embedding.weight.copy_(codebook)
        inputs: Any = self.module.get_input_embeddings()
        table = inputs.weight.data
        table[-NUM_CODES:] = code_rows(codebook, table[:-NUM_CODES])

    def train_image_tokenizer(self, side: int, corpus: Corpus, num_steps: int, seed: int) -> float:
        """Train one half of the VQ; pixels lie in [0, 1]."""
        vq, codebook = self.vq, self.vq.quantize.embedding.weight.detach()

        def pixels(batch: Tensor) -> Tensor:
            return torch.from_numpy(corpus.images[batch.numpy()]).permute(0, 3, 1, 2).float() / 255

        def encoder_loss(batch: Tensor) -> Tensor:
            # Nearest in distance is largest in product, since the codes have length 1.
            latents = vq.encode(pixels(batch)).latents.permute(0, 2, 3, 1)
            logits = COSINE_SCALE * latents @ codebook.t()
            return cross_entropy(logits.flatten(0, 2), corpus.codes[batch].flatten())

        def decoder_loss(batch: Tensor) -> Tensor:
            grid = corpus.codes[batch].view(-1, GRID, GRID)
            drawn = vq.decode(grid, force_not_quantize=True, shape=(*grid.shape, CODE_DIM)).sample
            target = pixels(batch)
            return l1_loss(drawn, target) + mse_loss(drawn, target)

        loss = (encoder_loss, decoder_loss)[side]
        return train_part(self.image_tokenizer()[side], loss, len(corpus.images), num_steps, seed)

    def drawing_loss(
        self, captions: Sequence[str], dropped: Sequence[bool], codes: Tensor, rng: random.Random
    ) -> Tensor:
        """Nats per hidden code."""
        prompts, lessons = self._policy.prompts, []
        for caption, empty, values in zip(captions, dropped, codes.numpy().astype(np.int32), strict=True):
            canvas = prompts.drawing(GenerationSample(id="lesson", prompt=caption), (GRID, GRID))
            lesson = Lesson(canvas=canvas, values=values)
            lessons.append(without_prompt(prompts, lesson) if empty else lesson)
        return self._nats(lessons, "generation", rng)[0].mean()

    def answering_loss(
        self,
        corpus: Corpus,
        rows: Sequence[int],
        answers: Sequence[Answer],
        letter_weight: float,
        rng: random.Random,
    ) -> tuple[Tensor, float]:
        """Nats per hidden token, letters weighted, and the nats of a hidden letter."""
        prompts, lessons = self._policy.prompts, []
        for row, answer in zip(rows, answers, strict=True):
            question = corpus.questions[row]
            sample = UnderstandingSample(
                id="lesson",
                image=corpus.images[row],
                question=question.text,
                choices=question.choices,
                answer=question.letter,
            )
            codes = corpus.codes[row].view(GRID, GRID).numpy().astype(np.int32)
            canvas = prompts.answering(sample, codes, ANSWER_CELLS)
            lessons.append(answer_lesson(prompts, canvas, answer_text(answer)))
        nats, values = self._nats(lessons, "understanding", rng)
        letters = torch.tensor(prompts.tokenizer.convert_tokens_to_ids(list(LETTERS)))
        is_letter = torch.isin(values, letters).float()
        letter = (nats.detach() * is_letter).sum() / is_letter.sum().clamp(min=1.0)
        return (nats * (1 + (letter_weight - 1) * is_letter)).mean(), float(letter)

    def as_model(self) -> LabModel:
        """The product's own sampler around a copy of the weights."""
        policy = self._loaded()
        return LuminaModel(DiffusionSampler(policy, max_model_len=128, max_num_seqs=128), SAMPLING, policy.vq)

    def write(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the checkpoint folder."""
        write_checkpoint(self.module, self.vq, path, facts)

    def _loaded(self) -> LuminaDimoo:
        """What a run would load if the weights were written now."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder) / "now")
            policy = LuminaDimoo.load(ModelConfig(family="lumina_dimoo"), Path(folder) / "now")
            policy.vq.load()
        return policy

    def _nats(self, lessons: Sequence[Lesson], task: Task, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Nats and ids of the hidden cells."""
        noise = np.random.default_rng(rng.getrandbits(32))
        hidden = [hide_cells(lesson, noise) for lesson in lessons]
        nats = masked_cross_entropy(self.module, lessons, hidden, self._policy.cell_law(task, 1.0))
        values = np.concatenate([lesson.values[cells] for lesson, cells in zip(lessons, hidden, strict=True)])
        return nats, torch.from_numpy(values)


def make_student(seed: int) -> LuminaStudent:
    """A tiny Lumina-DiMOO with random weights."""
    return LuminaStudent(make_model(seed), make_vq(seed))


def load_model(path: Path) -> SampledModel:
    """A checkpoint as a run samples it."""
    return SampledModel.load(ModelConfig(family="lumina_dimoo"), path, SAMPLING)
