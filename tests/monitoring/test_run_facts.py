import dataclasses

import pytest

from unirl.config import RewardConfig, RewardsConfig, RlConfig, SftConfig, TrainConfig
from unirl.config_loading import to_yaml
from unirl.monitoring.run_facts import changed_settings, describe_run, resume_command, without_secrets


def test_only_changed_settings_are_listed_with_their_defaults():
    config = RlConfig(train=TrainConfig(seed=3), rewards=RewardsConfig(generation={"hpsv2": RewardConfig(weight=2.0)}))
    changed = changed_settings(config)
    assert changed["train.seed"] == [0, 3]
    assert changed["rewards.generation.hpsv2"] == [None, {"weight": 2.0}]
    assert changed_settings(RlConfig()) == {}
    assert changed_settings(config, since=config) == {}
    assert changed_settings(RlConfig(), since=config)["train.seed"] == [3, 0]


def test_values_of_secret_keys_are_left_out():
    text = "teacher:\n  api_key: abc\n  max_tokens: 5\nhub.token=abc\npassword: abc\ntokens: 3\n"
    assert "abc" not in without_secrets(text)
    assert "max_tokens: 5" in without_secrets(text)
    assert "tokens: 3" in without_secrets(text)

    @dataclasses.dataclass(frozen=True)
    class Teacher:
        api_key: str = ""
        url: str = ""

    options = {"api_key": "abc", "url": "x"}
    config = RlConfig(rewards=RewardsConfig(generation={"hpsv2": RewardConfig(options=options)}))
    assert changed_settings(config)["rewards.generation.hpsv2"] == [
        None,
        {"options": {"api_key": "(not recorded)", "url": "x"}},
    ]
    assert changed_settings(Teacher(api_key="abc", url="x")) == {"api_key": ["", "(not recorded)"], "url": ["", "x"]}


def test_a_run_says_where_it_runs_and_from_which_code():
    facts = describe_run(RlConfig())
    assert facts.keys() == {"host", "pid", "python", "versions", "git_commit", "changed"}
    assert "numpy" in facts["versions"]


@pytest.mark.parametrize(("config", "job"), [(SftConfig(), "sft"), (RlConfig(), "train")])
def test_settings_tell_the_job_of_a_run_that_does_not_name_it(tmp_path, config, job):
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resume_command(tmp_path, {"local": True}) == f"unirl {job} --resume {tmp_path} --local"
    assert resume_command(tmp_path, {"job": "other"}) == f"unirl other --resume {tmp_path}"
