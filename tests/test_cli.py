import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unirl import cli
from unirl.config import RlConfig
from unirl.config_loading import load_config, to_yaml

HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "numpy", "omegaconf", "pyarrow")
COMMANDS = [
    "train", "eval", "replay", "scale", "verify", "doctor", "submit", "pair make", "pair verify", "pair report",
    "data import",
    "data validate", "data show", "lab data", "lab pretrain",
    "lab show", "bench diffusion", "bench shape", "bench sft", "bench sft-shape",
    "bench rollout", "bench reward", "bench learner", "bench sync", "bench step", "bench rl-shape", "bench all",
    "dashboard", "bench dashboard",
    "config show", "config validate", "config keys", "config diff",
    "runs list", "runs show", "runs compare", "runs tail", "runs fork", "export",
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy_and_start_at_once(argument):
    program = (
        "import resource, sys\nfrom unirl.cli import main\n"
        f"try: main(['{argument}'])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(loaded, usage.ru_utime + usage.ru_stime, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, seconds = done.stderr.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


@pytest.mark.parametrize("asked", [[], ["--prompt", ""], ["--prompt", " "], ["--prompt", "a", "--prompts", "b.jsonl"]])
def test_generate_wants_one_kind_of_prompt(asked):
    result = run("generate", *asked)
    assert result.exit_code == 2
    assert "expected" in result.output


def test_generate_says_what_a_checkpoint_may_be():
    shown = " ".join(run("generate", "--help").output.split())
    assert "run directory or lab:anole; default model.path, lab:janus." in shown


def test_show_prints_what_loads_back_equal(tmp_path):
    result = run("config", "show", "learner.lr=1e-5")
    file = tmp_path / "shown.yaml"
    file.write_text(result.stdout)
    assert load_config([file], []) == load_config([], ["learner.lr=1e-5"])


def test_show_as_json_is_flat():
    assert json.loads(run("config", "show", "--json").stdout)["learner.lr"] == RlConfig().learner.lr


def test_validate_counts_what_differs():
    assert "ok: 1 settings" in run("config", "validate", "learner.lr=1e-5").stdout
    assert "ok: 0 settings" in run("config", "validate", "--job", "pair").stdout


def test_keys_are_filtered_and_documented():
    result = run("config", "keys", "learner.lr", "--docs")
    assert re.match(r"learner\.lr: float = \S+ .*\n    Peak learning rate", result.stdout)
    assert {key["key"] for key in json.loads(run("config", "keys", "--json").stdout)} >= {"model.path", "learner.lr"}


def test_diff_compares_files_run_directories_and_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([], ["learner.lr=1e-5"])))
    other = tmp_path / "other.yaml"
    other.write_text("train: {num_steps: 3}")
    assert run("config", "diff", str(tmp_path)).stdout.splitlines() == [f"learner.lr: 1e-05 | {RlConfig().learner.lr}"]
    changed = json.loads(run("config", "diff", str(tmp_path), str(other), "--json").stdout)
    assert set(changed) == {"learner.lr", "train.num_steps"}


def test_keys_complete():
    assert "learner.lr=" in cli.complete_key("learner.l")
    assert "encoder=" in cli.complete_key("enc")


def exit_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code, capsys.readouterr().err


def test_a_mistyped_setting_ends_with_2_and_says_what_was_meant(capsys):
    code, text = exit_of(capsys, "train", "learner.learning_rate=3")
    assert code == 2
    assert "did you mean learner.lr?" in text
    assert "Traceback" not in text


def test_a_mistyped_option_ends_with_2(capsys):
    code, text = exit_of(capsys, "train", "--nope")
    assert code == 2
    assert "--nope" in text


def test_debug_shows_the_traceback_wherever_it_stands(capsys):
    _, text = exit_of(capsys, "config", "validate", "foo=3", "--debug")
    assert "Traceback" in text


def test_a_folder_that_exists_ends_with_4(capsys, tmp_path):
    code, text = exit_of(capsys, "lab", "data", str(tmp_path), "-n", "1")
    assert code == 4
    assert str(tmp_path) in text


def make_error(name, *bases, **attributes):
    return type(name, bases or (Exception,), attributes)("text")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (make_error("DataError", ValueError), 4),
        (make_error("PlacementError", RuntimeError), 5),
        (make_error("TornFile", make_error("DataError").__class__), 4),
        (make_error("Interrupted", exit_code=143), 143),
        (ModuleNotFoundError("vllm"), 3),
        (FileNotFoundError("x"), 4),
        (ConnectionRefusedError(), 5),
        (RuntimeError("boom"), 1),
    ],
)
def test_exit_codes_follow_the_kind_of_error(error, code):
    assert cli.exit_code(error) == code


def test_lab_data_is_what_the_readers_read(tmp_path):
    from unirl.data.records import read_samples
    from unirl.types import GenerationSample, UnderstandingSample

    out = tmp_path / "lab"
    assert run("lab", "data", str(out), "-n", "5", "--seed", "3").exit_code == 0
    for kind in (UnderstandingSample, GenerationSample):
        samples, rejected = read_samples(out, kind)
        assert len(samples) == 5
        assert rejected == []


def test_the_saved_settings_of_a_run_come_first(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert cli.saved_config(str(tmp_path)) == [tmp_path / "config.yaml"]
    assert cli.saved_config(None) == []


def test_the_error_names_agree_with_the_classes():
    source = "\n".join(file.read_text() for file in Path(cli.__file__).parent.rglob("*.py"))
    for name in ("ConfigError", "DataError", "PlacementError"):
        assert name in cli.EXIT_CODES
        assert f"class {name}(" in source
