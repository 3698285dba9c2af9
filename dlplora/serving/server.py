"""A server from its first request to its last: loaded, answering, draining, ended."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import uvicorn

from dlplora.errors import DlpLoraError
from dlplora.runtime import Place, keep_freed_memory
from dlplora.serving.app import Api, Bounds
from dlplora.serving.keys import Keys, check_listening
from dlplora.serving.models import Models

logger = logging.getLogger(__name__)
_DEAD_SECONDS = 10.0  # in which whoever watches can read that the engine has failed


class ServerError(DlpLoraError):
    """The server cannot be started."""


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Args:
        systems: What requests may name as their model, the default first; none is the model's own,
            "all" are those that need no task and can be built.
        keys: Who may ask.
        adapter_folders: Where adapters may be loaded from at run time.
        bounds: What one request may ask for.
        max_batch_size: How many answers are written at once.
        max_queue: How many more may wait.
        max_new_tokens: How long answers may be where a request sets no limit.
        drain_seconds: How long answers may run on when the server ends or the model is replaced.
        log: The file that decisions are appended to, if any.
        max_log_mib: How large it may grow before another one is begun.
        adapter_mib: How much memory a pool of adapters takes; None keeps all of them in memory.
        place: Device and dtype; None takes the best that this machine has.
    """

    systems: Sequence[str] | Literal["all"]
    keys: Keys
    adapter_folders: Sequence[Path]
    bounds: Bounds
    max_batch_size: int
    max_queue: int
    max_new_tokens: int
    drain_seconds: float
    log: Path | None
    max_log_mib: float
    adapter_mib: float | None
    place: Place | None


class Server(uvicorn.Server):
    """uvicorn's server, which lets answers end before it does.

    The first signal lets no new requests in, and ends when the running ones have, at most after
    `drain_seconds`; a second one ends at once.
    """

    has_failed = False

    def __init__(self, folder: Path, settings: Settings, models: Models | None = None) -> None:
        if settings.log is not None:
            settings.log.parent.mkdir(parents=True, exist_ok=True)
        models = models or Models(
            folder,
            systems=settings.systems,
            max_open=settings.max_batch_size + settings.max_queue,
            max_new_tokens=settings.max_new_tokens,
            drain_seconds=settings.drain_seconds,
            max_batch_size=settings.max_batch_size,
            log=settings.log,
            max_log_mib=settings.max_log_mib,
            adapter_mib=settings.adapter_mib,
            place=settings.place,
        )
        self.api = Api(
            models,
            keys=settings.keys,
            bounds=settings.bounds,
            adapter_folders=settings.adapter_folders,
        )
        super().__init__(
            uvicorn.Config(
                self.api.app(),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in this block; none is raised again behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or end at once."""
        if self.api.is_draining:
            os._exit(1)
        self.api.is_draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what runs, then close."""
        self.api.is_draining = True
        await self.api.models.drain()
        await self.api.models.close()
        await super().shutdown(sockets)


def serve(folder: Path, settings: Settings, *, host: str, port: int) -> None:
    """Serve a model until a signal ends it.

    Raises a `DlpLoraError` if the host may not be used, the port is taken, or the model cannot be
    loaded.
    """
    check_listening(host, settings.keys)
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):  # while the model is loaded
        signal.signal(number, lambda *_: os._exit(0))
    with closing(listen(host, port)) as listening:
        asyncio.run(run(Server(folder, settings), listening))


async def run(server: Server, listening: socket.socket) -> None:
    """Load the model and answer on a socket until the server is told to end."""
    models = server.api.models
    await models.start()
    following = asyncio.create_task(_follow(server))
    host, port = listening.getsockname()[:2]
    logger.info(
        "%s answers at http://%s:%d/v1 by %s",
        models.current.version,
        f"[{host}]" if ":" in host else host,
        port,
        models.current.default,
    )
    try:
        await server.serve([listening])
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await models.close()
    if server.has_failed:
        raise ServerError("the engine has failed; what it told stands above")


async def _follow(server: Server) -> None:
    """Follow the model in production; end the server some time after its engine has failed."""
    await server.api.models.follow()
    if server.api.is_draining:
        return
    server.has_failed = True
    await asyncio.sleep(_DEAD_SECONDS)
    server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; `ServerError` if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ServerError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}; another server may "
            f"be there: choose a --port"
        ) from error
