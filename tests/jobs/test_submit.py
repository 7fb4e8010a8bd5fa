import json
import os
import re
import signal
import subprocess
from threading import Timer

import pytest
from typer.testing import CliRunner

from tests.heads import BIN, ROOT, environment, ray_head, wait_for
from unirl import cli
from unirl.cluster import job_client
from unirl.cluster.job_client import Nodes, dashboard_address, read_token
from unirl.cluster.plan import PlacementError, may_grow
from unirl.cluster.upload import SubmitError, collect
from unirl.config import RlConfig
from unirl.config_loading import load_config
from unirl.jobs import submit

TOKEN = "0123456789abcdef-of-the-tests"
NOBODY = "http://127.0.0.1:9"
SETTINGS = (
    "evaluation.enabled=false", "rollout.pairs_per_step=4", "rollout.num_understanding=4", "rollout.num_generation=4",
    "data.max_pairs=64",
)  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("home"), num_cpus=3, token=TOKEN) as started:
        yield started


@pytest.fixture
def place(tmp_path):
    """Where a user submits from: a small project, and a file that is not part of it."""
    (tmp_path / "project" / "configs").mkdir(parents=True)
    (tmp_path / "project" / "configs" / "inside.yaml").write_text("train: {name: inside, num_steps: 7}\n")
    (tmp_path / "outside.yaml").write_text("learner: {lr: 0.125}\n")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return tmp_path


def begin(head, place, *words, **variables):
    """`unirl submit` as a process of its own, from a folder that is neither the project nor this checkout."""
    command = [BIN / "unirl", "submit", *map(str, words), "--address", head.address]
    command += ["--working-dir", str(place / "project")]
    return subprocess.Popen(
        command, cwd=place, env=environment(place, **variables), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(head, place, *words, **variables):
    process = begin(head, place, *words, **variables)
    out, error = process.communicate(timeout=120)
    assert TOKEN not in out + error
    return process.returncode, out, error


def one_error(error):
    """The one line that says what is wrong; nothing else but the plan is printed."""
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("unirl: error: ")]
    return line


def test_a_job_takes_its_settings_along_from_anywhere_and_its_log_is_followed(head, place):
    files = ["-c", place / "project" / "configs" / "inside.yaml", "-c", "outside.yaml"]
    code, out, error = run(head, place, "config", "show", *files, "--job-id", "shown", RAY_AUTH_TOKEN=TOKEN)
    assert code == 0, error
    assert "exec unirl config show -c configs/inside.yaml -c .submitted/1_outside.yaml" in error
    assert "name: inside" in out
    assert "lr: 0.125" in out
    assert "shown: succeeded" in error
    kept = json.dumps(head.get("/api/jobs/shown"))
    assert json.loads(kept)["metadata"] == {"name": "config", "run_dir": "", "command": "config show"}
    assert TOKEN not in kept


def test_a_job_that_fails_is_exit_code_1_with_its_own(head, place):
    token = ["--token-file", place / "token"]
    code, out, error = run(head, place, "data", "validate", place / "nothing", "--job-id", "failing", *token)
    assert code == 1
    assert "unirl: error: " in out
    assert "failing: failed: its command ended with exit code 4" in error
    code, _, error = run(head, place, "config", "keys", "--job-id", "failing", *token)
    assert code == 2
    assert "expected a new name; got failing" in one_error(error)


@pytest.mark.parametrize("by", ["ctrl-c", "--stop"])
def test_a_job_can_be_stopped_from_here_and_from_elsewhere(head, place, by):
    job, token = f"stopped-by-{by.strip('-')}", ["--token-file", str(place / "token")]
    process = begin(head, place, "lab", "pretrain", place / "made", "--job-id", job, *token)
    wait_for(lambda: is_running(head, job), 60)
    if by == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        assert run(head, place, "--stop", job, *token)[0] == 0
    out, error = process.communicate(timeout=60)
    assert process.returncode == (130 if by == "ctrl-c" else 143), error
    assert f"{job}: stopped" in error
    assert head.get(f"/api/jobs/{job}")["status"] == "STOPPED"
    assert out.count("Running entrypoint for job") <= 1, "a log is not shown twice"
    assert run(head, place, "--stop", job, *token)[2].startswith(f"{job} had ended already")


def is_running(head, job):
    return any(found["submission_id"] == job and found["status"] == "RUNNING" for found in head.get("/api/jobs/"))


