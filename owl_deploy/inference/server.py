"""An engine's own server in a process of its own, ready to be asked."""

import http.client
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from owl_deploy.errors import EngineFailed
from owl_deploy.inference.environment import ending_with_us, installed_version, served_by, server_of
from owl_deploy.inference.process import DEFAULT_TIMEOUT_S, Child, threads_for
from owl_deploy.inference.registry import MOST_ROWS
from owl_deploy.inference.worker import peak_bytes

_HOST = "127.0.0.1"
_LOOK_S = 0.05  # how often a server that starts is asked whether it is ready


class ServerProcess(Child):
    """A deployment behind its engine's server, on a free port, for the length of a `with` block.

    It answers `rows` requests at once, each of up to `context` tokens with its answer; the other
    arguments are as of `EngineProcess`, and so is `loaded`. `url`: where its API is; `model`: what
    requests call the deployment.

    Entering raises `BadInput` for an engine without a server, `EnvironmentFailed` for one that is
    not installed, and `EngineFailed`, with the server's own last words, when it ends or is not
    ready in `timeout_s`.
    """

    def __init__(
        self,
        engine: str,
        deployment: Path,
        *,
        rows: int,
        context: int,
        threads: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        trust_library: bool = False,
    ) -> None:
        super().__init__(engine, deployment)
        self.rows, self.context, self.timeout_s = rows, context, timeout_s
        self.threads = threads_for(threads)
        self.trust_library = trust_library
        self.model = deployment.resolve().name
        self.loaded: dict[str, Any] = {}
        self._port = 0

    @property
    def url(self) -> str:
        """Where the API is."""
        return f"http://{_HOST}:{self._port}/v1"

    @property
    def peak_bytes(self) -> int:
        """The peak of resident memory so far."""
        assert self._process is not None, "use ServerProcess in a with block"
        return peak_bytes(str(self._process.pid))

    def __enter__(self) -> Self:
        started = time.monotonic()
        try:
            self._port = _free_port()
            command = self._command()
            self._spawn(ending_with_us(command), self._environment(), subprocess.DEVNULL)
            self._wait(started + self.timeout_s)
        except BaseException:
            self.close()
            raise
        self.loaded = {
            "seconds": time.monotonic() - started,
            "version": installed_version(self.engine.name),
            "runtime": Path(command[0]).name,
            "isa": "",
            "threads": self.threads,
            "through": f"its server, {self.rows} requests at once",
        }
        return self

    def check_alive(self) -> None:
        """Raise `EngineFailed`, with its last words, where the server has ended."""
        assert self._process is not None, "use ServerProcess in a with block"
        if self._process.poll() is not None:
            raise self._death("serve")

    def _command(self) -> list[str]:
        program, server = server_of(self.engine.name), served_by(self.engine.name)
        values = {
            "deployment": self.deployment.resolve(),
            "port": self._port,
            "threads": self.threads,
            "rows": self.rows,
            "batch": min(self.rows, MOST_ROWS),
            "context": self.context,
            "cache": self.rows * self.context,
        }
        trusting = server.trusting if self.trust_library else ()
        return program + [option.format_map(values) for option in (*server.options, *trusting)]

    def _environment(self) -> dict[str, str]:
        assert self.engine.server is not None
        unset = self.engine.server.unset
        return {name: value for name, value in os.environ.items() if not name.startswith(unset)}

    def _wait(self, deadline: float) -> None:
        """Wait until it is ready."""
        assert self._process is not None
        while not _is_ready(self._port):
            self.check_alive()
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"{self._who()} was not ready to serve within {self.timeout_s:g} s.",
                    "Give it more time, or a smaller model or context.",
                )
            time.sleep(_LOOK_S)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
