"""Interleaved samples for people: lines for a terminal, and one HTML page that needs nothing else."""

import base64
import html
import io
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unirl.types import InterleavedSample, Segment

LARGEST_SIDE_PX = 384
SMALL_SIDE_PX = 200
"""Pictures of half this side or less are shown about so large, pixel by pixel."""
_STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
padding: 0 1rem } section { border-top: 1px solid; margin: 2rem 0 } h3 { margin: .8rem 0 .2rem; font-size: 1rem }
p { margin: .2rem 0; white-space: pre-wrap; padding-left: .6rem; border-left: 3px solid transparent }
.learned { border-color: #4477aa } img { max-width: 100% } .small { image-rendering: pixelated }
"""


def sample_lines(sample: InterleavedSample) -> Iterator[str]:
    """A sample as lines; + marks what counts in the loss. Control characters are shown, not sent to the terminal."""
    labels = ", ".join(label for label in (sample.subset, sample.source) if label)
    yield f"{_visible(sample.id)}{f' ({_visible(labels)})' if labels else ''}"
    for turn in sample.turns:
        yield f"  {turn.role}"
        for segment in turn.segments:
            mark = "+" if segment.in_loss else " "
            yield from (f"  {mark} {_visible(line)}" for line in _text(segment).splitlines() or [""])


def render_page(samples: Iterable[InterleavedSample], *, title: str, marks: bool = True) -> str:
    """One HTML page; images are shrunk to `LARGEST_SIDE_PX`.

    Args:
        samples: shown in their order.
        title: of the page.
        marks: a bar at the left marks what counts in the loss.
    """
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = "".join(_section(sample, marks) for sample in samples)
    note = "<p>A bar at the left: it counts in the loss.</p>" if marks else ""
    return (
        f'{head}<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{html.escape(title)}</h1>'
        f"{note}{body}</html>"
    )


def _section(sample: InterleavedSample, marks: bool) -> str:
    labels = " &middot; ".join(html.escape(label) for label in (sample.subset, sample.source) if label)
    turns = "".join(
        f"<h3>{turn.role}</h3>{''.join(_paragraph(segment, marks) for segment in turn.segments)}"
        for turn in sample.turns
    )
    return f"<section><h2>{html.escape(sample.id)}</h2><div>{labels}</div>{turns}</section>"


def _paragraph(segment: Segment, marks: bool) -> str:
    inner = _picture(segment.image) if segment.image is not None else html.escape(segment.text or "")
    return f"<p{' class=learned' if marks and segment.in_loss else ''}>{inner}</p>"


def _picture(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST_SIDE_PX, LARGEST_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = image.shape[:2]
    times = SMALL_SIDE_PX // max(height, width)
    small = f' class="small" width="{width * times}"' if times > 1 else ""
    return f'<img{small} alt="{width} x {height} pixels" src="data:image/png;base64,{data}">'


def _text(segment: Segment) -> str:
    if segment.image is None:
        return segment.text or ""
    return f"<image {segment.image.shape[1]} x {segment.image.shape[0]}>"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
