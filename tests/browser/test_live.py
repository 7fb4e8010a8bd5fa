"""The page before a real run of the lab that goes on meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser.watching import assert_accessible, require_browser, serving, until
from tests.jobs.runs import IN_ONE_PROCESS, SMALL, start, wait_for_step
from tests.monitoring.made_run import make_run

VIEWS = ("overview", "pairs", "compare", "fleet")
INKED = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const inked = data.filter((_, i) => i % 4 === 3).reduce((sum, alpha) => sum + (alpha > 0), 0);
  return inked / (canvas.width * canvas.height);
})"""
PIXELS = """async (img) => {
  await img.decode();
  const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(img, 0, 0);
  return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A run that trains until it is killed, beside one that is done, and the address of the real server before both."""
    require_browser()
    folder = tmp_path_factory.mktemp("live")
    runs = folder / "runs"
    run = start(
        folder, "live", *IN_ONE_PROCESS, *SMALL, "train.num_steps=1000", "train.save_every=1000",
        "monitoring.journal=false", "monitoring.pairs_every=1", "monitoring.pairs_per_step=2",
        f"train.run_dir={runs / 'live'}",
    )  # fmt: skip
    make_run(runs / "done", num_steps=12, num=5)
    program = [sys.executable, "-c", "from unirl.cli import main; main()", "dashboard", str(runs)]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        url = re.search(r"http://127\S+", "".join(iter(server.stdout.readline, "stop       Ctrl-C\n")))[0]
        wait_for_step(runs / "live", 2, run)
        yield runs, url, run
    finally:
        server.terminate()
        server.wait(20)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def shown_pairs(run_dir):
    return [json.loads(line) for line in (run_dir / "pairs.jsonl").read_text().splitlines()]


def strip_step(page):
    return int(page.locator("#strip div:has(dt:text('Step')) dd").inner_text().split(" / ")[0])


def test_curves_move_and_a_new_step_appears_without_a_reload(live, watched):
    page = watched.open(live[1])
    page.evaluate("window.same = 'page'")
    before, drawn = strip_step(page), page.evaluate("document.querySelector('figure.chart canvas').toDataURL()")
    until(page, f"Number(document.querySelector('#strip progress').value) > {before}", 60)
    until(page, f"document.querySelector('figure.chart canvas').toDataURL() !== '{drawn}'")
    assert page.evaluate("window.same") == "page"
    inked = page.evaluate(INKED)
    assert len(inked) > 10
    assert all(0.005 < share < 0.9 for share in inked), inked
    assert page.locator("#strip .badge").inner_text() == "running"


def test_a_pair_shows_every_answer_and_image_of_the_runs_files(live, watched):
    run_dir = live[0] / "live"
    line = shown_pairs(run_dir)[1]
    page = watched.open(f"{live[1]}#view=pairs&runs=live&step={line['step']}&pair={line['pair_id']}", "pairs")
    card = page.locator(f"[data-pair='{line['pair_id']}']")
    card.wait_for()
    understanding, generation = line["understanding"], line["generation"]
    answers, drawings = card.locator(".answer"), card.locator(".drawing")
    assert answers.count() == len(understanding["samples"]) == 4
    assert drawings.count() == len(generation["samples"]) == 4
    assert card.locator(".und .question").inner_text() == understanding["question"]
    assert card.locator(".gold").inner_text() == understanding["gold"]
    assert card.locator(".gen .question").inner_text() == generation["prompt"]
    assert f"{line['weight']:.4g}" in card.locator("header").inner_text()
    for shown, samples in ((answers, understanding["samples"]), (drawings, generation["samples"])):
        for index, sample in enumerate(samples):
            said = shown.nth(index)
            assert float(said.locator("[data-reward]").get_attribute("data-reward")) == sample["reward"]
            assert float(said.locator("[data-advantage]").get_attribute("data-advantage")) == sample["advantage"]
            parts = said.locator("[data-part]")
            assert [parts.nth(i).get_attribute("data-part") for i in range(parts.count())] == list(sample["parts"])
    for index, sample in enumerate(understanding["samples"]):
        assert answers.nth(index).locator(".answer-text").text_content() == sample["text"]
    images = [(card.locator(".und img"), understanding["image"])]
    images += [(drawings.nth(i).locator("img"), sample["image"]) for i, sample in enumerate(generation["samples"])]
    for element, name in images:
        height, width, pixels = element.evaluate(PIXELS)
        shown = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
        assert (shown == np.asarray(Image.open(run_dir / "images" / name).convert("RGB"))).all(), name


