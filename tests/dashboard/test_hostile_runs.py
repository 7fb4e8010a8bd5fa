"""What a policy, or somebody who may write to a run directory, might put there: nothing leaks, the page stays up."""

import io
import json
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.dashboard.conftest import add_lines, ask
from unirl.dashboard.pictures import MAX_PIXELS, picture_size

SECRET = "the secret of another folder"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\u200b\u2066\u0000"


def picture(width=4, height=4, kind="WEBP", **options):
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, kind, **options)
    return out.getvalue()


def huge_png(width=10_000, height=10_000):
    """A PNG of 100 megapixels in some kB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(b"\0" * (width // 8 + 1)) for _ in range(height)) + rows.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(own_runs):
    (own_runs.parent / "secret.json").write_text(json.dumps({"status": SECRET, "k": SECRET}))
    (own_runs.parent / "secret.webp").write_bytes(picture() + SECRET.encode())
    return own_runs


ESCAPES = (
    "../run.json",
    "..%2frun.json",
    "%2e%2e/%2e%2e/secret.webp",
    "..%2f..%2f..%2fsecret.webp",
    "..%5c..%5csecret.webp",
    "%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret.webp",
    "..%252f..%252fsecret.webp",
    "%c0%ae%c0%ae%c0%afsecret.webp",
    "....//....//secret.webp",
    "a%00.webp",
    "secret.webp%00.png",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    ".hidden.webp",
    "x.webp%0d%0aSet-Cookie:%20a=b",
    "\u202egpj.webp",
    "con.webp/../../../../secret.webp",
)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_pictures(hostile, name):
    client = ask(hostile)
    places = ("/files/one/images", "/files/one/evaluations/images", "/files/one", "/static", "/static/vendor")
    for address in (f"{place}/{name}" for place in places):
        answer = client.get(address)
        assert answer.status_code == 404, address
        assert SECRET not in answer.text


@pytest.mark.parametrize("name", ["..", "~", "~~", "%2e%2e", "..~..~", "one~..~..", "one%2f..%2f..", "%00", "one%00",
                                  "~etc", "one~images", "\u202eeno", "on\u200be"])  # fmt: skip
def test_no_run_id_leads_out_of_the_runs(hostile, name):
    client = ask(hostile)
    for address in (f"/api/run/{name}/strip", f"/files/{name}/images/secret.webp", f"/api/compare?runs={name}"):
        answer = client.get(address)
        assert answer.status_code == 404, address
        assert SECRET not in answer.text


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl", "pairs.jsonl", "used_pairs.jsonl",
                                  "events.jsonl", "evaluations/step_000012.json"])  # fmt: skip
def test_links_out_of_the_run_are_not_followed(hostile, name):
    (hostile / "one" / name).unlink()
    (hostile / "one" / name).symlink_to(hostile.parent / "secret.json")
    client = ask(hostile)
    addresses = ("s", "/one", "/one/events", "/one/pairs", "/one/similarities", "/one/pair_history?pair_id=pair-2-0")
    for address in (*(f"/api/run{address}" for address in addresses), "/api/compare?runs=one"):
        answer = client.get(address)
        assert answer.status_code in (200, 404)
        assert SECRET not in answer.text
    if name.endswith("l") and name != "config.yaml":
        client.get("/api/run/one/similarities")
        assert client.get("/api/run/one").json()["skipped"]["refused_files"] == 1


def test_linked_pictures_and_folders_are_refused_outside_and_served_inside(hostile):
    images = hostile / "one" / "images"
    own = next(images.iterdir())
    (images / "inside.webp").symlink_to(own.name)
    (images / "outside.webp").symlink_to(hostile.parent / "secret.webp")
    (images / "circle.webp").symlink_to("circle.webp")
    client = ask(hostile)
    assert client.get("/files/one/images/inside.webp").content == own.read_bytes()
    for name in ("outside.webp", "circle.webp"):
        assert client.get(f"/files/one/images/{name}").status_code == 404
    (hostile / "one" / "evaluations").rename(hostile.parent / "moved")
    (hostile / "one" / "evaluations").symlink_to(hostile.parent / "moved")
    evaluated = next((hostile.parent / "moved" / "images").iterdir()).name
    assert client.get(f"/files/one/evaluations/images/{evaluated}").status_code == 404


def test_pipes_are_not_waited_for(hostile):
    for name in ("metrics.jsonl", "run.json", "images/pipe.webp", "actors/x.jsonl"):
        (hostile / "one" / name).parent.mkdir(exist_ok=True)
        (hostile / "one" / name).unlink(missing_ok=True)
        os.mkfifo(hostile / "one" / name)
    client = ask(hostile)
    assert client.get("/files/one/images/pipe.webp").status_code == 404
    assert client.get("/api/run/one").json()["run"] == {}
    assert client.get("/api/run/one/fleet").status_code == 200


def test_a_picture_of_100_megapixels_is_refused_by_its_header(hostile):
    images = hostile / "one" / "images"
    (images / "huge.png").write_bytes(huge_png())
    # WebP in its three forms; the last one claims 10,000 x 10,000 in front of a picture of 4 x 4.
    (images / "lossy.webp").write_bytes(picture(5000, 900))
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (9999).to_bytes(3, "little") * 2
    (images / "extended.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended)
    client = ask(hostile)
    for name in ("huge.png", "lossy.webp", "extended.webp"):
        answer = client.get(f"/files/one/images/{name}")
        assert answer.status_code == 413, name
        assert "megapixels" in answer.json()["error"]
    (images / "long.png").write_bytes(picture(kind="PNG") + bytes(17 << 20))
    assert client.get("/files/one/images/long.png").status_code == 413


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_sizes_are_read_from_headers(kind, options):
    assert picture_size(picture(37, 211, kind, **options)) == (37, 211)
    assert MAX_PIXELS == 4_000_000


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", b"<html>" + SECRET.encode(), b"RIFF" + bytes(40),
                                  b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8L" + bytes(30)])  # fmt: skip
def test_what_is_no_picture_is_not_served_as_one(hostile, data):
    (hostile / "one" / "images" / "x.webp").write_bytes(data)
    (hostile / "one" / "images" / "x.svg").write_bytes(b"<svg/>")
    client = ask(hostile)
    assert client.get("/files/one/images/x.webp").status_code == 404
    assert client.get("/files/one/images/x.svg").status_code == 404


def hostile_pair(**changes):
    sample = {"text": HTML, "image": "../../secret.webp", "reward": float("nan"), "advantage": float("inf"),
              "parts": {HTML: float("nan")}}  # fmt: skip
    side = {"id": HTML, "image": "/etc/passwd", "question": "\u202e" + "q" * 1_000_000, "choices": ["c" * 30_000],
            "gold": None, "samples": [sample, 7, None, [sample]]}  # fmt: skip
    return {"step": 12, "pair_id": HTML, "kind": HTML, "similarity": float("-inf"), "weight": 1e400,
            "understanding": side, "generation": side | {"samples": "none"}} | changes  # fmt: skip


def test_texts_come_back_as_data_and_cut(hostile):
    add_lines(hostile / "one" / "pairs.jsonl", hostile_pair())
    client = ask(hostile)
    answer = client.get("/api/run/one/pair", params={"step": 12, "pair_id": HTML})
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 200_000
    side = answer.json()["understanding"]
    assert (len(side["question"]), side["cut"]) == (20_000, True)
    assert side["question"][0] == "\u202e"
    assert (side["image"], side["image_missing"]) == (None, True)
    assert side["samples"][0]["text"] == HTML
    assert "cut" not in side["samples"][0]
    assert side["samples"][0]["reward"] is None
    assert (answer.json()["similarity"], answer.json()["weight"]) == (None, None)
    (fact,) = client.get("/api/run/one/pairs", params={"text": "<SCRIPT>", "step": 12}).json()["pairs"]
    assert (fact["pair_id"], fact["understanding"], fact["zero_variance"]) == (HTML, None, [])
    assert client.get("/api/run/one/pairs", params={"text": "\u202eq"}).json()["total"] == 1
    assert client.get("/api/run/one").json()["skipped"]["refused_images"] == 3


def test_numbers_that_are_none_break_no_curve(hostile):
    file = hostile / "one" / "metrics.jsonl"
    add_lines(file, b'{"step":13,"time":NaN,"learner/loss":NaN,"policy/kl":Infinity,"a":1e999,"b":"1","c":true,'
              b'"d":[1]}\n', b'{"step":14,"time":1e300,"learner/loss":' + b"9" * 400 + b"}\n", b'{"step":1e99}\n',
              b'{"step":-1}\n', b'{"step":true}\n', b'{"step":' + b"9" * 30 + b"}\n")  # fmt: skip
    client = ask(hostile)
    found = client.get("/api/run/one/metrics?names=learner/loss,policy/kl,a,b,c,d")
    values = json.loads(found.text, parse_constant=pytest.fail)["values"]
    assert values["learner/loss"][12:] == [None, None]
    assert values["policy/kl"][12:] == [None, None]
    assert values["a"] == [None] * 14
    assert not values.keys() & {"b", "c", "d"}
    assert client.get("/api/run/one").json()["skipped"]["bad_lines"] == 4


def test_numbers_too_large_to_add_up_break_no_answer(hostile):
    run = hostile / "one"
    (run / "actors").mkdir(exist_ok=True)
    beat = {"v": 1, "actor": "rollout-text-0", "role": "rollout.text", "state": "idle", "queue": 0, "num_images": 0}
    beats = [beat | {"time": 100.0 + n, "num_done": 1e308 * n, "num_tokens": 1e308 * n} for n in range(2)]
    add_lines(run / "actors" / "rollout-text-0.jsonl", *beats)
    add_lines(run / "metrics.jsonl", {"step": 13, "time": 100.0, "time/step_s": 1e300, "learner/loss": 1.7e308})
    samples = [{"text": "t", "reward": 1.7e308, "advantage": 0.0, "parts": {}} for _ in range(2)]
    side = {"id": "q", "question": "?", "gold": "B", "samples": samples}
    add_lines(run / "pairs.jsonl", {"v": 1, "step": 13, "pair_id": "big", "kind": "aligned", "understanding": side})
    client = ask(hostile)
    for path in ("", "/strip", "/fleet", "/pairs", "/metrics?names=learner/loss", "/pair?step=13&pair_id=big"):
        answer = client.get(f"/api/run/one{path}")
        assert answer.status_code == 200, path
        json.loads(answer.text, parse_constant=pytest.fail)


@pytest.mark.parametrize("kind", ["pipe", "link to itself", "folder"])
def test_a_lock_that_is_none_takes_no_run_down(hostile, kind):
    run = hostile / "one"
    (run / "lock").unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / "lock")
    elif kind == "folder":
        (run / "lock").mkdir()
    else:
        (run / "lock").symlink_to("lock")
    document = json.loads((run / "run.json").read_text()) | {"status": "running", "host": socket.gethostname()}
    (run / "run.json").write_text(json.dumps(document))
    runs = {found["id"]: found for found in ask(hostile).get("/api/runs").json()["runs"]}
    assert runs["one"]["stalled"]


def test_memory_is_bounded_by_neither_names_nor_lines(hostile):
    run = hostile / "one"
    add_lines(run / "metrics.jsonl", {"step": 13, **{f"x/{n}": 1.0 for n in range(5000)}, "y" * 10_000: 1.0})
    nested = json.loads("[" * 200 + "]" * 200)
    add_lines(run / "events.jsonl", {"kind": "alert", "message": "m" * 1_000_000, "step": 1})
    add_lines(run / "events.jsonl", {"kind": ["alert"], "attempt": "x", "workers": 3, "nested": nested})
    client = ask(hostile)
    found = client.get("/api/run/one").json()
    assert len(found["metrics"]) == 2000
    assert found["skipped"]["values_beyond_limit"] > 3000
    assert len(found["strip"]["alerts"][-1]["message"]) == 2000
    assert len(client.get("/api/run/one/events").content) < 20_000


def test_a_settings_file_that_explodes_is_left_out(hostile):
    layers = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (hostile / "one" / "config.yaml").write_text("a0: &a0 [x]\n" + layers)
    client = ask(hostile)
    assert client.get("/api/run/one").json()["config"] == {}
    for text in ("!!python/object/apply:os.system ['true']", "[" * 3000, "- 1\n- 2", "\0", "x: " + "y" * (5 << 20)):
        (hostile / "one" / "config.yaml").write_text(text)
        assert client.get("/api/run/one").json()["config"] == {}


def test_a_line_without_end_is_passed_over(hostile, monkeypatch):
    monkeypatch.setattr("unirl.run_files.MAX_LINE_BYTES", 1 << 20)
    file = hostile / "one" / "metrics.jsonl"
    add_lines(file, b'{"step":13,"a":"' + b"x" * (3 << 20))
    client = ask(hostile)
    assert client.get("/api/run/one/metrics?names=learner/loss").json()["steps"][-1] == 12
    add_lines(file, b'"}\n', {"step": 14, "learner/loss": np.pi})
    assert client.get("/api/run/one/metrics?names=learner/loss").json()["values"]["learner/loss"][-1] == 3.141593
    assert client.get("/api/run/one").json()["skipped"]["bad_lines"] == 1
