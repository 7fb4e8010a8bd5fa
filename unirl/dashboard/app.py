"""The web application: the page, the JSON that it draws, and the pictures. Read-only, all paths relative.

Answers are made in worker threads and sent as finished bytes, so that a long one does not hold up the short ones.
"""

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from unirl.dashboard.access import Access
from unirl.dashboard.pictures import TooLargeError, read_picture
from unirl.dashboard.run_view import RunView
from unirl.dashboard.runs import Runs, quoted
from unirl.dashboard.shown_pairs import PairFilter

STATIC = Path(__file__).with_name("static")
NUM_THREADS = 4
MOST_POINTS = 20_000
MOST_PAIRS = 500
MOST_STEPS = 1000
_SMALL = 400
"""Bytes that are not worth compressing: headers alone weigh more."""

Step = Count = Annotated[int | None, Query(ge=0, lt=1 << 53)]


def create_app(runs_dir: Path, token: str | None = None, *, root_path: str = "") -> Access:
    """The dashboard of a folder of runs, as an ASGI application.

    Args:
        runs_dir: folder of runs at any depth down to 4, or a run.
        token: asked of everybody; None answers requests to loopback names only.
        root_path: prefix that a proxy in front leaves in the paths; they are answered without it too.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    runs = Runs(runs_dir)
    app = FastAPI(openapi_url=None, lifespan=_few_threads, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(Exception, _server_error)
    _add_run(app, runs)
    _add_pairs(app, runs)
    _add_files(app, runs)
    return Access(app, token or None, root_path)  # outermost, so that its headers stand on failures too


def _add_run(app: FastAPI, runs: Runs) -> None:
    """What concerns whole runs."""

    @app.get("/api/runs")
    def list_runs(request: Request) -> Response:
        return _answer(request, {"runs": runs.list()})

    @app.get("/api/run/{run}")
    def overview(request: Request, run: str) -> Response:
        view = _find(runs, run)
        return _answer(request, view.overview(), BackgroundTask(view.warm_later))

    @app.get("/api/run/{run}/strip")
    def strip(request: Request, run: str, alerts: Count = None) -> Response:
        return _answer(request, {"strip": _find(runs, run).strip(alerts)})

    @app.get("/api/run/{run}/metrics")
    def metrics(  # noqa: PLR0913 - one argument each
        request: Request,
        run: str,
        names: str = "",
        since: str | None = None,
        first: Step = None,
        last: Step = None,
        points: Annotated[int, Query(ge=4, le=MOST_POINTS)] = 2000,
        alerts: Count = None,
    ) -> Response:
        asked, view = [name for name in names.split(",") if name], _find(runs, run)
        found = view.metrics(asked, since, (first, last), points)
        if alerts is not None and found["steps"]:  # a new step changes the strip too
            found["strip"] = view.strip(alerts)
        return _answer(request, found)

    @app.get("/api/run/{run}/events")
    def events(request: Request, run: str, since: str | None = None) -> Response:
        return _answer(request, _find(runs, run).events(since))

    @app.get("/api/run/{run}/fleet")
    def fleet(request: Request, run: str, since: float | None = None) -> Response:
        return _answer(request, _find(runs, run).fleet(since))

    @app.get("/api/compare")
    def compare(request: Request, runs_asked: Annotated[str, Query(alias="runs")]) -> Response:
        views = {name: _find(runs, quoted(name)) for name in dict.fromkeys(runs_asked.split(",")) if name}
        return _answer(request, _compare(views))


def _add_pairs(app: FastAPI, runs: Runs) -> None:
    """What concerns single pairs."""

    @app.get("/api/run/{run}/pairs")
    def pairs(  # noqa: PLR0913 - one argument each
        request: Request,
        run: str,
        kind: str | None = None,
        zero_variance: bool | None = None,
        task: str | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        text: Annotated[str | None, Query(max_length=1000)] = None,
        step: Step = None,
        offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
        limit: Annotated[int, Query(ge=0, le=MOST_PAIRS)] = 100,
    ) -> Response:
        asked = PairFilter(
            kind=kind,
            zero_variance=zero_variance,
            task=task,
            min_reward=min_reward,
            max_reward=max_reward,
            text=text,
            step=step,
        )
        return _answer(request, _find(runs, run).pairs(asked, offset=offset, limit=limit))

    @app.get("/api/run/{run}/pair")
    def pair(request: Request, run: str, pair_id: str, step: Annotated[int, Query(ge=0, lt=1 << 53)]) -> Response:
        line = _find(runs, run).pair(step, pair_id)
        if line is None:
            raise HTTPException(
                404, "expected a pair that was shown in this step; got another; choose one in the list of pairs"
            )
        return _answer(request, line)

    @app.get("/api/run/{run}/pair_history")
    def pair_history(request: Request, run: str, pair_id: str) -> Response:
        return _answer(request, {"uses": _find(runs, run).pair_history(pair_id)})

    @app.get("/api/run/{run}/similarities")
    def similarities(
        request: Request, run: str, step: Step = None, window: Annotated[int, Query(ge=1, le=MOST_STEPS)] = 1
    ) -> Response:
        return _answer(request, _find(runs, run).similarities(step, window))


def _add_files(app: FastAPI, runs: Runs) -> None:
    """Pictures of runs, and the page."""

    @app.get("/files/{run}/{path:path}")
    def picture(request: Request, run: str, path: str) -> Response:
        try:
            found = read_picture(_find(runs, run).folder, path)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from error
        except FileNotFoundError as error:
            raise HTTPException(404, "expected a .webp or .png picture of the run; got none of this name") from error
        mark = f'"{found.mark}"'
        headers = {"cache-control": "private, no-cache", "etag": mark}
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers=headers)
        return Response(found.data, media_type=found.media_type, headers=headers)

    @app.get("/")
    def page() -> Response:
        if not (STATIC / "index.html").is_file():
            raise HTTPException(404, "expected the page in unirl/dashboard/static; got none; install the package anew")
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/static", _Static(directory=STATIC, check_dir=False))


class _Static(StaticFiles):
    """The page's own files. Browsers ask each time whether theirs is current, so that an update is seen at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