@pytest.mark.parametrize(
    ("words", "variables", "code", "said"),
    [
        ([], {"RAY_AUTH_TOKEN": "another"}, 5, "expected the cluster's token; got one that it refuses"),
        ([], {}, 5, "expected the cluster's token; got none; set RAY_AUTH_TOKEN, or name its file with --token-file"),
        (["--token-file", "nothing"], {}, 2, "--token-file: expected a file with the cluster's token; got nothing"),
        ([], {"RAY_AUTH_TOKEN": TOKEN}, 5, "expected room for every actor; got CPU 4 needed, 3 present"),
        (["--stop", "unheard-of"], {"RAY_AUTH_TOKEN": TOKEN}, 2, "expected one of its jobs"),
    ],
)  # fmt: skip
def test_what_the_cluster_refuses_is_one_error(head, place, words, variables, code, said):
    before = len(head.get("/api/jobs/"))
    found, out, error = run(head, place, *words, "--run-dir", "/shared/run", **variables)
    assert (found, out) == (code, "")
    assert said in one_error(error)
    assert len(head.get("/api/jobs/")) == before


@pytest.mark.slow
def test_a_cluster_without_a_token_takes_a_job_and_is_left_to_itself(place):
    with ray_head(place, num_cpus=1) as open_head:
        code, out, error = run(open_head, place, "config", "keys", "learner.lr", "--no-follow", "--job-id", "alone")
        assert (code, out) == (0, "alone\n")
        assert "unirl submit --stop alone" in error
        wait_for(lambda: open_head.get("/api/jobs/alone")["status"] == "SUCCEEDED", 60)


@pytest.fixture(scope="module")
def large_head(tmp_path_factory):
    """Room for a whole run."""
    with ray_head(tmp_path_factory.mktemp("home"), num_cpus=4, token=TOKEN) as started:
        yield started


