import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.rewards.groups import answers, pictures, question
from tests.rewards.random_clip import MODEL_NAME, PROMPTS, SIZES_PX, random_images, random_state, save_checkpoint
from unirl.rewards.hpsv2 import Hpsv2Reward, preprocess

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "hpsv2_golden.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("hpsv2") / "HPS_v2.1_compressed.pt")


@pytest.fixture(scope="module")
def reward(checkpoint):
    return Hpsv2Reward(checkpoint=checkpoint, model_name=MODEL_NAME, batch_size=3, device="cpu")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_equal_those_of_the_original_package(reward, prompt):
    scores = reward.score(pictures(prompt, random_images()))
    assert scores.values.dtype == np.float32
    assert scores.judged.all()
    np.testing.assert_allclose(scores.values, GOLDEN[prompt], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_golden_scores_come_from_the_original_package(checkpoint, tmp_path):
    packages = ["hpsv2==1.2.0", "clint==0.5.1", "args==0.1.0"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *packages]
    subprocess.run(pip, check=True)
    script = [sys.executable, str(HERE / "score_with_hpsv2.py"), str(tmp_path), str(checkpoint), MODEL_NAME]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    printed = subprocess.run(script, check=True, capture_output=True, env=environment).stdout
    fresh = json.loads(printed)
    assert fresh.keys() == GOLDEN.keys()
    for prompt, scores in fresh.items():
        np.testing.assert_allclose(scores, GOLDEN[prompt], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_size_loads_and_scores(tmp_path):
    path = save_checkpoint(tmp_path / "HPS_v2_compressed.pt", "ViT-H-14")
    size = path.stat().st_size
    code = f"""
import resource, numpy as np
from pathlib import Path
from tests.rewards.groups import pictures
from tests.rewards.random_clip import random_images
from unirl.rewards.hpsv2 import Hpsv2Reward
reward = Hpsv2Reward(checkpoint=Path({str(path)!r}), version="v2.0", device="cpu")
scores = reward.score(pictures("a photo", random_images(((64, 64), (100, 60)))))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak, *scores.values)
"""
    run = [sys.executable, "-c", code]
    printed = subprocess.run(run, check=True, capture_output=True, text=True, cwd=HERE.parents[1]).stdout
    path.unlink()
    peak, *values = map(float, printed.split())
    assert 3.9e9 < size < 4.0e9
    assert len(values) == 2
    assert all(-1 <= value <= 1 for value in values)
    assert values[0] != values[1]
    assert peak < 6.5e9


def test_batch_size_and_company_leave_scores_alone(reward):
    images = random_images()
    together = reward.score(pictures(PROMPTS[0], images)).values
    alone = [reward.score(pictures(PROMPTS[0], [image])).values[0] for image in images]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_the_prompt_is_encoded_once_and_images_in_batches(reward, monkeypatch):
    calls = {"text": [], "image": []}
    for tower in calls:
        encode = getattr(reward._model, f"encode_{tower}")

        def counted(batch, normalize, tower=tower, encode=encode):
            calls[tower].append(len(batch))
            return encode(batch, normalize=normalize)

        monkeypatch.setattr(reward._model, f"encode_{tower}", counted)
    reward.score(pictures(PROMPTS[0], random_images()))
    assert calls == {"text": [1], "image": [3, 3, 1]}


def test_a_wide_picture_is_scaled_by_its_longest_side_and_padded_with_black():
    image = np.full((100, 200, 3), 255, np.uint8)
    pixels = preprocess(image, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    unit = pixels * std + mean
    assert pixels.shape == (3, 224, 224)
    torch.testing.assert_close(unit[:, 56:168], torch.ones(3, 112, 224))
    torch.testing.assert_close(unit[:, :56], torch.zeros(3, 56, 224))
    torch.testing.assert_close(unit[:, 168:], torch.zeros(3, 56, 224))


@pytest.mark.parametrize(("height", "width"), [*SIZES_PX, (224, 160), (160, 224), (1, 1), (2, 1000), (1000, 1)])
def test_every_shape_becomes_a_square(height, width):
    pixels = preprocess(np.full((height, width, 3), 9, np.uint8), 224)
    assert pixels.shape == (3, 224, 224)
    assert pixels.isfinite().all()


def test_alpha_is_dropped():
    image = random_images(((30, 40),))[0]
    with_alpha = np.dstack([image, np.zeros((30, 40), np.uint8)])
    torch.testing.assert_close(preprocess(with_alpha, 32), preprocess(image, 32), rtol=0, atol=0)


def test_safetensors_give_the_same_scores(reward, tmp_path):
    save_file(random_state(), tmp_path / "hps.safetensors")
    other = Hpsv2Reward(checkpoint=tmp_path / "hps.safetensors", model_name=MODEL_NAME, device="cpu")
    group = pictures(PROMPTS[0], random_images())
    np.testing.assert_allclose(other.score(group).values, reward.score(group).values, rtol=0, atol=1e-6)


def refused(path, *words, error=ValueError, **options):
    with pytest.raises(error) as caught:
        Hpsv2Reward(checkpoint=path, model_name=MODEL_NAME, device="cpu", **options)
    for word in (*words, "hpsv2: expected", "got"):
        assert word in str(caught.value)


class Malicious:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": {}, "extra": Malicious(tmp_path / "ran")}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "running code", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_refused(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for name, data in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    refused(tmp_path / "cut.safetensors", "truncated", "100 bytes")
    refused(tmp_path / "none.pt", "none.pt", "xswu/HPSv2", error=FileNotFoundError)


def test_other_layouts_are_refused(tmp_path):
    state = {"visual.proj": torch.zeros(2, 2), "stray": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "small.pt")
    refused(tmp_path / "small.pt", "missing", "1 unexpected: stray", "visual.proj (2, 2) for (384, 256)")
    torch.save({"model": state}, tmp_path / "key.pt")
    refused(tmp_path / "key.pt", "state_dict", "['model']")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "state_dict", "list")


def test_wrong_options_are_refused(checkpoint):
    refused(checkpoint, "v2.0", version="v2.0")
    refused(checkpoint, "'v3'", version="v3")
    refused(checkpoint, "batch_size", batch_size=0)
    refused(checkpoint, "float16", precision="float16")
    with pytest.raises(ValueError, match="open_clip architecture; got 'ViT-X'"):
        Hpsv2Reward(checkpoint=checkpoint, model_name="ViT-X", device="cpu")


def test_answers_are_refused_with_the_place_to_look(reward):
    with pytest.raises(ValueError, match=r"rewards\.generation"):
        reward.score(answers(question(), ["<answer> B </answer>"]))


def test_a_score_that_is_not_finite_is_not_judged(checkpoint, tmp_path):
    state = random_state()
    state["visual.proj"][:] = float("nan")
    torch.save({"state_dict": state}, tmp_path / "nan.pt")
    broken = Hpsv2Reward(checkpoint=tmp_path / "nan.pt", model_name=MODEL_NAME, device="cpu")
    scores = broken.score(pictures("p", random_images()[:2]))
    assert not scores.judged.any()
    assert "NaN" in scores.problem


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_a_gpu_scores_like_the_original_on_a_cpu(checkpoint, precision, tolerance):
    reward = Hpsv2Reward(checkpoint=checkpoint, model_name=MODEL_NAME, device="cuda", precision=precision)
    scores = reward.score(pictures(PROMPTS[0], random_images()))
    np.testing.assert_allclose(scores.values, GOLDEN[PROMPTS[0]], rtol=0, atol=tolerance)
