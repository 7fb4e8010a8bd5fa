import json
from dataclasses import replace

import numpy as np
import pytest

from unirl.config import PairConfig
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.data.pair_store import PairSet, read_pair_set, write_pair_set
from unirl.data.records import write_samples
from unirl.jobs import pair
from unirl.lab.data import make_generation, make_understanding
from unirl.types import GenerationSample, UnderstandingSample

CONFIG = PairConfig(num_aligned=30, lab_samples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "set"
    assert pair.make(replace(CONFIG, out=str(out))) == 0
    return out


@pytest.fixture
def pair_set(folder):
    return read_pair_set(folder)


def test_what_is_made_holds(folder, capsys):
    assert pair.verify(folder, as_json=True) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["faults"] == []
    assert verdict["num_pairs"] == len(read_pair_set(folder).pairs)
    assert verdict["num_recomputed"] == pair.RECOMPUTED
    assert pair.verify(folder) == 0
    assert "holds: " in capsys.readouterr().out


def test_pairs_drawn_at_random_hold_and_others_do_not(tmp_path):
    drawn = replace(CONFIG, selection="random", out=str(tmp_path / "set"))
    assert pair.make(drawn) == 0
    assert pair.examine(tmp_path / "set").faults == ()
    pair_set = read_pair_set(tmp_path / "set")
    claimed = replace(pair_set, settings=pair_set.settings | {"seed": 1})
    write_pair_set(tmp_path / "claimed", claimed)
    assert "aligned pairs are not those that the seed draws" in pair.examine(tmp_path / "claimed").faults


def test_making_again_gives_the_same_bytes(folder, tmp_path):
    pair.make(replace(CONFIG, out=str(tmp_path / "again")))
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def drop_last(values):
    return values[:-1]


def swapped(pair_set):
    """Two retrieved pairs that exchanged their questions."""
    retrieved = [place for place, p in enumerate(pair_set.pairs) if p.kind == "retrieved"][:2]
    pairs = list(pair_set.pairs)
    first, second = (pairs[place] for place in retrieved)
    pairs[retrieved[0]] = replace(first, understanding=second.understanding)
    pairs[retrieved[1]] = replace(second, understanding=first.understanding)
    return replace(pair_set, pairs=tuple(pairs))


def without_a_match(pair_set):
    proof = {**pair_set.certificate}
    for name in ("gen_index", "und_index", "similarity"):
        proof[name] = proof[name][1:]
    return replace(pair_set, certificate=proof)


def with_another_medoid(pair_set):
    proof = {**pair_set.certificate}
    sizes = np.bincount(proof["assignment"])
    place = int(sizes.argmax())
    other = next(row for row, c in enumerate(proof["assignment"]) if c == place and row != proof["medoids"][place])
    proof["medoids"] = [other if c == place else medoid for c, medoid in enumerate(proof["medoids"])]
    return replace(pair_set, certificate=proof)


def with_features_of_others(pair_set):
    return replace(pair_set, features={task: rows[::-1].copy() for task, rows in pair_set.features.items()})


def with_a_lower_similarity(pair_set):
    pairs = [replace(p, similarity=0.6) if p.kind == "retrieved" else p for p in pair_set.pairs]
    return replace(pair_set, pairs=tuple(pairs))


def with_an_image_twice(pair_set):
    pairs = list(pair_set.pairs)
    image = pairs[1].generation.image
    pairs[0] = replace(pairs[0], generation=replace(pairs[0].generation, image=image))
    return replace(pair_set, pairs=tuple(pairs))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (swapped, "is in the pairs only"),
        (without_a_match, "were passed over"),
        (with_another_medoid, "is not its most central image"),
        (with_features_of_others, "stored features are not those of its image"),
        (with_a_lower_similarity, "is in the certificate only"),
        (with_an_image_twice, "an image that is in"),
    ],
)
def test_a_wrong_pair_set_does_not_hold(tmp_path, pair_set, harm, words, capsys):
    write_pair_set(tmp_path / "wrong", harm(pair_set))
    assert pair.verify(tmp_path / "wrong") == pair.FAULTY
    out = capsys.readouterr().out
    assert words in out
    assert "does not hold" in out


def test_a_certificate_that_does_not_fit_is_one_clear_error(tmp_path, pair_set):
    write_pair_set(tmp_path / "none", replace(pair_set, certificate={}))
    with pytest.raises(DataError, match="expected a certificate and features that fit each other"):
        pair.verify(tmp_path / "none")


def test_own_samples_are_paired_without_a_teacher(tmp_path, capsys):
    write_samples(tmp_path / "in" / "understanding.parquet", make_understanding(50, seed=3), UnderstandingSample)
    write_samples(tmp_path / "in" / "generation.parquet", make_generation(50, seed=3), GenerationSample)
    source = str(tmp_path / "in")
    out = tmp_path / "out"
    pair.make(replace(CONFIG, understanding=source, generation=source, teacher="none", out=str(out)))
    figures = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert figures["kinds"].keys() == {"retrieved"}
    assert pair.examine(out).faults == ()


def test_too_many_bad_records_stop_the_job_and_are_named_beside_the_folder(tmp_path):
    path = tmp_path / "und.parquet"
    write_samples(path, [replace(s, id="same") for s in make_understanding(20, seed=0)], UnderstandingSample)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"expected at most 1\.00% bad records of 20"):
        pair.make(replace(CONFIG, understanding=str(path), out=str(out)))
    with pytest.raises(DataError, match=r"expected at most 50\.00% bad records of 20"):
        pair.make(replace(CONFIG, understanding=str(path), out=str(out), max_rejected_fraction=0.5))
    assert not out.exists()
    assert "'same' a second time" in (tmp_path / "out.rejected.jsonl").read_text()


def test_a_folder_is_asked_for_and_never_overwritten(tmp_path):
    with pytest.raises(ConfigError, match="must name a new folder"):
        pair.make(CONFIG)
    with pytest.raises(DataError, match="expected a folder that is not there yet"):
        pair.make(replace(CONFIG, out=str(tmp_path)))


def test_the_report_prints_its_path_last(tmp_path, folder, capsys):
    page = tmp_path / "page.html"
    assert pair.report(folder, out=page) == 0
    *figures, path = capsys.readouterr().out.splitlines()
    assert path == str(page)
    assert dict(map(str.split, figures))["pairs"] == str(len(read_pair_set(folder).pairs))


def test_the_report_stands_alone_and_escapes_its_text(tmp_path, pair_set, capsys):
    first = pair_set.pairs[0]
    text = "<script>alert(1)</script>"
    pairs = (replace(first, generation=replace(first.generation, prompt=text)), *pair_set.pairs[1:])
    write_pair_set(tmp_path / "set", PairSet(pairs=pairs, weights=pair_set.weights, settings=pair_set.settings))
    assert pair.report(tmp_path / "set", as_json=True) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kinds"]["aligned"] == 30
    assert sum(figures["categories"]["retrieved"]["generation"].values()) == figures["kinds"]["retrieved"]
    page = (tmp_path / "set" / "report.html").read_text()
    assert text not in page
    assert "http" not in page
    assert page.count("data:image/png;base64,") >= 40
    read_pair_set(tmp_path / "set")
