"""The app in the browser with all that it needs, until Ctrl-C.

    python -m flows.app [--port 7860] [--host 127.0.0.1] [--ui-port 4200] [--server-port 8000]

Prefect's pages (`flows.ui`), unless they are open, a server of the newest model, unless one answers
there, and the app itself. What is started here ends with it, and nothing else.
"""

import os
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import typer

from dlplora.app.commands import PASSWORD
from dlplora.edge import one_line_errors
from dlplora.errors import DlpLoraError
from dlplora.scratch import alone, is_held
from dlplora.serving.keys import ADMIN_KEYS, USER_KEYS, Keys, KeysError, check_listening
from flows.model_server import ModelServer
from flows.parts import HOST, Parts, answers, end_on_signals, log_file, refuse_taken
from flows.runs import PrefectRuns
from flows.settings import ROOT, SCRATCH, UI_LOCK, own_api

_LOCK = "app"
_LEAST = 8  # characters
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0  # in which Prefect's pages end all of their own, and answers run on


def run(options: Namespace, *, tell: Callable[[str], None]) -> None:
    """Start what is not there yet and serve the app until a signal ends it."""
    if find_spec("gradio") is None:
        raise DlpLoraError("the app needs gradio: pip install 'dlplora[app]'")
    from dlplora.app.server import serve  # takes seconds

    password = read_password(options.password_file)
    check_host(options.host, password)
    if is_held(_LOCK, scratch=SCRATCH):
        raise DlpLoraError("the app of this project is open already; close it first")
    refuse_taken(options.port, "--port")
    parts = Parts("DLPLORA_APP", {PASSWORD: "", USER_KEYS: "", ADMIN_KEYS: ""})
    model = ModelServer(parts, root=ROOT, port=options.server_port)
    with (
        alone(_LOCK, scratch=SCRATCH),
        parts.ending(first=lambda pid: pid in parts.pids(), within=_STOP_SECONDS),
        model.kept_up(),
    ):
        tell("starting what the app needs, about half a minute; Ctrl-C ends it all")
        serve(
            root=ROOT,
            runs=PrefectRuns(_open_pages(parts, options.ui_port)),
            model_url=model.url,
            model_trouble=lambda: model.trouble,
            host=options.host,
            port=options.port,
            password=password,
            tell=tell,
            max_file_mib=options.max_file_mib,
        )


def _open_pages(parts: Parts, port: int) -> str:
    """Return the API's address of Prefect's pages, which are opened unless they are open."""
    while is_held(UI_LOCK, scratch=SCRATCH):
        if (api := own_api()) and answers(f"{api}/health"):
            return api
        time.sleep(_POLL_SECONDS)  # they open or close
    for number in (port, port + 1):
        refuse_taken(number, "--ui-port")
    address = f"http://{HOST}:{port}"
    parts.start("ui", ["-m", "flows.ui", "--port", str(port)])
    parts.wait("ui", lambda: address in log_file("ui").read_text(encoding="utf-8"))
    return f"{address}/api"


def read_password(file: Path | None) -> str | None:
    """Read the password from a file, or else from the environment; None if there is none.

    Raises a `DlpLoraError` if it cannot be read or is short.
    """
    where = PASSWORD if file is None else str(file)
    try:
        text = file.read_text(encoding="utf-8").strip() if file else os.environ.get(PASSWORD, "")
    except (OSError, UnicodeDecodeError) as error:
        raise DlpLoraError(f"{where}: the password cannot be read: {error}") from error
    if not text and file is None:
        return None
    if len(text) < _LEAST:
        raise DlpLoraError(
            f"{where}: the password has {len(text)} characters, expected at least {_LEAST}"
        )
    return text


def check_host(host: str, password: str | None) -> None:
    """Raise a `DlpLoraError` if other machines could open the app without a password."""
    try:
        check_listening(host, Keys())
    except KeysError as error:
        if password is None:
            raise DlpLoraError(
                f"--host {host} can be reached from other machines; set a password "
                f"(--password-file FILE or {PASSWORD}), or stay on {HOST}"
            ) from error


def read_options(words: list[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="python -m flows.app", description="The app in the browser.")
    parser.add_argument("--port", type=port_number, default=7860, help="of the app")
    parser.add_argument("--host", default=HOST, help="of the app; others need a password")
    parser.add_argument("--ui-port", type=port_number, default=4200, help="of Prefect's pages")
    parser.add_argument(
        "--server-port", type=port_number, default=8000, help="of the model's server"
    )
    parser.add_argument("--max-file-mib", type=int, default=256, help="how large uploads may be")
    parser.add_argument("--password-file", type=Path, help=f"or ${PASSWORD}")
    return parser.parse_args(words)


def port_number(word: str) -> int:
    """Read the number of a port."""
    if not (word.isdecimal() and 1 <= int(word) <= 65535):
        raise ArgumentTypeError(f"{word!r} is no port, expected 1 to 65535")
    return int(word)


def main() -> None:
    """Run until Ctrl-C, SIGTERM or SIGHUP."""
    options = read_options()
    end_on_signals()
    with one_line_errors(), suppress(KeyboardInterrupt):
        run(options, tell=typer.echo)


if __name__ == "__main__":
    main()
