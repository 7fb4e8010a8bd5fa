import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lumina_checkpoints import STRINGS, WORDS, edit_json, layout_of, random_vq, random_weights, write_lumina
from unirl.config import ImageSampling, ModelConfig, RlConfig, RolloutConfig, SamplingConfig, TextSampling
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.models.lumina_prompts import ANSWER_SYSTEM, DRAW_SYSTEM, PUBLIC_IDS
from unirl.models.policy import MaskedDiffusionPolicy, Scoring, load_policy, load_prompts
from unirl.types import GenerationSample, LearnerRow, UnderstandingSample

MODEL = ModelConfig(family="lumina_dimoo")
SAMPLING = SamplingConfig(text=TextSampling(max_tokens=8), image=ImageSampling(size=(12, 16), diffusion_steps=6))
GUIDED = Scoring(guidance_scale=3.0, text_temperature=0.7, image_temperature=0.9)
TABLE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
QUESTION = UnderstandingSample(
    id="q", image=np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8), question="what is on the mat ?",
    choices=("red", "blue"), answer="A",
)  # fmt: skip
DRAWING = GenerationSample(id="g", prompt="a red cat on a blue mat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_lumina(tmp_path_factory.mktemp("lumina") / "small")


@pytest.fixture(scope="module")
def policy(folder):
    """Nobody may change its weights."""
    return LuminaDimoo.load(MODEL, folder)


@pytest.fixture(scope="module")
def public_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lumina") / "public"
    return write_lumina(path, "public", factor=16, shard="20MB", dtype=torch.bfloat16)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def row_of(policy, sample, seed=0, sampling=SAMPLING):
    """Random values, revealed in three steps."""
    rng = np.random.default_rng(seed)
    drawing = isinstance(sample, GenerationSample)
    canvas = policy.encode(sample, sampling).ids
    length = int((canvas == policy.prompts.ids.mask).sum())
    choices = np.arange(policy.prompts.num_codes) if drawing else np.flatnonzero(policy.prompts.allowed_text_ids())
    return LearnerRow(
        task="generation" if drawing else "understanding",
        prompt_ids=canvas,
        image=None,
        completion_ids=rng.choice(choices, length).astype(np.int32),
        loss_mask=np.ones(length, bool),
        old_logprobs=np.zeros(length, np.float32),
        advantage=1.0,
        unmask_step=rng.permutation(np.arange(length) % 3).astype(np.int16),
    )


@torch.no_grad()
def scores_of(policy, rows, scoring=GUIDED):
    return [passed.logprobs for passed in policy.score(rows, scoring)]


def test_the_published_layout_loads_sharded_and_in_bfloat16(public_folder):
    assert len(list(public_folder.glob("model-*.safetensors"))) > 1
    policy = load_policy(replace(MODEL, dtype="bfloat16"), public_folder)
    assert isinstance(policy, MaskedDiffusionPolicy)
    assert {role: getattr(policy.prompts.ids, role) for role in PUBLIC_IDS} == PUBLIC_IDS
    source = random_weights(layout_of("public"), 0, torch.bfloat16)
    assert policy.module.state_dict().keys() == source.keys() == policy.shapes.keys()
    for name, value in policy.module.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, source[name]), name
    assert not torch.equal(policy.module.state_dict()[HEAD], policy.module.state_dict()[TABLE])
    config = policy.module.config
    assert (config.d_model, config.n_heads, config.rope_theta, config.rms_norm_eps) == (64, 2, 5e5, 1e-5)
    assert not policy.module.training
    assert policy.prompts.sizes.drawn == (512, 512)
    canvas = policy.encode(DRAWING, replace(SAMPLING, image=ImageSampling(size=(64, 48)))).ids
    assert (canvas == 126336).sum() == 12
    assert (canvas == 126084).sum() == 4
    assert (policy.prompts.draw_system, policy.prompts.answer_system) == (DRAW_SYSTEM, ANSWER_SYSTEM)
    law = policy.cell_law("generation", 1.0, 5.0)
    assert (law.start, law.stop, law.guidance_scale) == (126356, 134548, 5.0)