def test_keys_lead_from_pair_to_pair_and_the_newest_is_followed(live, watched):
    page = watched.open(f"{live[1]}#view=pairs&runs=live", "pairs")

    def shown():
        return page.locator("[data-pair]").evaluate("(card) => [Number(card.dataset.step), card.dataset.pair]")

    first = shown()
    until(page, f"Number(document.querySelector('[data-pair]').dataset.step) > {first[0]}", 60)
    page.keyboard.press("j")
    until(page, "location.hash.includes('pair=')")
    page.keyboard.press("j")
    listed = page.locator(".pair-list a")
    order = [listed.nth(i).get_attribute("data-key") for i in range(min(listed.count(), 12))]
    page.wait_for_timeout(400)
    at = order.index(" ".join(map(str, shown())))
    for key, by in (("ArrowDown", 1), ("k", -1), ("ArrowUp", -1)):
        page.keyboard.press(key)
        at += by
        step, _, pair = order[at].partition(" ")
        page.wait_for_selector(f"[data-pair='{pair}'][data-step='{step}']")
        assert page.locator(".pair-list a[aria-current]").get_attribute("data-key") == order[at]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter-text"
    page.keyboard.type("no pair says this")
    page.keyboard.press("Enter")
    page.get_by_text("No pair matches the filter").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.get_by_role("button", name="Close").click()
    assert not page.locator("dialog").is_visible()


def test_two_runs_are_compared(live, watched):
    page = watched.open(f"{live[1]}#view=compare&runs=live,done&smooth=0.5", "compare")
    page.get_by_role("heading", name="Settings that differ").wait_for()
    assert page.locator(".charts figure").count() >= 3
    assert page.locator("figure:first-child .legend li").all_inner_texts()[0].startswith("live")
    table = page.get_by_role("region", name="Settings that differ").get_by_role("row", name="train.num_steps")
    assert table.inner_text().split() == ["train.num_steps", "1000", "12"]
    evaluation = page.get_by_role("region", name="Last evaluation with 95 % intervals").first
    assert re.search(r"understanding/sampled/reward\s+\u2013\s+0\.\d+ \[0\.\d+, ", evaluation.inner_text())
    page.locator("#x-axis").select_option("time")
    until(page, "location.hash.includes('x=time')")
    page.get_by_role("checkbox", name="live").uncheck()
    until(page, "!location.hash.includes('live')")
    until(page, "document.querySelectorAll('figure:first-child .legend li:not([hidden])').length === 1")


@pytest.mark.parametrize("watched", ["light", "dark"], indirect=True)
def test_no_view_has_a_serious_accessibility_violation(live, watched):
    for view in VIEWS:
        page = watched.open(f"{live[1]}#view={view}&runs=live,done", view)
        if page.locator("summary").count():
            page.locator("summary").first.click()
        assert_accessible(page)
    page.keyboard.press("?")
    assert_accessible(page)


def test_the_directory_of_a_killed_driver_opens_and_says_what_was_skipped(live, watched):
    runs, address, run = live
    page = watched.open(f"{address}#runs=live")
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(20)
    until(page, "document.querySelector('#strip .badge').innerText === 'killed'", 15)
    run_dir = runs / "live"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    again = json.loads(lines[0]) | {"attempt": 1, "time": json.loads(lines[-1])["time"] - 86_400}
    torn = lines[1][: len(lines[1]) // 2]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\n".join([torn, json.dumps(again), torn]))
    first = shown_pairs(run_dir)[0]
    (run_dir / "images" / first["understanding"]["image"]).unlink()
    with serving(runs) as url:
        page = watched.open(f"{url}#runs=live")
        assert page.locator("#strip .badge").inner_text() == "killed"
        tiles = dict(zip(*(page.locator(f"#strip {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
        assert tiles["Time left"] == "\u2013"
        assert tiles["Go on with"].startswith(f"unirl train --resume {run_dir}")
        said = page.locator("#skipped").inner_text()
        page.goto(f"{url}#view=pairs&runs=live&step={first['step']}&pair={first['pair_id']}")
        page.locator(".und .missing").wait_for()
    for skipped in ("1 unreadable line", "1 missing image", "1 repeated step", "1 jump of the clock"):
        assert skipped in said
