import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, ChameleonForConditionalGeneration

from unirl.config import ModelConfig
from unirl.lab.anole_student import load_model
from unirl.lab.exam import make_exam
from unirl.lab.tiny_anole import TOKENS, make_vq, make_weights, write_checkpoint
from unirl.lab.unified_visual import WORDS
from unirl.lab.world import NUM_CODES, question_with_choices
from unirl.models.policy import load_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "random"
    write_checkpoint(make_weights(0), make_vq(0), path)
    return path


def test_the_vocabulary_has_anoles_order_and_no_spare_id():
    assert TOKENS[:6] == ("<s>", "<pad>", "</s>", "<unk>", "IMGIMGAZ", "IMGIMGBZ")
    assert TOKENS[4 + NUM_CODES - 1] == "IMGIMGJFZ"
    assert TOKENS[4 + NUM_CODES :] == ("<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08707>", *WORDS)
    assert len(set(TOKENS)) == len(TOKENS)


def test_the_folder_has_every_file_of_the_public_layout(folder):
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    weights = load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    assert {"model.vqmodel.decoder.conv_out.weight", "model.embed_tokens.weight"} <= set(weights)
    assert json.loads((folder / "config.json").read_text())["vocabulary_map"]["<image>"] == TOKENS.index(
        "<reserved08707>"
    )


def test_the_layout_knows_the_codes_and_what_may_be_written(folder):
    layout = load_layout(ModelConfig(family="anole"), folder)
    vocabulary = layout.vocabulary
    assert (vocabulary.size, vocabulary.first_code, vocabulary.num_codes) == (len(TOKENS), 4, NUM_CODES)
    assert [TOKENS[i] for i in np.flatnonzero(vocabulary.drawable_text)] == ["</s>", "<racm3:break>", *WORDS]


def test_making_weights_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_vq(0)
    make_weights(0)
    assert torch.equal(torch.rand(3), expected)


def test_transformers_sees_the_same_codes_and_the_same_answer(shipped_path):
    path, exam = shipped_path.parent / "anole", make_exam(3)
    loaded, report = ChameleonForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert all(name.startswith("model.vqmodel.decoder.") for name in report["unexpected_keys"])
    ours, processor = load_model(path), AutoProcessor.from_pretrained(path)
    for image, codes, question in zip(exam.images, ours.codec.encode(exam.images), exam.questions, strict=True):
        text = question_with_choices(question.text, question.choices)
        inputs = processor(text=[processor.image_token + text], images=[Image.fromarray(image)])
        prompt = ours.prompt(text, image, codes)
        seen = loaded.model.get_image_tokens(inputs["pixel_values"])[0]
        assert seen.tolist() == (codes.flatten() + 4).tolist()
        ids = inputs["input_ids"][0]
        placeholder = ids == TOKENS.index("<reserved08707>")
        assert ids.where(~placeholder, -1).tolist() == [-1 if 4 <= id < 4 + NUM_CODES else id for id in prompt]
        with torch.no_grad():
            theirs = loaded(**inputs).logits[0, -1]
            hidden = ours.policy.module.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1:]
        text_ids = torch.from_numpy(ours.policy.layout.vocabulary.text_ids)
        torch.testing.assert_close(theirs[text_ids], ours.policy.logits(hidden, "text")[0], atol=1e-4, rtol=1e-4)


def test_the_tokenizer_splits_at_blanks_and_prepends_bos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a red circle").input_ids == [TOKENS.index(word) for word in ("<s>", "a", "red", "circle")]
    assert tokenizer.decode(tokenizer("a red circle", add_special_tokens=False).input_ids) == "a red circle"
