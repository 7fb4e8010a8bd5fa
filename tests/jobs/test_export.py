import json
import shutil
import subprocess
import sys

import pytest

from tests.jobs.test_runs import ROOT, without
from tests.monitoring.mirror_files import read_tensorboard, read_tensorboard_times
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.journal import read_step


def test_parquet_is_a_row_a_step_and_a_column_a_metric(unirl, run_dir, tmp_path):
    import pyarrow.parquet as pq

    code, out, _ = unirl("export", run_dir, "--parquet", "--out", tmp_path / "m.parquet")
    assert code == 0
    assert "12 steps" in out
    table = pq.read_table(tmp_path / "m.parquet")
    metrics = read_run(run_dir).metrics
    assert table.num_rows == len(metrics)
    for row, line in zip(table.to_pylist(), metrics, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in line.items() if name not in ("v", "nonfinite") and value is not None
        }
    assert json.loads(table.schema.metadata[b"unirl_run"])["id"] == "run"


def test_tensorboard_has_every_value_and_the_evaluations(unirl, run_dir, tmp_path):
    assert unirl("export", run_dir, "--tensorboard", "--out", tmp_path / "tb")[0] == 0
    read, record = read_tensorboard(tmp_path / "tb"), read_run(run_dir)
    times = {key: time for key, (_, time) in read_tensorboard_times(tmp_path / "tb").items()}
    for line in record.metrics:
        for name, value in line.items():
            if "/" in name and value is not None:
                assert read[name, line["step"]] == pytest.approx(value, rel=1e-6)
    for step, result in record.evaluations.items():
        written = json.loads((run_dir / "evaluations" / f"step_{step:06d}.json").read_text())["time"]
        assert {times[f"evaluation/{name}", step] for name in result.estimates} == {written}
        for name, estimate in result.estimates.items():
            assert read[f"evaluation/{name}", step] == pytest.approx(estimate.mean, rel=1e-6, abs=1e-9)


def test_rollouts_are_dumped_as_verl_does(unirl, run_dir, tmp_path):
    code, out, _ = unirl("export", run_dir, "--verl-jsonl", "--out", tmp_path / "dump")
    assert code == 0
    assert "768 completions of 12 steps" in out
    files = sorted((tmp_path / "dump").iterdir(), key=lambda file: int(file.stem))
    assert [file.name for file in files] == [f"{step}.jsonl" for step in range(1, 13)]
    shown = {line["understanding"]["id"]: line["understanding"]["gold"] for line in read_run(run_dir).pairs}
    for file in files:
        step = int(file.stem)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line, row in zip(lines, read_step(run_dir, step), strict=True):
            assert list(line)[:5] == ["input", "output", "gts", "score", "step"]
            assert (line["step"], line["score"]) == (step, row.reward)
            assert line["output"] == (row.text or f"images/{row.image}" if row.text or row.image else line["output"])
            assert line["gts"] == shown.get(row.sample_id)
            assert line["accuracy" if row.task == "understanding" else "lab_verifier"] == row.components[0].value
            assert isinstance(line["input"], str)
    assert any(line["gts"] for line in lines), "step 12 was shown"


def test_a_prompt_is_decoded_by_the_tokenizer_that_made_it(unirl, run_dir, tmp_path):
    from tokenizers import Tokenizer

    from unirl.lab.checkpoint_folder import CHECKPOINTS

    unirl("export", run_dir, "--verl-jsonl", "--out", tmp_path / "dump")
    line = json.loads((tmp_path / "dump" / "1.jsonl").read_text().splitlines()[0])
    ids = read_step(run_dir, 1)[0].prompt_ids.tolist()
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "janus" / "tokenizer.json"))
    assert line["input"] == tokenizer.decode(ids, skip_special_tokens=True)
    code, _, err = unirl(
        "export", run_dir, "--verl-jsonl", "--out", tmp_path / "other", "--tokenizer", tmp_path / "dump"
    )
    assert code == 4
    assert "expected tokenizer.json in" in err
    assert not (tmp_path / "other").exists()


def test_a_run_without_a_journal_has_no_rollouts(unirl, run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(copy / "journal")
    code, _, err = unirl("export", copy, "--verl-jsonl", "--out", tmp_path / "dump")
    assert code == 4
    assert "run with monitoring.journal=true" in err


def test_a_damaged_journal_is_named_and_leaves_nothing(unirl, run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "journal" / "step_000003.parquet").write_bytes(b"PAR1")
    code, _, err = unirl("export", copy, "--verl-jsonl", "--out", tmp_path / "dump")
    assert code == 4
    assert "step_000003.parquet" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kinds", [[], ["--parquet", "--tensorboard"]])
def test_one_form_at_a_time(unirl, run_dir, kinds):
    code, _, err = unirl("export", run_dir, *kinds)
    assert code == 2
    assert "expected one of --parquet, --tensorboard, --verl-jsonl" in err


def test_what_is_there_is_not_overwritten(unirl, run_dir, tmp_path):
    (tmp_path / "m").write_text("mine")
    code, _, err = unirl("export", run_dir, "--parquet", "--out", tmp_path / "m")
    assert code == 4
    assert "expected a place that is free" in err
    assert (tmp_path / "m").read_text() == "mine"


def test_torch_and_ray_are_not_needed(run_dir, tmp_path):
    program = (
        without("torch", "ray", "vllm", "transformers", "deepspeed") + "from unirl.cli import main\n"
        "for kind in ('parquet', 'tensorboard', 'verl-jsonl'):\n"
        "    try: main(['export', sys.argv[1], f'--{kind}', '--out', f'{sys.argv[2]}/{kind}'])\n"
        "    except SystemExit as end: assert not end.code, kind\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, run_dir, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
