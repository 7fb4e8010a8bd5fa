import numpy as np
import pytest

from tests.janus_checkpoints import write_janus
from unirl.config import ModelConfig
from unirl.models.janus_pro import JanusPro
from unirl.types import GenerationSample, LearnerRow, UnderstandingSample


@pytest.fixture(scope="session")
def janus_folder(tmp_path_factory):
    return write_janus(tmp_path_factory.mktemp("janus") / "small")


@pytest.fixture
def policy(janus_folder):
    return JanusPro.load(ModelConfig(), janus_folder)


@pytest.fixture(scope="session")
def picture():
    return np.random.default_rng(0).integers(0, 255, (11, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def question(picture):
    return UnderstandingSample(
        id="q", image=picture, question="what colour is the cat ?", choices=("red", "blue"), answer="A"
    )


@pytest.fixture(scope="session")
def drawing():
    return GenerationSample(id="g", prompt="a red cat on a blue mat")


@pytest.fixture
def make_row(policy):
    """Row of a sample with random completion ids."""

    def make(sample, seed=0, length=5):
        rng = np.random.default_rng(seed)
        if isinstance(sample, UnderstandingSample):
            task, image, prompt = "understanding", sample.image, policy.prompts.encode_understanding(sample)
            ids = rng.choice(np.flatnonzero(policy.allowed_text_ids.numpy()), length)
        else:
            task, image, prompt = "generation", None, policy.prompts.encode_generation(sample)
            ids = rng.integers(0, policy.num_codes, policy.num_image_tokens)
        ones = np.ones(len(ids), bool)
        return LearnerRow(
            task=task, prompt_ids=prompt, image=image, completion_ids=ids.astype(np.int32), loss_mask=ones,
            old_logprobs=np.zeros(len(ids), np.float32), advantage=1.0,
        )  # fmt: skip

    return make
