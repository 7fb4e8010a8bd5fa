"""Conversations, and the families that write them, for tests of every family alike."""

import numpy as np
import torch

from tests.janus_checkpoints import write_janus
from tests.joint_checkpoints import write_anole, write_emu3, write_liquid
from unirl.config import ModelConfig
from unirl.models.interleaved import PackedRow
from unirl.types import Segment, Turn

# Name of the case -> family, how its checkpoint is written. Heads of a size that the engine's kernels take on a CPU;
# Liquid's own is 256.
CASES = {
    "anole": ("anole", write_anole, {}),
    "emu3": ("emu3", write_emu3, {"head_dim": 32}),
    "emu3 native": ("emu3", write_emu3, {"head_dim": 32, "native": True}),
    "liquid": ("liquid", write_liquid, {"head_dim": 256}),
    "liquid tied": ("liquid", write_liquid, {"head_dim": 32, "tied": True}),
    "janus_pro": ("janus_pro", write_janus, {}),
}
ONE_EACH = ["anole", "emu3", "liquid", "janus_pro"]


def written(folder, case):
    """Settings and folder of a case's checkpoint."""
    _, write, options = CASES[case]
    return config_of(case), write(folder, **options)


def config_of(case):
    """Settings of a case; nothing is frozen."""
    return ModelConfig(family=CASES[case][0], frozen=())


def say(role, *parts, in_loss=None):
    """A turn of strings and pictures; what the assistant says is to be learned."""
    learned = role == "assistant" if in_loss is None else in_loss
    segments = [
        Segment(text=part, in_loss=learned) if isinstance(part, str) else Segment(image=part, in_loss=learned)
        for part in parts
    ]
    return Turn(role=role, segments=tuple(segments))


def picture(seed=0, size=(6, 9)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def codes_of(layout, turns, seed=0, grid=(2, 3)):
    """Random codes of the images that need them."""
    rng = np.random.default_rng(seed)
    shape = grid if layout.placeholder is None else (4, 4)
    return [rng.integers(0, layout.vocabulary.num_codes, shape).astype(np.int32) for _ in layout.images_to_code(turns)]


def dialogues(layout):
    """Sequences of several lengths: words alone, images drawn, shown, and drawn twice."""
    made = [
        (say("user", "what is a red ?"), say("assistant", "a red")),
        (say("user", "a green red"), say("assistant", ": a", picture(1), "is red ?")),
        (
            *(say("user", picture(2), "what is ?"), say("assistant", "red")),
            *(say("user", "a red : green"), say("assistant", picture(3))),
        ),
        (say("user", "a", picture(4), picture(5)), say("assistant", picture(6), picture(7), "green ?")),
    ]
    return [
        layout.encode(turns, codes_of(layout, turns, seed), id=str(seed)) for seed, turns in enumerate(made, start=1)
    ]


def pack(sequences):
    return PackedRow(
        ids=torch.from_numpy(np.concatenate([sequence.ids for sequence in sequences])).long(),
        lengths=tuple(len(sequence.ids) for sequence in sequences),
        pixels=tuple(image for sequence in sequences for image in sequence.pixels),
    )


def targets_of(sequences):
    """Places in the packed row that predict something to be learned, and the ids that follow them."""
    places, ids, start = [], [], 0
    for sequence in sequences:
        learned = np.flatnonzero(sequence.in_loss[1:])
        places += (start + learned).tolist()
        ids += sequence.ids[1:][learned].tolist()
        start += len(sequence.ids)
    return torch.tensor(places), torch.tensor(ids)
