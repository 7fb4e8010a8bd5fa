"""Fine-tuning, then PairGRPO, then one report."""

import json
from dataclasses import replace

import pytest

from unirl.config import RecipeConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.jobs import recipe
from unirl.jobs.commands import CommandError


def test_settings_of_both_stages_are_checked_under_their_own_keys():
    with pytest.raises(ConfigError) as error:
        load_config([], ["sft.train.samples_per_step=0", "train.rollout.num_generation=1"], RecipeConfig)
    assert {problem.key for problem in error.value.problems} == {
        "sft.train.samples_per_step",
        "train.rollout.num_generation",
    }


class Stages:
    """In place of the commands: each leaves what a finished one leaves, and is noted."""

    def __init__(self):
        self.made = []

    def exam(self, config, checkpoint, save_image):
        return {"items": []}

    def run(self, *words):
        self.made.append([str(word) for word in words])
        if words[0] == "eval":
            return json.dumps({"estimates": {"generation/sampled/exact": {"mean": 0.2, "low": 0.1, "high": 0.3}}})
        folder = words[list(words).index("--run-dir") + 1] if "--run-dir" in words else words[2]
        (folder / "evaluations").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": "finished"}))
        exam = {"items": [{"id": str(i), "subset": "normal", "scores": {"exact": i % 2}} for i in range(4)]}
        for step in (0, 7):
            (folder / "evaluations" / f"exam_{step:06d}.json").write_text(json.dumps(exam))
            estimate = {"mean": 0.5, "low": None, "high": None}
            document = {"estimates": {"generation/sampled/exact": estimate}}
            (folder / "evaluations" / f"step_{step:06d}.json").write_text(json.dumps(document))
        return ""


def test_stages_follow_one_another_and_finished_ones_are_left_alone(tmp_path):
    config, stages = replace(RecipeConfig(), run_dir=str(tmp_path)), Stages()
    assert recipe.main(config, local=True, run=stages.run, exam=stages.exam) == 0
    commands = stages.made
    assert [words[0] for words in commands] == ["eval", "sft", "train"]
    assert all(words[-1] == "--local" for words in commands)
    train = (tmp_path / "train.yaml").read_text()
    assert f"path: {tmp_path}/sft/policy" in train
    assert "exam: lab" in (tmp_path / "sft.yaml").read_text()
    assert recipe.main(config, local=True, run=stages.run, exam=stages.exam) == 0
    assert len(commands) == 3, "nothing is run twice"
    page = (tmp_path / "report.html").read_text()
    assert [page.index(label) for label in ("base", "after fine-tuning", "after PairGRPO")] == sorted(
        page.index(label) for label in ("base", "after fine-tuning", "after PairGRPO")
    )
    assert "0.200<small>0.100 to 0.300" in page


def test_an_unfinished_stage_is_resumed(tmp_path):
    stages = Stages()
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run.json").write_text(json.dumps({"status": "interrupted"}))
    recipe.main(replace(RecipeConfig(), run_dir=str(tmp_path)), run=stages.run, exam=stages.exam)
    assert stages.made[1] == ["sft", "--resume", str(tmp_path / "sft")]


def test_a_failed_stage_ends_the_recipe_with_its_own_exit_code(tmp_path):
    config = replace(RecipeConfig(), run_dir=str(tmp_path))
    config = replace(config, sft=replace(config.sft, model=replace(config.sft.model, path=str(tmp_path / "nowhere"))))
    with pytest.raises(CommandError, match="expected `unirl eval") as error:
        recipe.main(config)
    assert error.value.exit_code == 4
    assert not (tmp_path / recipe.BASE_EVALUATION).exists()


def test_a_dry_run_shows_both_stages_and_writes_nothing(tmp_path, capsys):
    config = load_config(["configs/recipes/lab_sft_then_rl.yaml"], [f"run_dir={tmp_path / 'both'}"], RecipeConfig)
    assert recipe.main(config, local=True, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "unirl sft\n" in shown
    assert "train.name = lab-rl" in shown
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="expected a folder for several runs"):
        recipe.main(replace(RecipeConfig(), run_dir=str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_defaults_fit_together(tmp_path, capsys):
    assert recipe.main(replace(RecipeConfig(), run_dir=str(tmp_path / "new")), local=True, dry_run=True) == 0
    assert "lab:janus" not in capsys.readouterr().out
