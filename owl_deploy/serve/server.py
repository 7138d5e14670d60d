"""The HTTP server: OpenAI's endpoints before a line of requests for one open deployment."""

import asyncio
import errno
import hmac
import ipaddress
import json
import logging
import os
import signal
import socket
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.inference import threads_for
from owl_deploy.inference.deployment import Deployment, open_deployment
from owl_deploy.inference.draft import chosen_draft
from owl_deploy.inference.rows import PromptTooLong, Row, Speed
from owl_deploy.inference.sampling import LARGEST
from owl_deploy.inference.speculate import Search
from owl_deploy.inference.writer import Writer, open_writer
from owl_deploy.serve import protocol
from owl_deploy.serve.log import RequestLog
from owl_deploy.serve.scheduler import Answer, Asked, Line, Part

KEY = "OWL_API_KEY"  # from the environment, for everybody on a machine sees command lines
MOST_BYTES = 2**20  # of a request's body
_BYTES_A_TOKEN = 32  # no prompt has more on average, beside some for the rest of the body
GRACE_S = 30  # for answers in the making after SIGTERM
_LOOK_S = 0.25  # how often a request that waits looks whether its client is still there
_RETRY_S = 1
_BODY_S = 60  # for a request's body to come
_READ_S = 1  # to read what came while the model's library held Python's lock
_LOG = logging.getLogger(__name__)
_EVENTS = "text/event-stream"
_AS_IT_COMES = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would gather it
_UVICORN: dict[str, Any] = {
    "log_level": "warning",
    "server_header": False,
    "proxy_headers": False,  # what a client says of itself would stand in the log
    "timeout_graceful_shutdown": GRACE_S,
    "timeout_keep_alive": 75,  # longer than clients keep a connection: it is theirs to close first
    "lifespan": "off",  # there is none, and a second Ctrl-C would end it with a traceback
    "ws": "none",
}
# Each row adds a little to everybody's step.
BATCH = 8
CONTEXT = 4096

Endpoint = Callable[[HttpRequest], Awaitable[Response]]
Texts = AsyncGenerator[Part, None]


class Service:
    """The endpoints over one deployment, which has `names`, the first of them for who gives none.

    `key`: what clients must know, if any.
    """

    def __init__(
        self, writer: Writer, names: Sequence[str], waiting: int, key: str | None = None
    ) -> None:
        self._writer, self._key = writer, key
        more = {"object": "model", "created": int(time.time()), "owned_by": "owl"}
        more["max_model_len"] = writer.context  # vLLM's
        self._models = {name: {"id": name, **more} for name in names}
        self._line = Line(writer, waiting)
        self._most_bytes = min(MOST_BYTES, 2**16 + _BYTES_A_TOKEN * writer.context)

    def app(self) -> Starlette:
        """The application; without a key it answers to this machine's own names only."""
        errors = (
            protocol.Refused,
            BadInput,
            EngineFailed,
            HTTPException,
            ClientDisconnect,
            Exception,
        )
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._guarded(self._all_models)),
                Route("/v1/models/{model:path}", self._guarded(self._one_model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._completion), methods=["POST"]),
            ],
            exception_handlers=dict.fromkeys(errors, _said),
        )

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: HttpRequest) -> Response:
            if self._key:
                _check_key(request, self._key)
            else:
                _check_host(request)
            return await endpoint(request)

        return guarded

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _all_models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": list(self._models.values())})

    async def _one_model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._model(request.path_params["model"]))

    def _model(self, name: str) -> dict[str, Any]:
        if name not in self._models:
            there_are = ", ".join(map(repr, self._models))
            raise protocol.Refused(
                404, f"There is no model {name!r}, but {there_are}.", "model_not_found"
            )
        return self._models[name]

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.Chat)

    async def _completion(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.Completion)

    async def _answer(self, request: HttpRequest, kind: type[protocol.Request]) -> Response:
        asked = protocol.parse(kind, await _body(request, self._most_bytes))
        if asked.model is None:
            asked.model = next(iter(self._models))
        self._model(asked.model)
        request.state.speed = speed = Speed()
        texts = self._texts(request, asked, speed)
        with _until_the_end():
            first = await anext(texts)  # what is wrong with the request comes before any answer
            if asked.stream:
                parts = _parts(asked, first, texts, speed)
                return StreamingResponse(parts, headers=_AS_IT_COMES, media_type=_EVENTS)
            text, reason = first
            async for piece, reason in texts:  # noqa: B007 - the last one is meant
                text += piece
        choices = [asked.choice(text, reason, part=False)]
        body = {
            **protocol.header(asked, part=False),
            "choices": choices,
            "usage": protocol.usage(speed),
        }
        return JSONResponse(body)

    async def _texts(self, request: HttpRequest, asked: protocol.Request, speed: Speed) -> Texts:
        """The answer piece by piece, each with the reason why it ended: None but in the last."""

        def prepare() -> Row:
            text = asked.text(self._writer)
            row = self._writer.row(text, asked.sampling(), speed, templated=asked.templated)
            row.anew = asked.cache_prompt is False
            return row

        asks = Asked(prepare, asked.stops, request.is_disconnected)
        async with self._line.place(asks) as answer:
            reason = None
            while reason is None:
                text, reason = await _next_part(answer)
                yield text, reason


