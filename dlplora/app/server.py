"""The app as a web server: on loopback or with a password, with a limit for uploads."""

import asyncio
import hmac
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dlplora.app.commands import Commands
from dlplora.app.context import Context
from dlplora.app.model_client import ModelClient
from dlplora.app.runs import Runs
from dlplora.errors import DlpLoraError
from dlplora.project.files import Project
from dlplora.scratch import SCRATCH

_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_USER = "dlplora"
_AT_ONCE = 32
_WRONG_SECONDS = 1.0
_STOP_SECONDS = 2  # for what open pages still ask
_KEPT_SECONDS = 24 * 3600  # of uploads and tables to download


class AppError(DlpLoraError):
    """The pages cannot be served."""


def serve(
    *,
    root: Path,
    runs: Runs,
    model_url: str,
    model_trouble: Callable[[], str | None],
    host: str,
    port: int,
    password: str | None,
    tell: Callable[[str], None],
    max_file_mib: int,
) -> None:
    """Serve the pages until a signal ends it.

    Args:
        root: The folder of the project.
        runs: Who starts, watches and ends runs.
        model_url: Where the model's server is.
        model_trouble: Why it does not answer, if that is known.
        host: Where to listen; the caller sees to it that other machines need a password.
        port: Where to listen.
        password: What the user `dlplora` has to give; None on this machine alone.
        tell: Gets the address once the pages are there.
        max_file_mib: How large an upload may be.

    Raises `AppError` if the address cannot be used.
    """
    files = (root / SCRATCH / "app").resolve()
    shutil.rmtree(files, ignore_errors=True)  # uploads of an earlier time
    files.mkdir(parents=True)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(files))
    client = ModelClient(model_url)
    context = Context(Project(root), runs, Commands(root), client, model_trouble, files)
    app = web_app(context, host=host, password=password, max_file_mib=max_file_mib)
    config = uvicorn.Config(
        app,
        log_level="critical",  # streams that end with the server are no errors
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    with _listening(host, port) as listening, closing(client):
        tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; `AppError` if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise AppError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}; choose a --port"
        ) from error


class SameOrigin:
    """Refuse what pages of other sites ask a browser to send here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that comes from here, or from no page."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await PlainTextResponse("a request of another site is refused", status_code=403)(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)


def web_app(context: Context, *, host: str, password: str | None, max_file_mib: int) -> FastAPI:
    """Return the web application of all pages."""
    import gradio as gr

    from dlplora.app.pages import all_pages
    from dlplora.app.theme import STYLE, theme

    pages = all_pages(context)
    pages.queue(default_concurrency_limit=_AT_ONCE, api_open=False)
    pages.delete_cache = (_KEPT_SECONDS, _KEPT_SECONDS)
    app = FastAPI(openapi_url=None)
    app.add_middleware(SameOrigin)
    if password is None:  # a page of another site may lead a browser here by a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOCAL, host])

    async def is_user(user: str, given: str) -> bool:
        is_right = hmac.compare_digest(f"{user}:{given}".encode(), f"{_USER}:{password}".encode())
        if not is_right:
            await asyncio.sleep(_WRONG_SECONDS)  # so that nobody tries many
        return is_right

    # Gradio warns although SSR is off.
    warnings.filterwarnings("ignore", message="SSR mode is not supported")
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        pages,
        path="/",
        auth=None if password is None else is_user,
        auth_message=f"The user is {_USER}.",
        max_file_size=max_file_mib * 2**20,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css_paths=STYLE,
    )
    return mounted
