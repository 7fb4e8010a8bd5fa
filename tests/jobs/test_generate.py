"""`unirl generate` on a tiny random Anole: what it prints and writes, and what it refuses."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.joint_checkpoints import write_anole
from tests.vq_checkpoints import write_chameleon_vq
from unirl.config import DrawingConfig, GenerateConfig, ModelConfig, RepliesConfig
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.data.interleaved import stream_interleaved
from unirl.jobs import generate
from unirl.jobs.assets import CHECKPOINTS
from unirl.models.policy import max_positions

POSITIONS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    write_anole(folder / "anole")
    settings = folder / "anole" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_position_embeddings": POSITIONS}))
    write_chameleon_vq(folder / "vq", size=8, num_codes=16)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)).save(folder / "seen.png")
    return folder


@pytest.fixture
def config(folder):
    return GenerateConfig(
        model=ModelConfig(family="anole", path=str(folder / "anole"), image_tokenizer=str(folder / "vq")),
        replies=RepliesConfig(text=DrawingConfig(), max_tokens=60, kv_cache_memory_gib=0.125, backend="torch"),
        num_replies=4,
    )


def with_replies(config, **changes):
    return replace(config, replies=replace(config.replies, **changes))


def replies_of(out):
    rejected = []
    samples = list(stream_interleaved(out / "replies.jsonl", rejected))
    assert not rejected
    return samples


def test_replies_are_printed_written_and_shown(config, folder, tmp_path, capsys):
    prompt = generate.prompt_of("what is it ?", [folder / "seen.png"])
    assert generate.main(config, [prompt], out=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert shown.count("what is it ?") == 4
    samples = replies_of(tmp_path / "out")
    assert [sample.id for sample in samples] == [f"prompt/{seed}" for seed in range(4)]
    assert all(sample.turns[0].images[0].shape == (9, 13, 3) for sample in samples)
    drawn = [image for sample in samples for image in sample.turns[-1].images]
    assert drawn
    assert all(image.shape == (8, 8, 3) for image in drawn)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "loss" not in page
    assert page.count("<img") == len(drawn) + 4
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == len({image.tobytes() for image in drawn}) + 1


def test_the_engine_writes_what_the_plain_sampler_writes(config, tmp_path, capsys, caplog):
    prompts = [generate.prompt_of("draw a red circle", []), generate.Prompt("b", generate.prompt_of("it", []).turns)]
    for backend in ("torch", "vllm"):
        settings = with_replies(config, backend=backend, max_tokens=None)
        with caplog.at_level(logging.INFO, logger="unirl"):
            generate.main(settings, prompts, out=tmp_path / backend, as_json=True)
    assert f"replies: prompt and reply take at most {POSITIONS} tokens" in caplog.text
    one, other = ((tmp_path / backend / "replies.jsonl").read_text() for backend in ("torch", "vllm"))
    assert one == other
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:8] == lines[8:]
    assert {line["id"] for line in lines} == {"prompt", "b"}
    assert all(line["well_formed"] for line in lines)


def test_the_positions_of_a_checkpoint_are_those_of_its_language_model():
    found = {name: max_positions(CHECKPOINTS / name) for name in ("anole", "janus", "lumina_dimoo")}
    assert found == {"anole": 512, "janus": 128, "lumina_dimoo": None}


def test_a_reply_takes_what_its_prompt_leaves(config, tmp_path, capsys):
    prompts = [generate.prompt_of("draw", []), generate.Prompt("b", generate.prompt_of("draw a red circle", []).turns)]
    settings = with_replies(config, max_tokens=None, max_images=0, max_model_len=20)
    generate.main(replace(settings, num_replies=12), prompts, out=tmp_path / "out", as_json=True)
    cut = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    longest = {line["id"]: line["num_tokens"] for line in cut if line["finish_reason"] == "length"}
    assert longest["prompt"] == longest["b"] + 3


def test_no_images_means_text_alone(config, tmp_path):
    generate.main(with_replies(config, max_images=0), [generate.prompt_of("draw it", [])], out=tmp_path / "out")
    assert not any(sample.turns[-1].images for sample in replies_of(tmp_path / "out"))


def test_an_empty_reply_is_shown_and_not_as_something_to_learn(config, tmp_path, monkeypatch):
    monkeypatch.setattr(generate.Responder, "segments", lambda *_: ())
    generate.main(replace(config, num_replies=1), [generate.prompt_of("draw it", [])], out=tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<p>(nothing)</p>" in page
    assert "class=learned" not in page
    (sample,) = replies_of(tmp_path / "out")
    assert not sample.turns[-1].segments[0].in_loss


def test_prompts_come_in_any_form_of_conversations(tmp_path):
    rows = [
        {"id": "a", "prompt": "draw it"},
        {"messages": [{"role": "user", "content": "what is it ?"}]},
        {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": "a gold answer"}]},
        {"conversations": [
            {"from": "human", "value": "draw"}, {"from": "gpt", "value": "here"}, {"from": "human", "value": "again"},
        ]},
        {"messages": json.dumps([{"role": "user", "content": "what is it ?"}])},
    ]  # fmt: skip
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = generate.read_prompts(tmp_path / "ask.jsonl")
    assert [prompt.id for prompt in prompts] == ["a", "ask-1", "ask-2", "ask-3", "ask-4"]
    assert [len(prompt.turns) for prompt in prompts] == [1, 1, 1, 3, 1]
    assert prompts[2].turns[0].segments[0].text == "draw"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected prompts; got an empty file"),
        ('{"prompt": "a"}\n{"id": "x"}\n', "row 1: expected a list of turns"),
        ('{"messages": "no JSON"}\n', "row 0: expected a list of turns"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', "row 0: expected a role"),
        ('{"prompt": "a"', "row 0: expected a JSON object"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, content, message):
    (tmp_path / "ask.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        generate.read_prompts(tmp_path / "ask.jsonl")


def test_what_cannot_be_asked_is_refused_before_the_sampler_starts(config, folder, tmp_path, monkeypatch):
    prompt = generate.prompt_of("draw it", [])
    start = generate.Responder._start
    monkeypatch.setattr(generate.Responder, "_start", lambda *_: pytest.fail("started"))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a")
    for name, reason in (
        ("nowhere.png", "No such file or directory"),
        ("empty.png", "expected a whole .* image; got 0 bytes: the file is empty; .*"),
        ("text.png", "expected a whole .* that do not decode .cannot identify image file.; .*"),
    ):
        with pytest.raises(DataError, match=rf"^--image {tmp_path / name}: {reason}$"):
            generate.prompt_of("what is it ?", [tmp_path / name])
    with pytest.raises(ValueError, match=r"image_size: expected a size .* got 16 x 16, which it reads as 8 x 8"):
        generate.main(with_replies(config, image_size=(16, 16)), [prompt], out=tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"replies.max_model_len \(91\) must be at most 90, .*; try replies.max_model_len=90"
    ):
        generate.main(with_replies(config, max_model_len=91), [prompt], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model.family \(emu3\) must be anole, which .*; set model.family=anole"):
        generate.main(replace(config, model=replace(config.model, family="emu3")), [prompt], out=tmp_path / "out")
    with pytest.raises(DataError, match=r"replies.max_tokens of at least 19.*got 10"):
        generate.main(with_replies(config, max_tokens=10), [prompt], out=tmp_path / "out")
    with pytest.raises(DataError, match=r"within replies.max_model_len 90 tokens; got \d+ and up to 89; shorten"):
        generate.main(with_replies(config, max_tokens=89), [prompt], out=tmp_path / "out")
    with pytest.raises(DataError, match=r"within replies.max_model_len 20 tokens; got \d+ and at least 19; shorten"):
        generate.main(with_replies(config, max_tokens=None, max_model_len=20), [prompt], out=tmp_path / "out")
    for text, message in (("draw </s>", "special tokens"), ("Draw it", "words that it lacks: Draw; use others")):
        with pytest.raises(DataError, match=f"sequence prompt: .*{message}"):
            generate.main(config, [generate.prompt_of(text, [])], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(generate.Responder, "_start", start)
    generate.main(replace(config, num_replies=1), [prompt], out=tmp_path / "out")
    with pytest.raises(DataError, match="expected a folder without replies"):
        generate.main(config, [prompt], out=tmp_path / "out")