def test_shards_and_one_file_hold_the_same_model(policy, tmp_path):
    sharded = LuminaDimoo.load(MODEL, write_lumina(tmp_path / "s", shard="50KB"))
    assert (tmp_path / "s" / "model.safetensors.index.json").is_file()
    for name, value in sharded.module.state_dict().items():
        assert torch.equal(value, policy.module.state_dict()[name]), name


def test_tied_checkpoints_hold_one_table(tmp_path):
    policy = LuminaDimoo.load(MODEL, write_lumina(tmp_path / "t", tied=True))
    state = policy.module.state_dict()
    assert state[HEAD].data_ptr() == state[TABLE].data_ptr()
    assert HEAD not in policy.shapes
    policy.save(tmp_path / "out", state)
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    again = LuminaDimoo.load(MODEL, tmp_path / "out")
    assert torch.equal(again.module.state_dict()[HEAD], state[TABLE])


def test_loading_never_asks_for_leave_to_run_the_checkpoints_code(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    LuminaDimoo.load(MODEL, folder)
    assert asked == []


def test_a_saved_checkpoint_loads_back_whole(policy, folder, tmp_path):
    state = {name: value + 0.5 for name, value in policy.module.state_dict().items()}
    policy.save(tmp_path / "out", state)
    again = LuminaDimoo.load(MODEL, tmp_path / "out")
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert again.prompts.ids == policy.prompts.ids
    assert again.prompts.sizes == policy.prompts.sizes
    assert again.prompts.tokenizer.get_vocab() == policy.prompts.tokenizer.get_vocab()
    for file in sorted((folder / "vqvae").iterdir()):
        assert (tmp_path / "out" / "vqvae" / file.name).read_bytes() == file.read_bytes()
    codes = policy.vq.encode([QUESTION.image])
    assert np.array_equal(again.vq.encode([QUESTION.image])[0], codes[0])
    for row in (row_of(policy, QUESTION), row_of(policy, DRAWING)):
        assert not torch.equal(scores_of(again, [row])[0], scores_of(policy, [row])[0])
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    official = ("model_type", "d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size")
    assert {name: after[name] for name in official} == {name: before[name] for name in official}
    second = tmp_path / "second"
    again.save(second, again.module.state_dict())
    assert LuminaDimoo.load(MODEL, second).shapes == policy.shapes


def test_a_bfloat16_state_is_saved_and_said_to_be_bfloat16(policy, tmp_path):
    policy.save(tmp_path / "out", {name: value.bfloat16() for name, value in policy.module.state_dict().items()})
    assert load_file(tmp_path / "out" / "model.safetensors")[TABLE].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    assert policy.module.dtype == torch.float32


def test_saving_refuses_a_state_of_other_names(policy, tmp_path):
    state = {f"module.{name}": value for name, value in policy.module.state_dict().items()}
    with pytest.raises(ValueError, match="gather all parameters under the checkpoint's own names"):
        policy.save(tmp_path / "out", state)
    assert not (tmp_path / "out").exists()


def test_truncated_checkpoints_are_refused(copied):
    file = copied / "model.safetensors"
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if "blocks.1" not in name}, file)
    with pytest.raises(ValueError, match=r"without 9 of them, model\.transformer\.blocks\.1\.attn_norm\.weight"):
        LuminaDimoo.load(MODEL, copied)
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"expected a whole safetensors file; got 5000 bytes"):
        LuminaDimoo.load(MODEL, copied)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="convert the checkpoint to safetensors"):
        LuminaDimoo.load(MODEL, copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vqvae/config.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"with {name.rpartition('/')[2]}; got none"):
        LuminaDimoo.load(MODEL, copied)


def test_a_padded_head_is_refused(tmp_path):
    """A table that is padded to a round number would shift every image code."""
    folder, size = write_lumina(tmp_path / "c"), layout_of("small").size
    weights = load_file(folder / "model.safetensors")
    for name in (TABLE, HEAD):
        weights[name] = torch.cat([weights[name], torch.zeros(128 - size, weights[name].shape[1])])
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", vocab_size=128, embedding_size=128)
    with pytest.raises(ValueError, match=rf"expected a vocabulary of {size} ids, .*; got 128 in config\.json"):
        LuminaDimoo.load(MODEL, folder)


