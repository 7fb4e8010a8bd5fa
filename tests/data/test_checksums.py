import pytest

from unirl.data.atomic import DataError
from unirl.data.checksums import check_file, file_facts


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
