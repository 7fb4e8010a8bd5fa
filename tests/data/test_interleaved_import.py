import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest

from tests.data.interleaved_samples import encoded
from unirl.data.atomic import DataError
from unirl.data.interleaved import data_files, stream_interleaved
from unirl.data.interleaved_import import Draft, Plan, import_samples, key_of, source_files
from unirl.data.messages import exchange

PLAN = Plan(importer="made", source="nowhere", records_per_shard=4)


def row(place):
    return exchange([encoded(place), f"number {place} ?"], ["yes"], subset="understanding", source="made")


def drafts(count=10, bad=(), stop=None, build=row):
    for place in range(count):
        if place == stop:
            raise KeyboardInterrupt
        yield Draft(
            str(place), partial(exchange, [], [], subset="", source="") if place in bad else partial(build, place)
        )


def ids(path):
    return [sample.id for sample in stream_interleaved(path, [], max_rejected_fraction=0)]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_holds_whole_shards_a_manifest_and_what_was_left_out(tmp_path):
    out = tmp_path / "store"
    manifest = import_samples(out, partial(drafts, bad=(5,)), PLAN, max_rejected_fraction=0.1)
    assert sorted(contents(out)) == [
        "interleaved-00000.parquet", "interleaved-00001.parquet", "interleaved-00002.parquet", "manifest.json",
        "rejected.jsonl",
    ]  # fmt: skip
    assert ids(out) == [f"made/{place}" for place in range(10) if place != 5]
    counts = {"samples": 9, "images": 9, "images_in_loss": 0}
    assert manifest["counts"] == counts | {"subsets": {"understanding": counts}, "rejected": 1}
    rejected = json.loads((out / "rejected.jsonl").read_text())
    assert (rejected["row"], rejected["id"]) == (5, "5")
    assert "got an user turn without" in rejected["reason"]


def test_images_can_lie_beside_the_tables(tmp_path):
    import_samples(tmp_path / "store", partial(drafts, 3), replace(PLAN, image_files=True))
    assert len(list((tmp_path / "store" / "images").iterdir())) == 3
    assert len(ids(tmp_path / "store")) == 3


def test_a_subsample_depends_on_the_seed_alone_and_has_the_asked_size(tmp_path):
    chosen = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        import_samples(out, partial(drafts, 40), replace(PLAN, max_samples=12, seed=seed))
        assert chosen.setdefault(seed, ids(out)) == ids(out)
        assert len(ids(out)) == 12
    assert chosen[0] != chosen[1]
    assert chosen[0] == [f"made/{i}" for i in range(40) if key_of(str(i), 0) <= sorted(
        key_of(str(i), 0) for i in range(40))[11]]  # fmt: skip
    import_samples(tmp_path / "all", partial(drafts, 3), replace(PLAN, max_samples=12))
    assert len(ids(tmp_path / "all")) == 3


