"""What every family must keep that can be fine-tuned on conversations."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.janus_checkpoints import edit_json
from tests.models.conversations import CASES, ONE_EACH, codes_of, dialogues, pack, picture, say, targets_of, written
from tests.models.theirs import head_rows, rounding, their_model, their_states
from unirl.algorithms.cross_entropy import masked_cross_entropy, sliced_cross_entropy
from unirl.config import ModelConfig
from unirl.models.policy import load_interleaved, load_layout, load_policy, load_prompts
from unirl.types import TokenKind

BEGIN = {"anole": "<racm3:break>", "emu3": "<|image start|>", "liquid": "<boi>", "janus_pro": "<begin_of_image>"}
BEGIN |= {"emu3 native": BEGIN["emu3"], "liquid tied": BEGIN["liquid"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {case: written(tmp_path_factory.mktemp(case.replace(" ", "_")) / "c", case) for case in CASES}


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def policy(case, folders):
    return load_interleaved(*folders[case])


def only_these(*cases):
    return pytest.mark.parametrize("case", cases)


def test_states_equal_transformers_own_in_any_company_and_order(policy, case, folders):
    model, sequences = their_model(case, folders[case][1]), dialogues(policy.layout)
    alone = [their_states(model, sequence) for sequence in sequences]
    for order in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 1, 0, 2]):
        with torch.no_grad():
            states = policy.hidden_states_of(pack([sequences[index] for index in order]))
        for index, found in zip(order, states.split([len(sequences[index].ids) for index in order]), strict=True):
            torch.testing.assert_close(found, alone[index], atol=rounding(case), rtol=1e-6)


def test_what_is_saved_is_the_public_layout_again(policy, case, folders, tmp_path):
    source = folders[case][1]
    with torch.no_grad():
        for value in policy.module.parameters():
            value.mul_(1.01)
    policy.save(tmp_path / "out", policy.module.state_dict())
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    sequence, model = dialogues(policy.layout)[1], their_model(case, tmp_path / "out")
    again = load_interleaved(folders[case][0], tmp_path / "out")
    with torch.no_grad():
        states = policy.hidden_states_of(pack([sequence]))
        torch.testing.assert_close(states, their_states(model, sequence), atol=rounding(case), rtol=1e-6)
        assert torch.equal(again.hidden_states_of(pack([sequence])), states)
        logits = policy.logits(states, "both")
        torch.testing.assert_close(logits[:, policy.layout.vocabulary.text_ids], policy.logits(states, "text"))
        head = model.lm_head(states)
        torch.testing.assert_close(logits[:, : head.shape[1]], head, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"save: expected the .* weights .*checkpoint's own names"):
        policy.save(tmp_path / "other", {f"module.{name}": value for name, value in after.items()})


def parts_of(vocabulary, targets):
    """For each modality: its targets, and where they are among its ids."""
    is_code = torch.from_numpy(vocabulary.is_code)
    text_ids = torch.from_numpy(vocabulary.text_ids)
    own = is_code[targets]
    yield (
        "text",
        ~own,
        torch.searchsorted(text_ids, targets[~own]),
        torch.from_numpy(vocabulary.drawable_text)[text_ids],
    )
    yield "image", own, targets[own] - vocabulary.first_code, None


def test_masked_and_sliced_loss_are_one_in_value_and_gradient(policy):
    vocabulary, sequences = policy.layout.vocabulary, dialogues(policy.layout)
    places, targets = targets_of(sequences)
    is_code = torch.from_numpy(vocabulary.is_code)

    def gradients(nats):
        policy.module.zero_grad()
        nats.mean().backward()
        return {name: value.grad for name, value in policy.module.named_parameters() if value.grad is not None}

    hidden = policy.hidden_states_of(pack(sequences))[places]
    allowed = torch.from_numpy(vocabulary.drawable_text) | is_code
    masked, _ = masked_cross_entropy(policy.logits(hidden, "both"), targets, is_code, allowed)
    wanted = gradients(masked)
    hidden = policy.hidden_states_of(pack(sequences))[places]
    sliced = torch.zeros(len(targets))
    for part, own, ids, competing in parts_of(vocabulary, targets):
        nats, _ = sliced_cross_entropy(hidden[own], ids, lambda rows, part=part: policy.logits(rows, part), competing)
        sliced = sliced.masked_scatter(own, nats)
    torch.testing.assert_close(sliced, masked, atol=1e-6, rtol=1e-6)
    found = gradients(sliced)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4, msg=name)


@only_these(*ONE_EACH)
@pytest.mark.parametrize("part", ["text", "image"])
def test_the_other_modalitys_rows_get_no_gradient_at_all(policy, case, part):
    sequences = dialogues(policy.layout)
    places, targets = targets_of(sequences)
    hidden = policy.hidden_states_of(pack(sequences))[places]
    for other, own, ids, _ in parts_of(policy.layout.vocabulary, targets):
        if other == part:
            sliced_cross_entropy(hidden[own], ids, lambda rows: policy.logits(rows, part))[0].sum().backward()
    for each in ("text", "image"):
        weight, rows = head_rows(policy, each)
        moved = weight.grad is not None and bool((weight.grad[rows] != 0).any())
        assert moved == (each == part)


@only_these(*ONE_EACH)
def test_a_step_moves_the_rows_of_both_modalities(policy, case):
    sequences = dialogues(policy.layout)
    places, targets = targets_of(sequences)
    before = [weight[rows].clone() for weight, rows in (head_rows(policy, part) for part in ("text", "image"))]
    policy.module.train()
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        hidden = policy.hidden_states_of(pack(sequences))[places]
        nats = [
            sliced_cross_entropy(hidden[own], ids, lambda rows, part=part: policy.logits(rows, part))[0]
            for part, own, ids, _ in parts_of(policy.layout.vocabulary, targets)
        ]
        loss = torch.cat(nats).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for old, (weight, rows) in zip(before, (head_rows(policy, part) for part in ("text", "image")), strict=True):
        assert not torch.equal(old, weight[rows])


@only_these(*ONE_EACH)
def test_no_row_is_cheap_and_keeps_its_gradient(policy, case):
    hidden = torch.zeros(0, policy.hidden_states_of(pack(dialogues(policy.layout)[:1])).shape[1], requires_grad=True)
    vocabulary = policy.layout.vocabulary
    sizes = {"both": vocabulary.size, "image": vocabulary.num_codes, "text": vocabulary.size - vocabulary.num_codes}
    for part, size in sizes.items():
        logits = policy.logits(hidden, part)
        assert logits.shape == (0, size)
        logits.sum().backward()


def test_bfloat16_keeps_rotary_angles_in_float32_and_nothing_of_the_image_tokenizer(folders, case):
    policy = load_interleaved(replace(folders[case][0], dtype="bfloat16"), folders[case][1])
    trunk = getattr(policy.module.model, "language_model", policy.module.model)
    assert trunk.rotary_emb.inv_freq.dtype == torch.float32
    assert trunk.norm.weight.dtype == policy.module.lm_head.weight.dtype == torch.bfloat16
    if case != "janus_pro":
        assert not any("vqmodel" in name for name in policy.module.state_dict())


def test_ids_are_in_the_vocabulary_and_kinds_say_what_they_are(policy):
    layout = policy.layout
    vocabulary, is_code = layout.vocabulary, layout.vocabulary.is_code
    assert vocabulary.drawable_text[[layout.image.begin, layout.end]].all()
    assert not (vocabulary.drawable_text & is_code).any()
    assert not (layout.plain & ~vocabulary.drawable_text).any()
    for sequence in dialogues(layout):
        kinds = sequence.kinds
        assert (is_code[sequence.ids] == (kinds == TokenKind.CODE)).all()
        assert (sequence.ids[kinds == TokenKind.BEGIN] == layout.image.begin).all()
        assert (sequence.ids[kinds == TokenKind.END] == layout.image.end).all()
        assert (
            len(sequence.pixels) * layout.placeholders.count(layout.placeholder)
            == (kinds == TokenKind.PLACEHOLDER).sum()
        )
        assert sequence.in_loss[-1]
        assert sequence.ids[-1] == layout.end
        text_targets = sequence.in_loss & (kinds == TokenKind.TEXT)
        assert vocabulary.drawable_text[sequence.ids[text_targets]].all()


def test_a_prompt_is_the_beginning_of_what_is_learned(policy):
    layout = policy.layout
    for turns in (
        (say("user", "a green red"), say("assistant", picture(1), "is red ?")),
        (say("user", picture(2), "what is ?"), say("assistant", "red"), say("user", "red"), say("assistant", "a")),
    ):
        codes = codes_of(layout, turns)
        whole = layout.encode(turns, codes)
        prompt = layout.encode(turns[:-1], codes[: len(layout.images_to_code(turns[:-1]))])
        assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
        assert not prompt.in_loss[-1]
        assert whole.in_loss[len(prompt.ids) :].all()
        block = whole.kinds[whole.kinds != TokenKind.TEXT]
        rows, columns = codes[0].shape if codes else (0, 0)
        if codes:
            assert (whole.kinds == TokenKind.CODE).sum() == rows * columns * len(codes)
            assert layout.image.length(rows, columns) * len(codes) == (block != TokenKind.PLACEHOLDER).sum()


def test_a_system_turn_replaces_the_systems_usual_words(folders, case):
    config, folder = folders[case]
    turns = (say("user", picture(1), "what is ?"), say("assistant", "red"))
    said = load_layout(replace(config, system_prompt="is a"), folder)
    silent = load_layout(replace(config, system_prompt=""), folder)
    codes = codes_of(said, turns)
    by_setting, by_turn = said.encode(turns, codes), silent.encode((say("system", "is a"), *turns), codes)
    assert by_setting.ids.tolist() == by_turn.ids.tolist() != silent.encode(turns, codes).ids.tolist()
    both = said.encode((say("system", "red"), *turns), codes)
    assert both.ids.tolist() == silent.encode((say("system", "red"), *turns), codes).ids.tolist()
    assert said.fingerprint != silent.fingerprint


def test_text_with_a_special_token_is_refused(policy, case):
    layout = policy.layout
    with pytest.raises(ValueError, match=r"sequence s: expected plain text; got .*special tokens.*remove them"):
        layout.encode((say("user", f"a {BEGIN[case]}"), say("assistant", "red")), [], id="s")


def test_codes_must_be_those_of_the_images(policy):
    layout = policy.layout
    turns = (say("user", "red"), say("assistant", picture()))
    grid = codes_of(layout, turns)[0]
    for codes, message in (
        ([], "got too few; encode"),
        ([grid, grid], "expected 1 images in codes; got 2"),
        ([grid + layout.vocabulary.num_codes], r"image codes \[rows, columns\] in 0\.\."),
        ([grid.ravel()], r"image codes \[rows, columns\] in 0\.\..*got shape \(\d+,\)"),
        ([grid[:0]], r"got shape \(0, "),
    ):
        with pytest.raises(ValueError, match=f"sequence prompt: expected .*{message}|sequence prompt: {message}"):
            layout.encode(turns, codes)


def test_only_families_that_offer_it_are_loaded(folders):
    config, folder = folders["anole"]
    for load in (load_interleaved, load_layout):
        with pytest.raises(
            ValueError, match=r"can be fine-tuned on conversations; got lumina_dimoo; set it to one of jan"
        ):
            load(replace(config, family="lumina_dimoo"), folder)
        with pytest.raises(ValueError, match=r"expected one of janus_pro, .*got 'emu4'"):
            load(replace(config, family="emu4"), folder)
    for load in (load_policy, load_prompts):
        with pytest.raises(
            ValueError, match="by reinforcement learning; got emu3; set it to one of janus_pro, lumina_"
        ):
            load(replace(config, family="emu3"), folder)


@only_these(*ONE_EACH)
def test_a_checkpoint_of_another_family_is_refused(folders, case):
    other = folders["liquid" if case != "liquid" else "anole"][1]
    for load in (load_interleaved, load_layout):
        with pytest.raises(
            ValueError, match=rf"expected a checkpoint of model_type .* for model\.family {case}; got '"
        ):
            load(ModelConfig(family=case), other)


@only_these(*ONE_EACH)
def test_a_tokenizer_of_another_size_is_refused(folders, case, tmp_path):
    config, folder = folders[case]
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "config.json", **({"text_config": None} if case == "janus_pro" else {"vocab_size": 20}))
    if case == "janus_pro":
        edit_json(copy / "config.json", text_config={"model_type": "llama", "vocab_size": 20})
    with pytest.raises(ValueError, match=r"expected (token ids below )?vocab_size .*config\.json.*checkpoint"):
        load_layout(config, copy)


@only_these(*ONE_EACH)
def test_a_tokenizer_without_the_familys_tokens_is_refused(folders, case, tmp_path):
    config, folder = folders[case]
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = copy / name
        file.write_text(file.read_text().replace(BEGIN[case], "<begin>"))
    with pytest.raises(ValueError, match=r"special tokens in the tokenizer; got none for <.*take the tokenizer files"):
        load_layout(config, copy)


@only_these("anole", "emu3", "liquid")
def test_a_checkpoint_without_a_weight_is_refused_by_its_stored_name(folders, case, tmp_path):
    config, folder = folders[case]
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without 1 of them, model\.embed_tokens\.weight; it is truncated"):
        load_interleaved(config, copy)
