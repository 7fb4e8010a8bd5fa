"""Grids of arms and seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unirl.config import AblationConfig, ScoreConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.jobs import ablate
from unirl.jobs.commands import CommandError
from unirl.jobs.interrupts import Interrupted

ARMS = "arms={slow: {settings: [learner.lr=0.001]}, fast: {settings: [learner.lr=0.01]}}"
SCORES = "scores={right: {metrics: [riddles/right]}}"


@pytest.fixture
def grid(tmp_path):
    return load_config([], [ARMS, SCORES, "seeds=[0, 1]", f"run_dir={tmp_path / 'grid'}"], AblationConfig)


class Runs:
    """In place of the commands: each leaves what a finished run leaves, and is noted."""

    def __init__(self, ends_with=None):
        self.made, self.ends_with = [], ends_with or {}

    def run(self, job, *words, output):
        run_dir = Path(words[words.index("--run-dir") + 1] if "--run-dir" in words else words[1])
        name = f"{run_dir.parent.name}/{run_dir.name}"
        self.made.append((job, *map(str, words)))
        output.write_text("what it said")
        if error := self.ends_with.get(name):
            raise error
        (run_dir / "evaluations").mkdir(parents=True, exist_ok=True)
        for step, right in ((0, 0), (7, 1 if run_dir.parent.name == "fast" else 0.5)):
            items = [{"id": f"i{k}", "subset": "riddles", "scores": {"right": right}} for k in range(4)]
            (run_dir / "evaluations" / f"exam_{step:06d}.json").write_text(json.dumps({"items": items}))
        (run_dir / "run.json").write_text(json.dumps({"status": "finished"}))
        return ""


def test_every_arm_runs_with_every_seed_and_the_arms_are_compared(grid, capsys):
    runs = Runs()
    assert ablate.main(grid, local=True, as_json=True, run=runs.run) == 0
    folder = Path(grid.run_dir)
    order = [words[4].removeprefix(f"{folder}/") for words in runs.made]
    assert order == ["slow/seed-0", "fast/seed-0", "slow/seed-1", "fast/seed-1"], "each seed is a whole comparison"
    assert runs.made[0] == ("sft", "-c", f"{folder}/slow/seed-0.yaml", "--run-dir", f"{folder}/slow/seed-0", "--local")
    assert "lr: 0.01" in (folder / "fast/seed-1.yaml").read_text()
    assert "seed: 1" in (folder / "fast/seed-1.yaml").read_text()
    assert (folder / "fast/seed-1.log").read_text() == "what it said"
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((folder / "ablation.json").read_text())
    assert shown["before"] == {"right": 0}
    assert [shown["scores"]["right"][arm]["mean"][0] for arm in ("slow", "fast")] == [0.5, 1.0]
    assert shown["scores"]["right"]["fast"]["gain"][0] == 0.5
    assert (folder / "report.html").is_file()


def test_what_is_finished_is_left_alone_and_what_is_not_is_resumed(grid, capsys):
    folder = Path(grid.run_dir)
    assert ablate.main(grid, run=Runs({"fast/seed-0": Interrupted(15)}).run) == 143
    assert f"--run-dir {folder}" in capsys.readouterr().err
    (folder / "fast/seed-0").mkdir(parents=True, exist_ok=True)
    (folder / "fast/seed-0/run.json").write_text(json.dumps({"status": "interrupted"}))
    runs = Runs()
    assert ablate.main(grid, run=runs.run) == 0
    assert runs.made[0] == ("sft", "--resume", f"{folder}/fast/seed-0")
    assert all("slow/seed-0" not in " ".join(words) for words in runs.made)
    shown = capsys.readouterr().out
    assert "before training  0.000" in shown
    assert "0.500 [0.000, 1.000]  *" not in shown
    assert "4 runs, seeds 0, 1." in shown


def test_a_failed_run_is_named_and_the_others_are_compared(grid, capsys, caplog):
    failure = CommandError("unirl sft", 4, Path("fast.log"))
    assert ablate.main(grid, run=Runs({"fast/seed-1": failure}).run) == 4
    assert "fast, seed 1: expected `unirl sft` to finish; got exit code 4" in caplog.text
    assert "Not finished, and left out: fast, seed 1." in capsys.readouterr().out


def test_without_the_reference_there_is_nothing_to_compare(grid):
    failure = CommandError("unirl sft", 4, Path("log"))
    with pytest.raises(ValueError, match="expected a finished run of slow"):
        ablate.main(grid, run=Runs({"slow/seed-0": failure, "slow/seed-1": failure}).run)


def test_a_score_that_runs_lack_is_named_and_the_rest_is_compared(grid, capsys):
    scores = grid.scores | {"odd": ScoreConfig(metrics=("riddles/odd",))}
    assert ablate.main(replace(grid, scores=scores), run=Runs().run) == 0
    shown = capsys.readouterr().out
    assert "Left out: odd, since not all runs measured riddles/odd." in shown
    assert "right\n" in shown


def test_a_dry_run_says_what_is_left(grid, capsys):
    assert ablate.main(grid, dry_run=True, as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["runs"], len(shown["left"])) == (4, 4)
    assert ablate.main(grid, dry_run=True) == 0
    assert "fast: learner.lr=0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("model.path=nowhere", "arm odd: nowhere: expected an existing path or"),
        ("data.pairs=nowhere", "arm odd: nowhere: expected an existing path or 'lab:pairs'"),
        ("evaluation.data=nowhere", "arm odd: nowhere: expected an existing path or 'lab:heldout'"),
        ("evaluation.data=configs", "arm odd: configs: expected a table understanding.parquet"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_an_arm_is_made_from_must_be_there(tmp_path, arm, said, dry_run):
    asked = [f"arms={{plain: {{}}, odd: {{settings: [{arm}]}}}}", "job=train", f"run_dir={tmp_path / 'grid'}"]
    with pytest.raises(DataError, match=said):
        ablate.main(load_config([], asked, AblationConfig), dry_run=dry_run, run=Runs().run)
    assert not (tmp_path / "grid").exists()


def test_a_grid_that_was_begun_keeps_its_settings(grid):
    ablate.main(grid, run=Runs().run)
    with pytest.raises(DataError, match="expected the settings that this began with"):
        ablate.main(replace(grid, settings=("learner.zero_stage=0",)), run=Runs().run)


def test_an_arm_with_wrong_settings_is_named(tmp_path):
    wrong = load_config([], ["arms={odd: {settings: [learner.lr=-1, learner.rl=2]}}"], AblationConfig)
    with pytest.raises(ConfigError) as error:
        ablate.main(replace(wrong, run_dir=str(tmp_path / "grid")))
    assert {problem.key for problem in error.value.problems} == {"arm odd: learner.lr", "arm odd: learner.rl"}
    assert not (tmp_path / "grid").exists()


def test_rules_of_a_grid():
    with pytest.raises(ConfigError) as error:
        load_config(
            [],
            ["seeds=[0, 0]", "reference=c", "arms={'a b': {}}", "scores={s: {}}", "curves={k: {score: t, arms: [d]}}"],
            AblationConfig,
        )
    assert {problem.key for problem in error.value.problems} == {
        "seeds", "reference", "arms.a b", "scores.s.metrics", "curves.k.score", "curves.k.arms", "curves.k.x",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"arms .* must name what is compared"):
        load_config([], [], AblationConfig)


@pytest.mark.slow
def test_two_real_arms_of_two_steps(tmp_path, capfd):
    """The whole way: processes, run directories, held-out losses compared."""
    settings = (
        "data.cache_dir=" + str(tmp_path / "cache"),
        'evaluation.sources={held: {path: "lab:unified_visual_heldout", subsets: [text_reasoning]}}',
        'data.sources={lab: {path: "lab:unified_visual_heldout", subsets: [text_reasoning]}}',
        "evaluation.exam=none", "train.max_steps=2", "train.samples_per_step=16",
    )  # fmt: skip
    grid = load_config(
        [], [ARMS, "seeds=[0]", "runs_at_once=2", 'files=["configs/sft/lab.yaml"]', f"run_dir={tmp_path / 'grid'}"],
        AblationConfig,
    )  # fmt: skip
    assert ablate.main(replace(grid, settings=settings), local=True) == 0
    cells = json.loads((tmp_path / "grid/ablation.json").read_text())["measures"]["heldout/nats/text"]
    assert cells["slow"]["num_items"] == 1
    assert cells["fast"]["mean"][0] != cells["slow"]["mean"][0]
    assert "One seed an arm" in capfd.readouterr().out