@asynccontextmanager
async def _few_threads(_: FastAPI) -> AsyncIterator[None]:
    """Each thread may hold an answer and a heap of its own."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = NUM_THREADS
    yield


def _find(runs: Runs, name: str) -> RunView:
    try:
        view = runs.find(name)
    except FileNotFoundError as error:
        raise HTTPException(404, str(error)) from error
    if view is None:
        raise HTTPException(404, "expected the id of a run; got another; see api/runs")
    return view


def _compare(views: dict[str, RunView]) -> dict[str, Any]:
    found = {name: view.summary() for name, view in views.items()}
    keys = sorted({key for settings, _ in found.values() for key in settings})
    # A run that lacks a setting, as one of another job does, has no value of it.
    rows = {key: {n: settings[key] for n, (settings, _) in found.items() if key in settings} for key in keys}
    differing = {
        key: row
        for key, row in rows.items()
        if len(row) < len(found) or len({json.dumps(value) for value in row.values()}) > 1
    }
    return {"config": differing, "evaluations": {name: last for name, (_, last) in found.items()}}


def _answer(request: Request, document: object, background: BackgroundTask | None = None) -> Response:
    """JSON, compressed where it helps and the browser can read it."""
    body = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    headers = {"vary": "accept-encoding"}
    if len(body) > _SMALL and "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["content-encoding"] = gzip.compress(body, 1), "gzip"
    return Response(body, media_type="application/json", headers=headers, background=background)


def _error(status: int, text: str) -> Response:
    return Response(json.dumps({"error": text}), status, media_type="application/json")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    unknown = error.status_code == 404 and error.detail == "Not Found"
    text = "expected a path of the dashboard; got another; see docs/watching.md" if unknown else str(error.detail)
    return _error(error.status_code, text)


async def _bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _error(400, f"{first['loc'][-1]}: expected another value ({first['msg'].lower()}); correct the address")


async def _server_error(_: Request, error: Exception) -> Response:
    return _error(500, f"expected to be able to read the run; got {type(error).__name__}; see the dashboard's terminal")
