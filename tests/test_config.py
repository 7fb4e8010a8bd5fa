import dataclasses
import math
import re
from pathlib import Path

import pytest

import unirl.cli
from unirl.config import PairConfig, RewardConfig, RlConfig, SftConfig, flatten, setting_names
from unirl.config_keys import list_settings
from unirl.config_loading import SYNONYMS, differences, load_config, to_yaml
from unirl.config_rules import ConfigError, bound_of, find_problems

SCHEMAS = (RlConfig, PairConfig)


@pytest.fixture
def write(tmp_path):
    def write_yaml(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_yaml


def problems_of(*overrides, files=(), schema=RlConfig):
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides, schema)
    return {problem.key: problem for problem in caught.value.problems}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_defaults_load_without_a_file_and_have_no_problem(schema):
    assert load_config([], [], schema) == schema()
    assert find_problems(schema()) == []


def test_overrides_lie_on_top_of_files_and_later_files_on_top_of_earlier(write):
    first = write("learner: {lr: 1e-6, zero_stage: 1}\ntrain: {num_steps: 5}", "first.yaml")
    second = write("learner: {zero_stage: 3}", "second.yaml")
    config = load_config([first, second], ["train.num_steps=7", "model.system_prompt=''"])
    assert config.learner.lr == 1e-6
    assert config.learner.zero_stage == 3
    assert config.train.num_steps == 7
    assert config.model.system_prompt == ""


def test_a_number_without_a_dot_before_its_exponent_is_a_float(write):
    assert load_config([write("learner: {lr: 1e-6}")], []).learner.lr == 1e-6
    assert load_config([], ["learner.lr=2e-6"]).learner.lr == 2e-6


def test_a_file_replaces_the_table_of_rewards_and_a_dotted_override_edits_it(write):
    file = write("rewards: {generation: {hpsv2: {options: {checkpoint: weights.pt}}}}")
    config = load_config([file], ["rewards.generation.hpsv2.weight=0.5", "rewards.understanding.lab_verifier.weight=2"])
    assert config.rewards.generation == {"hpsv2": RewardConfig(weight=0.5, options={"checkpoint": "weights.pt"})}
    assert config.rewards.understanding == {"accuracy": RewardConfig(), "lab_verifier": RewardConfig(weight=2.0)}


def test_what_is_saved_loads_back_equal(write):
    config = load_config([], ["rewards.generation.hpsv2.options.levels=[1, 2]", "learner.betas=[0.8, 0.9]"])
    assert load_config([write(to_yaml(config))], []) == config


def test_every_problem_is_named_at_once_with_key_value_rule_and_fix():
    problems = problems_of("learner.lr=many", "rollout.num_understanding=x", "train.sead=3")
    assert list(problems) == ["learner.lr", "rollout.num_understanding", "train.sead"]
    text = str(ConfigError(list(problems.values())))
    assert "3 problems" in text
    for problem in problems.values():
        assert problem.rule
        assert problem.fix
        assert str(problem) in text


def test_mistyped_keys_wrong_types_open_values_and_broken_rules_are_named_together(write):
    file = write("model: {path: '???'}")
    overrides = ["learner.learning_rate=1e-3", "train.seed=x", "rollout.num_generation=1", "rewards.generation.hps={}"]
    problems = problems_of(*overrides, files=[file])
    assert set(problems) == {
        "learner.learning_rate",
        "train.seed",
        "model.path",
        "rollout.num_generation",
        "rewards.generation.hps",
    }
    assert "did you mean hpsv2?" in problems["rewards.generation.hps"].fix


def test_a_value_that_was_refused_is_named_once():
    assert list(problems_of("rollout.sampling.text.max_tokens=many", "rollout.max_model_len=20")) == [
        "rollout.sampling.text.max_tokens"
    ]


