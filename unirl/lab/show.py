"""A contact sheet of what a checkpoint draws and answers on held-out scenes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unirl.lab.exam import make_exam
from unirl.lab.plain_sampling import SamplingPlan, encode, sample_answers, sample_codes
from unirl.lab.tiny_janus import decode_codes, load_model, to_pixels
from unirl.lab.tokenizer import answered_letter, generation_prompt, understanding_prompt
from unirl.lab.verifier import verify
from unirl.lab.world import IMAGE_PX, caption, question_with_choices

_ZOOM = 8
_COLUMNS = 4
_MARGIN_PX = 12
_CELL_WIDTH_PX = 300
_CELL_HEIGHT_PX = IMAGE_PX * _ZOOM + 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One prompt with its picture's verdict, and one question with the answer written about the true picture."""

    prompt: str
    exact: bool
    partial: float
    question: str
    answer: str
    right: bool


def show(checkpoint: Path, out_dir: Path, n: int = 12, seed: int = 0, guidance: float = 1.0) -> list[Shown]:
    """Draw and answer `n` held-out scenes and write `out_dir`/lab.png; returns what is on it.

    The drawings are enlarged 8 times without smoothing. Each caption line starts with + where the verifier agrees.

    Raises:
        ValueError: the checkpoint is not the lab's.
    """
    model, exam = load_model(checkpoint), make_exam(n, seed)
    plan = SamplingPlan(seed=seed, guidance=guidance)
    prompts = [caption(scene.spec) for scene in exam.scenes]
    codes = sample_codes(model, encode([generation_prompt(p) for p in prompts], prompts=True), plan)
    images = decode_codes(model, codes)
    questions = encode([understanding_prompt(q.text, q.choices) for q in exam.questions], prompts=True)
    answers = sample_answers(model, questions, to_pixels(exam.images), plan)
    shown = []
    for scene, question, image, answer in zip(exam.scenes, exam.questions, images, answers, strict=True):
        verdict = verify(scene.spec, image)
        shown.append(
            Shown(
                prompt=caption(scene.spec),
                exact=verdict.exact,
                partial=verdict.partial,
                question=question_with_choices(question.text, question.choices),
                answer=answer,
                right=answered_letter(answer) == question.letter,
            )
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    _sheet(shown, images, exam.images).save(out_dir / "lab.png")
    return shown


def _sheet(shown: list[Shown], drawn: np.ndarray, asked: np.ndarray) -> Image.Image:
    """Per scene: the drawing, and beside it the picture that was asked about; their texts below."""
    rows = -(-len(shown) // _COLUMNS)
    size = (_COLUMNS * (_CELL_WIDTH_PX + _MARGIN_PX) + _MARGIN_PX, rows * (_CELL_HEIGHT_PX + _MARGIN_PX) + _MARGIN_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, record in enumerate(shown):
        left = _MARGIN_PX + index % _COLUMNS * (_CELL_WIDTH_PX + _MARGIN_PX)
        top = _MARGIN_PX + index // _COLUMNS * (_CELL_HEIGHT_PX + _MARGIN_PX)
        big = IMAGE_PX * _ZOOM
        for image, side, x in ((drawn[index], big, left), (asked[index], big // 2, left + big + _MARGIN_PX)):
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, top))
        words = record.answer.replace("<think> ", "").split(" </think>")[0]
        lines = (f"{'+' if record.exact else '-'} {record.prompt}", *_halves(record.question))
        lines += (f"{'+' if record.right else '-'} {words}",)
        pen.multiline_text((left, top + big + 2), "\n".join(lines), fill="black", font_size=11, spacing=2)
    return sheet


def _halves(question: str) -> tuple[str, str]:
    text, mark, choices = question.partition("?")
    return text + mark, choices.strip()
