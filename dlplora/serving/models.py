"""What is served: one loaded model, replaced by the next version while answers run."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dlplora.adapters import LoraAdapter, lora_pairs
from dlplora.engine.prompts import prompt_tokens
from dlplora.engine.requests import Request
from dlplora.errors import DlpLoraError, PromptTooLongError, one_line
from dlplora.imports import import_adapter
from dlplora.records.base_card import read_base_card
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.serving.calls import Calls
from dlplora.serving.engine_thread import EngineThread
from dlplora.serving.errors import ApiError, unknown
from dlplora.serving.systems import servable_systems
from dlplora.systems.engine import Engine

logger = logging.getLogger(__name__)
BASE = "base"
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 30.0  # of a version that cannot be loaded


@dataclass
class ServedModel:
    """One loaded model, the thread that answers by it, and what it is asked besides."""

    folder: Path
    engine: Engine
    thread: EngineThread
    calls: Calls
    fingerprint: str
    tokenizer: dict[str, Any]  # what a client needs to render prompts
    max_new_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def version(self) -> str:
        """The registered version, or the folder's name."""
        return self.engine.version or self.folder.name

    @property
    def default(self) -> str:
        """The system that answers where none is named."""
        return next(iter(self.engine.systems))

    @property
    def names(self) -> dict[str, str]:
        """What requests may name as their model, each with what it is."""
        adapters = dict.fromkeys(self.engine.pool.names, "adapter")
        return adapters | {BASE: "base"} | dict.fromkeys(self.engine.systems, "system")

    def kind_of(self, model: str) -> str:
        """Return what a model is: base, adapter or system; `ApiError` on an unknown one."""
        names = self.names
        if model not in names:
            raise unknown("model", model, names, param="model")
        return names[model]

    def told(self, model: str, *, splits: bool) -> dict[str, Any]:
        """Return the fields of a request that its model decides; `ApiError` on an unknown one.

        With `splits` a system that routes once answers several questions one by one.
        """
        name = model or self.default
        if (route := self.route_of(name)) is not None:
            return {"routes": (route,), "policy": "route_once"}
        is_split = splits and self.engine.systems[name] == "route_once"
        return {"system": name, "policy": "split" if is_split else None}

    def route_of(self, model: str) -> Route | None:
        """Return the route of the base model or an adapter; None of a system, which chooses."""
        kind = self.kind_of(model)
        if kind == "system":
            return None
        return BASE_ROUTE if kind == "base" else Route((model,), (1.0,))

    def room(self, request: Request) -> int | None:
        """Return how long the answer to a prompt may be if it is less than the request allows."""
        try:
            prompt_tokens(self.engine.base, request)
        except PromptTooLongError as error:
            room = error.limit - error.num_tokens
            return room if room > 0 else None
        return None


