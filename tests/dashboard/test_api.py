"""Every answer against what the run directory says, as its own reader reads it."""

import json
import shutil
from itertools import pairwise

import pytest

from tests.dashboard.conftest import NUM_STEPS, add_lines, ask
from tests.monitoring.made_run import make_config, make_step
from unirl.config import flatten
from unirl.dashboard.runs import quoted
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.conditions import Conditions
from unirl.monitoring.run_log import RunLog

RUN = "/api/run/grid~1seed~00"


def test_runs_are_listed_by_their_path_below_the_folder(client, finished_run):
    (row,) = client.get("/api/runs").json()["runs"]
    assert row.pop("updated") == (finished_run / "run.json").stat().st_mtime
    conditions = Conditions(read_run(finished_run).events)
    assert row.pop("num_alerts") == {"open": conditions.num_open, "all": conditions.num, "changes": conditions.changes}
    assert row == {"id": "grid/seed~0", "status": "finished", "stalled": False, "step": 12, "num_steps": 12}


def test_a_folder_that_is_a_run_lists_itself(finished_run):
    client = ask(finished_run)
    (row,) = client.get("/api/runs").json()["runs"]
    assert row["id"] == "seed~0"
    assert client.get("/api/run/seed~00").json()["run"]["status"] == "finished"


def test_runs_of_like_names_are_told_apart(own_runs, tmp_path):
    for name in ("a/b", "a~b"):
        (own_runs / name).mkdir(parents=True)
        (own_runs / name / "run.json").write_text(json.dumps({"id": name}))
    client = ask(own_runs)
    assert client.get("/api/run/a~1b").json()["run"] == {"id": "a/b"}
    assert client.get("/api/run/a~0b").json()["run"] == {"id": "a~b"}
    assert client.get("/api/compare?runs=a/b,a~b").json()["evaluations"].keys() == {"a/b", "a~b"}


def test_a_run_that_begins_later_is_found(own_runs, finished_run, monkeypatch):
    monkeypatch.setattr("unirl.dashboard.runs.LOOK_EVERY_S", 0.0)
    client = ask(own_runs)
    assert client.get("/api/run/two").status_code == 404
    config = make_config(3)
    RunLog(own_runs / "two", config, config.monitoring).end("finished")
    assert client.get("/api/run/two").json()["run"]["id"] == "two"
    (own_runs / "linked").symlink_to(finished_run)
    ids = {row["id"] for row in client.get("/api/runs").json()["runs"]}
    assert ids == {"one", "two"}, "links to folders are not followed"


def test_a_run_whose_folder_is_gone_is_said_to_be(own_runs):
    client = ask(own_runs)
    assert client.get("/api/run/one").status_code == 200
    shutil.rmtree(own_runs / "one")
    assert client.get("/api/runs").json()["runs"] == []
    for path in ("", "/strip", "/metrics", "/pairs", "/events"):
        answer = client.get(f"/api/run/one{path}")
        assert (answer.status_code, "this run's folder is gone" in answer.json()["error"]) == (404, True)
    assert "expected the id of a run" in client.get("/api/run/never").json()["error"]


def test_only_the_runs_that_were_looked_at_last_stay_in_memory(own_runs, finished_run, monkeypatch):
    monkeypatch.setattr("unirl.dashboard.runs.MAX_HELD", 1)
    shutil.copytree(finished_run, own_runs / "two")
    client = ask(own_runs)
    asked = "/api/run/{}/metrics?names=learner/loss&since={}"
    cursor = client.get(asked.format("one", "")).json()["cursor"]
    assert client.get(asked.format("one", cursor)).json()["reset"] is False
    client.get(asked.format("two", ""))
    again = client.get(asked.format("one", cursor)).json()
    assert (again["reset"], len(again["steps"])) == (True, NUM_STEPS)


