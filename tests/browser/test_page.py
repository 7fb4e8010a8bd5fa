"""The page before made runs: addresses, empty folders, a lost server, a prefix, and content that means harm."""

import json
import shutil
import struct
import time
import zlib

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.browser.watching import READY, assert_accessible, require_browser, serving, until
from tests.monitoring.made_run import make_run
from unirl.config import MonitoringConfig, SftConfig
from unirl.monitoring.run_log import RunLog

HARM = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg onload='window.hit = 1'>"
RTL, ZERO_WIDTH = "\u202egnp.exe", "pass\u200bword"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    require_browser()
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "one", num_steps=12, num=5, pairs_every=1, pairs_per_step=2)
    shutil.copytree(folder / "one", folder / "arm" / "seed-1")
    return folder


@pytest.fixture(scope="module")
def url(made):
    with serving(made) as url:
        yield url


def test_the_address_shows_a_colleague_the_same(url, made, watched):
    line = json.loads((made / "one" / "pairs.jsonl").read_text().splitlines()[3])
    chosen = f"kind={line['kind']}&step={line['step']}&pair={line['pair_id']}"
    page = watched.open(f"{url}#view=pairs&runs=arm/seed-1&{chosen}", "pairs")
    page.locator(f"[data-pair='{line['pair_id']}']").wait_for()
    assert page.locator("#run").input_value() == "arm/seed-1"
    assert {text.split()[0] for text in page.locator(".pair-facts").all_inner_texts()} == {line["kind"]}
    page.get_by_role("link", name="Overview").click()
    page.wait_for_selector(f"{READY}[data-view='overview']")
    page.go_back()
    page.locator(f"[data-pair='{line['pair_id']}']").wait_for()


def test_a_step_in_the_address_lists_its_pairs(url, watched):
    page = watched.open(f"{url}#view=pairs&runs=one&step=7", "pairs")
    page.locator("[data-step='7']").wait_for()
    assert {text.split("\n")[0] for text in page.locator(".pair-name").all_inner_texts()} == {"step 7"}


def test_zooming_keeps_only_the_steps_in_the_address(url, watched):
    page = watched.open(f"{url}#runs=one&range=4-8")
    page.locator("figure summary").first.click()
    table = page.locator("details[open] .scroll").last
    table.wait_for()
    steps = table.locator("tbody th").all_inner_texts()
    assert steps == ["8", "7", "6", "5", "4"]
    page.get_by_role("button", name="show all").click()
    until(page, "!location.hash.includes('range')")


