"""Rules between the settings of fine-tuning and of replies: each broken one is named by its key."""

import pytest

from unirl.config import GenerateConfig, RecipeConfig, RlConfig, SftConfig
from unirl.config_loading import load_config, model_settings, run_name, to_yaml
from unirl.config_rules import ConfigError

LAB = "lab: {path: 'lab:unified_visual'"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.sources={x: {path: ''}}"], "data.sources.x.path"),
        (["data.sources={" + LAB + ", count: 3, weight: 0.5}}"], "data.sources.lab.weight"),
        (["data.sources={" + LAB + ", weight: 0}}"], "data.sources.lab.weight"),
        (["data.sources={}"], "data.sources"),
        (["evaluation.sources={y: {path: ''}}"], "evaluation.sources.y.path"),
        (["learner.max_tokens_per_micro_batch=100"], "learner.max_tokens_per_micro_batch"),
        (["loss.restrict=false"], "loss.form"),
        (["loss.text_weight=0", "loss.image_weight=0"], "loss.text_weight"),
        (["model.family=anole", "model.frozen=[]"], "model.frozen"),
        (["model.family=janus_pro", "model.image_tokenizer=vq"], "model.image_tokenizer"),
        (["cluster.placement=colocated"], "cluster.placement"),
        (["monitoring.pairs_every=1"], "monitoring.pairs_every"),
        (["monitoring.images_max_mb=1"], "monitoring.images_max_mb"),
        (["learner.warmup_steps=9"], "learner.warmup_steps"),
        (["evaluation.every=9"], "evaluation.every"),
        (["model.image_pixels=[9, 4]"], "model.image_pixels"),
        (["model.family=lumina_dimoo"], "model.family"),
        (
            ["evaluation.exam=lab", "evaluation.replies={max_tokens: 9, max_model_len: 9}"],
            "evaluation.replies.max_tokens",
        ),
        (["train.name=a/b"], "train.name"),
        (["loss.rows_at_once=0"], "loss.rows_at_once"),
        (["learner.warmup_fraction=1.5"], "learner.warmup_fraction"),
    ],
)
def test_a_broken_rule_is_named_by_its_key(overrides, key):
    with pytest.raises(ConfigError) as error:
        load_config([], overrides, SftConfig)
    assert [problem.key for problem in error.value.problems] == [key]


def test_a_setting_that_would_have_no_effect_passes_where_it_has_one():
    heldout = "evaluation.sources={y: {path: talks}}"
    overrides = [
        "model.family=janus_pro",
        "model.frozen=[]",
        "learner.warmup_fraction=0",
        heldout,
        "evaluation.every=9",
    ]
    config = load_config([], [*overrides, "learner.warmup_steps=9"], SftConfig)
    assert (config.learner.warmup_steps, config.evaluation.every, config.model.frozen) == (9, 9, ())
    with pytest.raises(ConfigError, match=r"learner.warmup_steps \(9\) has no effect: .*; leave it out"):
        load_config([], ["learner.warmup_steps=9"], SftConfig)


def test_a_reply_must_fit_beside_its_prompt():
    with pytest.raises(
        ConfigError, match=r"replies.max_tokens .* must be below replies.max_model_len.*; lower it, or le"
    ):
        load_config([], ["replies.max_tokens=5000", "replies.max_model_len=512"], GenerateConfig)
    short = load_config([], ["replies.max_model_len=512"], GenerateConfig).replies
    assert (short.max_model_len, short.max_tokens) == (512, None), "the reply takes what the prompt leaves"


@pytest.mark.parametrize(
    ("schema", "override", "fix"),
    [
        (SftConfig, "loss.form=x", "unirl config keys --job sft loss.form`"),
        (SftConfig, "train.seed.x=3", "unirl config keys --job sft train.seed`"),
        (RlConfig, "learner.schedule=x", "unirl config keys learner.schedule`"),
        (RecipeConfig, "sft.loss.form=x", "unirl config keys --job recipe sft.loss.form`"),
        (SftConfig, "steps=9", "did you mean train.max_steps?"),
        (SftConfig, "epochs=9", "did you mean train.num_epochs?"),
        (SftConfig, "batch_size=9", "did you mean train.samples_per_step?"),
    ],
)
def test_advice_names_what_the_command_has(schema, override, fix):
    with pytest.raises(ConfigError) as error:
        load_config([], [override], schema)
    assert error.value.problems[0].fix.endswith(fix)


def test_a_runs_name_and_model_are_read_from_its_settings(tmp_path):
    config = load_config([], ["train.name=mine", "model.dtype=bfloat16", "model.system_prompt=be brief"], SftConfig)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert run_name(file) == "mine"
    assert load_config([], model_settings(file), GenerateConfig).model == config.model
    assert run_name(tmp_path / "none.yaml") == ""
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        model_settings(tmp_path / "none.yaml")
