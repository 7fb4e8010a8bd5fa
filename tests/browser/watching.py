"""A browser before the dashboard, and what it must never do."""

import os
import socket
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import uvicorn

from unirl.benchmarks.dashboard_browser import find_chromium
from unirl.dashboard.app import create_app

READY = "body[data-ready='1']"
CHROMIUM = find_chromium()
MISSING = "" if CHROMIUM else "no chromium on PATH (apt-get install chromium), or no playwright (launch/setup.sh --dev)"


def require_browser():
    """Skip what needs a browser where there is none, and fail there when UNIRL_REQUIRE_BROWSER=1."""
    if MISSING:
        (pytest.fail if os.environ.get("UNIRL_REQUIRE_BROWSER") == "1" else pytest.skip)(
            f"BROWSER TESTS NOT RUN: {MISSING}"
        )


@contextmanager
def serving(folder, port=0, wrap=lambda app: app):
    """The address of a dashboard of this process."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    config = uvicorn.Config(wrap(create_app(folder)), log_level="warning", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class Watched:
    """A page that keeps account of errors and of whom it asked."""

    def __init__(self, context):
        self.page = context.new_page()
        self.errors, self.hosts = [], set()
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def open(self, url, view="overview"):
        self.page.goto(url)
        self.page.wait_for_selector(f"{READY}[data-view='{view}']", timeout=30_000)
        return self.page

    def check(self):
        assert self.errors == []
        assert self.hosts <= {"127.0.0.1", None}, self.hosts


def until(page, expression, timeout_s=10.0):
    """Wait for JavaScript to be true. The page forbids eval, which the browser driver's own waiting needs."""
    for _ in range(int(timeout_s / 0.05)):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not within {timeout_s} s: {expression}")


def assert_accessible(page):
    """No violation that axe calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    bad = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in bad] == []
