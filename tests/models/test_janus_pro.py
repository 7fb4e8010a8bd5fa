import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import JanusForConditionalGeneration, JanusProcessor

import unirl.lab
from tests.janus_checkpoints import edit_json, layout_of, random_model, write_janus
from unirl.config import ModelConfig
from unirl.lab.data import make_heldout
from unirl.models.interleaved import PackedRow
from unirl.models.janus_pro import IMAGES_AT_ONCE, JanusPro, load_layout
from unirl.models.janus_prompts import JanusPrompts
from unirl.models.policy import Scoring, load_policy
from unirl.types import Segment, Turn

GUIDED = Scoring(guidance_scale=3.0)


def native(folder):
    return JanusForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()


def only(passes):
    (scores,) = passes
    return scores


@pytest.fixture
def copied(janus_folder, tmp_path):
    return shutil.copytree(janus_folder, tmp_path / "copy")


@pytest.mark.parametrize("size", ["1B", "7B"])
def test_public_layouts_load_with_their_ids_and_untied_heads(size, tmp_path):
    folder = write_janus(tmp_path / size, size, shard="4MB")
    policy = load_policy(ModelConfig(), folder)
    layout = layout_of(size)
    assert {name: getattr(policy.prompts.ids, name) for name in ("pad", "bos", "eos", "boi", "eoi", "placeholder")} == {
        name: index for name, index in layout.ids.items() if name not in ("user", "assistant")
    }
    source = random_model(layout, 0).state_dict()
    for name, value in policy.module.state_dict().items():
        assert torch.equal(value, source[name]), name
    head, table = policy.module.lm_head.weight, policy.module.model.language_model.embed_tokens.weight
    assert not torch.equal(head, table)


def test_shards_and_one_file_hold_the_same_model(policy, tmp_path):
    sharded = JanusPro.load(ModelConfig(), write_janus(tmp_path / "s", shard="100KB"))
    assert (tmp_path / "s" / "model.safetensors.index.json").is_file()
    for name, value in policy.module.state_dict().items():
        assert torch.equal(value, sharded.module.state_dict()[name]), name


def test_config_that_does_not_say_tied_never_ties_two_heads(copied):
    edit_json(copied / "config.json", tie_word_embeddings=None)
    policy = JanusPro.load(ModelConfig(), copied)
    assert not policy.tied
    assert torch.equal(policy.module.lm_head.weight, load_file(copied / "model.safetensors")["lm_head.weight"])


def test_tied_checkpoint_has_one_table_for_both_ends(tmp_path):
    policy = JanusPro.load(ModelConfig(), write_janus(tmp_path / "t", tied=True))
    assert policy.tied
    assert policy.module.lm_head.weight is policy.module.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in policy.shapes


def test_wrong_family_is_refused(copied):
    edit_json(copied / "config.json", model_type="chameleon")
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of model_type 'janus'.*got 'chameleon'.*set model.family"
    ):
        JanusPro.load(ModelConfig(), copied)


def test_truncated_file_is_refused(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"expected a whole safetensors file.*get it again"):
        JanusPro.load(ModelConfig(), copied)


