"""A line for each request: who asked for what, how it ended, and what it took."""

import contextlib
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl_deploy.inference.rows import Speed

_LONGEST_PATH = 200  # letters, of a client's own making


class RequestLog:
    """An application around `app` that tells `say` of each request, but of `/health`.

    Of texts it has the numbers of tokens alone: what is asked and answered is the clients' own.
    """

    def __init__(self, app: ASGIApp, say: Callable[[str], None]) -> None:
        self._app, self._say = app, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the application does, which may leave a `Speed` in the request's state."""
        if scope["type"] != "http" or scope["path"] == "/health":  # probes ask all the time
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), "no answer"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            with contextlib.suppress(OSError):  # nobody reads it any more: no client's fault
                self._say(_line(scope, status, time.monotonic() - began))


def _line(scope: Scope, status: str, seconds: float) -> str:
    path = scope["raw_path"][:_LONGEST_PATH].decode("ascii", "backslashreplace")
    client = (scope.get("client") or ("-",))[0]
    said = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {scope['method']} {path} {status}"
    speed: Speed | None = scope.get("state", {}).get("speed")
    if speed is not None and speed.prompt_tokens:
        said += f", {speed.prompt_tokens} + {speed.new_tokens} tokens"
    return f"{said}, {seconds:.2f} s"
