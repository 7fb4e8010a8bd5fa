import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, JanusForConditionalGeneration, JanusProcessor

from unirl.lab.data import make_heldout
from unirl.lab.plain_sampling import SamplingPlan, encode, sample_answers, sample_codes
from unirl.lab.tiny_janus import load_model, make_model, make_random_checkpoint, to_pixels, write_checkpoint
from unirl.lab.tokenizer import generation_prompt, understanding_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "random"
    make_random_checkpoint(path, 0)
    return path


def test_the_folder_has_every_file_a_janus_checkpoint_has(folder):
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert all(tensor.dtype == torch.float16 for tensor in load_file(folder / "model.safetensors").values())
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_it_loads_without_missing_or_unexpected_keys_and_ties_its_head(folder):
    model = load_model(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 1_016_371
    assert model.config.text_config.head_dim == 32
    assert model.config.text_config.tie_word_embeddings


def test_float16_keeps_the_weights_to_rounding(folder):
    written, loaded = make_model(0).state_dict(), load_model(folder).state_dict()
    assert written.keys() == loaded.keys()
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor.half().float()), name


def test_a_missing_tensor_is_an_error(folder, tmp_path):
    broken = tmp_path / "broken"
    make_random_checkpoint(broken, 0)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.generation_head.vision_head.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*unirl lab pretrain"):
        load_model(broken)


def test_the_codebook_lies_on_the_unit_sphere():
    codebook = make_model(1).model.vqmodel.quantize.embedding.weight
    assert torch.allclose(codebook.norm(dim=-1), torch.ones(96))


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_model(0)
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another path"):
        make_random_checkpoint(tmp_path, 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_older_checkpoint_is_replaced_and_nothing_else_stays_behind(tmp_path):
    path = tmp_path / "ckpt"
    write_checkpoint(make_model(0), path, {"a": 1})
    make_random_checkpoint(path, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]
    assert not (path / "lab.json").exists()
    assert torch.equal(load_model(path).lm_head.weight, make_model(1).lm_head.weight.half().float())


def test_transformers_own_processor_builds_the_labs_prompts_and_pixels(folder):
    processor, tokenizer = JanusProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sample = make_heldout(1)[0][0]
    choices = "A {} B {} C {} D {}".format(*sample.choices)
    text = f"<|User|>: <image_placeholder>\n{sample.question} {choices}\n\n<|Assistant|>:"
    inputs = processor(text=[text], images=[Image.fromarray(sample.image)])
    assert (
        inputs["input_ids"][0].tolist() == tokenizer(understanding_prompt(sample.question, sample.choices))["input_ids"]
    )
    assert torch.allclose(inputs["pixel_values"], to_pixels(sample.image[None]), atol=1e-6)
    inputs = processor(text=["<|User|>: a photo of a cross\n\n<|Assistant|>:"], generation_mode="image")
    assert inputs["input_ids"][0].tolist() == tokenizer(generation_prompt("a photo of a cross"))["input_ids"]


def test_greedy_sampling_equals_transformers_generate(shipped_path):
    model = JanusForConditionalGeneration.from_pretrained(shipped_path, dtype=torch.float32)
    processor = JanusProcessor.from_pretrained(shipped_path)
    understanding, generation = make_heldout(10)
    prompts = encode([generation_prompt(sample.prompt) for sample in generation], prompts=True)
    ours = sample_codes(model, prompts, SamplingPlan(seed=0, greedy=True, guidance=1.5))
    theirs = model.generate(
        prompts.ids, attention_mask=prompts.mask, generation_mode="image", do_sample=False, guidance_scale=1.5
    )
    assert torch.equal(ours, theirs)
    for sample in understanding[:5]:
        prompt = encode([understanding_prompt(sample.question, sample.choices)], prompts=True)
        pixels = to_pixels(sample.image[None])
        ids = model.generate(prompt.ids, attention_mask=prompt.mask, pixel_values=pixels, do_sample=False)
        text = processor.tokenizer.decode(ids[0, prompt.ids.shape[1] :])
        assert sample_answers(model, prompt, pixels, SamplingPlan(seed=0, greedy=True)) == [text]


def test_pixels_are_scaled_to_plus_minus_one():
    pixels = to_pixels(np.array([[[[0, 255, 51]]]], np.uint8))
    assert torch.allclose(pixels.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