def test_an_interrupted_import_is_no_store_until_it_went_on(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "store"
    import_samples(whole, partial(drafts, bad=(1, 6)), PLAN, max_rejected_fraction=0.3)
    with pytest.raises(KeyboardInterrupt):
        import_samples(out, partial(drafts, bad=(1, 6), stop=7), PLAN, max_rejected_fraction=0.3)
    with pytest.raises(DataError, match="an import left unfinished; add --resume"):
        data_files(out)
    with pytest.raises(DataError, match="got an existing one; add --resume"):
        import_samples(out, drafts, PLAN)
    with pytest.raises(DataError, match=r"got seed 0, now 1; repeat the first"):
        import_samples(out, drafts, replace(PLAN, seed=1), resume=True)
    built = []

    def build(place):
        built.append(place)
        return row(place)

    import_samples(out, partial(drafts, bad=(1, 6), build=build), PLAN, max_rejected_fraction=0.3, resume=True)
    assert built == [4, 5, 7, 8, 9]
    assert contents(out) == contents(whole)
    import_samples(out, drafts, PLAN, resume=True)
    assert contents(out) == contents(whole)


def test_a_resume_starts_where_a_kill_left_nothing_whole(tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    (out / ".progress.json.1.partial").write_text("{")
    with pytest.raises(DataError, match="remove it or name another"):
        import_samples(out, drafts, PLAN)
    import_samples(out, drafts, PLAN, resume=True)
    assert len(ids(out)) == 10


def test_progress_that_makes_no_sense_is_refused(tmp_path):
    for text in ("{", "[]", '{"settings": {}}', '{"settings": 3, "threshold": 1}'):
        (tmp_path / "progress.json").write_text(text)
        with pytest.raises(DataError, match="expected the progress of an import"):
            import_samples(tmp_path, drafts, PLAN, resume=True)


def test_a_shard_that_was_altered_is_not_gone_on_with(tmp_path):
    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        import_samples(out, partial(drafts, stop=6), PLAN)
    shard = out / "interleaved-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="it was cut off or altered"):
        import_samples(out, drafts, PLAN, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_too_many_bad_records_leave_their_names_alone_and_the_repaired_source_is_read_anew(tmp_path, resume):
    out = tmp_path / "store"
    words = r"nowhere: expected at most 1.00% bad records of 10; got 2: row 1 \(1\).*--max-rejected-fraction; all"
    with pytest.raises(DataError, match=words):
        import_samples(out, partial(drafts, bad=(1, 7)), replace(PLAN, image_files=True))
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 2
    manifest = import_samples(out, drafts, PLAN, resume=resume)
    assert manifest["counts"]["rejected"] == 0
    assert len(ids(out)) == 10
    assert (out / "rejected.jsonl").read_text() == ""


def test_a_larger_share_of_bad_records_may_be_allowed_afterwards(tmp_path):
    out = tmp_path / "store"
    with pytest.raises(DataError, match=r"at most 1.00% bad records"):
        import_samples(out, partial(drafts, bad=(1, 2)), PLAN)
    import_samples(out, partial(drafts, bad=(1, 2)), PLAN, max_rejected_fraction=0.2)
    assert len(ids(out)) == 8


def test_an_import_does_not_go_on_with_a_source_that_was_written_again(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "store"
    source.write_text("{}\n")
    plan = replace(PLAN, source=str(source))
    with pytest.raises(KeyboardInterrupt):
        import_samples(out, partial(drafts, stop=6), plan)
    source.write_text("{} \n")
    with pytest.raises(DataError, match=r"rows.jsonl written again since; remove the folder and import anew"):
        import_samples(out, drafts, plan, resume=True)


def test_records_of_one_id_enter_once_also_across_a_resume(tmp_path):
    def twins(stop=None):
        for draft in drafts(8, stop=stop):
            yield Draft(draft.id, partial(lambda build: build() | {"id": "twin"}, draft.build))

    with pytest.raises(KeyboardInterrupt):
        import_samples(tmp_path / "s", partial(twins, 5), PLAN, max_rejected_fraction=1)
    import_samples(tmp_path / "s", twins, PLAN, max_rejected_fraction=1, resume=True)
    assert ids(tmp_path / "s") == ["twin"]


def test_an_import_without_a_good_record_says_so(tmp_path):
    with pytest.raises(DataError, match="expected records to import; got 2, none of them good"):
        import_samples(tmp_path / "s", partial(drafts, 2, bad=(0, 1)), PLAN, max_rejected_fraction=1)
    with pytest.raises(DataError, match="got none: it is empty"):
        import_samples(tmp_path / "empty", partial(drafts, 0), PLAN)
    assert not (tmp_path / "empty").exists()
    with pytest.raises(DataError, match="expected a file, or a folder with a or b"):
        source_files(tmp_path, "a", "b")


def test_an_import_killed_at_any_moment_goes_on_to_the_same_store(tmp_path):
    source = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "q " * 100}, {"role": "assistant", "content": "a"}]
    source.write_text(f"{json.dumps({'messages': turns})}\n" * 1200)
    words = ["data", "import", "messages", str(source), "--records-per-shard", "40", "--resume", "-q", "--out"]
    command = [sys.executable, "-c", "from unirl.cli import main; main()", *words]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    kills = 0
    for wanted in (1, 9):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.parquet"))) < wanted:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if not (out / "manifest.json").exists():
            with pytest.raises(DataError, match="unfinished"):
                data_files(out)
    assert kills
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert contents(out) == contents(whole)
