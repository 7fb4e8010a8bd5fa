"""Picture features for pairing, computed from pixels: what is shown, and roughly where.

Plain colour-shape histograms make every scene of one content identical. With positions the similarities of retrieved
pairs spread, so that thresholds and similarity weights have something to act on.
"""

import numpy as np
from numpy.typing import NDArray

from unirl.lab.verifier import Detection, detect
from unirl.lab.world import COLORS, IMAGE_PX, SHAPES

_BINS = 3
_SHAPES = (*SHAPES, None)
NUM_FEATURES = len(COLORS) * len(_SHAPES) * (1 + _BINS**2) + len(COLORS) + len(_SHAPES) + _BINS**2 + 1
_WEIGHTS = {"kind": 1.0, "color": 0.5, "shape": 0.5, "kind_at": 1.0, "any_at": 0.5}


def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Lab images uint8 [N, 20, 20, 3] -> unit vectors float32 [N, 219].

    A picture without a single object points along the last axis, away from all others.

    Raises:
        ValueError: the images have another dtype or shape.
    """
    features = np.array([_features(detect(image)) for image in images]).reshape(len(images), NUM_FEATURES)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def _features(detection: Detection) -> NDArray[np.float64]:
    counts = np.zeros((len(COLORS), len(_SHAPES), _BINS, _BINS))
    for found in detection.objects:
        x, y = (int(c * _BINS / IMAGE_PX) for c in found.centre)
        counts[COLORS.index(found.color), _SHAPES.index(found.shape), y, x] += 1
    parts = {
        "kind": counts.sum((2, 3)),
        "color": counts.sum((1, 2, 3)),
        "shape": counts.sum((0, 2, 3)),
        "kind_at": counts,
        "any_at": counts.sum((0, 1)),
    }
    vector = np.concatenate([_WEIGHTS[name] * part.ravel() for name, part in parts.items()])
    return np.append(vector, 0.0 if detection.objects else 1.0)
