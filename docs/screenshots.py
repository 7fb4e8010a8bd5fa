"""The pictures of docs/watching.md, of two runs: `python docs/screenshots.py URL_OF_THE_DASHBOARD RUN OTHER_RUN`."""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from unirl.benchmarks.dashboard_browser import FLAGS, READY, find_chromium

IMAGES = Path(__file__).with_name("images")


def main(url: str, run: str, other: str) -> None:
    """Write every picture, 256 colours each."""
    views = {
        "overview_light": ("overview", f"runs={run}", 1180),
        "overview_dark": ("overview", f"runs={run}", 1180),
        "pairs": ("pairs", f"runs={run}&zero=0", 900),
        "compare": ("compare", f"runs={run},{other}&smooth=0.6", 1080),
        "fleet": ("fleet", f"runs={run}", 900),
    }
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        for name, (view, what, height) in views.items():
            scheme = "dark" if name.endswith("dark") else "light"
            page = chromium.new_page(viewport={"width": 1360, "height": height}, color_scheme=scheme)
            page.goto(f"{url}#view={view}&{what}")
            page.wait_for_selector(READY.format(view), state="attached")
            page.wait_for_timeout(1000)
            save(page, IMAGES / f"watching_{name}.png")
            page.close()
        chromium.close()


def save(page: Page, path: Path) -> None:
    """A picture of what is in sight."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