def test_the_overview_says_what_the_files_say(client, finished_run):
    found, record = client.get(RUN).json(), read_run(finished_run)
    assert found["run"] == record.run
    assert found["config"] == json.loads(json.dumps(flatten(make_config(NUM_STEPS, **{
        "pairs_every": 2, "pairs_per_step": 2, "journal": False})))) | {"rewards.understanding.accuracy.options": {},
        "rewards.generation.lab_verifier.options": {}}  # fmt: skip
    names = {metric["name"]: metric for metric in found["metrics"]}
    assert names.keys() == {name for line in record.metrics for name in line} - {
        "v",
        "step",
        "time",
        "attempt",
        "nonfinite",
    }
    assert names["time/rollout_s"]["unit"] == "s"
    assert "overlaps" in names["time/rollout_s"]["meaning"]
    assert [one["step"] for one in found["evaluations"]] == [0, NUM_STEPS]
    for one in found["evaluations"]:
        estimates = record.evaluations[one["step"]].estimates
        assert one["tasks"].keys() == estimates.keys()
        for name, shown in one["tasks"].items():
            own = estimates[name]
            assert shown == {"value": own.mean, "low": own.low, "high": own.high, "num": own.num}
    assert set(found["skipped"].values()) == {0}
    strip = found["strip"]
    assert (strip["step"], strip["num_steps"], strip["eta_s"], strip["stalled"]) == (12, 12, None, False)
    conditions = Conditions(record.events)
    assert strip["num_alerts"]["all"] == conditions.num
    assert strip["alerts"] == [dict(c.alert) | {"over": c.over, "told": c.num_told} for c in conditions.all[:20]]
    assert client.get(f"{RUN}/strip").json()["strip"].keys() == strip.keys()


def test_curves_equal_the_metrics(client, finished_run):
    record = read_run(finished_run)
    names = ["reward/understanding", "learner/loss/generation", "reward/generation/retrieved"]
    found = client.get(f"{RUN}/metrics", params={"names": ",".join([*names, "not/there"])}).json()
    assert found["steps"] == list(range(1, NUM_STEPS + 1))
    assert found["values"].keys() == set(names)
    for name in names:
        assert found["values"][name] == pytest.approx([line.get(name) for line in record.metrics], rel=1e-6)
    assert found["times"] == pytest.approx([line["time"] for line in record.metrics], abs=0.01)
    assert found["samples"] == [step * 4 * 16 for step in found["steps"]]
    window = client.get(f"{RUN}/metrics", params={"names": names[0], "first": 3, "last": 5}).json()
    assert window["steps"] == [3, 4, 5]


def test_a_poll_brings_only_what_is_new(own_runs):
    client, file = ask(own_runs), own_runs / "one" / "metrics.jsonl"
    first = client.get("/api/run/one/metrics?names=reward/understanding").json()
    poll = "/api/run/one/metrics?names=reward/understanding&since="
    nothing = client.get(poll + first["cursor"]).json()
    assert (nothing["steps"], nothing["reset"]) == ([], False)
    add_lines(file, b'{"v":1,"step":13,"time":1,"rew')
    assert client.get(poll + first["cursor"]).json()["steps"] == [], "half a line is not shown"
    add_lines(file, b'ard/understanding":0.25}\n', {"step": 12, "reward/understanding": None})
    more = client.get(poll + first["cursor"]).json()
    assert (more["steps"], more["values"]["reward/understanding"]) == ([13, 12], [0.25, None])
    assert client.get(poll + more["cursor"]).json()["steps"] == []
    whole = client.get(poll + "of-before.3").json()
    assert whole["reset"] is True
    assert whole["steps"] == list(range(1, 14))
    assert whole["values"]["reward/understanding"][-2:] == [None, 0.25]


def test_a_poll_of_everything_is_small(client):
    found = client.get(RUN).json()
    names = ",".join(metric["name"] for metric in found["metrics"])
    cursor = client.get(f"{RUN}/metrics", params={"names": names}).json()["cursor"]
    sizes = [len(client.get(f"{RUN}/metrics", params={"names": names, "since": cursor}).content),
             len(client.get(f"{RUN}/strip").content)]  # fmt: skip
    assert sum(sizes) < 5000


def test_a_poll_needs_no_names_and_brings_the_strip_with_a_step(own_runs):
    client, run = ask(own_runs), own_runs / "one"
    first = client.get("/api/run/one/metrics?names=reward/understanding,learner/loss").json()
    other = client.get("/api/run/one/metrics?names=learner/lr").json()
    poll = "/api/run/one/metrics?alerts=0&since="
    nothing = client.get(poll + first["cursor"]).json()
    assert (nothing["values"], "strip" in nothing, nothing["cursor"]) == ({}, False, first["cursor"])
    add_lines(run / "metrics.jsonl", {"step": 13, "time": 1, "reward/understanding": 0.25, "learner/lr": 0.5})
    more = client.get(poll + first["cursor"]).json()
    assert more["values"] == {"reward/understanding": [0.25], "learner/loss": [None]}
    assert client.get(poll + other["cursor"]).json()["values"] == {"learner/lr": [0.5]}
    assert (more["strip"]["step"], more["strip"]["num_alerts"]["all"], more["strip"]["alerts"]) == (13, 0, None)
    for lost in ("x.3.y", first["cursor"].rpartition(".")[0], f"{first['cursor']}x"):
        assert client.get(poll + lost).json()["reset"] is True


