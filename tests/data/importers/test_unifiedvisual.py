import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded, outline
from tests.data.test_archives import tarred
from unirl.data.archives import ArchiveError
from unirl.data.atomic import DataError


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def talk(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def images_of(source, archive, *names):
    (source / "images").mkdir(parents=True, exist_ok=True)
    members = [(name, encoded(0, place + 1)) for place, name in enumerate(names)]
    tarred(source / "images" / f"{archive}.tar.gz", *members)


@pytest.fixture
def download(tmp_path):
    source = tmp_path / "UnifiedVisual-240K"
    images_of(source, "Image_Generation", "Image_Generation/1.png")
    images_of(source, "Image_Correctionr", "Image_Correctionr/1.png", "Image_Correctionr/2.png")
    table(
        source / "data" / "Image_Generation-00000-of-00001.parquet",
        {"id": "g1", "conversations": talk("Draw a sport.", "Cricket.<image>"), "images": ["Image_Generation/1.png"]},
    )
    table(
        source / "data" / "Image_Correction-00000-of-00001.parquet",
        {"id": "c1", "conversations": talk("Two zebras.", "<image>", "That is wrong.", "One only. <image>"),
         "images": ["images/Image_Correctionr/1.png", "2.png"]},
    )  # fmt: skip
    table(
        source / "data" / "CoT_Collection-00000-of-00001.parquet",
        {"id": "t1", "conversations": talk("Is ice cold?", "Yes."), "images": []},
    )
    return source


CORRECTION = [
    ("user", "-Two zebras."),
    ("assistant", "-(1, 8)"),
    ("user", "-That is wrong."),
    ("assistant", "+One only. ", "+(2, 8)"),
]


def test_a_usual_layout_is_guessed_and_said(tmp_path, download, caplog):
    caplog.set_level(logging.INFO)
    samples = {sample.id: sample for sample in made(tmp_path, "unifiedvisual", download)}
    assert {name: (s.subset, s.source) for name, s in samples.items()} == {
        "image_generation/g1": ("image_generation", "unifiedvisual"),
        "image_correction/c1": ("image_correction", "unifiedvisual"),
        "cot_collection/t1": ("understanding", "cot_collection"),
    }
    assert outline(samples["image_generation/g1"]) == [
        ("user", "-Draw a sport."),
        ("assistant", "+Cricket.", "+(1, 8)"),
    ]
    said = "no mapping, guessed: id from 'id', turns from 'conversations', images from 'images'"
    assert f"data/Image_Generation-00000-of-00001.parquet: {said}" in caplog.messages
    assert sorted(path.name for path in (download / "unpacked").iterdir()) == ["Image_Correctionr", "Image_Generation"]


def test_the_wrong_image_of_a_correction_is_learned_only_when_asked(tmp_path, download):
    samples = {sample.id: sample for sample in made(tmp_path, "unifiedvisual", download)}
    assert outline(samples["image_correction/c1"]) == CORRECTION
    samples = {sample.id: sample for sample in made(tmp_path, "unifiedvisual", download, learn_wrong_image=True)}
    assert outline(samples["image_correction/c1"])[1] == ("assistant", "+(1, 8)")


def test_a_mapping_names_other_columns_roles_and_markers(tmp_path):
    source = tmp_path / "uv"
    images_of(source, "odd", "deep/1.png", "deep/2.png")
    turns = [{"who": "Q", "said": "Two zebras."}, {"who": "A", "said": "[img]"},
             {"who": "Q", "said": "That is wrong."}, {"who": "A", "said": "One only. [img]"}]  # fmt: skip
    table(source / "data" / "all.parquet",
          {"key": 1, "talk": json.dumps(turns), "pics": ["1.png", "deep/2.png"], "kind": "fixing"})  # fmt: skip
    mapping = yaml.safe_load("""
    id: key
    turns: talk
    role: who
    content: said
    roles: {Q: user, A: assistant}
    images: pics
    marker: "[img]"
    subset: kind
    subsets: {fixing: image_correction}
    archives: {image_correction: images/odd.tar.gz}
    """)
    (sample,) = made(tmp_path, "unifiedvisual", source, mapping=mapping, images=str(tmp_path / "elsewhere"))
    assert (sample.id, outline(sample)) == ("image_correction/1", CORRECTION)
    assert (tmp_path / "elsewhere" / "odd" / "deep" / "1.png").is_file()


def test_files_with_different_columns_take_different_mappings(tmp_path, download):
    table(download / "data" / "MMInternet.parquet", {"ask": "How?", "tell": "So.<image>", "p": ["g/1.png"]})
    images_of(download, "MMInternet", "g/1.png")
    mapping = [
        {"files": "data/MMInternet*", "user": "ask", "assistant": "tell", "images": "p"},
        {"files": "data/*", "id": "id", "turns": "conversations", "images": "images"},
    ]
    samples = made(tmp_path, "unifiedvisual", download, mapping=mapping)
    assert [s.subset for s in samples] == ["understanding", "image_correction", "image_generation", "mm_internet"]
    assert outline(samples[-1]) == [("user", "-How?"), ("assistant", "+So.", "+(1, 8)")]


def test_columns_that_cannot_be_guessed_are_shown_with_a_mapping_to_edit(tmp_path):
    source = tmp_path / "uv"
    images_of(source, "MMInternet", "1.png")
    for name in ("a", "b"):
        table(source / "data" / f"{name}.parquet", {"talk": [{"who": "Q", "said": "x" * 99}], "pics": ["1.png"]})
    with pytest.raises(DataError) as caught:
        made(tmp_path, "unifiedvisual", source)
    text = str(caught.value)
    for line in (
        "  a.parquet\n    talk: list<element: struct<who: string, said: string>>, for example [{'who': 'Q', 'said': 'x",
        "    pics: list<element: string>, for example ['1.png']\n  b.parquet (columns as above)",
        "  archives: MMInternet.tar.gz",
        "  data/a.parquet: no column looks like a conversation",
        "  # columns: talk | pics",
    ):
        assert line in text
    skeleton = yaml.safe_load(text.partition("--mapping mapping.yaml:\n")[2])
    filled = skeleton | {"turns": "talk", "role": "who", "content": "said", "subset": None}
    with pytest.raises(DataError, match="turns of 'Q', of which none is known; name them under roles"):
        made(tmp_path, "unifiedvisual", source, mapping=filled)
    filled["roles"] = {"Q": "user"}
    with pytest.raises(DataError, match="none of them good"):  # the mapping fits; the made rows have no answer
        made(tmp_path, "unifiedvisual", source, mapping=filled, bad=[])


def test_turns_whose_keys_cannot_be_guessed_are_shown_with_a_mapping_to_edit(tmp_path):
    source = tmp_path / "uv"
    turns = [{"speaker": "user", "says": "<image>?"}, {"speaker": "assistant", "says": "Yes."}]
    table(source / "data" / "MMInternet.parquet", {"key": 1, "dialog": json.dumps(turns), "pics": [encoded()]})
    with pytest.raises(DataError) as caught:
        made(tmp_path, "unifiedvisual", source)
    text = str(caught.value)
    for line in (
        "no mapping, guessed: turns from 'dialog'; no column of images found, ignored: 'key', 'pics'",
        "no key 'role' inside the turns of 'dialog', which have 'speaker', 'says'; name it as role",
        "no key 'content' inside the turns of 'dialog', which have 'speaker', 'says'; name it as content",
    ):
        assert line in text
    template = yaml.safe_load(text.partition("--mapping mapping.yaml:\n")[2])
    assert template["turns"] == "dialog"
    filled = template | {"role": "speaker", "content": "says", "images": "pics"}
    with pytest.raises(DataError, match=r"(?s)no column 'pic', which.*no key 'content' inside"):
        made(tmp_path, "unifiedvisual", source, mapping=filled | {"images": "pic", "content": "content"})
    (sample,) = made(tmp_path, "unifiedvisual", source, mapping=filled)
    assert outline(sample) == [("user", "-(6, 8)", "-?"), ("assistant", "+Yes.")]


def test_a_partly_wrong_mapping_comes_back_with_what_was_right(tmp_path, download):
    given = {"turns": "talks", "role": "speaker", "roles": {"Q": "user"}, "marker": "[img]"}
    for mapping in (given, [given, given | {"files": "other/*"}]):
        with pytest.raises(DataError) as caught:
            made(tmp_path, "unifiedvisual", download, mapping=mapping)
        template = yaml.safe_load(str(caught.value).partition("--mapping mapping.yaml:\n")[2])
        shown = template if isinstance(template, list) else [template]
        assert [given.items() <= entry.items() for entry in shown] == [True] * len(shown)
        assert isinstance(template, list) == isinstance(mapping, list)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"turns": "talks"}, "no column 'talks', which the mapping names as turns"),
        ({"turn": "conversations"}, "got: it has 'turn', did you mean turns?"),
        ({"images": "images"}, "it names neither turns nor user and assistant"),
        ({"turns": 3}, "turns is 3"),
        ({"turns": "conversations", "roles": {"a": 1}}, "roles is {'a': 1}"),
        ("conversations", "it is 'conversations'"),
        ([{"files": "x/*", "turns": "conversations"}, {"files": "y/*", "turns": "t"}], "no mapping fits"),
    ],
)
def test_an_unfit_mapping_is_refused_by_name(tmp_path, download, mapping, words):
    with pytest.raises(DataError) as caught:
        made(tmp_path, "unifiedvisual", download, mapping=mapping)
    assert words in str(caught.value)


