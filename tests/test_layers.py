"""Imports point down: reads every import, late ones too, and names the offender."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unirl"
MATH = ("types", "algorithms", "pairing")
PARTS = ("models", "rollout", "rewards", "learner", "data", "evaluation", "monitoring", "lab")
CONFIG = ("config", "config_rules", "config_keys", "config_loading")
WHOLE = (*CONFIG, "run_files", *MATH, *PARTS, "cluster", "dashboard", "torchvision_hook")
# Room -> rooms it may import, itself aside.
MAY_IMPORT = (
    {"types": (), "torchvision_hook": (), "run_files": (), "config": ("types",)}
    | {name: ("types", *CONFIG[:place]) for place, name in enumerate(CONFIG) if place}
    | {"algorithms": ("types",), "pairing": ("types",)}
    | {part: (*CONFIG, *MATH) for part in PARTS}
    | {part: (*CONFIG, *MATH, "run_files") for part in ("evaluation", "monitoring")}
    | {"rollout": (*CONFIG, *MATH, "models"), "learner": (*CONFIG, *MATH, "models")}
    | {"lab": (*CONFIG, *MATH, "models", "rollout"), "rewards": (*CONFIG, *MATH, "lab")}  # the lab's verifier
    | {
        "cluster": (*CONFIG, "run_files", *MATH, *PARTS),
        "dashboard": (*CONFIG, "run_files", "types", "evaluation", "monitoring"),
        "benchmarks": WHOLE,
        "jobs": (*WHOLE, "benchmarks"),
        "cli": (*WHOLE, "jobs"),
    }
)
# Third-party package -> the rooms it is kept to.
KEPT_TO = {
    "ray": ("cluster", "jobs"),
    "vllm": ("rollout",),
    "deepspeed": ("learner",),
    "faiss": ("pairing",),
    "omegaconf": ("config_loading",),
    "typer": ("cli",),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), ("dashboard", "jobs")),
}
PURE = {room: ("ray", "vllm", "deepspeed", "transformers", "omegaconf") for room in ("algorithms", "pairing", "types")}


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in (names if node.module == "unirl" else [node.module]))


def offences(room, name):
    top, *rest = name.split(".")
    if top == "unirl":
        return rest and rest[0] != room and rest[0] not in MAY_IMPORT[room]
    return room not in KEPT_TO.get(top, (room,)) or top in PURE.get(room, ())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert not file.read_text().strip(), "unirl/__init__.py stays empty"
        return
    assert room in MAY_IMPORT, f"{file}: {room} is no room of the house; give it a layer in {__file__}"
    wrong = [f"{file}:{line}: {room} may not import {name}" for line, name in imports_of(ast.parse(file.read_text()))
             if offences(room, name)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_init_files_stay_empty():
    assert [str(file) for file in PACKAGE.rglob("__init__.py") if file.read_text().strip()] == []