def test_alerts_come_when_there_are_others(own_runs):
    client, alert = ask(own_runs), {"kind": "alert", "message": "look"}
    add_lines(own_runs / "one" / "events.jsonl", alert, alert)
    told = client.get("/api/run/one/strip?alerts=1").json()["strip"]["alerts"]
    assert told == [alert | {"over": None, "told": 1}] * 2
    strip = client.get("/api/run/one/strip?alerts=2").json()["strip"]
    assert (strip["num_alerts"], strip["alerts"]) == ({"open": 2, "all": 2, "changes": 2}, None)


def test_an_alert_that_is_over_is_open_no_more(own_runs):
    client, events = ask(own_runs), own_runs / "one" / "events.jsonl"
    alert = {"kind": "alert", "step": 4, "since": 4, "severity": "warn", "message": "look"}
    add_lines(events, alert | {"sentinel": "far_kl"}, alert | {"sentinel": "equal_images", "severity": "stop"})
    add_lines(events, {"kind": "checkpoint", "step": 4}, {"kind": "resume"}, alert | {"sentinel": "far_kl", "step": 5})
    assert client.get("/api/runs").json()["runs"][0]["num_alerts"]["open"] == 2
    add_lines(events, {"kind": "alert over", "sentinel": "far_kl", "step": 8})
    strip = client.get("/api/run/one/strip?alerts=3").json()["strip"]
    assert (strip["num_alerts"]["open"], strip["num_alerts"]["all"]) == (1, 2)
    told = [(one["sentinel"], one["over"], one["told"]) for one in strip["alerts"]]
    assert told == [("equal_images", None, 1), ("far_kl", 8, 2)]


def test_the_strip_says_when_the_overview_is_another(own_runs):
    client, run = ask(own_runs), own_runs / "one"

    def mark():
        return client.get("/api/run/one/strip").json()["strip"]["overview"]

    marks = [mark()]
    known = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    add_lines(run / "metrics.jsonl", known | {"step": 13})
    assert mark() == marks[0], "a step alone changes nothing of it"
    add_lines(run / "metrics.jsonl", known | {"step": 14, "learner/new": 1.0})
    marks.append(mark())
    shutil.copy(run / "evaluations/step_000012.json", run / "evaluations/step_000014.json")
    marks.append(mark())
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"status": "failed"}))
    marks.append(mark())
    assert len(set(marks)) == 4


def test_the_run_itself_says_how_many_steps_there_will_be(own_runs):
    run = own_runs / "one" / "run.json"
    run.write_text(
        json.dumps(json.loads(run.read_text()) | {"num_steps": 77, "status": "running", "host": "elsewhere"})
    )
    client = ask(own_runs)
    assert client.get("/api/runs").json()["runs"][0]["num_steps"] == 77
    strip = client.get("/api/run/one/strip").json()["strip"]
    assert strip["num_steps"] == 77
    assert strip["eta_s"] > 0


def test_a_page_sees_a_live_run_move(tmp_path):
    config = make_config(50)
    client = None
    with RunLog(tmp_path / "live", config, config.monitoring) as log:
        log.record_step(make_step(1))
        client = ask(tmp_path)
        strip = client.get("/api/run/live/strip").json()["strip"]
        assert (strip["status"], strip["stalled"], strip["step"]) == ("running", False, 1)
        cursor = client.get("/api/run/live/metrics?names=time/step_s").json()["cursor"]
        log.record_step(make_step(2))
        strip = client.get("/api/run/live/strip").json()["strip"]
        assert strip["step"] == 2
        steps = read_run(tmp_path / "live").series("time/step_s")
        assert strip["eta_s"] == pytest.approx(48 * sum(value for _, value in steps) / 2, abs=0.1)
        assert strip["age_s"] < 60
        assert client.get(f"/api/run/live/metrics?names=time/step_s&since={cursor}").json()["steps"] == [2]
        assert client.get("/api/run/live/events").json()["events"][0]["kind"] == "start"
    assert client.get("/api/run/live/strip").json()["strip"]["status"] == "finished"


def test_events_come_once(own_runs):
    client = ask(own_runs)
    first = client.get("/api/run/one/events").json()
    assert first["events"] == list(read_run(own_runs / "one").events)
    assert client.get(f"/api/run/one/events?since={first['cursor']}").json()["events"] == []
    add_lines(own_runs / "one" / "events.jsonl", {"kind": "checkpoint", "message": "saved"})
    more = client.get(f"/api/run/one/events?since={first['cursor']}").json()["events"]
    assert more == [{"kind": "checkpoint", "message": "saved"}]


