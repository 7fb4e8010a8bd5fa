import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unirl.config import PairConfig
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.data.pair_store import read_pair_set
from unirl.data.records import write_samples
from unirl.jobs.assets import (
    resolve_checkpoint,
    resolve_encoder,
    resolve_heldout,
    resolve_pairs,
    resolve_samples,
    resolve_teacher,
)
from unirl.lab.data import make_generation, make_heldout
from unirl.types import GenerationSample, UnderstandingSample

SMALL = PairConfig(lab_samples=40, num_aligned=10)


@pytest.mark.parametrize("name", ["lab:janus", "lab:lumina_dimoo", "lab:anole"])
def test_the_labs_checkpoints_are_in_the_package(name):
    assert (resolve_checkpoint(name) / "model.safetensors").is_file()


def test_the_lab_encoder_gives_unit_rows():
    pictures = [sample.image for sample in make_generation(5, seed=0)]
    features = resolve_encoder("lab")(pictures)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="expected a lab image"):
        resolve_encoder("lab")([np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.parametrize("resolve", [resolve_checkpoint, lambda name: resolve_pairs(name, "x"), resolve_heldout])
@pytest.mark.parametrize("name", ["lab:nothing", "/no/such/folder"])
def test_unknown_names_say_what_is_allowed(resolve, name):
    with pytest.raises(DataError, match=f"{name}: expected an existing path or 'lab:"):
        resolve(name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a Hugging Face checkpoint folder with config.json"):
        resolve_checkpoint(str(tmp_path))


def test_the_labs_pairs_are_made_once_and_kept(tmp_path):
    folder = resolve_pairs("lab:pairs", tmp_path, SMALL)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert resolve_pairs("lab:pairs", tmp_path, SMALL) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    assert len(read_pair_set(folder).pairs) > 10
    assert resolve_pairs(str(folder), tmp_path) == folder


def test_settings_of_the_labs_pairs_may_follow_their_name(tmp_path):
    folder = resolve_pairs("lab:pairs,lab_samples=60,num_aligned=10,threshold=0.9", tmp_path)
    pairs = read_pair_set(folder).pairs
    assert [pair.kind for pair in pairs].count("aligned") == 10
    assert min(pair.similarity for pair in pairs) >= 0.9
    with pytest.raises(ConfigError, match="threshold"):
        resolve_pairs("lab:pairs,threshold=2", tmp_path)


def test_damaged_lab_pairs_are_made_anew(tmp_path, caplog):
    folder = resolve_pairs("lab:pairs", tmp_path, SMALL)
    wanted = (folder / "manifest.json").read_bytes()
    (folder / "pairs.parquet").write_bytes(b"")
    resolve_pairs("lab:pairs", tmp_path, SMALL)
    assert (folder / "manifest.json").read_bytes() == wanted
    assert "making the lab's pairs anew" in caplog.text
    read_pair_set(folder)


def test_a_damaged_folder_of_the_user_is_refused(tmp_path):
    folder = resolve_pairs("lab:pairs", tmp_path, SMALL)
    (folder / "pairs.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="it was cut off or altered"):
        resolve_pairs(str(folder), tmp_path)


def make_and_report(cache, queue):
    folder = resolve_pairs("lab:pairs", cache, SMALL)
    queue.put((os.getpid(), str(folder), (folder / "manifest.json").stat().st_ino))


def test_two_that_ask_at_once_wait_for_each_other(tmp_path, caplog):
    caplog.set_level("INFO", "unirl.jobs.assets")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve_pairs("lab:pairs", tmp_path, SMALL), range(2))
    assert first == second
    assert caplog.text.count("making the lab's pairs in") == 1


@pytest.mark.slow
def test_processes_that_ask_at_once_make_one_pair_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=make_and_report, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len({pid for pid, _, _ in answers}) == 2
    assert len({answer[1:] for answer in answers}) == 1


def test_held_out_samples_come_from_the_lab_or_a_folder(tmp_path, caplog):
    understanding, generation = resolve_heldout("lab:heldout", 10)
    assert [sample.id for sample in understanding] == [sample.id for sample in make_heldout(10)[0]]
    write_samples(tmp_path / "understanding.parquet", understanding, UnderstandingSample)
    write_samples(tmp_path / "generation.parquet", generation, GenerationSample)
    read = resolve_heldout(str(tmp_path), 4)
    assert [[s.id for s in side] for side in read] == [[s.id for s in side[:4]] for side in (understanding, generation)]
    assert caplog.text == ""
    assert [len(side) for side in resolve_heldout(str(tmp_path), 20)] == [10, 10]
    assert "fewer than the 20 asked for" in caplog.text


def test_swapped_sources_are_named():
    with pytest.raises(DataError, match="expected a source of UnderstandingSample records; got GenerationSample"):
        resolve_samples("lab:generation", UnderstandingSample, SMALL, [])


def test_teachers_go_by_name():
    assert resolve_teacher("none", 0) is None
    assert resolve_teacher("lab", 0) is not None
    with pytest.raises(DataError, match="expected one of lab, none; got 'gpt'"):
        resolve_teacher("gpt", 0)
