"""The memory plan of the paper's recipes, on checkpoints that have the published shapes and no contents."""

import json
import math
import re
import struct

import pytest
from transformers import JanusConfig

from tests.janus_checkpoints import write_janus
from unirl import cli
from unirl.cluster.plan import count_parameters
from unirl.models.janus_pro import _weight_shapes

SIZES = {"1b": (2048, 5632, 24, 16), "7b": (4096, 11008, 30, 32)}
"""Width, width of the MLP, layers and heads."""


def write_hollow(folder, size):
    """A folder with real tokenizer files, config.json in the published sizes, and a sparse file of its weights."""
    write_janus(folder, size.upper())
    config = JanusConfig.from_pretrained(folder)
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = SIZES[size]
    text.num_key_value_heads, text.head_dim = text.num_attention_heads, 128
    vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.mlp_ratio = 1024, 24, 16, 4.0
    vision.image_size, vision.patch_size, vision.num_image_tokens = 384, 16, 576
    vq.num_embeddings, vq.latent_channels, vq.base_channels = 16384, 256, 128
    vq.channel_multiplier = [1, 1, 2, 2, 4]
    vision.projection_dim = vq.projection_dim = vq.image_token_embed_dim = text.hidden_size
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, shape in _weight_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def plan_of(folder, size, capsys, *more):
    """Exit code of the recipe's dry run, and what lies on each card as it says."""
    (folder / "hpsv2.pt").touch()
    checkpoint = write_hollow(folder / "checkpoint", size)
    words = [
        "train", "-c", f"configs/rl/janus_pro_{size}.yaml", "--dry-run", f"model.path={checkpoint}", "data.pairs=later",
        f"rewards.generation.hpsv2.options.checkpoint={folder / 'hpsv2.pt'}", "cluster.address=elsewhere", *more,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    shown = capsys.readouterr().out
    return ended.value.code, shown, re.findall(r"^ +(\d+) x +([\d.]+) GiB  (fits|DOES NOT FIT) +(.+)$", shown, re.M)


@pytest.mark.parametrize(
    ("size", "num_parameters", "learners", "workers", "others"),
    [("1b", 2.08e9, ("2", "37.8"), ("4", "28.7"), "28.7"), ("7b", 7.41e9, ("4", "47.0"), ("2", "38.6"), "38.6")],
)
def test_a_recipe_fits_eight_cards_of_80_gb(tmp_path, capsys, size, num_parameters, learners, workers, others):
    code, shown, cards = plan_of(tmp_path, size, capsys)
    assert count_parameters(tmp_path / "checkpoint") == pytest.approx(num_parameters, rel=2e-3)
    assert code == 0
    assert cards == [
        (*learners, "fits", f"learner {learners[1]}"),
        ("1", others, "fits", f"rollout.text {others}"),
        (*workers, "fits", f"rollout.image {workers[1]}"),
        ("1", "4.5", "fits", "reward.hpsv2 4.5"),
    ]
    assert sum(int(count) for count, *_ in cards) == 8
    assert "7.5 GPUs" in shown


def test_what_shares_a_card_and_is_too_much_is_named(tmp_path, capsys):
    """One rank holds 18 bytes a weight; workers on its card make it worse."""
    shared = ("cluster.placement=colocated", "learner.num_ranks=2", "learner.num_gpus=0.5", "rollout.text.num_gpus=0.5")
    code, shown, cards = plan_of(tmp_path, "7b", capsys, *shared, "rollout.image.num_gpus=0.5")
    assert code == 2
    assert [verdict for _, _, verdict, _ in cards] == ["DOES NOT FIT", "DOES NOT FIT", "fits"]
    assert "does not fit: learner + rollout.text + rollout.image: " in shown
    assert "GiB on a GPU of 80 GB" in shown
