from pathlib import Path

import pytest

import unirl.lab
from unirl.lab.tiny_janus import load_model, make_model

SHIPPED = Path(unirl.lab.__file__).parent / "checkpoints" / "janus"


@pytest.fixture(scope="session")
def shipped_path():
    return SHIPPED


@pytest.fixture(scope="session")
def base():
    return load_model(SHIPPED)


@pytest.fixture(scope="session")
def random_model():
    return make_model(0)
