"""Who may reach the page where it is served on this machine alone."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

HERE = ("127.0.0.1", "localhost", "::1")
REFUSED = "vlm-fix demo answers to localhost alone: open it there, or start it with --host."


class OnlyHere:
    """Refuses requests to any other name: a web page whose name leads to this machine's address could read its images."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        named = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        try:
            host = urlsplit(f"//{named}").hostname
        except ValueError:
            host = None
        if scope["type"] == "lifespan" or host in HERE:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(REFUSED, 403)(scope, receive, send)