def test_checkpoint_without_a_tensor_is_refused(copied):
    state = load_file(copied / "model.safetensors")
    del state["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    for trunk in (True, False):
        with pytest.raises(ValueError, match=r"without 1 of them, model.language_model.layers.1.mlp.up_proj.weight"):
            JanusPro.load(ModelConfig(), copied, trunk=trunk)


def test_tensor_of_another_shape_is_refused(copied):
    state = load_file(copied / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"][:-1].contiguous()
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected lm_head.weight of shape \(64, 64\).*got \(63, 64\)"):
        JanusPro.load(ModelConfig(), copied)


def test_weights_with_nan_are_refused(copied):
    state = load_file(copied / "model.safetensors")
    state["lm_head.weight"][3, 3] = torch.nan
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weight lm_head.weight: expected finite values"):
        JanusPro.load(ModelConfig(), copied)


def test_missing_shard_and_pickled_weights_are_refused(tmp_path, copied):
    sharded = write_janus(tmp_path / "s", shard="100KB")
    next(iter(sorted(sharded.glob("model-00002*")))).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the shard model-00002.*download it"):
        JanusPro.load(ModelConfig(), sharded)
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"got \['pytorch_model.bin'\].*convert the checkpoint to safetensors"):
        JanusPro.load(ModelConfig(), copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"folder with {name}; got none"):
        JanusPro.load(ModelConfig(), copied)


def test_missing_preprocessor_is_never_replaced_by_clip_means(copied):
    (copied / "preprocessor_config.json").unlink()
    edit_json(copied / "processor_config.json", image_processor=None)
    with pytest.raises(FileNotFoundError, match=r"expected preprocessor_config.json"):
        JanusPro.load(ModelConfig(), copied)


def test_missing_token_string_is_named(copied):
    file = copied / "tokenizer.json"
    file.write_text(file.read_text().replace("<begin_of_image>", "<picture>"))
    config = copied / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<begin_of_image>", "<picture>"))
    with pytest.raises(ValueError, match=r"got none for <begin_of_image>; take the tokenizer"):
        JanusPro.load(ModelConfig(), copied)


def test_files_of_two_checkpoints_are_refused(copied):
    edit_json(copied / "config.json", image_token_id=9)
    with pytest.raises(ValueError, match=r"expected id of <image_placeholder> to be 9 as config.json says; got 5"):
        JanusPro.load(ModelConfig(), copied)


def test_unknown_frozen_part_is_refused(janus_folder):
    with pytest.raises(ValueError, match=r"expected names among \['aligner', 'vision', 'vq'\]; got 'head'"):
        JanusPro.load(ModelConfig(frozen=("head",)), janus_folder)


def test_pixels_equal_the_processors_own(policy, janus_folder, picture):
    processor = JanusProcessor.from_pretrained(janus_folder, local_files_only=True)
    wanted = processor(text=["<image_placeholder>"], images=[picture], input_data_format="channels_last")
    assert torch.equal(policy._pixels([picture]), wanted["pixel_values"])


def test_front_leaves_the_trunk_out_and_embeds_alike(policy, janus_folder, question):
    front = JanusPro.load(ModelConfig(), janus_folder, trunk=False)
    assert not any("layers" in name for name in front.module.state_dict() if "language_model" in name)
    assert front.shapes == policy.shapes
    prompt = policy.pad_prompts([policy.prompts.encode_understanding(question)])
    images = [question.image]
    assert torch.equal(front.embed_prompts(*prompt, images), policy.embed_prompts(*prompt, images))


def test_text_scores_equal_transformers_own_forward(policy, janus_folder, question, make_row):
    row = make_row(question)
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], dtype=torch.long)
    with torch.no_grad():
        logits = native(janus_folder)(input_ids=ids, pixel_values=policy._pixels([row.image])).logits[0]
    law = (logits[len(row.prompt_ids) - 1 : -1] / 0.7).masked_fill(~policy.allowed_text_ids, -torch.inf).log_softmax(-1)
    scores = only(policy.score([row], Scoring(text_temperature=0.7)))
    wanted = law.gather(1, torch.from_numpy(row.completion_ids).long()[:, None])[:, 0]
    assert scores.logprobs[0].detach().numpy() == pytest.approx(wanted.numpy(), abs=2e-6)
    entropy = -(law.exp() * law.masked_fill(law == -torch.inf, 0)).sum(-1)
    assert scores.entropy[0].numpy() == pytest.approx(entropy.numpy(), abs=2e-6)


def plain_image_logprobs(model, policy, row, scale, temperature=1.0):
    """One row, no padding, the native modules; null prompt: all but the first and last id is padding."""
    prompt = torch.from_numpy(row.prompt_ids).long()
    null = torch.full_like(prompt, policy.pad_id)
    null[0], null[-1] = prompt[0], prompt[-1]
    codes = torch.from_numpy(row.completion_ids).long()
    logits = []
    for ids in (prompt, null):
        inputs = torch.cat(
            [model.get_input_embeddings()(ids[None]), model.prepare_embeddings_for_image_generation(codes[None, :-1])],
            1,
        )
        hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits.append(model.model.generation_head(hidden[0, len(ids) - 1 :]))
    cond, uncond = logits
    law = ((uncond + scale * (cond - uncond)) / temperature).log_softmax(-1)
    return law.gather(1, codes[:, None])[:, 0]


