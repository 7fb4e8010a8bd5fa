"""Who may ask, and what browsers are told about every answer. Plain ASGI, so that it holds for errors too."""

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, quote

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
     b"object-src 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address: 127.0.0.0/8, ::1, localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Access:
    """Lets requests through that may read the runs.

    Without a token the server listens on loopback alone, and answers only requests that name it so: a page elsewhere
    that had its own name point to 127.0.0.1 would give that name (DNS rebinding). With a token, that token is asked of
    everybody, as `Authorization: Bearer` or as the cookie that opening `/?token=...` leaves.
    """

    def __init__(self, app: App, token: str | None, root_path: str = "") -> None:
        """Stand before `app`.

        Args:
            app: what answers.
            token: secret, or None.
            root_path: prefix that may stand before the page's path.
        """
        self._app, self._token, self._pages = app, token, ("", root_path.rstrip("/"))
        key = (token or "").encode()
        self._cookie = "unirl_" + hashlib.sha256(b"name" + key).hexdigest()[:8]
        self._proof = hmac.new(key, b"unirl dashboard", "sha256").hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or hand on one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message.get("headers", ())}
                more = [(name, value) for name, value in HEADERS if name not in given]
                if b"cache-control" not in given:
                    more.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(self._without_prefix(scope), receive, send_with_headers)
            return
        status, headers, body = refusal
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send_with_headers({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._token is None:
            host = headers.get(b"host", "")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if is_loopback(name):
                return self._slash(scope)
            wanted = "127.0.0.1, localhost or [::1]"
            return _error(403, f"expected a request to {wanted}; got another host; serve other names with a token")
        # A token in the page's address is exchanged for a cookie, so that it stays in no history.
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
        if given and scope["path"].rstrip("/") in self._pages and self._is_token(given[-1]):
            cookie = f"{self._cookie}={self._proof}; HttpOnly; SameSite=Lax"
            return 303, [(b"location", _page_of(scope["path"])), (b"set-cookie", cookie.encode())], b""
        kind, _, bearer = headers.get(b"authorization", "").partition(" ")
        if (kind.lower() == "bearer" and self._is_token(bearer.strip())) or self._has_cookie(
            headers.get(b"cookie", "")
        ):
            return self._slash(scope)
        return _error(401, "expected the dashboard's token; got none, or another one; open the page once as "
                      "/?token=TOKEN, or send it as Authorization: Bearer")  # fmt: skip

    def _without_prefix(self, scope: Scope) -> Scope:
        """The request as it would be without a proxy; one that came past the proxy is so already."""
        prefix, path = self._pages[1], scope["path"]
        return {**scope, "path": path.removeprefix(prefix)} if prefix and path.startswith(f"{prefix}/") else scope

    def _slash(self, scope: Scope) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        """Where the page lies when its prefix was asked for without the slash, against which its addresses are told."""
        path = scope["path"]
        return (307, [(b"location", _page_of(path))], b"") if path and path == self._pages[1] else None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), (self._token or "").encode(errors="replace"))

    def _has_cookie(self, header: str) -> bool:
        try:
            cookie = SimpleCookie(header).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._proof.encode())


def _page_of(path: str) -> bytes:
    """The page's address as seen from a path of it, with the slash that its own addresses need."""
    return b"." if path.endswith("/") or not path else f"./{quote(path.rpartition('/')[2])}/".encode()


def _error(status: int, text: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return status, [(b"content-type", b"application/json")], json.dumps({"error": text}).encode()