@pytest.mark.slow
def test_a_run_through_submit_saves_when_stopped_and_goes_on_to_its_end(large_head, place):
    run_dir, auth = place / "shared" / "run", {"RAY_AUTH_TOKEN": TOKEN}
    words = ["-c", ROOT / "configs" / "rl" / "lab.yaml", *SETTINGS, "train.num_steps=30", "--run-dir", run_dir]
    words += [f"data.cache_dir={place / 'cache'}"]
    process = begin(large_head, place, *words, "--job-id", "begun", **auth)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and (run_dir / "metrics.jsonl").read_text(), 240)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, out + error
    assert "asking begun to end" in error
    assert "saved and ended; go on with: unirl train --resume" in out
    made = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 1 <= made < 30
    assert [folder.name for folder in (run_dir / "checkpoints").glob("step_*")] == [f"step_{made:08d}"]
    assert large_head.get("/api/jobs/begun")["metadata"]["run_dir"] == str(run_dir)

    again = ["train", "--resume", run_dir, f"train.num_steps={made + 2}", "--job-id", "again"]
    code, out, error = run(large_head, place, *again, **auth)
    assert code == 0, out + error
    assert f"step={made + 2}/{made + 2}" in out
    assert (run_dir / "policy" / "config.json").is_file()
    assert not any(TOKEN in file.read_text(errors="ignore") for file in run_dir.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_driver_on_a_cluster_that_cannot_grow_refuses_at_once(large_head, place):
    joined = environment(place, RAY_ADDRESS=large_head.gcs, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    command = [BIN / "unirl", "train", "--run-dir", place / "run", "learner.num_cpus=50", f"data.cache_dir={place}"]
    done = subprocess.run(command, cwd=place, env=joined, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 5
    assert "CPU 53 needed, 4 present" in one_error(done.stderr)


@pytest.mark.slow
def test_a_cluster_that_goes_away_is_one_error(place, monkeypatch):
    monkeypatch.setattr(job_client, "LOST_S", 2.0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with ray_head(place, num_cpus=1, token=TOKEN) as lost:
        client = job_client.JobClient(lost.address, TOKEN)
        client.submit("exec sleep 300", collect(place / "project", [])[0], {}, job_id="sleeping")
        Timer(5.0, lost.process.terminate).start()
        with pytest.raises(ConnectionError, match=r"expected to follow sleeping to its end; got no answer for 2 s"):
            client.follow("sleeping", print)


def offline(*words):
    return CliRunner().invoke(cli.app, ["submit", *map(str, words)])


def test_nobody_at_the_address_is_one_error():
    with pytest.raises(ConnectionError, match="expected the dashboard of a Ray cluster; got Connection refused"):
        submit.Target(address=NOBODY).connect()
    assert cli.exit_code(ConnectionError()) == 5


def test_a_dry_run_shows_the_plan_and_asks_nobody(monkeypatch, place):
    monkeypatch.chdir(place / "project")
    shown = offline("-c", "configs/inside.yaml", "--run-dir", "/shared/run", "--dry-run", "--address", NOBODY)
    assert shown.exit_code == 0, shown.output
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in shown.stdout.splitlines())
    assert lines["cluster"] == NOBODY
    assert re.fullmatch(r"inside-\d{8}-\d{6}", lines["job"])
    assert lines["command"] == "exec unirl train --run-dir /shared/run -c configs/inside.yaml"
    assert re.match(rf"{place}/project: 1 files, 0\.0 MB", lines["upload"])
    assert lines["results"] == "/shared/run, which every node must see"
    assert lines["actors"].endswith("4 CPUs and 0 GPUs at once")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learner.lrr=1", "--run-dir", "/s"], "learner.lrr (1) is not a setting; did you mean learner.lr?"),
        (["sft", "--run-dir", "/s", "--bogus"], "No such option: --bogus"),
        (["trian", "--run-dir", "/s"], "expected one of ablate, "),
        (["pair"], "expected one of make, report, verify"),
        (["--run-dir", "runs/x"], "--run-dir: expected an absolute path"),
        (
            ["recipe", "-c", ROOT / "configs" / "recipes" / "lab_sft_then_rl.yaml"],
            "got none; add --run-dir /shared/NAME",
        ),
        (["generate", "--prompt", "a", "--out", "here"], "--out: expected an absolute path"),
        (["--run-dir", "/s", "--address", "10.0.0.1:6379"], "--address: expected the URL of a Ray dashboard"),
        (["--run-dir", "/s", "--dry-run", "--token-file", "none"], "--token-file: expected a file with"),
        (["--resume", "runs/x"], "--run-dir: expected an absolute path"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "--address", NOBODY, *map(str, words)])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_files_that_a_grid_names_must_be_among_those_it_takes_along(tmp_path, monkeypatch):
    grid = "configs/ablations/lab_sft_seeds.yaml"
    monkeypatch.chdir(ROOT)
    with pytest.raises(SubmitError, match="expected every file of the grid"):
        submit.main(cli.read_command(["ablate", "--run-dir", "/s"], [ROOT / grid]), submit.Target(working_dir=tmp_path))
    shown = offline("ablate", "-c", grid, "--run-dir", "/s", "--dry-run")
    assert shown.exit_code == 0
    assert "2 x encoder" in shown.stdout, "two runs at once"


def test_a_run_to_go_on_with_brings_its_own_settings_where_it_can_be_seen(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {name: begun}\nlearner: {num_ranks: 2}\n")
    seen = cli.read_command(["train", "--resume", str(tmp_path)], [])
    assert (seen.settings.train.name, seen.settings.learner.num_ranks, seen.results) == ("begun", 2, tmp_path)
    assert cli.read_command(["train", "--resume", "/elsewhere/run"], []).settings is None


def test_room_is_counted_in_all_and_on_single_nodes():
    def check(settings, *nodes, grows=False, driver_gpus=0.0):
        config = load_config([], ["train.name=x", *settings], RlConfig)
        command = submit.Command(words=("train",), settings=config)
        submit._check_room(
            command, Nodes(nodes, may_grow=grows), submit.Target(address=NOBODY, driver_gpus=driver_gpus)
        )

    check([], {"CPU": 1}, {"CPU": 1.0}, {"CPU": 2.0})
    with pytest.raises(PlacementError, match=r"127\.0\.0\.1:9: .*GPU 2 needed, 0 present"):
        check(["learner.num_gpus=1", "learner.num_ranks=2"], {"CPU": 8.0})
    with pytest.raises(PlacementError, match="no node with 3 CPU"):
        check(["learner.num_cpus=3"], {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(PlacementError, match="no node with 1 GPU"):
        check([], {"CPU": 4.0}, driver_gpus=1.0)
    check(["learner.num_cpus=300"], {"CPU": 2.0}, grows=True)


def test_what_makes_no_actors_needs_no_room():
    for words in (["verify"], ["train", "--local", "--run-dir", "/s"], ["bench", "shape"]):
        assert submit._needs(cli.read_command(words, [])) == []
    (evaluation,) = submit._needs(cli.read_command(["eval", "/s/run"], []))
    assert "learner" not in [actor.role for actor in evaluation[0]]


def test_a_cluster_grows_unless_every_node_is_of_a_type_of_its_own():
    assert not may_grow({"ab12": "node_ab12", "cd34": "node_cd34"})
    assert may_grow({"ab12": "headgroup", "cd34": "rollout"})
    assert may_grow({})


def test_address_and_token_come_from_where_ray_looks(monkeypatch, tmp_path):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://there")
    assert dashboard_address(None) == "https://there"
    assert dashboard_address("http://here:1/") == "http://here:1"
    assert read_token(None) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    assert read_token(None) == "default"
    (tmp_path / "other").write_text("of the path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert read_token(None) == "of the path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the variable")
    assert read_token(None) == "of the variable"
    assert read_token(tmp_path / "other") == "of the path"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token(None) is None
