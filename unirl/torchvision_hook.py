"""Lets a CUDA-built torchvision import on CPU torch; a `.pth` file in the environment imports this at start-up.

A start-up hook, because vLLM inspects models in child interpreters that never import unirl, and Ray workers are
children too. It costs nothing until something imports torchvision.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PTH_NAME = "unirl_torchvision.pth"
PTH_LINE = "import unirl.torchvision_hook; unirl.torchvision_hook.install()\n"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")


class TorchvisionFinder:
    """Meta-path finder that readies torch's operator table right before torchvision is first imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary spec of torchvision, after its operators are sure to exist; None for any other module."""
        if name != "torchvision":
            return None
        sys.meta_path.remove(TorchvisionFinder)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            declare_operators(Path(spec.submodule_search_locations[0]))
        return spec


def install() -> None:
    """Put the finder in front of Python's own, once."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def declare_operators(package: Path) -> str:
    """Load torchvision's C++ library, or declare the schemas its Python code expects.

    Calling a declared operator still raises torchvision's own "Couldn't load custom C++ ops".

    Args:
        package: folder of the installed torchvision.

    Returns:
        "native" when the library loads, else "declared".
    """
    import torch

    libraries = sorted(package.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        libraries = []
    if libraries:
        return "native"
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", SCHEMA)
    return "declared"
