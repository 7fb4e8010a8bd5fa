from pathlib import Path

import pytest

from unirl.config import PairConfig, RlConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError, find_problems

ROOT = Path(__file__).parents[1] / "configs"
SCHEMAS = {"rl": RlConfig, "pair": PairConfig}
FILES = sorted(ROOT.rglob("*.yaml"))


def questions_of(file, schema):
    """Overrides that answer the keys which the file leaves to the user."""
    try:
        load_config([file], [], schema)
    except ConfigError as error:
        return [f"{problem.key}=given" for problem in error.problems if problem.rule == "must be given"]
    return []


def test_there_are_configurations_and_each_folder_has_a_schema():
    assert FILES
    assert {file.parent.name for file in FILES} <= set(SCHEMAS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_shipped_configuration_loads(file):
    schema = SCHEMAS[file.parent.name]
    assert find_problems(load_config([file], questions_of(file, schema), schema)) == []


def test_the_lab_needs_no_answer():
    assert questions_of(ROOT / "rl" / "lab.yaml", RlConfig) == []