@pytest.mark.parametrize("mode", ["guided", "conditional"])
def test_image_scores_and_gradients_equal_a_plain_loop(policy, janus_folder, drawing, make_row, mode):
    rows = [make_row(drawing, seed=1), make_row(replace(drawing, prompt="yes cat"), seed=2)]
    scoring = Scoring(guidance_scale=3.0, image_logprob=mode, image_temperature=0.8)
    model = native(janus_folder)
    plain = [plain_image_logprobs(model, policy, row, 3.0 if mode == "guided" else 1.0, 0.8) for row in rows]
    torch.stack(plain).sum().backward()
    scores = only(policy.score(rows, scoring))
    scores.logprobs.sum().backward()
    assert scores.logprobs.detach().numpy() == pytest.approx(torch.stack(plain).detach().numpy(), abs=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert functional.cosine_similarity(gradient.flatten(), wanted[name].flatten(), 0) > 1 - 1e-6, name
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-4 * wanted[name].abs().max()), name


def test_guidance_gap_is_the_distance_between_the_two_modes(policy, drawing, make_row):
    rows = [make_row(drawing)]
    with torch.no_grad():
        guided = only(policy.score(rows, GUIDED))
        conditional = only(policy.score(rows, replace(GUIDED, image_logprob="conditional")))
    gap = (guided.logprobs - conditional.logprobs).abs().sum()
    assert guided.metrics["guidance_gap"] == pytest.approx(gap.item(), rel=1e-5)
    assert gap > 1
    assert not conditional.metrics


def test_null_condition_keeps_begin_of_text_and_of_image_only(policy, drawing):
    prompt = torch.from_numpy(policy.prompts.encode_generation(drawing)).long()
    null = policy.unconditional(prompt)
    ids = policy.prompts.ids
    assert null.tolist() == [ids.bos] + [ids.pad] * (len(prompt) - 2) + [ids.boi]


def test_padding_order_and_micro_batch_change_nothing(policy, question, drawing, make_row):
    texts = [make_row(question, 1, 3), make_row(replace(question, question="what is the dog on ?"), 2, 9)]
    texts.append(make_row(replace(question, image=np.ascontiguousarray(question.image[::-1])), 3, 1))
    images = [make_row(replace(drawing, prompt=" ".join(["cat"] * count)), count) for count in (1, 7, 4)]
    for rows in (texts, images):
        together = only(policy.score(rows, GUIDED)).logprobs.detach()
        turned = only(policy.score(rows[::-1], GUIDED)).logprobs.detach().flip(0)
        assert torch.allclose(together, turned, atol=2e-6)
        for index, row in enumerate(rows):
            alone = only(policy.score([row], GUIDED)).logprobs.detach()
            assert torch.allclose(together[index, : len(row.completion_ids)], alone[0], atol=2e-6)
            assert (together[index, len(row.completion_ids) :] == 0).all()


def test_placeholder_in_an_answer_takes_no_image_feature(policy, question, make_row):
    row = make_row(question)
    row.completion_ids[2] = policy.prompts.ids.placeholder
    row.loss_mask[2] = False
    scores = only(policy.score([row], Scoring()))
    assert scores.scored[0].tolist() == [True, True, False, True, True]
    assert torch.isfinite(scores.logprobs).all()


def test_id_that_cannot_be_sampled_is_refused(policy, question, make_row):
    row = make_row(question)
    row.completion_ids[2] = policy.pad_id
    with pytest.raises(ValueError, match="row 0, position 2"):
        only(policy.score([row], Scoring()))


def test_each_distinct_image_is_seen_once_and_frozen_parts_get_no_gradient(policy, question, make_row):
    seen = []
    policy.module.model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    rows = [make_row(question, seed) for seed in range(4)]
    only(policy.score(rows, Scoring())).logprobs.sum().backward()
    assert seen == [1]
    grads = {name for name, p in policy.module.named_parameters() if p.grad is not None}
    assert not any("vision_model" in name or "vqmodel" in name for name in grads)
    assert any("aligner" in name for name in grads)


def test_a_sampler_sees_many_images_part_by_part_and_a_learner_at_once(policy, question, make_row):
    seen = []
    policy.module.model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    images = [question.image.copy() for _ in range(IMAGES_AT_ONCE + 1)]
    row = make_row(question)
    only(policy.score([replace(row, image=image) for image in images], Scoring()))
    ids, mask = policy.pad_prompts([row.prompt_ids] * len(images))
    with torch.inference_mode():
        policy.embed_prompts(ids, mask, images)
    assert seen == [IMAGES_AT_ONCE + 1, IMAGES_AT_ONCE, 1]