def test_rows_without_a_known_part_or_image_are_left_out(tmp_path, download):
    images_of(download, "MMInternet", "1.png")
    table(
        download / "data" / "other.parquet",
        {"id": "x1", "conversations": talk("q", "a"), "images": [], "subset": "unheard of"},
        {"id": "x2", "conversations": talk("q", "<image>"), "images": ["9.png"], "subset": "MM Internet"},
        {"id": "x3", "conversations": talk("q", "<image>"), "images": ["../../etc/x.png"], "subset": "MMInternet"},
        {"id": "x4", "conversations": talk("q", "<image>"), "images": ["1.png"], "subset": "MM-Reasoning (T)"},
        {"id": "g1", "conversations": talk("q", "<image>"), "images": ["1.png"], "subset": "MMInternet"},
    )
    reasons = []
    samples = made(tmp_path, "unifiedvisual", download, bad=reasons)
    assert [sample.id.partition("/")[2] for sample in samples] == ["t1", "c1", "g1", "g1"]
    wanted = ("expected a part of", "in MMInternet; got none there", "got none there", "expected one archive with")
    assert all(words in reason for words, reason in zip(wanted, reasons, strict=True)), reasons


def test_one_file_can_be_imported_alone_and_a_named_archive_must_be_there(tmp_path, download):
    file = download / "data" / "Image_Generation-00000-of-00001.parquet"
    (sample,) = made(tmp_path, "unifiedvisual", file)
    assert sample.turns[1].images[0].shape == (1, 8, 3)
    mapping = {"turns": "conversations", "images": "images", "archives": {"image_generation": "images/none.tar"}}
    with pytest.raises(DataError, match=r"expected the archive 'images/none\.tar', which the mapping names; got none"):
        made(tmp_path, "unifiedvisual", file, mapping=mapping)


def test_an_archive_that_cannot_be_unpacked_ends_the_import(tmp_path, download):
    archive = download / "images" / "Image_Correctionr.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match="expected a whole tar archive"):
        made(tmp_path, "unifiedvisual", download, bad=[])