def test_a_chart_says_its_values_without_being_seen(url, made, watched):
    page = watched.open(f"{url}#runs=one")
    last = json.loads((made / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    chart = page.get_by_role("img", name="Understanding reward, chart")
    assert f"group {last['reward/understanding']:.3g}" in chart.get_attribute("aria-label")


def test_filters_find_pairs(url, made, watched):
    page = watched.open(f"{url}#view=pairs&runs=one", "pairs")
    lines = [json.loads(line) for line in (made / "one" / "pairs.jsonl").read_text().splitlines()]
    words = lines[5]["generation"]["prompt"]
    page.get_by_label("Search").fill(words)
    page.keyboard.press("Enter")
    expected = sum(words in json.dumps(line) for line in lines)
    until(page, f"document.querySelectorAll('.pair-list a').length === {expected}")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    until(page, "location.hash.includes('pair=')")
    assert "text=" in page.evaluate("location.hash"), "leaving the field keeps the search"
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Zero variance").select_option("1")
    groups = [[line[task]["samples"] for task in ("understanding", "generation")] for line in lines]
    flat = sum(any(len({s["reward"] for s in samples}) == 1 for samples in both) for both in groups)
    until(page, f"document.querySelectorAll('.pair-list a').length === {flat}")


def test_a_link_to_no_pair_says_so_in_place_of_another_pair(url, watched):
    page = watched.open(f"{url}#view=pairs&runs=one&step=7&pair=none", "pairs")
    page.locator(".empty-title", has_text="not shown such a pair").wait_for()
    assert "none" in page.locator("#pair-card").inner_text()
    assert not page.locator("#connection").is_visible()
    page.get_by_role("button", name="Newest").click()
    page.locator("[data-pair]").wait_for()
    page.evaluate("location.hash = location.hash + '&step=7&pair=none'")
    page.locator(".empty-title", has_text="not shown such a pair").wait_for()
    assert page.locator("[data-pair]").count() == 0
    watched.errors = [error for error in watched.errors if "404" not in error]


def test_under_the_cursor_the_evaluation_is_that_of_then(url, watched):
    page = watched.open(f"{url}#runs=one")
    chart = page.locator(".plot").first
    chart.locator("canvas").wait_for()
    marks = page.evaluate("document.querySelector('.plot').chart.marks.map(({ value }) => value)")
    said = page.locator(".mark .value").first
    assert float(said.inner_text()) == pytest.approx(marks[-1], abs=0.01)
    chart.locator(".u-over").hover(position={"x": 60, "y": 40})
    until(page, "document.querySelector('.plot').chart.plot.cursor.idx !== null")
    assert float(said.inner_text()) == pytest.approx(marks[0], abs=0.01)


def test_changed_settings_are_named_among_the_events(tmp_path, watched):
    folder = make_run(tmp_path / "runs" / "one", num_steps=2, num=5)
    event = {
        "kind": "settings",
        "time": 1.0,
        "message": "resumed with other settings",
        "changed": {"learner.lr": [0.5, 0.25]},
    }
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    with serving(tmp_path / "runs") as url:
        page = watched.open(f"{url}#view=fleet", "fleet")
        page.get_by_text("resumed with other settings: learner.lr 0.5 → 0.25").wait_for()


def test_filter_fields_say_what_is_filtered(url, watched):
    page = watched.open(f"{url}#view=pairs&runs=one", "pairs")
    fields = {"kind": "retrieved", "zero": "1", "task": "generation"}
    texts = {"min": "0.1", "max": "0.9", "at": "7", "text": "a"}

    def shown():
        return [page.locator(f"#filter-{name}").input_value() for name in (*fields, *texts)]

    total = page.locator("#pair-count").inner_text()
    for name, value in fields.items():
        page.locator(f"#filter-{name}").select_option(value)
    for name, value in texts.items():
        page.locator(f"#filter-{name}").fill(value)
        page.keyboard.press("Tab")
    until(page, "location.hash.includes('text=a')")
    page.get_by_role("button", name="Clear").click()
    assert shown() == [""] * 7
    until(page, f"document.getElementById('pair-count').textContent === '{total}'")
    page.go_back()
    until(page, "document.getElementById('filter-zero').value === '1'")
    assert shown() == [*fields.values(), *texts.values()]
    page.go_forward()
    until(page, "document.getElementById('filter-zero').value === ''")
    assert shown() == [""] * 7
    page.get_by_label("Zero variance").select_option("1")
    until(page, "location.hash.includes('zero=1')")


def test_the_search_begins_while_it_is_typed_and_keeps_what_is_typed(url, watched):
    page = watched.open(f"{url}#view=pairs&runs=one", "pairs")
    total = page.locator("#pair-count").inner_text()
    page.locator("#filter-text").press_sequentially("pair-7", delay=40)
    until(page, "location.hash.includes('text=pair-7')")
    until(page, f"document.getElementById('pair-count').textContent !== '{total}'")
    page.locator("#filter-min").press_sequentially("0.")  # no number yet: it is not taken, and not taken away
    page.wait_for_timeout(2500)
    page.locator("#filter-min").press_sequentially("25")
    assert page.locator("#filter-min").input_value() == "0.25"


def test_only_what_is_open_is_red(tmp_path, watched):
    folder = make_run(tmp_path / "runs" / "one", num_steps=8, num=5)

    def tell(*events):
        with (folder / "events.jsonl").open("a") as file:
            file.writelines(json.dumps({"v": 1, "time": time.time()} | event) + "\n" for event in events)

    first = {"kind": "alert", "step": 3, "since": 3, "severity": "warn", "message": "look"}
    tell(first | {"sentinel": "far_kl", "severity": "stop"}, first | {"sentinel": "equal_images"})
    tile = "[...document.querySelectorAll('#strip > div')].find((d) => d.innerText.startsWith('Alerts'))"
    with serving(tmp_path / "runs") as url:
        page = watched.open(url)
        assert "far_kl" in page.locator("#alerts > ul").inner_text(), "what ends the run leads"
        assert page.evaluate(f"[{tile}.innerText.split('\\n').slice(1).join(' '), {tile}.className]") == [
            "2 open 2 in all", "bad"
        ]  # fmt: skip
        tell(*({"kind": "alert over", "step": 7, "sentinel": name} for name in ("far_kl", "equal_images")))
        until(page, f"{tile}.innerText.includes('0 open')", 15)
        assert page.evaluate(f"{tile}.className") == ""
        assert page.locator("#alerts > ul").count() == 0
        page.get_by_text("Alerts: 2 over").click()
        assert "over at step 7" in page.locator("#alerts li").first.inner_text()
        bad = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--bad')")
        page.evaluate("document.body.append(Object.assign(document.createElement('i'), {id: 'red'}))")
        page.evaluate(f"document.getElementById('red').style.color = '{bad.strip()}'")
        colours = "['#red', '#alerts b'].map((one) => getComputedStyle(document.querySelector(one)).color)"
        assert len(set(page.evaluate(colours))) == 2
        assert_accessible(page)


def test_beats_of_a_node_whose_clock_is_late_are_shown(tmp_path, watched):
    folder, now = make_run(tmp_path / "runs" / "one", num_steps=2, num=5), time.time()
    (folder / "actors").mkdir(exist_ok=True)

    def beat(actor, at):
        with (folder / "actors" / f"{actor}.jsonl").open("a") as file:
            fixed = {"actor": actor, "role": "rollout.text", "state": "sampling", "num_done": 1}
            file.write(json.dumps(fixed | {"time": at}) + "\n")

    beat("early", now + 40)
    beat("late", now)
    with serving(tmp_path / "runs") as url:
        page = watched.open(f"{url}#view=fleet&runs=one", "fleet")
        until(page, "document.querySelectorAll('svg.lanes rect').length === 2")
        beat("late", now + 5)
        until(page, "document.querySelectorAll('svg.lanes rect').length === 3")


def test_a_run_of_fine_tuning_shows_what_it_has_and_no_more(tmp_path, watched):
    run = tmp_path / "runs" / "tuned"
    config = SftConfig(monitoring=MonitoringConfig())
    names = ["learner/loss", "learner/grad_norm", "learner/lr", "sft/tokens_per_s", "time/update_s", "time/step_s"]
    names += [
        f"sft/{what}/{modality}" for what in ("nats", "accuracy", "num_targets") for modality in ("text", "image")
    ]
    with RunLog(run, config, config.monitoring, facts={"num_steps": 40}) as log:
        for step in range(1, 7):
            log.write_metrics(step, {name: 0.5 for name in names})
        held_out = {"sft/nats/text": 0.75, "sft/nats/image": 0.25}
        (run / "evaluations" / "heldout_000006.json").write_text(json.dumps(held_out))
        with serving(tmp_path / "runs") as url:
            page = watched.open(f"{url}#runs=tuned")
            assert page.locator("#strip progress").get_attribute("max") == "40"
            tiles = dict(zip(*(page.locator(f"#strip {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
            assert tiles["Time left"] == "17 s"
            assert "Weights" not in tiles
            titles = [" ".join(text.split()) for text in page.locator("figcaption").all_inner_texts()]
            assert titles == [
                "Cross-entropy nats per target", "Accuracy share", "Loss nats", "Gradient norm", "Learning rate",
                "Targets of a step", "Phases of a step s", "Tokens per second",
            ]  # fmt: skip
            assert "held-out evaluation text 0.75, image 0.25" in page.locator("figure").first.inner_text()
            page.keyboard.press("2")
            page.get_by_text("Fine-tuning has no pairs").wait_for()
            assert not page.locator(".toolbar").is_visible()
            page.keyboard.press("3")
            page.wait_for_selector(f"{READY}[data-view='compare']")
            shown = page.locator("figcaption").all_inner_texts()
            assert [text.split()[0] for text in shown] == ["sft/nats/text", "sft/nats/image", "sft/accuracy/text",
                                                           "time/step_s"]  # fmt: skip


def test_the_next_pair_is_there_before_it_is_asked_for(url, made, watched):
    pairs = [json.loads(line) for line in (made / "one" / "pairs.jsonl").read_text().splitlines()]
    page = watched.open(f"{url}#view=pairs&runs=one&step={pairs[5]['step']}&pair={pairs[5]['pair_id']}", "pairs")
    page.locator(f"[data-pair='{pairs[5]['pair_id']}']").wait_for()
    page.keyboard.press("j")
    until(page, f"document.querySelector('[data-pair]').dataset.pair !== '{pairs[5]['pair_id']}'")
    second = page.locator("[data-pair]").get_attribute("data-pair")
    page.wait_for_timeout(500)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.keyboard.press("j")
    until(page, f"document.querySelector('[data-pair]').dataset.pair !== '{second}'")
    third = page.locator("[data-pair]").get_attribute("data-pair")
    assert page.evaluate("[...document.querySelectorAll('[data-pair] img')].every((img) => img.complete)")
    assert not [address for address in asked if f"pair_id={third}" in address], "it was asked for with the one before"


def test_the_history_of_a_pair_shows_each_use(tmp_path, watched):
    folder = make_run(tmp_path / "runs" / "one", num_steps=4, num=5)
    lines = [json.loads(line) for line in (folder / "used_pairs.jsonl").read_text().splitlines()]
    name = lines[0]["pairs"][0]["pair_id"]
    for line, reward in zip(lines, (0.0, 0.25, 0.5, 1.0), strict=True):
        line["pairs"][0] |= {"pair_id": name, "understanding": reward}
    (folder / "used_pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(tmp_path / "runs") as url:
        page = watched.open(f"{url}#view=pairs&step=1&pair={name}", "pairs")
        page.get_by_text("History of this pair").click()
        rows = page.locator(".history tbody tr")
        rows.nth(3).wait_for()
        said = [row.split("\t")[1:3] for row in rows.all_inner_texts()]
        assert said == [["0", ""], ["0.25", "+0.25"], ["0.5", "+0.50"], ["1", "+1.00"]]


def test_wall_time_has_a_unit_and_no_line_where_nothing_ran(tmp_path, watched):
    folder = make_run(tmp_path / "runs" / "one", num_steps=8, num=5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"time": 1e9 + 60 * number + (600 if number > 3 else 0), "time/step_s": 60.0, "attempt": number // 4}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(tmp_path / "runs") as url:
        page = watched.open(f"{url}#view=compare&runs=one&x=time", "compare")
        page.locator(".plot canvas").first.wait_for()
        plot = "document.querySelector('.plot').chart.plot"
        assert page.evaluate(f"{plot}.axes[0].label()") == "minutes since the first step"
        assert page.evaluate(f"{plot}.data[0].at(-1)") == pytest.approx(17)
        gaps = f"{plot}.series[1]._paths.gaps.map((ends) => ends.map((at) => {plot}.posToVal(at, 'x', true)))"
        until(page, f"{plot}.series[1]._paths?.gaps.length > 0")
        assert page.evaluate(gaps) == [[pytest.approx(3, abs=0.1), pytest.approx(14, abs=0.1)]]


def test_theme_and_keys_are_the_readers_choice(url, watched):
    page = watched.open(f"{url}#runs=one")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").select_option("dark")
    page.reload()
    page.wait_for_selector(READY)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.keyboard.press("?")
    page.get_by_label("keys work").uncheck()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("2")
    page.keyboard.press("?")
    assert not page.locator("dialog").is_visible()
    assert "view=pairs" not in page.url


def test_an_empty_folder_says_what_to_do_and_shows_the_first_run(tmp_path, watched):
    with serving(tmp_path) as url:
        watched.page.goto(url)
        watched.page.get_by_text("No run here yet").wait_for()
        watched.page.wait_for_selector(READY, state="attached")
        assert_accessible(watched.page)
        make_run(tmp_path / "first", num_steps=2, num=5)
        watched.page.locator("canvas").first.wait_for(timeout=10_000)


def test_a_lost_server_is_said_and_found_again(made, watched):
    with serving(made) as url:
        page = watched.open(url)
    page.locator("#connection", has_text="Connection lost").wait_for(timeout=10_000)
    assert page.locator("canvas").count() > 3, "what was there stays"
    with serving(made, int(url.rstrip("/").rpartition(":")[2])):
        page.locator("#connection", has_text="Connection lost").wait_for(state="hidden", timeout=10_000)
    watched.errors = [error for error in watched.errors if "ERR_CONNECTION_REFUSED" not in error]


def test_a_run_that_is_removed_is_said_to_be_gone(made, tmp_path, watched):
    for name in ("one", "two"):
        shutil.copytree(made / "one", tmp_path / "runs" / name)
    with serving(tmp_path / "runs") as url:
        page = watched.open(f"{url}#view=pairs&runs=one", "pairs")
        page.locator("[data-pair]").wait_for()
        shutil.rmtree(tmp_path / "runs" / "one")
        page.locator(".empty-title", has_text="This run's folder is gone").wait_for(timeout=15_000)
        assert page.locator("#strip > div, [data-pair]").count() == 0
        page.locator("#run").select_option("two")
        page.locator("[data-pair]").wait_for()
    watched.errors = [error for error in watched.errors if "404" not in error]


def test_the_page_works_below_a_prefix(made, watched):
    with serving(made, wrap=lambda app: Starlette(routes=[Mount("/lab/runs", app)])) as url:
        page = watched.open(f"{url}lab/runs/#view=pairs&runs=one", "pairs")
        page.locator("[data-pair] img").first.wait_for()
        assert page.locator("[data-pair] img").first.evaluate("(img) => img.decode().then(() => img.naturalWidth)") > 0


def png(width, height):
    """A file that claims so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.fixture
def hostile(tmp_path):
    """A run in which everything that can be text means harm."""
    runs = tmp_path / "runs"
    folder = make_run(runs / "<b onclick=hit()>&~ 'x'", num_steps=3, num=5)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    bad = lines[-1] | {"pair_id": HARM, "kind": "aligned"}
    bad["understanding"] |= {
        "question": HARM + RTL,
        "choices": [HARM],
        "gold": ZERO_WIDTH,
        "image": "../../run.json.png",
    }
    bad["understanding"]["samples"][0] |= {"text": HARM, "parts": {HARM: 1.0}}
    bad["understanding"]["samples"][1] |= {"text": "א" * 500_000 + HARM}
    bad["generation"] |= {"prompt": HARM}
    bad["generation"]["samples"][0] |= {"image": "huge.png", "reward": None}
    bad["generation"]["samples"][1] |= {"image": "javascript:alert(1).png"}
    (folder / "images" / "huge.png").write_bytes(png(20_000, 5_000))
    with (folder / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(bad | {"step": 4}) + "\n")
    alert = {
        "v": 1,
        "time": 1.0,
        "kind": "alert",
        "step": 2,
        **dict.fromkeys(("sentinel", "severity", "message", "remedy"), HARM),
    }
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(alert) + "\n")
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    metrics |= {"step": 4, f"reward/{HARM}": 1.0, f"reward/{HARM}/group_std": 0.1, "policy/kl": float("nan")}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")
    run = json.loads((folder / "run.json").read_text()) | dict.fromkeys(("reason", "status", "host"), HARM)
    (folder / "run.json").write_text(json.dumps(run | {"changed": {HARM: [HARM, HARM]}}))
    return runs


def test_nothing_that_a_run_says_is_executed(hostile, watched):
    with serving(hostile) as url:
        for view in ("overview", "compare", "fleet", "pairs"):
            page = watched.open(f"{url}#view={view}", view)
            assert page.evaluate("window.hit") is None
            assert page.locator("main script, main [onerror], main [onclick], svg[onload]").count() == 0
        card = page.locator("[data-pair]")
        assert card.get_attribute("data-pair") == HARM
        assert card.locator(".und .question bdi").text_content() == HARM + "U+202Egnp.exe", "shown, not obeyed"
        assert card.locator(".gold").inner_text() == "passU+200Bword"
        assert card.locator(".answer").nth(0).locator(".answer-text").text_content() == HARM
        assert len(card.locator(".answer").nth(1).locator("bdi").first.text_content()) == 20_000
        assert card.locator(".answer").nth(1).get_by_text("cut at 20,000 characters").is_visible()
        assert card.locator(".und .asked .missing").is_visible()
        card.locator(".drawing").nth(0).get_by_text("too large to show").wait_for()
        assert card.locator(".drawing").nth(1).locator(".missing").is_visible()
        assert page.evaluate("getComputedStyle(document.querySelector('.answer bdi')).unicodeBidi") == "isolate"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing widens the page"
        assert_accessible(page)
    watched.errors = [error for error in watched.errors if "413" not in error]
