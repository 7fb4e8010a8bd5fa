import hashlib

import numpy as np
import pytest
import torch
from blake3 import blake3

from unirl.models.named_arrays import checksum, to_array, to_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_tensors_survive_the_journey(dtype):
    tensor = torch.randn(3, 4).mul(100).to(dtype)
    array = to_array(tensor)
    array.flags.writeable = False
    assert array.shape == (3, 4)
    assert torch.equal(to_tensor(array), tensor)


def test_checksum_is_over_names_and_bytes_in_order():
    named = [("a", np.arange(3, dtype=np.float32)), ("b", np.zeros((), np.uint16))]
    data = b"a" + named[0][1].tobytes() + b"b" + b"\0\0"
    assert checksum(named) == blake3(data).hexdigest()
    assert checksum(named, hashlib.sha256()) == hashlib.sha256(data).hexdigest()
    assert checksum(named[::-1]) != checksum(named)
