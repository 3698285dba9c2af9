"""A server over a tiny model, in a thread of the tests, and clients of it."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from dlplora.params.project import Served
from dlplora.serving.app import Bounds
from dlplora.serving.keys import Keys
from dlplora.serving.server import Server, Settings, listen, run
from tests.device import float32_place
from tests.peft_adapters import peft_model, save_peft
from tests.tiny import TARGETS, tiny_model

PLACE = float32_place()
SETTINGS = Settings(
    systems=["dlp_mlp", "single:opposites", "logo"],
    keys=Keys(),
    adapter_folders=[],
    bounds=Bounds(max_body_bytes=100_000, max_n=4, max_prompts=8, seconds=60.0),
    max_batch_size=4,
    max_queue=32,
    max_new_tokens=12,
    drain_seconds=20.0,
    log=None,
    max_log_mib=1.0,
    adapter_mib=None,
    place=PLACE,
)


class Running:
    """A server that runs; `url` is where."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        """Return OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """Send a body."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        """Ask for what stands at a path."""
        return httpx.get(f"{self.url}{path}", timeout=60, **more)


@contextmanager
def running(folder: Path, **changes: Any) -> Iterator[Running]:
    """Serve a folder for the time of a `with` block."""
    server = Server(folder, replace(SETTINGS, **changes))
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            asyncio.run(run(server, listening))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.02)
        if failed:
            raise failed[0]
        yield Running(server, port)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def write_version(data: Path, folder: Path, seed: int) -> None:
    """Write a model's folder as a registered version, with adapters of its own."""
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "adapters")
    for place, name in enumerate(("colours", "opposites")):
        config = {"r": 2, "target_modules": TARGETS["llama"]}
        adapter = peft_model(tiny_model(), seed=2 * seed + place, **config)
        save_peft(adapter, folder / "adapters" / name)
    params = yaml.safe_load((data.parent / "params.yaml").read_text())
    served = {key: params[key] for key in Served.model_fields}
    del served["runtime"]["kernels"]
    (folder / "params.yaml").write_text(yaml.safe_dump(served))
    (folder / "model.json").write_text(json.dumps({"version": folder.name}))