def fitting(record, keep):
    lines = sorted(record.pairs, key=lambda line: -line["step"])
    return [(line["step"], line["pair_id"]) for line in lines if keep(line)]


def mean(side):
    return sum(sample["reward"] for sample in side["samples"]) / len(side["samples"])


def is_flat(side):
    return len({sample["reward"] for sample in side["samples"]}) == 1


@pytest.mark.parametrize(
    ("query", "keep"),
    [
        ({}, lambda line: True),
        ({"kind": "aligned"}, lambda line: line["kind"] == "aligned"),
        ({"kind": "no such kind"}, lambda line: False),
        ({"step": 4}, lambda line: line["step"] == 4),
        ({"task": "generation", "min_reward": 0.9}, lambda line: mean(line["generation"]) >= 0.9),
        ({"task": "understanding", "max_reward": 0.8}, lambda line: mean(line["understanding"]) <= 0.8),
        (
            {"min_reward": 0.99},
            lambda line: mean(line["understanding"]) >= 0.99 or mean(line["generation"]) >= 0.99,
        ),
        ({"zero_variance": 1}, lambda line: is_flat(line["understanding"]) or is_flat(line["generation"])),
        ({"zero_variance": 0, "task": "generation"}, lambda line: not is_flat(line["generation"])),
        ({"text": "PAIR-8-"}, lambda line: line["step"] == 8),
        ({"text": "red"}, lambda line: "red" in json.dumps(line)),
        ({"text": "lab_verifier"}, lambda line: False),
    ],
)
def test_pairs_are_found(client, finished_run, query, keep):
    record = read_run(finished_run)
    found = client.get(f"{RUN}/pairs", params=query).json()
    assert [(pair["step"], pair["pair_id"]) for pair in found["pairs"]] == fitting(record, keep)
    assert found["total"] == len(found["pairs"])
    page = client.get(f"{RUN}/pairs", params=query | {"offset": 1, "limit": 2}).json()
    assert page == {"total": found["total"], "pairs": found["pairs"][1:3]}


def test_a_pair_is_told_whole(client, finished_run):
    record = read_run(finished_run)
    for fact in client.get(f"{RUN}/pairs").json()["pairs"]:
        asked = {"step": fact["step"], "pair_id": fact["pair_id"]}
        line = next(p for p in record.pairs if (p["step"], p["pair_id"]) == (fact["step"], fact["pair_id"]))
        found = client.get(f"{RUN}/pair", params=asked).json()
        assert found == line | {"policy_version": fact["step"] - 1}
        for task in ("understanding", "generation"):
            assert fact[task] == pytest.approx(mean(line[task]), rel=1e-6)
            assert (task in fact["zero_variance"]) == is_flat(line[task])
        for sample in found["generation"]["samples"]:
            picture = client.get(f"/files/grid~1seed~00/images/{sample['image']}")
            assert picture.content == (finished_run / "images" / sample["image"]).read_bytes()
            assert picture.headers["content-type"] == "image/webp"
    assert client.get(f"{RUN}/pair", params={"step": 3, "pair_id": "pair-3-0"}).status_code == 404


def test_a_picture_is_sent_once(client, finished_run):
    name = next((finished_run / "images").iterdir()).name
    address = f"/files/grid~1seed~00/images/{name}"
    mark = client.get(address).headers["etag"]
    again = client.get(address, headers={"If-None-Match": mark})
    assert (again.status_code, again.content) == (304, b"")
    evaluated = next((finished_run / "evaluations" / "images").iterdir())
    assert client.get(f"/files/grid~1seed~00/evaluations/images/{evaluated.name}").content == evaluated.read_bytes()


def test_the_same_pair_is_followed_over_epochs(own_runs):
    client, run = ask(own_runs), own_runs / "one"
    use = {"pair_id": "pair-2-0", "kind": "aligned", "similarity": 0.5, "weight": 0.7, "understanding": None,
           "generation": 0.25}  # fmt: skip
    (first,) = client.get("/api/run/one/pair_history?pair_id=pair-2-0").json()["uses"]
    assert (first["step"], first["shown"]) == (2, True)
    add_lines(run / "used_pairs.jsonl", {"step": 40, "pairs": [use]}, {"step": 41, "pairs": [use | {"pair_id": "x"}]})
    uses = client.get("/api/run/one/pair_history?pair_id=pair-2-0").json()["uses"]
    assert uses[0] == first
    assert uses[1] == {**{key: use[key] for key in use if key != "pair_id"}, "step": 40, "shown": False}
    add_lines(run / "used_pairs.jsonl", {"step": 40, "pairs": []})
    assert client.get("/api/run/one/pair_history?pair_id=pair-2-0").json()["uses"] == [first], "the later line counts"
    assert client.get("/api/run/one/pair_history?pair_id=unknown").json() == {"uses": []}


