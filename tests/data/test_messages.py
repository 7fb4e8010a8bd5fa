import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.interleaved_samples import edit, encoded, outline, same
from unirl.data.messages import normalise, to_json, to_row, to_sample, with_bytes

PNG = encoded()
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
IMAGE = "(6, 8)"
QA = [("user", f"-{IMAGE}", "-What?"), ("assistant", "+That.")]


def ask(content, answer="That.", **rest):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **rest}


def read(row, folder=Path("absent")):
    return to_sample(normalise(row, default_id="n"), folder)


def shown(row, folder=Path("absent")):
    return outline(read(row, folder))


def test_stored_rows_come_back_also_through_json():
    assert same(read(to_row(edit())), edit())
    line = json.loads(json.dumps(to_json(to_row(edit()))))
    assert same(read(line), edit())
    assert "loss" not in str(line)


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "row",
    [
        ask([{"type": "image", "image": URL}, TEXT]),
        ask([{"type": "image_url", "image_url": {"url": URL}}, TEXT]),
        ask([{"type": "image_url", "image_url": URL}, "What?"]),
        ask([{"type": "image", "url": URL}, TEXT]),
        ask([{"type": "image", "bytes": PNG}, TEXT]),
        ask([{"type": "image", "image": {"bytes": base64.b64encode(PNG).decode()}}, {"text": "What?"}]),
        ask([{"type": "image"}, TEXT], images=[{"bytes": PNG, "path": "ignored.png"}]),
        ask("<image>\nWhat?", images=[URL]),
        ask("<image>What?", image={"bytes": PNG, "path": None}),
        ask([{"type": "text", "text": "<image>What?"}], images=[URL]),
        ask("What?", images=[URL]),
        ask("What?", image=URL),
        {
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}],
            "images": [URL],
        },
        {"conversations": json.dumps(ask("<image>What?")["messages"]), "images": [URL]},
    ],
)
def test_every_chat_form_of_one_question_about_an_image_is_read_alike(row):
    assert shown(row) == QA


def test_markers_take_the_images_in_their_order_on_both_sides():
    images = [{"bytes": encoded(seed, height=seed + 1)} for seed in range(3)]
    row = ask("Mix <image> and\n<image>", "Here:\n<image>\nDone.", images=images)
    assert shown(row) == [
        ("user", "-Mix ", "-(1, 8)", "- and", "-(2, 8)"),
        ("assistant", "+Here:", "+(3, 8)", "+Done."),
    ]


def test_paths_start_at_the_folder_and_can_be_turned_into_bytes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    for part in ({"type": "image", "path": "images/a.png"}, {"type": "image", "image": "images/a.png"}):
        assert shown(ask([part, TEXT]), tmp_path) == QA
    row = with_bytes(normalise(ask("<image>What?", images=["images/a.png"], id=7)), tmp_path)
    assert (row["id"], row["messages"][0]["content"][0]["image"]) == ("7", {"bytes": PNG, "path": None})


def test_a_system_text_comes_first_and_turns_of_one_role_become_one():
    row = {
        "system": "Be kind.",
        "messages": [
            {"role": "user", "content": "One."},
            {"role": "user", "content": [{"type": "image", "image": URL}]},
            {"role": "user", "content": "Two."},
            {"role": "user", "content": "Three."},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    assert shown(row) == [
        ("system", "-Be kind."),
        ("user", "-One.", f"-{IMAGE}", "-Two.", "-\nThree."),
        ("assistant", "+Yes."),
    ]


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
def test_loss_flags_of_a_message_or_a_part_win_over_the_role(key):
    row = {
        "messages": [
            {"role": "user", "content": "One.", key: 1},
            {"role": "assistant", "content": [{"type": "image", "image": URL}, "Wrong."], key: 0},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": ["Now.", {"type": "image", "image": URL, key: False}]},
        ]
    }
    assert shown(row) == [
        ("user", "+One."),
        ("assistant", f"-{IMAGE}", "-Wrong."),
        ("user", "-Again."),
        ("assistant", "+Now.", f"-{IMAGE}"),
    ]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, r"expected a list of turns under messages or conversations; got keys \['text'\]"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": "torn ["}, "expected a list of turns"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "expected a role of .* got 'tool'"),
        ({"messages": [USER]}, "expected the assistant's answer at the end; got turns of user;"),
        ({"messages": [USER, ANSWER, USER]}, "expected the assistant's answer at the end"),
        ({"messages": [ANSWER, USER, ANSWER]}, "from a user's turn to an assistant's"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "got an assistant turn without"),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, "got an assistant turn without"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a list of parts; got nothing"),
        ({"messages": [USER, {"role": "assistant", "content": [None]}]}, "expected parts of text or images"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "video", "video": "v"}]}]}, "got 'video'"),
        ({"messages": [USER, ANSWER | {"loss": 0.5}]}, "expected loss to be true, false, 0 or 1; got 0.5"),
        (ask("a <image> b"), "expected an image for each <image>; got fewer"),
        (ask([{"type": "image"}]), "expected an image for each <image>; got fewer"),
        (ask("<image>", images=[URL, URL]), "expected a <image> for each of the 2 images; got 1"),
        (ask("<image>", images=["https://a.test/i.png"]), "got 'https://a.test/i.png', which is never fetched"),
        (ask("<image>", images=["file:///etc/passwd"]), "never fetched"),
        (ask("<image>", images=["/etc/passwd"]), "a path inside the table's folder"),
        (ask("<image>", images=["../x.png"]), "a path inside the table's folder"),
        (ask("<image>", images=[""]), "a path inside the table's folder"),
        (ask("<image>", images=["none.png"]), "expected an image file 'none.png'; got none there"),
        (ask("<image>", images=[{"bytes": b""}]), "got 0 bytes: the file is empty"),
        (ask("<image>", images=[{"bytes": encoded()[:50]}]), "do not decode"),
        (ask("<image>", images=["data:image/png;base64,@@"]), "in base64"),
        (ask("<image>", images=["data:image/png,abc"]), "expected a data: URL in base64"),
        (ask("<image>", images=[3]), "got a int"),
        (ask("<image>", images=[{}]), "got nothing"),
        (ask("lone \ud800"), "expected text of whole characters"),
        (ask("q", id=["x"]), "expected a text under id; got a list"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(row, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read(row, tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=8) | st.just("<image>") | st.just("user"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image", "image_url", "url", "path", "bytes", "loss"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "gpt", "system", "?"]) | json_values, "content": json_values}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(message | json_values, max_size=3) | json_values, json_values, json_values)
def test_no_row_is_worse_than_a_data_error(messages, images, system):
    try:
        row = normalise({"messages": messages, "images": images, "system": system}, default_id="n")
        assert normalise(row) == row
        to_sample(row, Path("absent"))
    except ValueError:
        pass
