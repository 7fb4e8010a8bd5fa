import numpy as np
import pytest

from unirl.pairing.unit_rows import require_unit_rows


def test_unit_rows_within_rounding_pass():
    rows = np.random.default_rng(0).normal(size=(50, 2048))
    require_unit_rows((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), "features")


@pytest.mark.parametrize("bad", [0.0, 2.0, float("nan"), float("inf")])
def test_a_row_of_another_length_is_an_error_with_its_number(bad):
    rows = np.eye(4, dtype=np.float32)
    rows[2, 2] = bad
    with pytest.raises(ValueError, match=r"gen_features .* in row 2 \(1 rows"):
        require_unit_rows(rows, "gen_features")


def test_another_dtype_is_an_error():
    with pytest.raises(ValueError, match="float32, got float64"):
        require_unit_rows(np.eye(3), "features")
