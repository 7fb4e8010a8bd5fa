import subprocess
import sys
import textwrap

import pytest

from unirl.data.atomic import DataError, atomic_file, atomic_folder


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail():
        with atomic_file(target) as file:
            file.write(b"new")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_finished_block_replaces_the_file(tmp_path):
    target = tmp_path / "deep" / "a.bin"
    for content in (b"one", b"two"):
        with atomic_file(target) as file:
            file.write(content)
        assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_block_leaves_no_folder(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "set") as folder:
            (folder / "x").write_bytes(b"x")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a folder that is not there yet"), atomic_folder(tmp_path):
        pass


def test_errors_of_the_block_keep_their_own_words(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    # RLIMIT_FSIZE makes the kernel refuse writes past 64 KiB, as a full disk refuses them.
    code = textwrap.dedent(
        f"""
        import resource, pathlib, numpy as np
        from unirl.data.atomic import DataError
        from unirl.data.records import write_samples
        from unirl.types import GenerationSample
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (40, 64, 64, 3), np.uint8)
        samples = [GenerationSample(id=str(i), prompt="p", image=image) for i, image in enumerate(images)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            write_samples(pathlib.Path({str(tmp_path)!r}) / "generation.parquet", samples, GenerationSample)
        except DataError as error:
            raise SystemExit(str(error))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected to write it; got 'File too large'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
