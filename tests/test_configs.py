from dataclasses import replace
from pathlib import Path

import pytest

from unirl.config import AblationConfig, PairConfig, RecipeConfig, RlConfig, SftConfig
from unirl.config_loading import load_config, to_yaml
from unirl.config_rules import ConfigError, find_problems
from unirl.jobs.ablate import runs_of

ROOT = Path(__file__).parents[1] / "configs"
SCHEMAS = {
    "rl": RlConfig, "sft": SftConfig, "arms": SftConfig, "pair": PairConfig, "recipes": RecipeConfig,
    "ablations": AblationConfig,
}  # fmt: skip
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


@pytest.mark.parametrize("file", sorted((ROOT / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_arm_of_an_ablation_is_a_run(file):
    grid = load_config([file], [], AblationConfig)
    try:
        runs = list(runs_of(grid, Path("runs")))
    except ConfigError as error:
        asked = {problem.key.partition(": ")[2] for problem in error.problems if problem.rule == "must be given"}
        given = replace(grid, settings=(*grid.settings, *(f"{key}=given" for key in sorted(asked))))
        runs = list(runs_of(given, Path("runs")))
    assert len({to_yaml(run.config) for run in runs}) == len(grid.arms) * len(grid.seeds)


def test_the_lab_needs_no_answer():
    assert questions_of(ROOT / "rl" / "lab.yaml", RlConfig) == []


@pytest.mark.parametrize("arm", sorted((ROOT / "sft" / "arms").glob("*.yaml")), ids=lambda file: file.stem)
def test_an_arm_changes_the_data_of_a_recipe_and_nothing_else(arm):
    recipe = ROOT / "sft" / "anole_unifiedvisual.yaml"
    whole, changed = (load_config(files, ["model.path=given"], SftConfig) for files in ([recipe], [recipe, arm]))
    assert changed.data.sources != whole.data.sources
    assert replace(changed, data=whole.data, train=whole.train) == whole
    assert replace(changed.train, name=whole.train.name) == whole.train
    assert replace(changed.data, sources=whole.data.sources) == whole.data


@pytest.mark.parametrize("family", ["anole", "emu3", "liquid", "janus_pro_1b"])
def test_the_recipes_of_the_paper_have_its_numbers(family):
    file = ROOT / "sft" / f"{family}_unifiedvisual.yaml"
    config = load_config([file], questions_of(file, SftConfig), SftConfig)
    assert (config.train.samples_per_step, config.train.num_epochs, config.data.max_length) == (512, 2, 4096)
    assert (config.learner.lr, config.learner.warmup_fraction, config.learner.schedule) == (2e-5, 0.05, "cosine")
    assert config.loss.restrict


@pytest.mark.parametrize(("size", "rollout_size"), [("1b", 8), ("7b", 4)])
def test_the_recipes_of_pairuni_have_its_numbers(size, rollout_size):
    file = ROOT / "rl" / f"janus_pro_{size}.yaml"
    config = load_config([file], questions_of(file, RlConfig), RlConfig)
    rollout, sampling, algorithm = config.rollout, config.rollout.sampling, config.algorithm
    assert (rollout.pairs_per_step, rollout.num_understanding, rollout.num_generation) == (16, *[rollout_size] * 2)
    assert (sampling.text.temperature, sampling.image.temperature, sampling.image.guidance_scale) == (1.0, 1.0, 5.0)
    assert (algorithm.objective, algorithm.pair_weight, algorithm.kl_beta) == ("pair_grpo", "sqrt", 0.0)
    assert (config.learner.lr, config.train.num_steps) == (1e-6, 1200)
    assert (list(config.rewards.understanding), list(config.rewards.generation)) == (["accuracy"], ["hpsv2"])
