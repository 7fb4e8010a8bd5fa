"""Checkpoint folders in the Hugging Face layout: strict reading and writing of safetensors, never of pickles."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
)
"""Files beside the weights that a family needs and that training does not change."""


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Shapes of the tensors of a folder, and the file that holds each."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    def read(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each wanted name, one file at a time."""
        for file in sorted({self.files[name] for name in names}):
            with opened(file) as stored:
                for name in sorted(name for name in names if self.files[name] == file):
                    yield name, stored.get_tensor(name)

    def check(self, expected: Mapping[str, tuple[int, ...]], described_by: str = "config.json") -> None:
        """Compare with the tensors that a model needs, as the file `described_by` describes it.

        Raises:
            ValueError: a tensor is absent or of another shape.
        """
        missing = sorted(expected.keys() - self.shapes.keys())
        if missing:
            raise ValueError(
                f"{self.folder}: expected {len(expected)} tensors; got a checkpoint without {len(missing)} of them, "
                f"{', '.join(missing[:5])}; it is truncated or of another layout: download or convert it again"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.folder}: expected {name} of shape {shape} as {described_by} says; got {self.shapes[name]}; "
                    f"{described_by} and the weights do not belong together"
                )


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent}: expected a Hugging Face checkpoint folder with {file.name}; got none; point model.path at "
            "the folder of a converted checkpoint, or download the file that is missing"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a JSON object; got text that does not parse ({error}); get it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; got {type(content).__name__}; get it again")
    return content


def stored_tensors(folder: Path, file: Path | None = None) -> StoredTensors:
    """What the folder's safetensors, or the one file, hold, from their headers alone.

    Raises:
        FileNotFoundError: no weights in safetensors form, or a shard is absent.
        ValueError: a file is cut short or corrupt.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for part in _weight_files(folder) if file is None else [file]:
        with opened(part) as stored:
            for name in stored.keys():  # noqa: SIM118 - safe_open has keys() but does not iterate
                shapes[name] = tuple(stored.get_slice(name).get_shape())
                files[name] = part
    return StoredTensors(folder, shapes, files)


def start_folder(
    folder: Path, source: Path, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Make the folder of a checkpoint to be saved, with the companions of the one that it came from.

    Raises:
        ValueError: the names or shapes of `state` are not `shapes`.
    """
    got = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(got.items() ^ shapes.items()):
        raise ValueError(
            f"save: expected the {len(shapes)} weights of {source}; got a state that differs in {wrong[:3]}; gather "
            "all parameters under the checkpoint's own names"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, or shards of at most 5 GB with their index, into the folder."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library leaves them readable by their owner only


def all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the least and the greatest, which takes one pass and no memory."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    """Copy one weight into the tensor of its name.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    if not all_finite(value):
        raise ValueError(f"weight {name}: expected finite values; got NaN or infinity; do not use these weights")
    targets[name].copy_(value)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        found = sorted(file.name for file in folder.glob("*.bin")) or "nothing"
        raise FileNotFoundError(
            f"{folder}: expected {WEIGHTS} or {INDEX}; got {found}; convert the checkpoint to safetensors (pickled "
            "weights are never loaded)"
        )
    files = sorted({folder / str(name) for name in read_json(folder / INDEX).get("weight_map", {}).values()})
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder}: expected the shard {file.name} that {INDEX} names; got none; download it"
            )
    return files


def opened(file: Path) -> Any:
    """The open safetensors file, after its header was found whole.

    Raises:
        ValueError: it is cut short or corrupt.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected a whole safetensors file; got {file.stat().st_size} bytes that do not read ({error}); "
            "the download was cut short or the file is corrupt: get it again"
        ) from error


def config_of(folder: Path, family: str, *model_types: str) -> dict[str, Any]:
    """config.json of the folder, after its model_type was found to be one of the family's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another family's.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in model_types:
        raise ValueError(
            f"{folder}: expected a checkpoint of model_type {' or '.join(map(repr, model_types))} for model.family "
            f"{family}; got {raw.get('model_type')!r}; set model.family to its family, or point model.path elsewhere"
        )
    return raw
