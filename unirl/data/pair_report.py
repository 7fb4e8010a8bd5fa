"""A pair set in figures and pictures: one HTML page that needs nothing else."""

import base64
import html
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from unirl.data.pair_store import PairSet
from unirl.data.records import encode_png
from unirl.types import PairKind, PairRecord, UnderstandingSample

NUM_EXAMPLES = 12
_BINS = np.linspace(0.0, 1.0, 41)
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
padding: 0 1rem } table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
svg { display: block; max-width: 44rem } rect { fill: #4477aa } text { font-size: 11px; fill: currentColor }
.pair { display: grid; grid-template-columns: 9rem 1fr 9rem 1fr; gap: .8rem; margin: 1rem 0 }
.pair img { width: 9rem; image-rendering: pixelated }
@media (max-width: 40rem) { .pair { grid-template-columns: 9rem 1fr } }
"""


def summary(pair_set: PairSet) -> dict[str, Any]:
    """The figures of a pair set as JSON values: counts by kind, origin, category, rejection; quantiles of s and w."""
    retrieved = [place for place, pair in enumerate(pair_set.pairs) if pair.kind == "retrieved"]
    aligned = [pair for pair in pair_set.pairs if pair.kind == "aligned"]
    return {
        "pairs": len(pair_set.pairs),
        "kinds": _counts(pair.kind for pair in pair_set.pairs),
        "aligned_from": _counts(
            "understanding" if pair.generation.id == f"{pair.understanding.id}/prompt" else "generation"
            for pair in aligned
        ),
        "categories": {
            kind: {
                "understanding": _counts(p.understanding.category for p in pair_set.pairs if p.kind == kind),
                "generation": _counts(p.generation.class_name for p in pair_set.pairs if p.kind == kind),
            }
            for kind in get_args(PairKind)
        },
        "similarity_of_retrieved": _quantiles([pair_set.pairs[place].similarity for place in retrieved]),
        "weight_of_retrieved": _quantiles([pair_set.weights[place] for place in retrieved]),
        "rejected": _counts(record.stage for record in pair_set.rejected),
        "settings": pair_set.settings,
    }


def render_report(pair_set: PairSet, *, title: str, num_examples: int = NUM_EXAMPLES) -> str:
    """One HTML page: figures, histograms of s and w, and examples of both kinds, retrieved ones from best to worst."""
    retrieved = sorted((p for p in pair_set.pairs if p.kind == "retrieved"), key=lambda p: (-p.similarity, p.pair_id))
    aligned = [pair for pair in pair_set.pairs if pair.kind == "aligned"]
    weight = dict(zip((pair.pair_id for pair in pair_set.pairs), pair_set.weights, strict=True))
    figures = summary(pair_set)
    parts = [
        f"<h1>Pair set {html.escape(title)}</h1>",
        _table({"pairs": figures["pairs"]} | figures["kinds"]),
        "<h2>Aligned pairs made from</h2>",
        _table(figures["aligned_from"]),
        "<h2>Similarity s of retrieved pairs</h2>",
        _histogram([pair.similarity for pair in retrieved], "similarity s"),
        "<p>Quantiles:</p>",
        _table(figures["similarity_of_retrieved"]),
        "<h2>Weight w of retrieved pairs</h2>",
        _histogram([weight[pair.pair_id] for pair in retrieved], "weight w"),
        "<p>Quantiles:</p>",
        _table(figures["weight_of_retrieved"]),
        "<h2>Categories</h2>",
        _category_table(figures["categories"]),
        "<h2>Left out</h2>",
        _table(figures["rejected"]),
        "<h2>Retrieved pairs, from the most to the least similar</h2>",
        *(_example(pair, weight[pair.pair_id]) for pair in _spread(retrieved, num_examples)),
        "<h2>Aligned pairs</h2>",
        *(_example(pair, weight[pair.pair_id]) for pair in aligned[:num_examples]),
        "<h2>Settings</h2>",
        _table(figures["settings"]),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f'{head}<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>{"".join(parts)}</html>'


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(value or "none" for value in values).items()))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{q:.0%}": round(float(v), 4) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)}


def _spread(pairs: Sequence[PairRecord], count: int) -> list[PairRecord]:
    places = np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)) if pairs else []
    return [pairs[place] for place in places]


def _table(rows: dict[str, Any]) -> str:
    body = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{body}</table>" if body else "<p>none</p>"


def _category_table(categories: dict[str, dict[str, dict[str, int]]]) -> str:
    columns = {f"{kind}, {side}": counts for kind, sides in categories.items() for side, counts in sides.items()}
    names = sorted({name for counts in columns.values() for name in counts})
    head = "".join(f"<th>{column}</th>" for column in ("", *columns))
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{c.get(name, 0)}</td>' for c in columns.values())}</tr>"
        for name in names
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _histogram(values: Sequence[float], name: str) -> str:
    counts, _ = np.histogram(np.clip(values, 0.0, 1.0), _BINS)
    top = max(1, int(counts.max()))
    bars = "".join(
        f'<rect x="{50 + 10 * place}" y="{110 - 100 * count / top:.1f}" width="9" height="{100 * count / top:.1f}">'
        f"<title>{_BINS[place]:.3f} to {_BINS[place + 1]:.3f}: {count}</title></rect>"
        for place, count in enumerate(counts.tolist())
    )
    across = [(f"{x:.1f}", 50 + x * 400, 124, "middle") for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    up = [(str(count), 44, 114 - 100 * count / top, "end") for count in sorted({0, top // 2, top})]
    texts = "".join(
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{word}</text>'
        for word, x, y, anchor in (*across, *up, (name, 250, 140, "middle"))
    )
    return (
        f'<svg viewBox="0 0 462 146" role="img" aria-label="histogram of {name}, {len(values)} pairs">{bars}{texts}'
        '<line x1="50" x2="450" y1="110.5" y2="110.5" stroke="currentColor"/>'
        '<text transform="rotate(-90)" x="-60" y="12" text-anchor="middle">number of pairs</text></svg>'
    )


def _example(pair: PairRecord, weight: float) -> str:
    generation, image = pair.generation, pair.generation.image
    return (
        f'<div class="pair">{_picture(pair.understanding.image)}<div>{_question(pair.understanding)}</div>'
        f"{_picture(image) if image is not None else ''}"
        f"<div><b>{html.escape(generation.prompt)}</b><br>{html.escape(generation.class_name)}<br>"
        f"{pair.pair_id}, {pair.kind}<br>s {pair.similarity:.3f}, w {weight:.3f}</div></div>"
    )


def _question(sample: UnderstandingSample) -> str:
    choices = "".join(
        f"<br>{'<b>' if chr(65 + i) == sample.answer else ''}{chr(65 + i)} {html.escape(choice)}"
        f"{'</b>' if chr(65 + i) == sample.answer else ''}"
        for i, choice in enumerate(sample.choices)
    )
    answer = "" if sample.choices else f"<br><b>{html.escape(sample.answer)}</b>"
    return f"<b>{html.escape(sample.question)}</b>{choices}{answer}"


def _picture(image: NDArray[np.uint8]) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}">'
