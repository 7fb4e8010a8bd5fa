import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from unirl.evaluation.evaluate import Estimate
from unirl.evaluation.report import POLICY_CHARTS, _gain_cell, write_report
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.metrics import lookup

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&"\''
CEILING = {"generation/sampled/lab_verifier/exact": 0.885}
VOID = {"meta", "img", "br", "circle", "line", "rect", "polyline", "polygon"}


class Checker(HTMLParser):
    """Collects tags, references and text, and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references, self.handlers, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


def test_the_report_holds_its_figures_and_tables(copy):
    path = write_report(copy, notes=["Understanding is mostly sharpening."], ceiling=CEILING, num_examples=10)
    page = path.read_text()
    assert path == copy / "report.html"
    seen = read(page)
    text = " ".join(seen.text)
    titles = (
        "Reward, understanding|Reward, generation|Groups that teach nothing|Weights of the pairs used|Sampler against"
    )
    others = "Gradient norm|Entropy of the next token|Where the time went|greedy before|ceiling|sharpening.|by prompt"
    for words in f"{titles}|{others}|rollout.pairs_per_step|color_attr|finished".split("|"):
        assert words in text, words
    assert page.count("<article") == 10
    assert seen.tags.count("svg") >= 9
    after = read_run(copy).evaluations[12].estimates["generation/sampled/lab_verifier/exact"]
    assert f"{after.mean:.3f}" in text
    assert f"{after.low:.3f} to {after.high:.3f}" in text
    assert "0.885" in text


def test_the_evaluation_table_fits_a_window_of_1100_px(copy):
    table = re.search(r'<div class="scroll"><table>(.*?)</table>', write_report(copy, ceiling=CEILING).read_text())[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    columns = [*zip(*(row for row in rows if len(row) == 7), strict=True)]
    assert any("by prompt" in cell for cell in columns[1])
    # Lines are small print, 7 px a letter; the first column wraps at 9 rem, and each cell has 23 px of padding.
    widths = [max(len(line) for cell in column for line in re.split(r"<[^>]*>", cell)) for column in columns[1:]]
    assert 144 + 7 * sum(widths) + 7 * 23 <= 1100 - 64 - 15


@pytest.mark.parametrize(
    ("ends", "bold"),
    [
        ((0.1, 0.3, None, None), True),
        ((-0.3, -0.1, -0.4, -0.05), True),
        ((-0.006, 0.16, 0.01, 0.17), False),
        ((0.01, 0.17, -0.006, 0.16), False),
        ((None, None, None, None), False),
    ],
)
def test_a_gain_is_bold_when_none_of_its_intervals_holds_0(ends, bold):
    low, high, clustered_low, clustered_high = ends
    gain = Estimate(
        mean=0.08, low=low, high=high, num=9, clustered_low=clustered_low, clustered_high=clustered_high, num_clusters=5
    )
    assert ("class=sure" in _gain_cell(gain)) == bold


def test_the_report_needs_nothing_outside_itself(copy):
    seen = read(write_report(copy).read_text())
    assert "script" not in seen.tags
    assert "link" not in seen.tags
    assert seen.references
    assert all(reference.startswith("data:image/") for reference in seen.references)
    style = re.search(r"<style>.*</style>", (copy / "report.html").read_text(), re.DOTALL).group()
    assert "url(" not in style
    assert "@import" not in style


def test_text_of_the_model_and_of_the_data_is_escaped(copy):
    path = copy / "evaluations" / "step_000012.json"
    document = json.loads(path.read_text())
    for item in document["items"]:
        item["prompt"] = item["category"] = HOSTILE
        item["text"] = item["text"] and HOSTILE
        item["choices"] = [HOSTILE for _ in item["choices"]]
    document["categories"] = {HOSTILE: next(iter(document["categories"].values()))}
    path.write_text(json.dumps(document))
    run = json.loads((copy / "run.json").read_text())
    run |= {"id": HOSTILE, "reason": HOSTILE, "status": HOSTILE, "changed": {HOSTILE: [HOSTILE, HOSTILE]}}
    (copy / "run.json").write_text(json.dumps(run))
    with (copy / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "alert", "step": HOSTILE, "message": HOSTILE}) + "\n")
    page = write_report(copy, notes=[HOSTILE]).read_text()
    seen = read(page)
    assert "script" not in seen.tags
    assert seen.handlers == []
    assert "".join(seen.text).count("<script>alert(1)</script>") > 20


def test_a_run_without_evaluation_or_steps_still_has_a_report(copy):
    shutil.rmtree(copy / "evaluations")
    for name in ("metrics", "pairs", "used_pairs", "events"):
        (copy / f"{name}.jsonl").unlink()
    text = " ".join(read(write_report(copy).read_text()).text)
    assert "This run was not evaluated." in text
    assert "Rewards while training" not in text


def test_a_single_evaluation_shows_values_without_gains(copy):
    (copy / "evaluations" / "step_000000.json").unlink()
    text = " ".join(read(write_report(copy).read_text()).text)
    assert "gain" not in text.split("Means with 95 %")[0]
    assert "value" in text


def test_evaluations_in_between_become_a_curve(copy):
    shutil.copy(copy / "evaluations" / "step_000000.json", copy / "evaluations" / "step_000006.json")
    assert "Held-out reward by step" in write_report(copy).read_text()


def test_unjudged_items_and_torn_lines_are_said(copy):
    path = copy / "evaluations" / "step_000012.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_unjudged": 3}))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("{torn\n")
    text = " ".join(read(write_report(copy).read_text()).text)
    assert "3 completions could not be judged" in text
    assert "1 unreadable lines were skipped" in text


def test_every_metric_that_the_report_draws_is_declared():
    for _, _, curves in POLICY_CHARTS:
        for name, _, _ in curves:
            assert lookup(name)


def test_every_drawn_metric_of_the_made_run_is_written(copy):
    written = set(read_run(copy).metrics[0])
    wanted = {name for _, _, curves in POLICY_CHARTS for name, _, _ in curves} - {"policy/kl_reference"}
    assert wanted <= written


def test_a_folder_without_a_run_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="run directory"):
        write_report(tmp_path)
