import zipfile

import pytest

from unirl.cluster import upload
from unirl.cluster.upload import SubmitError, collect


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "project"
    kept = ("a.yaml", "code/b.py", "code/checkpoints/model.bin", "notes/keep.txt")
    left_out = (
        ".git/HEAD", ".venv/bin/python", "runs/x/run.json", "checkpoints/model.bin", "code/__pycache__/b.pyc",
        "code/data/big.bin", "notes/drop.txt", "elsewhere/run.json", "elsewhere/metrics.jsonl", ".unirl/pairs",
    )  # fmt: skip
    for name in kept + left_out:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (made / "code" / ".rayignore").write_text("data/\n")
    (made / ".gitignore").write_text("/notes/*\n!/notes/keep.txt\n")
    return made, {*kept, ".gitignore", "code/.rayignore"}


def test_ignored_files_and_runs_stay_here(folder):
    made, expected = folder
    found, names = collect(made, [])
    assert set(found.files) == expected
    assert names == []


def test_settings_files_come_along_wherever_they_lie(folder, tmp_path):
    made, expected = folder
    outside = tmp_path / "b.yaml"
    outside.write_text("x: 1")
    found, names = collect(made, [made / "a.yaml", outside, made / "runs" / "x" / "run.json"])
    assert names == ["a.yaml", ".submitted/1_b.yaml", "runs/x/run.json"]
    assert set(found.files) == expected | set(names)
    assert found.files[names[1]].read_text() == "x: 1"


def test_the_archive_holds_the_files_and_is_the_same_each_time(folder, tmp_path):
    made, expected = folder
    (made / "code" / "b.py").chmod(0o755)
    found, _ = collect(made, [])
    for name in ("one.zip", "two.zip"):
        found.write(tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    archive = zipfile.ZipFile(tmp_path / "one.zip")
    assert set(archive.namelist()) == expected
    assert archive.read("code/b.py") == b"code/b.py"
    assert archive.getinfo("code/b.py").external_attr >> 16 & 0o777 == 0o755


def test_too_much_is_refused_by_the_names_of_what_weighs_most(folder, monkeypatch):
    made, _ = folder
    (made / "code" / "weights.bin").write_bytes(bytes(400_000))
    (made / "picture.png").write_bytes(bytes(200_000))
    monkeypatch.setattr(upload, "MAX_MB", 0.5)
    with pytest.raises(SubmitError, match=r"got 1 in .*project, mostly code/ 0\.4 MB, picture\.png 0\.2 MB"):
        collect(made, [])
    (made / ".rayignore").write_text("*.bin\n")
    assert "code/weights.bin" not in collect(made, [])[0].files


def test_a_link_to_a_folder_is_not_followed_and_one_to_a_file_is_its_file(folder, tmp_path):
    made, expected = folder
    (made / "loop").symlink_to(made)
    (made / "broken").symlink_to(made / "nothing")
    (made / "link.yaml").symlink_to(made / "a.yaml")
    assert set(collect(made, [])[0].files) == expected | {"link.yaml"}
    with pytest.raises(SubmitError, match="expected a folder"):
        collect(tmp_path / "nothing", [])
