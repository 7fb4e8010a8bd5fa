"""A contact sheet of what a checkpoint draws and answers on held-out scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unirl.config import Family
from unirl.lab.exam import make_exam
from unirl.lab.lab_model import SamplingPlan
from unirl.lab.tokenizer import answered_letter
from unirl.lab.verifier import verify
from unirl.lab.world import IMAGE_PX, caption, question_with_choices
from unirl.models.checkpoint import read_json

_FAMILIES: dict[str, Family] = {"janus": "janus_pro", "llada": "lumina_dimoo", "chameleon": "anole"}
"""By model_type in config.json."""
_ZOOM = 8
_COLUMNS = 4
_MARGIN_PX = 16
_FONT_PX = 13
_LINE_PX = 17
_CELL_WIDTH_PX = 336
_CELL_HEIGHT_PX = IMAGE_PX * _ZOOM + 4 * _LINE_PX + 8
_GOOD, _BAD = "#1b7a45", "#b3261e"
_LEGEND = (
    ("Each cell is a held-out scene. Lines below it: prompt; question; choices; reasoning -> answer.", "black"),
    ("Large picture: what the model drew for the prompt. Small picture: the true scene, asked about.", "black"),
    ("+ and green: the verifier finds the drawing exact; the answer names the right letter.", _GOOD),
    ("- and red: it does not.", _BAD),
)
"""Lines above the cells, with their colours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One prompt with its picture's verdict, and one question with the answer written about the true picture."""

    category: str
    prompt: str
    exact: bool
    partial: float
    question: str
    answer: str
    right: bool


def show(checkpoint: Path, out_dir: Path, n: int = 12, seed: int = 0, guidance: float = 1.0) -> list[Shown]:
    """Draw and answer `n` held-out scenes and write `out_dir`/lab.png; returns what is on it.

    The drawings are enlarged 8 times without smoothing; the legend at the top says how to read them.

    Raises:
        ValueError: the checkpoint is not the lab's.
    """
    family = _FAMILIES.get(read_json(checkpoint / "config.json").get("model_type", ""))
    if family is None:
        raise ValueError(
            f"{checkpoint}: expected a checkpoint of {', '.join(_FAMILIES)}; got another; correct the path"
        )
    model, exam = import_module(f"unirl.lab.{family}_student").load_model(checkpoint), make_exam(n, seed)
    plan = SamplingPlan(seed=seed, guidance=guidance)
    images = model.draw([caption(scene.spec) for scene in exam.scenes], plan)
    answers = model.answer(exam.images, exam.questions, plan)
    shown = []
    for scene, question, image, answer in zip(exam.scenes, exam.questions, images, answers, strict=True):
        verdict = verify(scene.spec, image)
        shown.append(
            Shown(
                category=scene.spec.category,
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
    """Below the legend, per scene: the drawing, and beside it the picture that was asked about; then their texts."""
    rows, head = -(-len(shown) // _COLUMNS), len(_LEGEND) * _LINE_PX + 2 * _MARGIN_PX
    size = (_COLUMNS * (_CELL_WIDTH_PX + _MARGIN_PX) + _MARGIN_PX, rows * (_CELL_HEIGHT_PX + _MARGIN_PX) + head)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    def write(left: int, top: int, lines: Sequence[tuple[str, str]]) -> None:
        for number, (words, color) in enumerate(lines):
            pen.text((left, top + number * _LINE_PX), words, fill=color, font_size=_FONT_PX)

    write(_MARGIN_PX, _MARGIN_PX, _LEGEND)
    for index, record in enumerate(shown):
        left = _MARGIN_PX + index % _COLUMNS * (_CELL_WIDTH_PX + _MARGIN_PX)
        top = head + index // _COLUMNS * (_CELL_HEIGHT_PX + _MARGIN_PX)
        big = IMAGE_PX * _ZOOM
        for image, side, x in ((drawn[index], big, left), (asked[index], big // 2, left + big + _MARGIN_PX)):
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, top))
        thought = record.answer.replace("<think> ", "").split(" </think>")[0]
        words = f"{thought} -> {answered_letter(record.answer) or 'no letter'}"
        question, choices = ((half, "black") for half in _halves(record.question))
        lines = (_judged(record.prompt, record.exact), question, choices, _judged(words, record.right))
        write(left, top + big + 4, lines)
    return sheet


def _judged(words: str, good: bool) -> tuple[str, str]:
    return f"{'+' if good else '-'} {words}", _GOOD if good else _BAD


def _halves(question: str) -> tuple[str, str]:
    text, mark, choices = question.partition("?")
    return text + mark, choices.strip()
