import pytest

from tests.browser.watching import CHROMIUM, Watched, require_browser
from unirl.benchmarks.dashboard_browser import FLAGS


@pytest.fixture(scope="module")
def browser():
    require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(params=["light"])
def watched(browser, request):
    """A page in the theme that the test asks for; whatever it did wrong fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=request.param)
    watched = Watched(context)
    yield watched
    watched.check()
    context.close()
