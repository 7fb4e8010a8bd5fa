"""`unirl dashboard`: serves a folder of runs to a browser."""

import ctypes
import socket
import sys
import threading
import webbrowser
from contextlib import suppress
from pathlib import Path

import uvicorn

from unirl.dashboard.access import is_loopback
from unirl.dashboard.app import create_app

_M_ARENA_MAX, _M_TRIM_THRESHOLD = -8, -1


class AddressError(ValueError):
    """The dashboard cannot be served there, or everybody who reaches the address could read the runs."""

    exit_code = 2  # the command line's code for usage


def main(
    runs_dir: Path, *, host: str, port: int, token: str | None = None, root_path: str = "", open_page: bool = False
) -> int:
    """Serve until Ctrl-C.

    Args:
        runs_dir: folder of runs, or a run.
        host: address to listen on.
        port: 0 takes a free one.
        token: asked of everybody; needed beyond loopback.
        root_path: prefix that a proxy in front leaves in the paths.
        open_page: open it in a browser here.

    Raises:
        AddressError: an address beyond loopback without a token, an unknown host, or a prefix without its slash.
        FileNotFoundError: there is no such folder.
        OSError: the address is taken, or is not this machine's.
    """
    if not token and not is_loopback(host):
        raise AddressError(
            f"--host {host}: expected a token, since anyone who reaches it could read every run; got none; set "
            "UNIRL_DASHBOARD_TOKEN, or listen on 127.0.0.1 and use the ssh line that is printed"
        )
    if root_path and not root_path.startswith("/"):
        raise AddressError(
            f"--root-path {root_path}: expected a prefix that begins with a slash, as it stands in the address; got "
            f"none there; write --root-path /{root_path}"
        )
    _keep_one_heap()
    app = create_app(runs_dir, token or None, root_path=root_path.rstrip("/"))
    with _listen(host, port) as listener:
        address, port = listener.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}/"
        sys.stdout.write(_banner(runs_dir, url, port, with_token=bool(token)))
        sys.stdout.flush()
        if open_page:
            threading.Timer(0.5, webbrowser.open, (url,)).start()
        # The access log would hold what is asked, a token in an address among it.
        config = uvicorn.Config(app, access_log=False, log_level="warning", loop="asyncio", http="h11", ws="none",
                                server_header=False, proxy_headers=False, timeout_graceful_shutdown=2)  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise AddressError(
            f"--host {host}: expected an address or a name of this machine; got one that nobody knows "
            f"({error.strerror}); leave it out for 127.0.0.1"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"--host {host} --port {port}: expected a free address of this machine; got "
            f"'{error.strerror}'; leave --port out, and a free one is taken"
        ) from error  # fmt: skip
    return listener


def _keep_one_heap() -> None:
    """Without this, glibc gives each thread a heap of its own, which hardly shrinks: 20 MB in all for long runs."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def _banner(runs_dir: Path, url: str, port: int, *, with_token: bool) -> str:
    query = "?token=TOKEN, with the token that was set" if with_token else ""
    lines = [
        f"runs       {runs_dir}",
        f"dashboard  {url}{query}",
        f"elsewhere  ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}, then open http://127.0.0.1:{port}/{query}",
        "stop       Ctrl-C",
    ]
    return "\n".join(lines) + "\n"
