"""Who is answered, and what browsers are told."""

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import uvicorn
from typer.testing import CliRunner

from tests.dashboard.conftest import ask
from unirl.cli import app, main
from unirl.dashboard.access import is_loopback
from unirl.dashboard.app import create_app

TOKEN = "a-secret-of-this-test"
PROGRAM = "from unirl.cli import main; main()"


@pytest.mark.parametrize("address", ["/api/runs", "/", "/none", "/files/x/images/y.webp", "/static/none.js"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_every_answer_carries_the_headers(finished_runs, address, token):
    answer = ask(finished_runs, token=token).get(address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in answer.headers
    assert "server" not in answer.headers


def test_marks_in_place_of_letters_are_no_token(finished_runs):
    client = ask(finished_runs, token="пароль")
    assert client.get("/api/runs", headers={"Authorization": "Bearer ??????"}).status_code == 401
    assert client.get("/", params={"token": "??????"}, follow_redirects=False).status_code == 401
    assert client.get("/", params={"token": "пароль"}, follow_redirects=False).status_code == 303


def test_a_failure_of_ours_carries_the_headers_and_leaves_the_server_up(finished_runs, monkeypatch):
    monkeypatch.setattr("unirl.dashboard.run_view.RunView.fleet", lambda *_: 1 / 0)
    client = ask(finished_runs)
    answer = client.get("/api/run/grid~1seed~00/fleet")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.json()["error"]
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.get("/api/runs").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.2:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("[::2]:8000", 403),
        ("", 403),
    ],
)
def test_only_loopback_names_are_answered_without_a_token(finished_runs, host, status):
    assert ask(finished_runs).get("/api/runs", headers={"Host": host}).status_code == status


def test_a_token_is_asked_of_everybody(finished_runs):
    client = ask(finished_runs, token=TOKEN)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"},
                    {"Authorization": "Bearer "}, {"Cookie": f"unirl_0={TOKEN}"}, {"Cookie": "\u00e4;=;"}):  # fmt: skip
        answer = client.get("/api/runs", headers={name: value.encode() for name, value in headers.items()})
        assert answer.status_code == 401
        assert TOKEN not in answer.text
    assert client.get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    far = client.get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}", "Host": "cluster.example"})
    assert far.status_code == 200, "with a token, other names are served"


def test_the_address_with_the_token_becomes_a_cookie(finished_runs):
    client = ask(finished_runs, token=TOKEN)
    assert client.get("/?token=wrong", follow_redirects=False).status_code == 401
    assert client.get(f"/api/runs?token={TOKEN}").status_code == 401, "addresses are kept in histories"
    answer = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, ".")
    cookie = answer.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite" in cookie
    assert client.get("/api/runs").status_code == 200
    other = ask(finished_runs, token="another")
    other.cookies = client.cookies
    assert other.get("/api/runs").status_code == 401


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_prefix_without_its_slash_leads_to_the_page(finished_runs, token):
    client = ask(finished_runs, token=token, root_path="/proxy/8000")
    asked = "/proxy/8000" + (f"?token={TOKEN}" if token else "")
    answer = client.get(asked, follow_redirects=False)
    assert (answer.status_code // 100, answer.headers["location"]) == (3, "./8000/")
    page = client.get("/proxy/8000")
    assert page.url.path == "/proxy/8000/"
    assert "<title>unirl</title>" in page.text
    assert client.get("/proxy/8000/api/runs/", follow_redirects=False).status_code == 404


@pytest.mark.parametrize("prefix", ["", "/proxy/8000"])
def test_with_a_prefix_the_page_and_its_parts_are_there_with_and_without_it(finished_runs, prefix):
    client = ask(finished_runs, root_path="/proxy/8000/")
    for path in ("/", "/static/main.js", "/static/vendor/uPlot.min.css", "/api/runs", "/api/run/grid~1seed~00/strip"):
        assert client.get(prefix + path).status_code == 200, path
    assert client.get("/proxy/80001/api/runs").status_code == 404


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--root-path", "pre/fix"], "write --root-path /pre/fix"), (["--host", "no.such.invalid"], "leave it out")],
)
def test_an_address_that_cannot_be_is_refused_in_a_line(finished_runs, capsys, options, said):
    with pytest.raises(SystemExit) as end:
        main(["dashboard", str(finished_runs), "--token", "x", *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unirl: error: {' '.join(options)}: expected")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "yes"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("127.255.255.254", True), ("128.0.0.1", False), ("localhost", True),
     ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
     ("example.com", False)],
)  # fmt: skip
def test_loopback_is_known(host, yes):
    assert is_loopback(host) is yes


@pytest.mark.parametrize("token", [[], ["--token", ""]])
def test_an_open_address_without_a_token_is_refused(finished_runs, capsys, token):
    with pytest.raises(SystemExit) as end:
        main(["dashboard", str(finished_runs), "--host", "0.0.0.0", *token])
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("unirl: error: --host 0.0.0.0: expected a token")
    assert error.count("\n") == 1


def test_no_folder_and_a_taken_port_are_told_plainly(finished_runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["dashboard", str(tmp_path / "none")])
    assert end.value.code == 4
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["dashboard", str(finished_runs), "--port", str(taken.getsockname()[1])])
    assert "expected a free address" in capsys.readouterr().err


def test_the_help_shows_no_token(monkeypatch):
    monkeypatch.setenv("UNIRL_DASHBOARD_TOKEN", TOKEN)
    shown = CliRunner().invoke(app, ["dashboard", "--help"]).output
    assert "UNIRL_DASHBOARD_TOKEN" in shown
    assert TOKEN not in shown


def test_the_command_serves_and_never_tells_its_token(finished_runs, monkeypatch):
    monkeypatch.setenv("UNIRL_DASHBOARD_TOKEN", TOKEN)
    command = [sys.executable, "-c", PROGRAM, "dashboard", str(finished_runs), "--host", "0.0.0.0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [server.stdout.readline() for _ in range(4)]
    port = int(lines[1].split(":")[2].split("/")[0])
    assert f"ssh -L {port}:127.0.0.1:{port}" in lines[2]
    assert f"http://127.0.0.1:{port}/?token=TOKEN" in lines[2]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/runs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert b"grid/seed~0" in wait_for(request)
    wait_for(f"http://127.0.0.1:{port}/?token={TOKEN}")
    assert b"expected the dashboard's token" in wait_for(f"http://127.0.0.1:{port}/api/runs?token={TOKEN}")
    server.terminate()
    out, error = server.communicate(timeout=30)
    assert TOKEN not in "".join(lines) + out + error


def wait_for(request):
    """What a server answers that may still be starting."""
    for _ in range(200):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            return error.read()
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server did not answer")


def test_slow_answers_do_not_hold_up_short_ones(finished_runs, monkeypatch):
    """The loop stays free: while one answer is being made, another is sent."""
    from unirl.dashboard.run_view import RunView

    entered, leave = threading.Event(), threading.Event()

    def slow(*_):
        entered.set()
        assert leave.wait(30)
        return {}

    monkeypatch.setattr(RunView, "fleet", slow)
    config = uvicorn.Config(create_app(finished_runs), port=0, log_level="error", loop="asyncio", ws="none")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        asking = threading.Thread(target=wait_for, args=(f"{address}/run/grid~1seed~00/fleet",))
        asking.start()
        assert entered.wait(30)
        assert b"runs" in wait_for(f"{address}/runs")
        leave.set()
        asking.join()
        server.should_exit = True
        thread.join()