def test_what_is_open_is_asked_for_once_and_nothing_is_said_of_it_before(write):
    file = write("learner: {lr: '???', offload_optimizer: nvme, nvme_path: '???', num_gpus: 1}")
    assert list(problems_of("learner.lr=fast", files=[file])) == ["learner.lr", "learner.nvme_path"]
    assert load_config([file], [], incomplete=True).learner.nvme_path == "???"
    entry = write("rewards: {generation: {hpsv2: {weight: '???'}}}", "entry.yaml")
    assert list(problems_of(files=[entry])) == ["rewards.generation.hpsv2.weight"]
    assert "a value, not a group" in str(problems_of("model.path.x=1", files=[write("model: {path: '???'}")]))


def test_an_incomplete_configuration_can_be_looked_at(write):
    file = write(
        "model: {path: '???'}\ntrain:\n  num_steps: ???\nrewards: {generation: {hpsv2: {options: {checkpoint: '???'}}}}"
    )
    config = load_config([file], [], incomplete=True)
    assert config.model.path == "???"
    assert config.train.num_steps == "???"
    assert config.rewards.generation["hpsv2"].options == {"checkpoint": "???"}
    assert (
        load_config([write(to_yaml(config), "again.yaml")], ["train.num_steps=3"], incomplete=True).model.path == "???"
    )


def test_an_entry_that_one_side_lacks_is_one_difference(write):
    file = write("rewards: {generation: {hpsv2: {weight: 0.5, options: {checkpoint: a}}}}")
    config = load_config([file], ["rewards.understanding.accuracy.weight=2"])
    assert differences(RlConfig(), config) == {
        "rewards.understanding.accuracy.weight": (1.0, 2.0),
        "rewards.generation.lab_verifier": ({}, None),
        "rewards.generation.hpsv2": (None, {"weight": 0.5, "options": {"checkpoint": "a"}}),
    }


def test_broken_rules_are_named_together():
    problems = problems_of("learner.lr=-1", "rollout.num_generation=1", "train.name=a/b", "model.frozen=[tower]")
    assert set(problems) == {"learner.lr", "rollout.num_generation", "train.name", "model.frozen"}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.sead=3", "train.seed"),
        ("learner.learning_rate=3", "learner.lr"),
        ("train.learning_rate=3", "learner.lr"),
        ("lr=3", "learner.lr"),
        ("rollout.actors=3", "rollout.text.num_workers"),
        ("temperature=3", "rollout.sampling.text.temperature or rollout.sampling.image.temperature"),
        ("rewards.generation.hpsv2.wieght=3", "rewards.generation.<name>.weight"),
    ],
)
def test_a_mistyped_key_gets_the_key_that_was_meant(override, suggestion):
    (problem,) = problems_of(override).values()
    assert problem.rule == "is not a setting"
    assert f"did you mean {suggestion}" in problem.fix


def test_a_key_like_no_other_gets_the_list_of_its_group():
    (problem,) = problems_of("train.frobnicate=3").values()
    assert "did you mean" not in problem.fix
    assert "num_steps" in problem.fix


def test_every_synonym_leads_to_a_setting_that_exists():
    names = setting_names(RlConfig) + setting_names(SftConfig)
    assert {name for meant in SYNONYMS.values() for name in meant} <= set(names)


@pytest.mark.parametrize(
    "override",
    ["train.num_steps=1.5", "train.num_steps=[1]", "model.dtype=fp8", "rollout.deterministic=maybe", "model.path="],
)
def test_a_value_of_the_wrong_type_is_named(override):
    (problem,) = problems_of(override).values()
    assert problem.key == override.partition("=")[0]
    assert problem.rule.startswith("must be ")
    assert "type" not in problem.rule


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train", "key=value"),
        ("train=3", "group of settings"),
        ("learner.lr.x=3", "a value, not a group"),
        ("learner.betas=[1", "could not be read"),
        ("train.name=${absent}", "Interpolation"),
        ("train.name=a${", "could not be read"),
    ],
)
def test_a_malformed_override_says_what_is_wrong(override, text):
    (problem,) = problems_of(override).values()
    assert text in str(problem)


