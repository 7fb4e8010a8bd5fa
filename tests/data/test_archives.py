import io
import random
import tarfile
import zipfile

import pytest

from unirl.data.archives import JoinedParts, ZipImages, unpack_tar
from unirl.data.atomic import DataError


def cut(path, data, sizes):
    """Write data in parts path-aa, path-ab, ...; returns their paths."""
    parts = []
    for place, size in enumerate([*sizes, len(data)]):
        parts.append(path.with_name(f"{path.name}.part-a{'abcdefgh'[place]}"))
        parts[-1].write_bytes(data[:size])
        data = data[size:]
    return parts


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def tarred(path, *members):
    """A tar.gz of (name, bytes) files and ready-made TarInfo."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def test_joined_parts_read_as_the_whole_from_any_place(tmp_path):
    rng = random.Random(0)
    whole = rng.randbytes(1000)
    file = io.BufferedReader(JoinedParts(cut(tmp_path / "f", whole, [1, 0, 300, 7])), 16)
    assert file.read() == whole
    for _ in range(200):
        start, count = rng.randrange(1100), rng.randrange(400)
        file.seek(start)
        assert (file.read(count), file.tell()) == (whole[start : start + count], start + len(whole[start:][:count]))
    assert file.seek(-3, io.SEEK_END) == 997
    with pytest.raises(ValueError, match="expected a place in the file"):
        JoinedParts([]).seek(-1)


def test_a_zip_in_parts_gives_its_images_with_or_without_its_top_folder(tmp_path):
    data = {f"images/{name}.png": bytes([place]) * 5000 for place, name in enumerate("abc")}
    whole = zipped(data, zipfile.ZIP_STORED)
    with ZipImages(cut(tmp_path / "image.zip", whole, [4000, 4000, 4000])) as images:
        assert images.read("images/b.png") == images.read("b.png") == data["images/b.png"]
        for absent in ("d.png", "../a.png", "images/"):
            with pytest.raises(DataError, match=r"expected an image .* got none there"):
                images.read(absent)


def test_a_missing_part_and_a_damaged_member_are_named(tmp_path):
    whole = bytearray(zipped({"a.png": random.Random(0).randbytes(3000)}))
    parts = cut(tmp_path / "image.zip", bytes(whole), [1000])
    with pytest.raises(DataError, match=r"expected a whole zip archive in image\.zip\.part-aa; got"):
        ZipImages(parts[:1])
    parts[0].write_bytes(bytes(500) + parts[0].read_bytes()[500:])
    with ZipImages(parts) as images, pytest.raises(DataError, match="expected a whole image"):
        images.read("a.png")


def test_a_tar_is_unpacked_once_and_whole(tmp_path):
    archive = tarred(tmp_path / "a.tar.gz", ("x/1.png", b"one"), ("x/y/2.png", b"two"))
    folder = tmp_path / "unpacked" / "a"
    (tmp_path / "unpacked" / ".a.1.partial").mkdir(parents=True)
    assert unpack_tar(archive, folder) == folder
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == {"x/1.png", "x/y/2.png"}
    assert list(folder.parent.iterdir()) == [folder]
    archive.unlink()
    assert unpack_tar(archive, folder) == folder


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (("../out.png", b"x"), "expected members below the archive's own folder"),
        (("a/../../out.png", b"x"), "expected members below the archive's own folder"),
        (link("out.png", "/etc/passwd"), "a link or device"),
        (link("out.png", "1.png", tarfile.LNKTYPE), "a link or device"),
        (link("out.png", "", tarfile.FIFOTYPE), "a link or device"),
    ],
)
def test_a_hostile_tar_is_refused_and_leaves_nothing(tmp_path, member, words):
    archive = tarred(tmp_path / "a.tar.gz", ("1.png", b"one"), member)
    with pytest.raises(DataError, match=words):
        unpack_tar(archive, tmp_path / "u" / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz", "u"]


def test_a_cut_off_tar_is_refused_and_leaves_nothing(tmp_path):
    archive = tarred(tmp_path / "a.tar.gz", ("1.png", random.Random(0).randbytes(50_000)))
    whole = archive.read_bytes()
    for kept in (0, 10, 20_000, len(whole) - 20):
        archive.write_bytes(whole[:kept])
        with pytest.raises(DataError, match="expected a whole tar archive"):
            unpack_tar(archive, tmp_path / "u" / "a")
    assert list((tmp_path / "u").iterdir()) == []