def test_vision_tower_learns_when_not_frozen(janus_folder, question, make_row):
    policy = JanusPro.load(ModelConfig(frozen=("vq",)), janus_folder)
    only(policy.score([make_row(question)], Scoring())).logprobs.sum().backward()
    assert policy.module.model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient(policy, janus_folder, drawing, make_row):
    other = JanusPro.load(ModelConfig(), janus_folder)
    other.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.module.train()
    for each in (policy, other):
        only(each.score([make_row(drawing)], GUIDED)).logprobs.sum().backward()
    for (name, a), b in zip(policy.module.named_parameters(), other.module.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_tokens_per_row_counts_both_streams(policy, drawing, question, make_row):
    row, text = make_row(drawing), make_row(question)
    length = len(row.prompt_ids) + len(row.completion_ids)
    assert policy.tokens_per_row(row, GUIDED) == 2 * length
    assert policy.tokens_per_row(row, replace(GUIDED, image_logprob="conditional")) == length
    assert policy.tokens_per_row(text, GUIDED) == len(text.prompt_ids) + len(text.completion_ids)
    assert policy.passes_per_row(row, GUIDED) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: replace(row, image=None), "expected 0 image placeholders.*got 16"),
        (lambda row: replace(row, prompt_ids=row.prompt_ids[-6:]), "expected 16 image placeholders.*got 0"),
        (lambda row: replace(row, image=np.zeros((0, 4, 3), np.uint8)), "expected RGB pixels.*got shape"),
    ],
)
def test_image_and_prompt_must_belong_together(policy, question, make_row, change, message):
    with pytest.raises(ValueError, match=message):
        only(policy.score([change(make_row(question))], Scoring()))


def test_mixed_tasks_and_partial_images_are_refused(policy, question, drawing, make_row):
    with pytest.raises(ValueError, match="expected rows of one task"):
        only(policy.score([make_row(question), make_row(drawing)], Scoring()))
    row = make_row(drawing)
    short = replace(row, completion_ids=row.completion_ids[:3], loss_mask=row.loss_mask[:3])
    with pytest.raises(ValueError, match="expected images of 16 codes; got 3"):
        only(policy.score([short], Scoring()))


def test_decoding_normalises_code_vectors_and_equals_the_native_decoder(policy, janus_folder):
    codes = np.random.default_rng(0).integers(0, policy.num_codes, (3, 16)).astype(np.int32)
    pictures = policy.decode_images(codes)
    assert [picture.shape for picture in pictures] == [(8, 8, 3)] * 3
    with torch.no_grad():
        pixels = native(janus_folder).decode_image_tokens(torch.from_numpy(codes).long())
    assert np.abs(np.stack(pictures) - ((pixels.numpy() + 1) * 127.5).clip(0, 255)).max() <= 0.51
    policy.module.model.vqmodel.quantize.embedding.weight.data.mul_(7)
    assert np.array_equal(policy.decode_images(codes), pictures)


def test_decoding_refuses_ids_of_the_joint_vocabulary_and_partial_images(policy):
    with pytest.raises(ValueError, match=r"codes in 0\.\.47; got 64\.\.64"):
        policy.decode_images(np.full((1, 16), 64, np.int32))
    with pytest.raises(ValueError, match=r"expected codes \[16\] each; got \{\(9,\)\}"):
        policy.decode_images(np.zeros((1, 9), np.int32))


def test_encoding_takes_the_code_of_the_largest_cosine(policy, picture):
    codes = policy.encode_images([picture, picture[:, ::-1]])
    vq = policy.module.model.vqmodel
    with torch.no_grad():
        features = vq.quant_conv(vq.encoder(policy._pixels([picture])))[0].flatten(1).T
    for place, feature in enumerate(features):
        cosines = [functional.cosine_similarity(feature, code, 0) for code in vq.quantize.embedding.weight]
        assert codes[0, place] == int(torch.stack(cosines).argmax())
    assert codes.shape == (2, 16)


def test_saved_checkpoint_loads_alike_here_and_in_transformers(policy, tmp_path, drawing, make_row):
    policy.save(tmp_path / "out", policy.module.state_dict())
    again = JanusPro.load(ModelConfig(), tmp_path / "out")
    rows = [make_row(drawing)]
    assert torch.equal(only(policy.score(rows, GUIDED)).logprobs, only(again.score(rows, GUIDED)).logprobs)
    theirs = native(tmp_path / "out")
    assert torch.equal(theirs.lm_head.weight, policy.module.lm_head.weight)
    assert JanusProcessor.from_pretrained(tmp_path / "out", local_files_only=True).num_image_tokens == 16


