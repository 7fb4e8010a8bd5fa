"""Held-out pairs before and after as HTML: the question with both answers, the prompt with both images."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from unirl.evaluation.evaluate import EvaluationItem, EvaluationResult

_PIXEL_SIDE_PX = 64
"""Smaller pictures are enlarged without blur."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def side_by_side(folder: Path, before: EvaluationResult | None, after: EvaluationResult, num_pairs: int) -> str:
    """Cards of evenly spaced held-out items, one question and one prompt each, sampled as in training.

    Args:
        folder: the run directory, which holds the pictures.
        before: the first evaluation; None shows the last one alone.
        after: the last evaluation.
        num_pairs: cards.
    """
    questions, prompts = (_evenly(_sampled(after, task), num_pairs) for task in ("understanding", "generation"))
    earlier = {} if before is None else {(item.task, item.id): item for item in before.items if item.mode == "sampled"}
    cards = []
    for number in range(max(len(questions), len(prompts))):
        halves = [
            show(folder, earlier.get((item.task, item.id)), item)
            for side, show in ((questions, _answered), (prompts, _drawn))
            for item in side[number : number + 1]
        ]
        cards.append(f'<article class="pair">{"".join(halves)}</article>')
    return "".join(cards)


def image_tag(folder: Path, name: str | None, description: str) -> str:
    """The picture as a data URI, or a frame that says that it is missing; never a file outside the folder."""
    path = (folder / (name or "")).resolve()
    try:
        if name is None or not path.is_relative_to(folder.resolve()):
            raise FileNotFoundError(name)
        with Image.open(path) as picture:
            small, kind = max(picture.size) <= _PIXEL_SIDE_PX, picture.get_format_mimetype() or "image/webp"
        data = base64.b64encode(path.read_bytes()).decode()
    except (OSError, UnidentifiedImageError):
        return '<div class="missing">image missing</div>'
    pixel = ' class="pixel"' if small else ""
    return f'<img{pixel} src="data:{kind};base64,{data}" alt="{escape(description)}">'


def _sampled(result: EvaluationResult, task: str) -> list[EvaluationItem]:
    return [item for item in result.items if item.mode == "sampled" and item.task == task]


def _evenly(items: Sequence[EvaluationItem], wanted: int) -> list[EvaluationItem]:
    count = min(wanted, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _answered(folder: Path, before: EvaluationItem | None, item: EvaluationItem) -> str:
    choices = "".join(
        f"<div{' class=gold' if letter == item.gold else ''}>{letter} {escape(choice)}</div>"
        for letter, choice in zip(_LETTERS, item.choices, strict=False)
    )
    gold = choices or f"<div>right: <span class=gold>{escape(item.gold)}</span></div>"
    answers = "".join(
        f'<div class="answer">{when} {_verdict(one)}<br><code>{escape(one.text or "")}</code></div>'
        for when, one in (("before", before), ("after", item))
        if one is not None
    )
    picture = image_tag(folder, item.prompt_image, f"image of question {item.id}")
    return (
        f"<section><h3>{_heading(item)}</h3><div class=asked>{picture}"
        f"<div><div>{escape(item.prompt)}</div><div class=small>{gold}</div></div></div>{answers}</section>"
    )


def _drawn(folder: Path, before: EvaluationItem | None, item: EvaluationItem) -> str:
    pictures = "".join(
        f"<div>{image_tag(folder, one.image, f'{when}: {one.prompt}')}{when} {_verdict(one)}</div>"
        for when, one in (("before", before), ("after", item))
        if one is not None
    )
    return (
        f"<section><h3>{_heading(item)}</h3><div>{escape(item.prompt)}</div><div class=drawn>{pictures}</div></section>"
    )


def _heading(item: EvaluationItem) -> str:
    return escape(" · ".join(word for word in (item.task, item.category, item.id) if word))


def _verdict(item: EvaluationItem) -> str:
    """Right or wrong where a part of the score says so, and every number that the rewards gave."""
    if item.reward is None:
        return '<span class="wrong">could not be judged</span>'
    verdict = next((value for name, value in item.parts.items() if name.endswith(("/correct", "/exact"))), None)
    word = (
        "" if verdict is None else '<b class="right">✓ right</b>' if verdict == 1.0 else '<b class="wrong">✗ wrong</b>'
    )
    details = {name.rsplit("/", 1)[1]: value for name, value in item.parts.items() if "/" in name}
    shown = details or {"reward": item.reward}
    numbers = " · ".join(f"{name} {value:.2g}" for name, value in shown.items() if value is not None)
    return f"{word} <span class=small>{escape(numbers)}</span>"
