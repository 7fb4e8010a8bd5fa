import hashlib
import os

import pytest

from unirl.data.atomic import DataError
from unirl.data.checksums import check_file, file_facts, remembered_sha256


def test_a_missing_cut_off_or_altered_file_is_told_apart(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    facts = file_facts(path)
    check_file(path, facts, whole="store")
    path.write_bytes(b"abd")
    check_file(path, facts, whole="store", contents=False)
    with pytest.raises(DataError, match=r"expected sha256 ba7816bf.*make the store again"):
        check_file(path, facts, whole="store")
    path.write_bytes(b"ab")
    with pytest.raises(DataError, match="expected 3 bytes, as its manifest says; got 2"):
        check_file(path, facts, whole="store", contents=False)
    path.unlink()
    with pytest.raises(DataError, match="got none"):
        check_file(path, facts, whole="store")


def test_a_checksum_is_remembered_until_size_or_time_changes(tmp_path, caplog):
    caplog.set_level("INFO")
    path, memory = tmp_path / "a", tmp_path / "memory"

    def reads(data=None, *, time_ns):
        """Whether asking for the checksum reads the file."""
        if data is not None:
            path.write_bytes(data)
        os.utime(path, ns=(time_ns, time_ns))
        caplog.clear()
        assert remembered_sha256(path, memory) == hashlib.sha256(path.read_bytes()).hexdigest()
        return bool(caplog.messages)

    assert reads(b"abc", time_ns=1)
    assert not reads(time_ns=1)
    assert reads(time_ns=2)
    assert reads(b"abd", time_ns=3)
    assert reads(b"abcd", time_ns=3)
    (note,) = memory.iterdir()
    for torn in ("{", "[]", "[1]", "{}"):
        note.write_text(torn)
        assert reads(time_ns=3)
    assert not reads(time_ns=3)