def test_a_config_of_other_weights_is_refused(copied):
    edit_json(copied / "config.json", mlp_hidden_size=100)
    with pytest.raises(ValueError, match=r"config\.json and the weights do not belong together"):
        LuminaDimoo.load(MODEL, copied)


def test_weights_that_are_not_finite_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    weights[TABLE][3, 3] = float("nan")
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match=rf"weight {TABLE}: expected finite values"):
        LuminaDimoo.load(MODEL, copied)


def test_a_tokenizer_without_the_newline_is_refused(public_folder, copied, tmp_path):
    roles = json.loads((copied / "tokenizer_config.json").read_text())["token_roles"]
    edit_json(copied / "tokenizer_config.json", token_roles={r: t for r, t in roles.items() if r != "newline"})
    with pytest.raises(ValueError, match=r"a string for every role under token_roles; got none for newline"):
        LuminaDimoo.load(MODEL, copied)
    # The published tokenizer has no string for it that the code knows: its number must be in the vocabulary.
    bare = tmp_path / "public"
    bare.mkdir()
    for file in public_folder.iterdir():
        if file.name != "tokenizer.json":
            (bare / file.name).symlink_to(file)
    tokenizer = json.loads((public_folder / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"][STRINGS["newline"]]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] != 126084]
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((public_folder / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").unlink()
    for key in ("extra_special_tokens", "additional_special_tokens"):
        config[key] = [text for text in config.get(key) or [] if text != STRINGS["newline"]]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"without ids for newline \(126084\); take the tokenizer files"):
        LuminaDimoo.load(MODEL, bare)


@pytest.mark.parametrize("part", ["aligner", "head"])
def test_a_part_to_freeze_that_there_is_not_is_refused(folder, part):
    with pytest.raises(ValueError, match=rf"model\.frozen: .* got \['vq', '{part}'\]; it has no {part}: leave it out"):
        LuminaDimoo.load(replace(MODEL, frozen=("vq", part)), folder)


@pytest.mark.parametrize(("model_type", "d_model"), [("janus", None), ("qwen2", 64), ("llada", None)])
def test_another_familys_config_is_refused(copied, model_type, d_model):
    edit_json(copied / "config.json", model_type=model_type, d_model=d_model)
    with pytest.raises(ValueError, match=rf"with d_model, .*; got model_type '{model_type}'; set model\.family to its"):
        LuminaDimoo.load(MODEL, copied)


def test_a_system_prompt_with_a_special_token_is_refused(folder):
    with pytest.raises(ValueError, match=r"model\.system_prompt: expected plain text; got the special token <answer>"):
        LuminaDimoo.load(replace(MODEL, system_prompt="write <answer> then think"), folder)
    assert LuminaDimoo.load(replace(MODEL, system_prompt="draw"), folder).prompts.draw_system == "draw"


def run_with(sampling):
    return RlConfig(rollout=RolloutConfig(sampling=sampling))


@pytest.mark.parametrize(
    ("text", "image", "key", "value", "fix"),
    [
        ({}, {"size": (14, 16)}, "image.size", (14, 16), "try [12, 16]"),
        ({}, {"size": (3, 9)}, "image.size", (3, 9), "try [4, 8]"),
        ({}, {"diffusion_steps": 13}, "image.diffusion_steps", 13, "try 12"),
        ({"diffusion_steps": 25}, {}, "text.diffusion_steps", 25, "try 24"),
        ({"block_length": 7}, {}, "text.block_length", 7, "try 24"),
        ({"block_length": 48}, {}, "text.block_length", 48, "try 24"),
        ({"block_length": 8, "diffusion_steps": 4}, {}, "text.diffusion_steps", 4, "try 6"),
        ({"block_length": 1, "diffusion_steps": 2}, {}, "text.diffusion_steps", 2, "try 24"),
    ],
)
def test_settings_that_cannot_be_are_named_with_a_fix_that_works(policy, text, image, key, value, fix):
    good = SamplingConfig(
        text=TextSampling(max_tokens=24, diffusion_steps=2),
        image=ImageSampling(size=(12, 16), diffusion_steps=1 if "size" in image else 12),
    )
    assert policy.find_problems(run_with(good)) == []
    bad = replace(good, text=replace(good.text, **text), image=replace(good.image, **image))
    (problem,) = policy.find_problems(run_with(bad))
    assert (problem.key, problem.value, problem.fix) == (f"rollout.sampling.{key}", value, fix)
    assert str(problem).startswith(f"rollout.sampling.{key} (")
    section, name = key.split(".")
    mended = replace(getattr(bad, section), **{name: json.loads(fix.removeprefix("try "))})
    assert policy.find_problems(run_with(replace(bad, **{section: mended}))) == []


def test_the_published_factor_is_16(public_folder):
    prompts = load_prompts(MODEL, public_folder)
    (problem,) = prompts.find_problems(run_with(SamplingConfig(image=ImageSampling(size=(520, 512)))))
    assert "must be two multiples of 16" in str(problem)
    assert problem.fix == "try [512, 512]"
    assert prompts.find_problems(RlConfig()) == []


def test_prompts_without_the_codes_of_an_image_are_at_least_as_long(folder, policy):
    prompts = load_prompts(MODEL, folder)
    for size in ((12, 12), (20, 28), (24, 24), (48, 12), (200, 90), (3, 40)):
        sample = replace(QUESTION, image=np.zeros((*size, 3), np.uint8))
        encoded = policy.encode(sample, SAMPLING)
        assert encoded.longest == len(encoded.ids) <= prompts.encode(sample, SAMPLING).longest
    assert np.array_equal(prompts.encode(DRAWING, SAMPLING).ids, policy.encode(DRAWING, SAMPLING).ids)


def test_a_questions_canvas_holds_the_codes_of_its_image(policy):
    canvas = policy.encode(QUESTION, SAMPLING).ids
    (codes,) = policy.vq.encode([QUESTION.image])
    first = policy.prompts.ids.first_code
    assert codes.shape == (5, 7)
    assert (canvas[canvas >= first] - first).tolist() == codes.flatten().tolist()


@pytest.mark.parametrize("sample", [QUESTION, DRAWING], ids=["question", "drawing"])
def test_a_row_without_a_reveal_step_for_each_cell_is_refused(policy, sample):
    row = row_of(policy, sample)
    cells = len(row.completion_ids)
    with pytest.raises(ValueError, match=rf"each of the {cells} cells .* got {cells} tokens and no reveal steps"):
        scores_of(policy, [row, replace(row, unmask_step=None)])
    short = replace(row, completion_ids=row.completion_ids[:3], unmask_step=row.unmask_step[:3])
    with pytest.raises(ValueError, match=rf"each of the {cells} cells .* got 3 tokens and 3 reveal steps; take"):
        scores_of(policy, [short])


def test_rows_of_both_tasks_are_refused(policy):
    with pytest.raises(ValueError, match=r"expected rows of one task; got \['generation', 'understanding'\]; make"):
        scores_of(policy, [row_of(policy, QUESTION), row_of(policy, DRAWING)])


def test_an_id_that_cannot_be_drawn_is_refused(policy):
    row = row_of(policy, QUESTION)
    row.completion_ids[2] = policy.prompts.ids.mask
    with pytest.raises(ValueError, match=r"expected tokens among the .* ids that the sampler may draw"):
        scores_of(policy, [row])


def test_rows_together_score_as_each_alone(policy):
    questions = [row_of(policy, replace(QUESTION, image=QUESTION.image[:rows]), rows) for rows in (20, 12, 16)]
    sizes = ((12, 16), (8, 8), (24, 24))
    drawings = [row_of(policy, DRAWING, size[0], replace(SAMPLING, image=ImageSampling(size=size))) for size in sizes]
    for rows in (questions, drawings):
        together = sum(scores_of(policy, rows))
        for own, row in zip(together, rows, strict=True):
            alone = sum(scores_of(policy, [row]))[0]
            assert torch.allclose(own[: len(alone)], alone, atol=5e-6)
            assert (own[len(alone) :] == 0).all()


def test_tokens_and_passes_of_a_row(policy):
    drawing, question = row_of(policy, DRAWING), row_of(policy, QUESTION)
    assert policy.tokens_per_row(drawing, GUIDED) == 2 * len(drawing.prompt_ids)
    assert policy.tokens_per_row(drawing, replace(GUIDED, image_logprob="conditional")) == len(drawing.prompt_ids)
    assert policy.tokens_per_row(question, GUIDED) == len(question.prompt_ids)
    assert policy.passes_per_row(drawing, GUIDED) == 3
    last = replace(question, loss_mask=question.unmask_step == 2)
    assert policy.passes_per_row(last, GUIDED) == 1


def ids_of(policy, text):
    return np.array([policy.prompts.tokenizer.convert_tokens_to_ids(word) for word in text.split()], np.int32)


@pytest.mark.parametrize(
    ("written", "end", "text"),
    [
        ("yes red cat", None, "yes red cat"),
        ("yes </answer> <answer_pad> <answer_pad>", 1, "yes"),
        ("yes <|endoftext|> no", 1, "yes <|endoftext|>"),
        ("yes <answer_pad> </answer>", 1, "yes"),
        ("</answer>", 0, ""),
    ],
)
def test_where_an_answer_ends_and_how_it_reads(policy, written, end, text):
    ids = ids_of(policy, written)
    assert policy.end_of(ids) == end
    assert policy.decode_text(ids) == text


def test_pictures_of_two_sizes_are_decoded_in_one_call(policy):
    rng = np.random.default_rng(0)
    sizes = ((12, 16), (16, 12), (8, 20), (12, 16))
    canvases = [policy.encode(DRAWING, replace(SAMPLING, image=ImageSampling(size=size))).ids for size in sizes]
    codes = [rng.integers(0, 24, size[0] * size[1] // 16).astype(np.int32) for size in sizes]
    pictures = policy.decode_images(codes, canvases)
    assert [picture.shape for picture in pictures] == [(*size, 3) for size in sizes]
    for picture, own, (height, width) in zip(pictures, codes, sizes, strict=True):
        (alone,) = policy.vq.decode([own.reshape(height // 4, width // 4)])
        assert np.abs(picture.astype(int) - alone).max() <= 1
    assert np.array_equal(policy.decode_images(codes[::-1], canvases[::-1])[0].shape, (12, 16, 3))


def test_an_answer_may_hold_words_and_ends_and_nothing_else(policy):
    allowed = policy.prompts.allowed_text_ids()
    ids, first = policy.prompts.ids, policy.prompts.ids.first_code
    assert allowed.shape == (first,)
    ends = (STRINGS["end_answer"], STRINGS["end_text"], STRINGS["answer_pad"])
    wanted = ids_of(policy, " ".join((*WORDS[1:], *ends)))
    assert np.flatnonzero(allowed).tolist() == sorted(wanted.tolist())
    for role in ("mask", "newline", "begin_image", "end_image", "uncondition", "begin_answer"):
        assert not allowed[getattr(ids, role)], role
    law = policy.cell_law("understanding", 0.7, 5.0)
    assert (law.start, law.stop, law.guidance_scale, law.mask_id) == (0, first, 1.0, ids.mask)
    assert law.allowed.tolist() == allowed.tolist()


def test_the_image_tokenizer_stays_outside_the_weights_and_in_float32(folder, policy):
    assert not any("vq" in name for name, _ in policy.module.named_parameters())
    half = LuminaDimoo.load(replace(MODEL, dtype="bfloat16"), folder)
    (code,) = half.vq.encode([QUESTION.image])
    assert np.array_equal(code, policy.vq.encode([QUESTION.image])[0])
    (scores, *_) = scores_of(half, [row_of(policy, DRAWING)])
    assert scores.dtype == torch.float32


def test_a_tokenizer_of_images_with_another_number_of_codes_is_refused(copied):
    shutil.rmtree(copied / "vqvae")
    random_vq(20, 4, 0).save_pretrained(copied / "vqvae")
    with pytest.raises(ValueError, match=r"which ends in 20 image codes .*; got 67 in config\.json"):
        LuminaDimoo.load(MODEL, copied)