class Models:
    """The model in use; `.models/current` is followed, where that is what is served.

    Args:
        folder: The model's folder, or a link to it that may move.
        systems: The systems to serve, the default first; none is the model's default alone, "all"
            are those of each version that need no task and can be built.
        max_open: How many answers may wait or run, and how many calls besides.
        max_new_tokens: How long answers may be where a request sets no limit.
        drain_seconds: How long answers of an old version may run on.
        settings: Those of `Engine.load`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        systems: Sequence[str] | Literal["all"],
        max_open: int,
        max_new_tokens: int,
        drain_seconds: float,
        **settings: Any,
    ) -> None:
        self._folder = folder
        self._systems = systems
        self._max_open = max_open
        self._max_new_tokens = max_new_tokens
        self._drain_seconds = drain_seconds
        self._settings = settings
        self._served: ServedModel | None = None
        self._loaded: dict[str, Path] = {}  # adapters that were loaded while serving
        self._changing = asyncio.Lock()
        self._retiring: dict[asyncio.Task[None], ServedModel] = {}
        self.refused: str | None = None  # the version that could not be loaded

    @property
    def current(self) -> ServedModel:
        """The model that answers now."""
        assert self._served is not None
        return self._served

    @property
    def is_alive(self) -> bool:
        """Tell whether requests are answered."""
        return self._served is not None and self._served.thread.is_alive

    @property
    def num_open(self) -> int:
        """How many answers wait or run, also by versions that are replaced."""
        return sum(served.thread.num_open for served in self._all())

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a place."""
        return sum(served.thread.num_waiting for served in self._all())

    def _all(self) -> list[ServedModel]:
        return [self.current, *self._retiring.values()]

    def load(self, loop: asyncio.AbstractEventLoop) -> ServedModel:
        """Load the folder as it is now; a `DlpLoraError` if it cannot be."""
        folder = self._folder.resolve()
        systems = servable_systems(folder) if self._systems == "all" else self._systems
        first, others = next(iter(systems), None), systems[1:]
        engine = Engine.load(folder, system=first, systems=others, **self._settings)
        for name, path in self._loaded.items():
            try:
                engine.pool.add(_read(path, name, folder), replaces=True)
            except DlpLoraError as error:
                logger.warning("the adapter %s does not fit the new version: %s", name, error)
        base = read_base_card(folder / "base")
        return ServedModel(
            folder,
            engine,
            EngineThread(engine, loop, max_open=self._max_open),
            Calls(max_open=self._max_open),
            f"{engine.version or folder.name}-{base.fingerprint[:12]}",
            engine.base.template.told(before=engine.base.chat.frame.before),
            self._max_new_tokens,
        )

    async def start(self) -> None:
        """Load the model."""
        loop = asyncio.get_running_loop()
        self._served = await asyncio.to_thread(self.load, loop)

    async def follow(self) -> None:
        """Replace the model whenever the link points to another one, until the engine fails.

        One that cannot be loaded leaves the old one serving, and is tried again later.
        """
        next_try = 0.0
        while self.is_alive:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                target = self._folder.resolve()
                if target == self.current.folder:
                    self.refused = None
                elif self.refused != target.name or time.monotonic() >= next_try:
                    async with self._changing:
                        loop = asyncio.get_running_loop()
                        self._take_over(await asyncio.to_thread(self.load, loop))
            except Exception as error:
                self.refused = self._folder.resolve().name
                next_try = time.monotonic() + _RETRY_SECONDS
                logger.warning(
                    "%s cannot be loaded, %s stays: %s",
                    self.refused,
                    self.current.version,
                    error if isinstance(error, DlpLoraError) else one_line(error),
                )

    def _take_over(self, new: ServedModel) -> None:
        """Let new requests go to another model; the old one ends its answers and is let go."""
        old, self._served, self.refused = self.current, new, None
        logger.info("%s serves now instead of %s", new.version, old.version)
        retiring = asyncio.create_task(self._retire(old))
        self._retiring[retiring] = old
        retiring.add_done_callback(self._retiring.pop)

    async def drain(self) -> None:
        """Wait until all answers have ended, at most `drain_seconds`."""
        await asyncio.gather(*self._retiring, self._until_idle(self.current))

    async def close(self) -> None:
        """End all that serves."""
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if self._served is not None:
            await self._end(self._served, "the server is shutting down")

    async def _retire(self, served: ServedModel) -> None:
        try:
            await self._until_idle(served)
        finally:
            await self._end(served, "another version has taken over; ask again")

    async def _until_idle(self, served: ServedModel) -> None:
        deadline = time.monotonic() + self._drain_seconds
        while (served.thread.num_open or served.calls.num_open) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _end(self, served: ServedModel, reason: str) -> None:
        await asyncio.gather(served.thread.stop(reason), served.calls.stop(reason))
        served.engine.close()

    async def add_adapter(self, name: str, path: Path, *, replaces: bool) -> None:
        """Load an adapter from a folder; an `AdapterError` if it does not fit."""
        async with self._changing:
            served = self.current
            pool = served.engine.pool
            if name in served.names and not (replaces and name in pool.names):
                raise ApiError(
                    400, f"there is a model {name!r} already", param="lora_name", code="exists"
                )
            adapter = await asyncio.to_thread(_read, path, name, served.folder)
            await asyncio.to_thread(pool.add, adapter, replaces=replaces)
            self._loaded[name] = path

    async def remove_adapter(self, name: str) -> None:
        """Let go of an adapter; answers that run with it end with it."""
        async with self._changing:
            pool = self.current.engine.pool
            if name not in pool.names:
                raise unknown("adapter", name, pool.names, param="lora_name")
            await asyncio.to_thread(pool.remove, name)
            self._loaded.pop(name, None)


def _read(path: Path, name: str, folder: Path) -> LoraAdapter:
    """Read a PEFT folder as an adapter of a model's base."""
    whole = import_adapter(path, task=name, base=folder / "base")
    return LoraAdapter(name, lora_pairs(path, whole.config, whole.tensors))
