"""The dashboard's page in a headless Chromium: how soon it is drawn, how long another pair takes, what it asks for."""

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from unirl.benchmarks.report import Goal, Row

NUM_VISITS, NUM_SWITCHES, NUM_STEPS, IDLE_S, STEP_S = 3, 30, 5, 10.0, 4.0
READY_S, SWITCH_S, POLL_BYTES = 3.0, 0.3, 5000.0
POLL_S = 2.0
VIEWPORT = {"width": 1400, "height": 900}
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
READY = "body[data-ready='1'][data-view='{}']"
# Presses a key, and waits until another pair with all its pictures is on the page.
_SWITCH = """async (key) => {
  const shown = () => document.querySelector("[data-pair]");
  const before = shown();
  const started = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const there = (img) => img.complete && img.naturalWidth;
  const done = () => shown() !== before && [...shown().querySelectorAll("img")].every(there);
  while (!done()) await new Promise((resume) => requestAnimationFrame(resume));
  return (performance.now() - started) / 1000;
}"""


def find_chromium() -> str | None:
    """The browser's program; None where it, or playwright that drives it, is missing."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found if find_spec("playwright") else None


def measure_page(url: str, run_dir: Path) -> "tuple[list[Row], list[Goal]]":
    """Figures of the page at an address, and which of the goals they meet.

    Args:
        url: of the dashboard.
        run_dir: of the run to look at.
    """
    from unirl.benchmarks.report import Goal  # imports torch, which tests of the page can do without

    run = f"runs={run_dir.name}"
    with _chromium() as chromium:
        pages = [
            chromium.new_page(viewport=VIEWPORT) for _ in range(NUM_VISITS)
        ]  # nothing is kept from one to the next
        visits = [_open(page, f"{url}#{run}", "overview") for page in pages]
        page = pages.pop()
        for other in pages:
            other.close()
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
        polls = _idle_bytes(page)
        steps = _step_bytes(page, run_dir)
        _open(page, f"{url}#view=pairs&{run}", "pairs")
        switches = [page.evaluate(_SWITCH, "j") for _ in range(NUM_SWITCHES)]
    rows: list[Row] = [
        {"figure": "page drawn, first visit, median, s", "value": statistics.median(visits)},
        {"figure": "page drawn, first visit, longest, s", "value": max(visits)},
        {"figure": "another pair with its pictures, median, s", "value": statistics.median(switches)},
        {"figure": "another pair with its pictures, longest, s", "value": max(switches)},
        {"figure": "bytes every 2 s with nothing new", "value": polls},
        {"figure": f"bytes a new step, one each {STEP_S:g} s, median", "value": statistics.median(steps)},
        {"figure": f"bytes a new step, one each {STEP_S:g} s, most", "value": max(steps)},
        {"figure": "JavaScript heap, MB", "value": heap},
    ]
    goals = [
        Goal(text="page drawn in a browser, longest, s", wanted=READY_S, got=max(visits), at_most=True),
        Goal(text="pair switch in a browser, longest, s", wanted=SWITCH_S, got=max(switches), at_most=True),
        Goal(text="poll of the page with nothing new, bytes", wanted=POLL_BYTES, got=polls, at_most=True),
        Goal(text="all that the page moves for a new step, bytes", wanted=POLL_BYTES, got=max(steps), at_most=True),
    ]
    return rows, goals


@contextmanager
def _chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield chromium
        chromium.close()


def _open(page: Any, url: str, view: str) -> float:
    """Seconds until the page is drawn."""
    started = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(READY.format(view), state="attached")
    return time.perf_counter() - started


def _idle_bytes(page: Any) -> float:
    """Bytes per poll while nothing new comes."""
    return _moved_bytes(page, IDLE_S) / (IDLE_S / POLL_S)


def _step_bytes(page: Any, run_dir: Path) -> list[float]:
    """Bytes of each step that comes while the page is open; every one must be on it before the next."""
    moved = []
    for _ in range(NUM_STEPS):
        for name in ("used_pairs.jsonl", "metrics.jsonl"):
            last = json.loads((run_dir / name).read_bytes().splitlines()[-1])
            line = last | {"step": last["step"] + 1} | ({"time": last["time"] + STEP_S} if "time" in last else {})
            with (run_dir / name).open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        moved.append(_moved_bytes(page, STEP_S))
        shown = page.evaluate("document.querySelector('#strip progress').value")
        assert shown == line["step"], (shown, line["step"])
    return moved


def _moved_bytes(page: Any, seconds: float) -> float:
    """What goes over the wire meanwhile: requests and answers, headers and bodies."""
    requests = []

    def keep(request: Any) -> None:
        requests.append(request)

    page.on("requestfinished", keep)
    page.wait_for_timeout(seconds * 1000)
    page.remove_listener("requestfinished", keep)
    # Sizes of requests leave out what follows "?" in the address.
    return float(sum(sum(request.sizes().values()) + len(urlsplit(request.url).query) for request in requests))
