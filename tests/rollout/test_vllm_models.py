"""Interleaved replies of the other families, each against the plain sampler and one teacher-forced pass."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Emu3ForCausalLM, Emu3TextConfig, GemmaConfig, GemmaForCausalLM

from tests.janus_checkpoints import write_janus
from tests.rollout.conftest import publication
from tests.rollout.interleaved import gaps, images, tokens
from unirl.config import ModelConfig
from unirl.models.interleaved import ChatLayout, ImageMarkup
from unirl.models.janus_pro import JanusPro
from unirl.models.joint_policy import JointFamily, JointPolicy
from unirl.rollout.interleaved_engine import InterleavedEngine
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest
from unirl.rollout.interleaved_torch import InterleavedTorch
from unirl.rollout.vllm_models import emu3, janus_pro, liquid
from unirl.rollout.vllm_models.joint import JointLlama
from unirl.rollout.vllm_process import EngineSettings
from unirl.types import TokenSequence

SETTINGS = EngineSettings(max_model_len=128, max_num_seqs=16, kv_cache_memory_gib=0.0625)
SAMPLING = InterleavedSampling(max_tokens=48, grid=(2, 3))
GREEDY = replace(SAMPLING, text=Drawing(temperature=0), image=Drawing(temperature=0))


@pytest.fixture(scope="module", params=["emu3", "liquid tied", "liquid"])
def case(request, chat_layout, tmp_path_factory):
    """Settings, folder, and how a policy of the family is loaded."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 256, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    if request.param == "emu3":
        config: Any = Emu3TextConfig(**sizes, num_key_value_heads=1, attention_dropout=0.0)
        module, name = Emu3ForCausalLM, "emu3"
        image = ImageMarkup(
            begin=40, end=41, geometry=lambda rows, columns: (rows, 9, columns, 42), row_end=43, before_end=(44,)
        )  # fmt: skip
    else:
        tied = request.param == "liquid tied"
        config = GemmaConfig(**sizes, num_key_value_heads=2, head_dim=256, tie_word_embeddings=tied)
        module, name = GemmaForCausalLM, "liquid"
        image = ImageMarkup(begin=40, end=41)
    folder = tmp_path_factory.mktemp(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = module(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    layout = chat_layout(image, size=64, codes=range(48, 60), words=range(1, 16), end=1)
    family = JointFamily(
        module=module,
        read_config=lambda path: type(config).from_dict(config.to_dict()),
        load_layout=lambda settings, path: layout,
    )

    def load(settings, path, **how):
        return JointPolicy.load(family, settings, path, **how)

    return ModelConfig(family=name), folder, load


@pytest.fixture(scope="module")
def policy(case):
    settings, folder, load = case
    return load(settings, folder)


@pytest.fixture(scope="module")
def engine(case):
    settings, folder, load = case
    with pytest.MonkeyPatch.context() as patch:
        for file in (emu3, liquid):
            patch.setattr(file, "load_front", lambda model, path: load(model, path, weights=False))
        return InterleavedEngine(settings, folder, SETTINGS)


def request_of(index, ids, seeds=3, pixels=(), **more):
    ids = np.array(ids, np.int32)
    prompt = TokenSequence(
        id=str(index), ids=ids, kinds=np.zeros(len(ids), np.uint8), in_loss=np.zeros(len(ids), np.bool_), pixels=pixels
    )
    own = tuple(range(10 * index, 10 * index + seeds))
    return InterleavedRequest(request_id=str(index), prompt=prompt, seeds=own, **more)


def assert_sampled_as_the_policy_would(engine, policy, requests, sampling, report, name):
    plain = InterleavedTorch(policy, SETTINGS.max_model_len)
    for settings in (sampling, replace(sampling, text=Drawing(temperature=0), image=Drawing(temperature=0))):
        assert tokens(engine.generate(requests, settings)) == tokens(plain.generate(requests, settings))
    replies = engine.generate(requests, sampling)
    assert all(reply.well_formed for reply in replies)
    assert sum(len(images(reply)) for reply in replies) > 3
    shown = {request.request_id: request.prompt.pixels for request in requests}
    pixels = tuple(picture for reply in replies for picture in shown[reply.request_id])
    text, image = gaps(policy, replies, sampling, pixels)
    report(f"max |engine - learner| log-prob of {name}'s interleaved replies: text {text:.2g}, codes {image:.2g} nats")
    assert max(text, image) <= 1e-5


def test_replies_are_those_of_the_policy(engine, policy, report):
    requests = [request_of(n, [3, 4, 5, 6, 7, 8][: n + 1], begin_with_image=n % 2 == 1) for n in range(6)]
    assert_sampled_as_the_policy_would(engine, policy, requests, SAMPLING, report, type(policy.module).__name__)


def test_new_weights_reach_the_engine(engine, case, policy):
    settings, folder, load = case
    moved, requests = load(settings, folder), [request_of(0, [3, 4, 5])]
    with torch.no_grad():
        for parameter in moved.module.parameters():
            parameter *= 1.3
    before = tokens(engine.generate(requests, SAMPLING))
    engine.load_weights(*publication(moved, moved.module.state_dict(), 1))
    after = tokens(engine.generate(requests, SAMPLING))
    engine.load_weights(*publication(policy, policy.module.state_dict(), 0))
    assert after == tokens(InterleavedTorch(moved, SETTINGS.max_model_len).generate(requests, SAMPLING)) != before
    assert tokens(engine.generate(requests, SAMPLING)) == before


def test_both_public_namings_of_a_llama_are_read():
    names = JointLlama.checkpoint_names
    for stored in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert names.map_name(stored) == stored
        native = stored.replace("model.", "model.text_model.", 1)
        assert names.map_name(native) == names.map_name(f"text_model.{stored}") == stored
    assert names.map_name("model.vqmodel.encoder.conv_in.weight") is None


@dataclass
class Conversing:
    """Janus-Pro as a policy of conversations, from what it offers to its own samplers."""

    janus: JanusPro
    layout: ChatLayout

    def __getattr__(self, name):
        return getattr(self.janus, name)

    def hidden_states_of(self, row):
        left, states = list(row.pixels), []
        for ids in row.ids.split(row.lengths):
            count = int((ids == self.layout.placeholder).sum()) // self.janus.num_image_tokens
            embedded = janus_pro.embed_prompt(self.janus, ids.int().numpy(), [left.pop(0) for _ in range(count)])
            states.append(self.janus.hidden_states(embedded[None], torch.ones(1, len(ids)).long())[0])
        return torch.cat(states)

    def logits(self, hidden, part):
        return torch.cat([self.janus.text_logits(hidden), self.janus.code_logits(hidden)], dim=-1)


@pytest.fixture(scope="module")
def janus(chat_layout, tmp_path_factory):
    """A policy of conversations and an engine; codes come behind 64 text ids."""
    folder, settings = write_janus(tmp_path_factory.mktemp("janus") / "small"), ModelConfig(family="janus_pro")
    policy = JanusPro.load(settings, folder)
    ids = policy.prompts.ids
    layout = chat_layout(
        ImageMarkup(begin=ids.boi, end=ids.eoi), size=112, codes=range(64, 112), words=range(8, 30), end=ids.eos,
        placeholders=(ids.boi, *[ids.placeholder] * policy.num_image_tokens, ids.eoi), placeholder=ids.placeholder,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        load = janus_pro.load_front
        patch.setattr(janus_pro, "load_front", lambda model, path: Conversing(load(model, path), layout))
        engine = InterleavedEngine(settings, folder, SETTINGS)
    return Conversing(policy, layout), engine


@pytest.mark.parametrize("shows", [True, False], ids=["with a picture", "words alone"])
def test_janus_sees_pixels_and_draws_codes(janus, report, shows):
    policy, engine = janus
    layout, picture = policy.layout, np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    seen = layout.placeholders if shows else ()
    drawn = [layout.image.begin, *range(70, 86), layout.image.end]
    prompts = [[0, 12, *seen, 13], [0, *seen, *drawn, 9], [0, 14, *seen]]
    requests = [
        request_of(n, prompt, pixels=(picture,) * shows, begin_with_image=n == 2) for n, prompt in enumerate(prompts)
    ]
    sampling = replace(SAMPLING, grid=(4, 4), max_tokens=60)
    assert_sampled_as_the_policy_would(engine, policy, requests, sampling, report, "Janus-Pro")


def test_a_picture_without_its_placeholders_is_refused(janus):
    _, engine = janus
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="prompt: expected 16 image placeholders for 1 images; got 0"):
        engine.generate([request_of(0, [0, 12], pixels=(picture,))], replace(SAMPLING, grid=(4, 4)))
