"""The condition that every feature matrix must meet before it is paired."""

import numpy as np
from jaxtyping import Shaped

NORM_TOLERANCE = 1e-3


def require_unit_rows(features: Shaped[np.ndarray, "N D"], name: str) -> None:
    """Refuse what is not a float32 matrix of finite, L2-normalised rows.

    Raises:
        ValueError: wrong dtype, a value that is not finite, or a row whose norm is off 1 by more than 1e-3; the
            message names the row.
    """
    if features.dtype != np.float32:
        raise ValueError(f"expected {name} in float32, got {features.dtype}: convert with .astype(numpy.float32).")
    norms = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"expected {name} with rows of length 1, got length {norms[row]:.6g} in row {row} ({int(bad.sum())} rows "
            "in all): L2-normalise the features and drop images that could not be embedded."
        )