def test_files_that_cannot_be_read_are_all_named(write, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    files = [tmp_path / "absent.yaml", write("a: 1\na: 2"), write("- a", "list.yaml"), tmp_path / "binary.yaml"]
    assert len(problems_of(files=files)) == 4


def test_what_a_file_leaves_to_the_user_is_asked_for_at_once(write):
    file = write("model:\n  path: ???\nrewards: {generation: {hpsv2: {options: {checkpoint: '???'}}}}")
    problems = problems_of(files=[file])
    assert set(problems) == {"model.path", "rewards.generation.hpsv2.options.checkpoint"}
    overrides = ["model.path=a", "rewards.generation.hpsv2.options.checkpoint=b"]
    assert load_config([file], overrides).model.path == "a"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_is_read_somewhere(schema):
    package = Path(unirl.cli.__file__).parent
    sources = [file.read_text() for file in package.rglob("*.py") if not file.name.startswith("config")]
    read = set(re.findall(r"\.(\w+)\b", "\n".join(sources)))
    assert [name for name in setting_names(schema) if name.rpartition(".")[2] not in read] == []


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_has_a_range(schema):
    numbers = {k for k, v in flatten(schema()).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert {key for key in numbers if bound_of(key) is None} == set()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_rate_that_would_ruin_the_weights_is_refused(value):
    config = RlConfig(learner=dataclasses.replace(RlConfig().learner, lr=value))
    assert [problem.key for problem in find_problems(config)] == ["learner.lr"]


@pytest.mark.parametrize("name", ["timeout_s", "weight"])
def test_nothing_is_endless(name):
    key = f"rewards.generation.lab_verifier.{name}"
    assert list(problems_of(f"{key}=.inf")) == [key]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rollout.sampling.text.temperature=0"], "rollout.sampling.text.temperature"),
        (["rollout.text.num_workers=0"], "rollout.text.num_workers"),
        (["rewards.generation={}"], "rewards.generation"),
        (["rewards.understanding.accuracy.weight=0"], "rewards.understanding"),
        (["algorithm.kl_beta=0.1"], "algorithm.kl_beta"),
        (["data.partners=random"], "algorithm.pair_weight"),
        (["data.partners=unlike", "algorithm.objective=vanilla_mixed"], "data.partners"),
        (["learner.max_tokens_per_micro_batch=200"], "learner.max_tokens_per_micro_batch"),
        (["learner.offload_params=cpu", "learner.num_gpus=1"], "learner.offload_params"),
        (["learner.offload_params=nvme", "learner.num_gpus=1", "learner.zero_stage=3"], "learner.nvme_path"),
        (["learner.num_gpus=2"], "learner.num_gpus"),
        (["rollout.sampling.text.max_tokens=500"], "rollout.sampling.text.max_tokens"),
        (["learner.betas=[0.9, 1.0]"], "learner.betas"),
        (["train.seed=-1"], "train.seed"),
        (["rollout.sampling.image.approximate_cache=true"], "rollout.sampling.image.approximate_cache"),
        (["algorithm.diffusion_steps_per_update=0"], "algorithm.diffusion_steps_per_update"),
        (["rollout.sampling.image.size=[0, 512]"], "rollout.sampling.image.size"),
        (["model.family=emu3"], "model.family"),
    ],
)
def test_settings_that_would_fail_late_or_silently_are_refused_early(overrides, key):
    assert list(problems_of(*overrides)) == [key]


def test_one_stream_needs_half_the_token_budget():
    overrides = ["learner.max_tokens_per_micro_batch=200", "rollout.sampling.image.guidance_scale=1"]
    assert load_config([], overrides).learner.max_tokens_per_micro_batch == 200


def test_the_resnet_encoder_needs_its_weights():
    assert list(problems_of("encoder=resnet50", schema=PairConfig)) == ["encoder_checkpoint"]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_is_documented(schema):
    settings = list_settings(schema)
    assert [s.key for s in settings] == [name for name in setting_names(schema) if not name.endswith("<name>")]
    assert [s.key for s in settings if not s.doc] == []


def test_a_default_is_that_of_the_whole_configuration():
    (setting,) = [s for s in list_settings(RlConfig) if s.key == "rollout.both.num_workers"]
    assert setting.default == str(RlConfig().rollout.both.num_workers)