def test_saving_refuses_a_state_of_other_names(policy, tmp_path):
    state = {f"module.{name}": value for name, value in policy.module.state_dict().items()}
    with pytest.raises(ValueError, match="gather all parameters under the checkpoint's own names"):
        policy.save(tmp_path / "out", state)


def test_tied_state_may_name_the_table_twice(tmp_path):
    policy = JanusPro.load(ModelConfig(), write_janus(tmp_path / "t", tied=True))
    policy.save(tmp_path / "out", policy.module.state_dict())
    assert JanusPro.load(ModelConfig(), tmp_path / "out").tied


def test_bfloat16_keeps_heads_and_image_decoder_in_float32(janus_folder, drawing, make_row):
    policy = JanusPro.load(ModelConfig(dtype="bfloat16"), janus_folder)
    assert policy.module.lm_head.weight.dtype == torch.bfloat16
    scores = only(policy.score([make_row(drawing)], GUIDED))
    assert scores.logprobs.dtype == torch.float32
    codes = np.zeros((1, 16), np.int32)
    assert np.array_equal(policy.decode_images(codes), JanusPro.load(ModelConfig(), janus_folder).decode_images(codes))
    policy.module.bfloat16()
    assert policy.decode_images(codes)[0].shape == (8, 8, 3)


def says(role, *parts):
    segments = [Segment(**{"text" if isinstance(part, str) else "image": part}) for part in parts]
    return Turn(role=role, segments=tuple(segments))


@pytest.mark.parametrize("system", [None, "what is the cat"])
def test_a_conversation_begins_as_the_two_prompts_do(janus_folder, question, drawing, system):
    policy = JanusPro.load(ModelConfig(system_prompt=system), janus_folder)
    options = "\n".join((question.question, "A red", "B blue"))
    asked = policy.layout.encode((says("user", question.image, options),), [])
    assert asked.ids.tolist() == policy.prompts.encode_understanding(question).tolist()
    assert torch.equal(policy._pixels(asked.pixels), policy._pixels([question.image]))
    wanted = policy.prompts.encode_generation(drawing).tolist()
    assert [*policy.layout.encode((says("user", drawing.prompt),), []).ids.tolist(), policy.prompts.ids.boi] == wanted


def test_lab_conversations_begin_as_its_prompts_do():
    folder = Path(unirl.lab.__file__).parent / "checkpoints" / "janus"
    layout, prompts = load_layout(ModelConfig(), folder), JanusPrompts.load(folder, None)
    for asked, drawn in zip(*make_heldout(20, 0), strict=True):
        lines = [asked.question, *(f"{letter} {choice}" for letter, choice in zip("ABCD", asked.choices, strict=False))]
        turn = says("user", asked.image, "\n".join(lines))
        assert layout.encode((turn,), []).ids.tolist() == prompts.encode_understanding(asked).tolist()
        ids = layout.encode((says("user", drawn.prompt),), []).ids.tolist()
        assert [*ids, layout.image.begin] == prompts.encode_generation(drawn).tolist()


def test_an_answer_with_an_image_by_hand(policy):
    ids, layout = policy.prompts.ids, policy.layout
    words = policy.prompts.tokenizer.get_vocab()
    codes = np.arange(16, dtype=np.int32).reshape(4, 4)
    turns = (says("user", "a cat"), says("assistant", "red :", np.zeros((8, 8, 3), np.uint8), "yes"))
    sequence = layout.encode(turns, [codes])
    prompt = [ids.bos, words["<|User|>"], words[":"], words["a"], words["cat"], words["<|Assistant|>"], words[":"]]
    image = [ids.boi, *range(64, 80), ids.eoi]
    assert sequence.ids.tolist() == [*prompt, words["red"], words[":"], *image, words["yes"], ids.eos]
    assert (layout.vocabulary.first_code, layout.vocabulary.size, layout.end) == (64, 64 + 48, ids.eos)
    assert not sequence.pixels