def test_similarities_are_counted_by_kind(client, finished_run):
    record = read_run(finished_run)
    found = client.get(f"{RUN}/similarities?step=3").json()
    (line,) = (line for line in record.used_pairs if line["step"] == 3)
    edges = found["edges"]
    assert edges[-1] == 1.0
    for kind in ("aligned", "retrieved"):
        own = [pair["similarity"] for pair in line["pairs"] if pair["kind"] == kind]
        expected = [sum(low <= s and (s < high or high == 1.0) for s in own)
                    for low, high in pairwise(edges)]  # fmt: skip
        assert found["counts"].get(kind, [0] * len(expected)) == expected
    assert sum(map(sum, client.get(f"{RUN}/similarities?window=12").json()["counts"].values())) == 4 * NUM_STEPS
    assert client.get(f"{RUN}/similarities?step=999").json()["counts"] == {}


def test_runs_are_compared_by_settings_and_last_evaluation(own_runs):
    config = make_config(3, pairs_every=7)
    RunLog(own_runs / "two", config, config.monitoring).end("finished")
    found = ask(own_runs).get("/api/compare?runs=one,two").json()
    assert found["config"]["train.num_steps"] == {"one": 12, "two": 3}
    assert found["config"]["monitoring.pairs_every"] == {"one": 2, "two": 7}
    assert "learner.lr" not in found["config"]
    settings = own_runs / "two" / "config.yaml"
    settings.write_text(settings.read_text().replace("pairs_every: 7", "elsewhere: 7"))
    found = ask(own_runs).get("/api/compare?runs=one,two").json()
    assert found["config"]["monitoring.pairs_every"] == {"one": 2}, "what a run lacks is not null"
    assert found["config"]["monitoring.elsewhere"] == {"two": 7}
    last = read_run(own_runs / "one").evaluations[12].estimates["generation/sampled/reward"]
    assert found["evaluations"]["one"]["tasks"]["generation/sampled/reward"]["value"] == last.mean
    assert found["evaluations"]["two"] == {}


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/api/run/none", 404),
        ("/api/run/none/metrics", 404),
        ("/api/compare", 400),
        ("/api/compare?runs=none", 404),
        (f"{RUN}/metrics?points=1", 400),
        (f"{RUN}/metrics?first=-1", 400),
        (f"{RUN}/pairs?limit=100000", 400),
        (f"{RUN}/pairs?zero_variance=perhaps", 400),
        (f"{RUN}/pair", 400),
        (f"{RUN}/pair?step=1e9&pair_id=x", 400),
        (f"{RUN}/similarities?window=99999999999999", 400),
        ("/api/nothing", 404),
        ("/files/grid~1seed~00/images/none.webp", 404),
    ],
)
def test_a_wrong_question_gets_one_sentence(client, address, status):
    answer = client.get(address)
    assert answer.status_code == status
    (text,) = answer.json().values()
    assert "expected" in text
    assert "\n" not in text


def test_no_two_paths_have_one_address(tmp_path):
    names = ["a~/b", "a/~b", "a~1b", "a/1b", "a~~b", "a/b", "a~0/b"]
    assert len({quoted(name) for name in names}) == len(names)
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"id": name}))
    client = ask(tmp_path)
    for name in names:
        assert client.get(f"/api/run/{quoted(name)}").json()["run"] == {"id": name}


def test_nothing_can_be_written(client):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/api/runs").status_code == 405


def test_long_answers_are_compressed(client):
    packed = client.get(RUN, headers={"Accept-Encoding": "gzip"})
    plain = client.get(RUN, headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.json()["config"] == plain.json()["config"]


@pytest.mark.parametrize("prefix", ["", "/proxy/8000"])
def test_a_prefix_may_be_left_in_the_path_or_taken_off(finished_runs, prefix):
    client = ask(finished_runs, root_path="/proxy/8000")
    assert client.get(f"{prefix}/api/runs").status_code == 200
    assert client.get(f"{prefix}/files/grid~1seed~00/images/none.webp").status_code == 404
