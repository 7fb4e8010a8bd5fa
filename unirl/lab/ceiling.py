"""What a lab checkpoint knows of its clean self, and what a reader must know to read lab numbers right."""

import json
from pathlib import Path

NOTES = (
    "The base model was trained with wrong captions and wrong answers on purpose. The ceiling is what the same weights "
    "reached before that, sampled at temperature 1.",
    "Understanding is mostly sharpening: training removes label noise, it adds little visual skill; compare the "
    "sampled column with the greedy one. Generation learns from the verifier and can pass the ceiling.",
    "Held-out prompts repeat: 480 prompts hold about a hundred distinct captions, so for generation trust the interval "
    "by prompt.",
)


def clean_ceiling(checkpoint: Path, guidance_scale: float) -> dict[str, float]:
    """Held-out means before the noise phase, by measure name; empty where the checkpoint does not tell.

    Args:
        checkpoint: a folder; only those of `unirl lab pretrain` hold lab.json.
        guidance_scale: of the evaluation; generation is told for the scales that pre-training measured.
    """
    file = checkpoint / "lab.json"
    if not file.is_file():
        return {}
    clean = json.loads(file.read_text(encoding="utf-8"))["measured"]["clean"]
    suffix = f"_sampled_guidance_{guidance_scale:g}"
    names = {
        "understanding/sampled/accuracy": "understanding_sampled",
        "generation/sampled/lab_verifier/exact": f"exact{suffix}",
        "generation/sampled/lab_verifier/partial": f"partial{suffix}",
    }
    return {measure: clean[name] for measure, name in names.items() if name in clean}