def _check_key(request: HttpRequest, key: str) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise protocol.Refused(401, "The API key is missing or wrong.", "invalid_api_key")


def _check_host(request: HttpRequest) -> None:
    """Against DNS rebinding: a page of another site whose name leads here asks for that name.

    It knows no key, so where there is one any name will do.
    """
    asked = request.headers.get("host", "")
    if not _is_loopback(_name_in(asked)):
        raise protocol.Refused(
            400,
            f"Without a key only this machine's own names are answered to, and {asked!r} is none: "
            f"have a proxy send the Host localhost, or start the server with {KEY} set.",
        )


def _name_in(address: str) -> str:
    """The host in one with a port or without; "" for what is no address."""
    try:
        return (urlsplit(f"//{address}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


@contextmanager
def _until_the_end() -> Iterator[None]:
    """Answers that are not finished `GRACE_S` after the server was to end are cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        raise protocol.Refused(503, "The server is shutting down.") from None


async def _next_part(answer: Answer) -> Part:
    """What comes next; raises what the answer failed with, or that the client is gone."""
    found = None
    while found is None:
        with suppress(TimeoutError):
            found = await asyncio.wait_for(answer.parts.get(), _LOOK_S)
        if await answer.asked.is_gone():
            raise ClientDisconnect
    if isinstance(found, Exception):
        raise found
    return found


async def _parts(
    asked: protocol.Request, first: Part, texts: Texts, speed: Speed
) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer."""
    header = protocol.header(asked, part=True)
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)

    def event(choices: list[dict[str, Any]], **more: Any) -> str:  # noqa: ANN401 - JSON
        return f"data: {json.dumps({**header, 'choices': choices, **more})}\n\n"

    async def all_texts() -> Texts:
        yield first
        async for found in texts:
            yield found

    try:
        async with aclosing(texts):  # whenever the client goes: its place is another's
            with _until_the_end():
                if opening := asked.opening():
                    yield event(opening)
                async for text, reason in all_texts():
                    if text or reason:
                        yield event([asked.choice(text, reason, part=True)])
    except ClientDisconnect:  # no error of ours, and nobody reads what it would say
        return
    except Exception as error:  # too late for a status
        if not isinstance(error, (BadInput, EngineFailed, protocol.Refused)):
            _LOG.exception("A stream failed.")
        yield f"data: {json.dumps(_refusal(error).body())}\n\n"
        return
    if with_usage:
        yield event([], usage=protocol.usage(speed))
    yield "data: [DONE]\n\n"


async def _body(request: HttpRequest, most_bytes: int) -> bytes:
    """The body, if it is JSON of a bearable size.

    Of another type a browser would send it from any page, and without asking (CORS's preflight).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise protocol.Refused(415, "The body must be application/json.")
    body = bytearray()
    for seconds in (_BODY_S, _READ_S):
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most_bytes:
                        raise protocol.Refused(413, f"The body has more than {most_bytes} bytes.")
                return bytes(body)
    raise protocol.Refused(408, f"The body did not come within {_BODY_S} seconds.")


def _refusal(error: Exception) -> protocol.Refused:
    """What a client is told of `error`; of one of the server's own nothing, for the log has it."""
    if isinstance(error, protocol.Refused):
        return error
    if isinstance(error, HTTPException):
        return protocol.Refused(error.status_code, error.detail)
    if isinstance(error, BadInput):
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return protocol.Refused(400, error.message, code)
    if isinstance(error, EngineFailed):
        _LOG.error("%s", error)
    return protocol.Refused(500, "The server failed.")


async def _said(_: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    refused = _refusal(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if refused.status in (429, 503):
        headers["Retry-After"] = str(_RETRY_S)
    if refused.status == 500:  # uvicorn hangs up after it, unsaid: no client may ask there again
        headers["Connection"] = "close"
    return JSONResponse(refused.body(), refused.status, headers)


def serve(
    deployment: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    batch: int = BATCH,
    waiting: int = 16,
    context: int | None = None,
    names: Sequence[str] = (),
    threads: int | None = None,
    trust_library: bool = False,
    draft: str | Path | None = None,
    draft_tokens: int | None = None,
    log: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve `deployment` until SIGTERM or Ctrl-C; answers in the making are finished.

    `port`: 0 for a free one; `say` is told which. `batch`: requests that are answered side by
    side, at most; `waiting`: requests in line behind them; `context`: tokens of a prompt and its
    answer, at most (None: `CONTEXT`, or what the model takes), `batch` times as many in all.
    `names`: what clients call the model, in place of its folder's name. `log`: whether `say` is
    told of each request, too (`RequestLog`). What a request leaves out of how tokens are chosen is
    as the deployment's genai_config.json has it, where that says `do_sample`, and `say` is told.
    `threads`, `trust_library`, `draft`, `draft_tokens`: as in `generate`; only a request that is
    alone has the draft. Clients must know the key that stands in the environment variable
    `OWL_API_KEY`, if one does. Raises `BadInput` for a deployment that cannot be opened, for a
    draft that does not fit it, for a `context` that is more than it takes, for an address that
    cannot be had, for one that other machines reach without a key, and for a key that no client
    could send.
    """
    key = _key()
    if not key and not _is_loopback(host):
        raise BadInput(
            f"{host} can be reached from other machines, and no key is asked for.",
            f"Set {KEY} in the environment, or leave out --host.",
        )
    listener = _listen(host, port)
    with listener:
        opened = open_deployment(Path(deployment), trust_library=trust_library)
        drafting = chosen_draft(opened, draft, draft_tokens, trust_library)
        threads, context = threads_for(threads), _context(opened, context)
        writer = open_writer(opened, threads, context, drafting, batch)
        names = list(names) or [Path(deployment).resolve().name]
        app = Service(writer, names, waiting, key).app()
        running = _http_server(RequestLog(app, say) if log else app)
        # Before uvicorn's own handlers are there, and after: it sends itself the signal that ended
        # it once more.
        signal.signal(signal.SIGTERM, running.handle_exit)
        bound = f"[{host}]" if ":" in host else host
        url = f"http://{bound}:{listener.getsockname()[1]}/v1"
        say(f"{', '.join(names)} ({_limits(writer, threads)}) is served at {url}")
        if usual := _said_of(writer.usual):
            say(f"Requests that do not say otherwise have the model's own {usual}.")
        running.run([listener])


def _context(opened: Deployment, asked: int | None) -> int:
    """The tokens of a prompt and its answer, at most; raises `BadInput` for more than there are."""
    takes = opened.max_context
    if asked is not None and takes is not None and asked > takes:
        raise BadInput(
            f"--context {asked} is more than the {takes} tokens that {opened.path} takes.",
            f"Give {takes} or less.",
        )
    return asked or CONTEXT


def _limits(writer: Writer, threads: int) -> str:
    """What a user is told of a server's size."""
    at_once = f"up to {writer.batch} at once" if writer.batch > 1 else "one at a time"
    return f"context {writer.context}, {threads} thread{'s' * (threads > 1)}, {at_once}"


def _said_of(usual: Search) -> str:
    """How tokens are drawn where a model's makers had a say in that; else ""."""
    if not usual.do_sample:
        return ""
    off = Search(do_sample=True, top_k=LARGEST)
    found = {name: value for name, value in vars(usual).items() if value != getattr(off, name)}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _key() -> str | None:
    """What clients must know, if anything, without the line's end that a file of secrets has."""
    if KEY not in os.environ:
        return None
    key = os.environ[KEY].strip()
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise BadInput(
            f"The key in {KEY} is empty, or has what no client can send in a header.",
            "Give it ASCII letters, digits and signs without a space, or unset it.",
        )
    return key


def _http_server(app: ASGIApp, **settings: Any) -> uvicorn.Server:  # noqa: ANN401
    """What runs `app`; `settings`: of uvicorn, beside or in place of ours."""
    config = uvicorn.Config(app, **{**_UVICORN, **settings})
    logging.getLogger("uvicorn.error").addFilter(_is_no_advice)
    return uvicorn.Server(config)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """uvicorn would have WebSocket's libraries installed for whoever asks for one: in vain here."""
    return "uvicorn[standard]" not in record.getMessage()


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # What is wrong with a name is told as such here only, and nothing is open yet.
        socket.getaddrinfo(host or None, 0, family)
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        hint = "Give another --port."
        if _is_the_hosts(error):
            hint = "Give a --host that is this machine's, as 127.0.0.1 is."
        raise BadInput(f"{host}:{port} cannot be listened at ({error}).", hint) from error


def _is_the_hosts(error: Exception) -> bool:
    """Whether the host is at fault: it is no name, nobody's, or another machine's."""
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return True
    return isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL
