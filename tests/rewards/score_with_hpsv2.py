"""Scores pictures with the code of the PyPI package hpsv2 1.2.0; prints the scores as JSON.

The package cannot share an environment with ours (its protobuf and pytest pins), so only its files are used:

    pip install --no-deps --target FOLDER hpsv2==1.2.0 clint==0.5.1 args==0.1.0
    PYTHONPATH=. python tests/rewards/score_with_hpsv2.py FOLDER CHECKPOINT MODEL_NAME > tests/rewards/hpsv2_golden.json

Two faults of its wheel are repaired on the way in: the vocabulary is missing (open_clip_torch has the same file), and a
stray import of turtle needs Tk.
"""

import json
import os
import shutil
import sys
import types
import warnings
from pathlib import Path

import open_clip
from PIL import Image

from tests.rewards.random_clip import PROMPTS, random_images


def main(folder: Path, checkpoint: str, model_name: str) -> None:
    """Score every picture against every prompt."""
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(Path(open_clip.__file__).with_name(vocabulary), folder / "hpsv2/src/open_clip" / vocabulary)
    sys.modules["turtle"] = types.SimpleNamespace(forward=None)
    sys.path.insert(0, str(folder))
    os.environ["HPS_ROOT"] = str(folder / "unused")
    warnings.simplefilter("ignore")
    from hpsv2 import img_score
    from hpsv2.src.open_clip import create_model_and_transforms

    # As its initialize_model does, without the download of base weights that it overwrites anyway.
    model, _, preprocess = create_model_and_transforms(
        model_name, None, precision="amp", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    images = [Image.fromarray(image) for image in random_images()]
    scores = {prompt: [float(score) for score in img_score.score(images, prompt, checkpoint)] for prompt in PROMPTS}
    sys.stdout.write(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
