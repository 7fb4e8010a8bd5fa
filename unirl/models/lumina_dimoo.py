"""Lumina-DiMOO: masked diffusion over text ids and image codes in one vocabulary, on an LLaDA transformer.

A prompt is the whole canvas, masks in the cells that the model fills; a completion is what the cells hold in the end
and the step that revealed each. Only the transformer is trained; the image tokenizer stays beside it.
"""

import copy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.initialization import no_init_weights

from unirl.config import ModelConfig, RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models.canvases import CanvasRow, CellLaw, cells_of, score_canvases
from unirl.models.checkpoint import (
    StoredTensors,
    copy_into,
    read_json,
    start_folder,
    stored_tensors,
    write_weights,
)
from unirl.models.llada import LladaConfig, LladaForDiffusion
from unirl.models.lumina_prompts import LuminaPrompts
from unirl.models.lumina_vq import FOLDER, LuminaVq
from unirl.models.policy import EncodedPrompt, Scoring, TokenScores
from unirl.types import GenerationSample, LearnerRow, Task, UnderstandingSample

EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


@dataclass(slots=True)
class LuminaDimoo:
    """A Lumina-DiMOO policy; see `unirl.models.policy.MaskedDiffusionPolicy` for what each method promises."""

    module: LladaForDiffusion
    prompts: LuminaPrompts
    vq: LuminaVq
    folder: Path
    """Where it was loaded from."""
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def load(cls, config: ModelConfig, path: Path) -> "LuminaDimoo":
        """The checkpoint folder's model on the CPU, in evaluation mode.

        Args:
            config: precision and system prompt; of the parts to freeze it has only the image tokenizer.
            path: Hugging Face folder with weights in safetensors form and the image tokenizer in vqvae.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, truncated or unfit weights, a tokenizer without the special tokens, a
                vocabulary that does not end in the image codes, or a part to freeze that there is not.
        """
        if absent := sorted(set(config.frozen) - {"vision", "vq"}):
            raise ValueError(
                f"model.frozen: expected names among vision, vq for lumina_dimoo; got {list(config.frozen)}; it has no "
                f"{absent[0]}: leave it out"
            )
        _own_config(path)
        # Before the weights, because it says what a vocabulary of another size does.
        prompts = LuminaPrompts.load(path, config.system_prompt)
        llada, stored, shapes = _checked_weights(path)
        vq = LuminaVq(path, prompts.sizes)
        with no_init_weights():
            module = LladaForDiffusion._from_config(llada, dtype=getattr(torch, config.dtype))
        if llada.weight_tying:
            module.tie_weights()
        targets = module.state_dict()
        for name, value in stored.read(set(shapes)):
            copy_into(targets, name, value)
        return cls(module=module.eval(), prompts=prompts, vq=vq, folder=path, shapes=shapes)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.module.device

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that this checkpoint cannot serve."""
        return self.prompts.find_problems(config)

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The canvas of a question with its image's codes, or of a picture to draw."""
        if isinstance(sample, GenerationSample):
            return self.prompts.encode(sample, sampling)
        self.vq.device = self.device
        canvas = self.prompts.answering(sample, self.vq.encode([sample.image])[0], sampling.text.max_tokens)
        return EncodedPrompt(canvas, len(canvas))

    def decode_text(self, ids: NDArray[np.int32]) -> str:
        """Text of completion ids up to the end, special tokens kept but for those that only end or fill a canvas."""
        end = self.prompts.end_of(ids)
        return self.prompts.decode(ids if end is None else ids[: end + 1])

    def decode_images(
        self, codes: Sequence[NDArray[np.int32]], prompts: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.uint8]]:
        """Pictures [height, width, 3] of image codes [N] each, of the sizes that their canvases say."""
        self.vq.device = self.device
        grids = [self.prompts.grid_of(canvas) for canvas in prompts]
        return self.vq.decode([own.reshape(grid) for own, grid in zip(codes, grids, strict=True)])

    def cell_law(self, task: Task, temperature: float, guidance_scale: float = 1.0) -> CellLaw:
        """The distribution of a cell: over image codes, or over the ids that an answer may hold."""
        first, mask_id = self.prompts.ids.first_code, self.prompts.ids.mask
        if task == "generation":
            stop = first + self.prompts.num_codes
            return CellLaw(
                mask_id=mask_id, start=first, stop=stop, temperature=temperature, guidance_scale=guidance_scale
            )
        allowed = torch.from_numpy(self.prompts.allowed_text_ids())
        return CellLaw(mask_id=mask_id, start=0, stop=first, allowed=allowed, temperature=temperature)

    def null_canvas(self, canvas: NDArray[np.int32]) -> NDArray[np.int32]:
        """The same cells after an empty instruction."""
        return self.prompts.unconditional(canvas)

    def end_of(self, ids: NDArray[np.int32]) -> int | None:
        """Place of the first token that ends an answer."""
        return self.prompts.end_of(ids)

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> Iterator[TokenScores]:
        """Score each revealed token on the canvas of its step, one pass per step that revealed a token of the loss.

        Raises:
            ValueError: rows of both tasks, or a row without a reveal step for each of its cells.
        """
        task = rows[0].task
        if len(tasks := {row.task for row in rows}) != 1:
            raise ValueError(f"score: expected rows of one task; got {sorted(tasks)}; make micro-batches per task")
        guided = self._is_guided(task, scoring)
        temperature = scoring.image_temperature if task == "generation" else scoring.text_temperature
        law = self.cell_law(task, temperature or 1.0, scoring.guidance_scale if guided else 1.0)
        yield from score_canvases(self.module, [self._canvas_row(row, guided=guided) for row in rows], law)

    def tokens_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Tokens of the row's canvas, both streams counted, the null one as if it were as long."""
        return len(row.prompt_ids) * (2 if self._is_guided(row.task, scoring) else 1)

    def passes_per_row(self, row: LearnerRow, scoring: Scoring) -> int:
        """Steps that revealed a token of the loss."""
        return len(self._canvas_row(row, guided=False).scored_steps)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write a checkpoint folder in the public layout with these weights and the image tokenizer.

        Raises:
            ValueError: the names or shapes of `state` are not those of the model.
        """
        state = {name: value for name, value in state.items() if name in self.shapes or name != HEAD}
        start_folder(folder, self.folder, state, self.shapes)
        shutil.copytree(self.folder / FOLDER, folder / FOLDER, dirs_exist_ok=True)
        config = copy.deepcopy(self.module.config)
        config.dtype = state[EMBEDDING].dtype
        # Published configurations name code files, which are not needed here and not copied.
        vars(config).pop("auto_map", None)
        config.save_pretrained(folder)
        write_weights(folder, state)

    @staticmethod
    def _is_guided(task: Task, scoring: Scoring) -> bool:
        return task == "generation" and scoring.guidance_scale != 1.0 and scoring.image_logprob == "guided"

    def _canvas_row(self, row: LearnerRow, *, guided: bool) -> CanvasRow:
        num_cells = len(cells_of(row.prompt_ids, self.prompts.ids.mask))
        if row.unmask_step is None or num_cells != len(row.completion_ids):
            steps = "no reveal steps" if row.unmask_step is None else f"{len(row.unmask_step)} reveal steps"
            raise ValueError(
                f"score: expected a token and a reveal step for each of the {num_cells} cells of the canvas; got "
                f"{len(row.completion_ids)} tokens and {steps}; take prompt_ids, completion_ids and unmask_step from "
                "one trajectory of this family"
            )
        return CanvasRow(
            canvas=row.prompt_ids,
            null=self.null_canvas(row.prompt_ids) if guided else None,
            values=row.completion_ids,
            steps=row.unmask_step,
            counts=row.loss_mask,
        )


def _checked_weights(path: Path) -> tuple[LladaConfig, StoredTensors, dict[str, tuple[int, ...]]]:
    """Configuration, stored tensors and the shapes that they were found to have, from headers alone.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: another family, or weights that do not fit config.json.
    """
    llada, stored = LladaConfig.from_dict(_own_config(path)), stored_tensors(path)
    with torch.device("meta"):
        empty = LladaForDiffusion(copy.deepcopy(llada))
    shapes = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    if llada.weight_tying:
        del shapes[HEAD]
    stored.check(shapes)
    return llada, stored, shapes


def _own_config(path: Path) -> dict[str, Any]:
    """config.json of the folder, after it was found to be this family's."""
    raw = read_json(path / "config.json")
    if raw.get("model_type") not in ("llada", None) or "d_model" not in raw:
        raise ValueError(
            f"{path}: expected an LLaDA config.json, with d_model, for model.family lumina_dimoo; got model_type "
            f"{raw.get('model_type')!r}; set model.family to its family, or point model.path elsewhere"
        )
    return raw


load = LuminaDimoo.load


def load_prompts(config: ModelConfig, path: Path) -> LuminaPrompts:
    """The canvases alone, after the weights were found to fit, from their headers; see `LuminaPrompts.load`."""
    _own_config(path)
    prompts = LuminaPrompts.load(path, config.system_prompt)
    _checked_weights(path)
    LuminaVq(path, prompts.sizes)
    return prompts
