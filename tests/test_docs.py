import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from unirl import cli
from unirl.config import PairConfig, RlConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError
from unirl.types import GenerationSample, RolloutGroup, RolloutRequest, Trajectory

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page):
    """Command lines that a page shows at a prompt, continued lines joined."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines if line.startswith("$ ") for part in line[2:].split("&&")]


def unirl_commands():
    shown = [(page.name, words[1:]) for page in PAGES for words in commands_of(page) if words[0] == "unirl"]
    return [pytest.param(words, id=f"{name}: {' '.join(words)[:60]}") for name, words in shown]


def picture_group(images):
    length = 3
    made = [
        Trajectory(
            prompt_ids=np.zeros(2, np.int32),
            completion_ids=np.zeros(length, np.int32),
            loss_mask=np.ones(length, bool),
            logprobs=np.zeros(length, np.float32),
            modality="image",
            image=image,
            finish_reason="stop",
            policy_version=0,
            seed=seed,
        )
        for seed, image in enumerate(images)
    ]
    request = RolloutRequest(
        request_id="p/generation",
        pair_id="p",
        task="generation",
        sample=GenerationSample(id="g", prompt="a red square"),
        seeds=tuple(range(len(images))),
    )
    return RolloutGroup(request=request, trajectories=tuple(made))


def test_the_example_reward_of_the_extending_page_runs():
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(source, "docs/extending.md", "exec"), names)
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[::2] = 255
    scores = names["ContrastReward"](target=0.5).score(picture_group([stripes, np.full((8, 8, 3), 90, np.uint8)]))
    assert scores.judged.tolist() == [True, True]
    np.testing.assert_allclose(scores.values, [1.0, 0.0])
    with pytest.raises(ValueError, match="contrast: expected target"):
        names["ContrastReward"](target=0)


def test_the_example_reward_is_one_new_file_and_one_edited_line(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text()
    shutil.copytree(ROOT / "unirl", tmp_path / "unirl", ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    example = tmp_path / "unirl" / "rewards" / "contrast.py"
    example.write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    (line,) = re.findall(r"^RewardName = .*$", page, re.MULTILINE)
    config = tmp_path / "unirl" / "config.py"
    config.write_text(re.sub(r"^RewardName = .*$", line, config.read_text(), flags=re.MULTILINE))
    code = """
from unirl.config_loading import load_config
from unirl.rewards.reward import build_reward, check_rewards
settings = ["rewards.generation.contrast.weight=0.1", "rewards.generation.contrast.options.target=0.3"]
config = load_config([], settings)
check_rewards(config.rewards)
print(build_reward("contrast", config.rewards.generation["contrast"])._target)
"""
    assert all(setting in page for setting in re.findall(r'"(rewards\.[^"]*=[^"]*)"', code))
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert ran.stdout.decode().strip() == "0.3", ran.stderr.decode()
    ruff = [
        str(Path(sys.executable).with_name("ruff")),
        "check",
        "--config",
        str(ROOT / "pyproject.toml"),
        str(example),
    ]
    assert subprocess.run(ruff, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("words", unirl_commands())
def test_a_shown_command_exists_and_its_settings_are_accepted(words, monkeypatch, tmp_path):
    path = []
    for word in words:
        if CliRunner().invoke(cli.app, [*path, word, "--help"]).exit_code or word.startswith("-"):
            break
        path.append(word)
    assert path, words
    if path[0] == "submit":
        monkeypatch.chdir(ROOT)
        token = tmp_path / "token"
        token.write_text("a token")
        words = [str(token) if flag == "--token-file" else word for flag, word in pairwise(["", *words])]
        assert CliRunner().invoke(cli.app, [*words, "--dry-run"]).exit_code == 0
    if path not in (["train"], ["pair", "make"]):
        return
    files = [ROOT / file for flag, file in pairwise(words) if flag == "-c"]
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    schema = RlConfig if path == ["train"] else PairConfig
    existing = [file for file in files if file.exists()]
    assert [file for file in files if not file.exists()] in ([], [ROOT / "mine.yaml"])
    load_config(existing, overrides, schema)


def test_the_shown_job_of_slurm_is_a_command_of_unirl():
    (shown,) = [words for words in commands_of(ROOT / "docs" / "cluster.md") if words[0] == "sbatch"]
    words = shown[shown.index("launch/slurm.sbatch") + 1 :]
    file = words.index("-c")
    command = cli.read_command([*words[:file], *words[file + 2 :]], [ROOT / words[file + 1]])
    assert command.settings.train.name == "janus-pro-1b"


def test_the_error_shown_in_the_configuration_page_is_what_a_user_sees():
    with pytest.raises(ConfigError) as caught:
        load_config([], ["learner.learning_rate=0.001", "rollout.num_generation=1"])
    assert f"unirl: error: {caught.value}" in (ROOT / "docs" / "configuration.md").read_text()


def test_the_page_of_sentinels_is_current():
    from unirl.monitoring.sentinel_table import page

    assert (ROOT / "docs" / "sentinels.md").read_text() == page()


def test_the_page_of_faults_has_every_fault_and_clean_run_and_no_miss():
    from unirl.jobs.faults.bank import CLEAN, FAULTS

    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found = {row[0].strip("`"): row for row in rows}
    for fault in FAULTS:
        name, what, planted, caught, by, _ = found[f"{fault.name}"]
        assert (what, by) == (fault.what, fault.sentinel), name
        assert int(caught) - int(planted) < 3
    assert {clean.name: found[clean.name][2] for clean in CLEAN} == {clean.name: "no alarm" for clean in CLEAN}
    assert len(found) == len(FAULTS) + len(CLEAN) + 2


def test_the_metrics_page_is_current():
    from unirl.monitoring.metrics import metrics_page

    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page()