def test_conversation_scores_are_those_of_reinforcement_learning(policy, question, drawing, make_row):
    answer, image = make_row(question), make_row(drawing)
    codes = image.completion_ids + policy.layout.vocabulary.first_code
    ids = np.concatenate([answer.prompt_ids, answer.completion_ids, image.prompt_ids, codes])
    lengths = (len(answer.prompt_ids) + len(answer.completion_ids), len(image.prompt_ids) + len(codes))
    row = PackedRow(ids=torch.from_numpy(ids).long(), lengths=lengths, pixels=(answer.image,))
    states = policy.hidden_states_of(row).split(lengths)
    for scored, part, state in ((answer, "text", states[0]), (image, "image", states[1])):
        logits = policy.logits(state[len(scored.prompt_ids) - 1 : -1], part)
        if part == "text":
            logits = logits.masked_fill(~policy.allowed_text_ids, -torch.inf)
        found = logits.log_softmax(-1).gather(1, torch.from_numpy(scored.completion_ids).long()[:, None])[:, 0]
        assert torch.allclose(found, only(policy.score([scored], Scoring())).logprobs[0], atol=5e-6)


def test_every_module_is_called_once_whatever_a_row_holds(janus_folder, picture):
    policy = JanusPro.load(ModelConfig(frozen=("vq",)), janus_folder)
    model, calls = policy.module.model, []
    watched = {name: getattr(model, name) for name in ("vision_model", "aligner", "generation_embeddings")}
    watched |= {"generation_aligner": model.generation_aligner, "table": model.language_model.embed_tokens}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    words = (says("user", "a cat"), says("assistant", "yes"))
    shown = (says("user", picture, "is", picture.copy()), says("assistant", picture))
    for turns in (words, shown):
        calls.clear()
        policy.module.zero_grad()
        codes = [np.zeros((4, 4), np.int32) for _ in policy.layout.images_to_code(turns)]
        sequence = policy.layout.encode(turns, codes)
        row = PackedRow(ids=torch.from_numpy(sequence.ids).long(), lengths=(len(sequence.ids),), pixels=sequence.pixels)
        states = policy.hidden_states_of(row)
        (policy.logits(states, "text").sum() + policy.logits(states[:0], "image").sum()).backward()
        assert sorted(calls) == sorted(watched)
        without = {name for name, value in policy.module.named_parameters() if value.grad is None}
        assert {name.split(".")[1] for name in without} == {"vqmodel"}


def test_pixels_and_placeholders_of_a_packed_row_must_agree(policy, picture):
    sequence = policy.layout.encode((says("user", picture, "is"),), [])
    row = PackedRow(ids=torch.from_numpy(sequence.ids).long(), lengths=(len(sequence.ids),))
    with pytest.raises(ValueError, match="packed row: expected 0 image placeholders for 0 images; got 16; keep"):
        policy.hidden_states_of(row)


def test_packed_images_go_to_their_places_in_order(policy, picture):
    first, second = picture, picture[::-1].copy()
    turns = (says("user", first, second, "is"),)
    sequence = policy.layout.encode(turns, [])
    ids = torch.from_numpy(sequence.ids).long()
    row = PackedRow(ids=ids, lengths=(len(ids),), pixels=sequence.pixels)
    whole = policy.hidden_states_of(row)
    prompt = policy.pad_prompts([sequence.ids])
    with torch.no_grad():
        embedded = policy.embed_text(prompt[0])
        features = torch.cat([policy._image_features([image])[id(image)] for image in (first, second)])
        embedded[prompt[0] == policy.prompts.ids.placeholder] = features
        wanted = policy.hidden_states(embedded, prompt[1])[0]
    assert torch.allclose(whole, wanted, atol=5e-6)
    turned = PackedRow(ids=ids, lengths=(len(ids),), pixels=sequence.pixels[::-1])
    assert not torch.allclose(policy.hidden_states_of(turned), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "kept_size"),
    [((40, 25), (8, 8)), ((9, 8), (8, 8)), ((300, 2), (8, 8)), ((8, 8), (8, 8)), ((3, 5), (3, 5))],
)
def test_a_picture_of_a_conversation_is_kept_as_the_model_looks_at_it(policy, size, kept_size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    turns = says("user", image, "what is the cat"), says("assistant", "A red")
    (kept,) = policy.layout.encode(turns, []).pixels
    assert kept.shape == (*kept_size, 3)
    assert torch.equal(policy._pixels([kept]), policy._pixels([image]))
