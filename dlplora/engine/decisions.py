"""Every decision of a router, written down as JSON Lines."""

import hashlib
import json
import threading
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlplora.errors import GenerationError, RequestFailedError
from dlplora.records.routes import Route

_WRITING = threading.Lock()  # several logs may write to one file


class DecisionLog:
    """Append one line a decision to a file; `RequestFailedError` if it cannot be written.

    A file that has grown beyond `max_mib` is renamed, `decisions.jsonl` to `decisions.1.jsonl` and
    so on, the newest being 1; `keep` of them are kept.

    A line holds time, version and system; the SHA-256 of the text that was routed and how many
    tokens it has as a prompt; the route in force with its confidence, and whether it is the
    fallback to the base model; and the milliseconds that the decision took, a probe's reading
    included. Adapters and weights are null where the model weighs adapters for each token.

    Args:
        path: The file.
        system: The name of the system that answers.
        version: The registered model that it belongs to, if it is one.
        with_text: Write the texts themselves, too.
        embed: Maps texts to the router's vectors (B, D), which are written in float16 as base64.
        max_mib: How large the file may grow; None sets no limit.
        keep: How many older files are kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        system: str,
        version: str | None = None,
        with_text: bool = False,
        embed: Callable[[Sequence[str]], NDArray[Any]] | None = None,
        max_mib: float | None = None,
        keep: int = 9,
    ) -> None:
        self._path = Path(path)
        folder = self._path.parent
        if not folder.is_dir():
            raise GenerationError(f"{path}: no folder {folder} to log decisions in")
        self._system = system
        self._version = version
        self._with_text = with_text
        self._embed = embed
        self._max_bytes = None if max_mib is None else max_mib * 2**20
        self._keep = keep
        self._append("")  # refused now, not at the first decision

    def write(
        self, text: str, route: Route, *, fallback: bool, num_tokens: int, milliseconds: float
    ) -> None:
        """Write down the route that a text got."""
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": self._version,
            "system": self._system,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "adapters": None if route.per_token else list(route.adapters),
            "weights": None if route.per_token else list(route.weights),
            "confidence": route.confidence,
            "fallback": fallback,
            "tokens": num_tokens,
            "milliseconds": round(milliseconds, 3),
        }
        if self._with_text:
            line["text"] = text
        if self._embed is not None:
            line["embedding"] = b64encode(self._embed([text])[0].astype(np.float16)).decode()
        self._append(json.dumps(line, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        try:
            with _WRITING:
                self._rotate()
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text)
        except OSError as error:
            raise RequestFailedError(
                f"{self._path}: cannot be written: {error.strerror}"
            ) from error

    def _rotate(self) -> None:
        if self._max_bytes is None or not self._path.is_file():
            return
        if self._path.stat().st_size < self._max_bytes:
            return
        for number in range(self._keep - 1, 0, -1):
            if (older := self._numbered(number)).is_file():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_suffix(f".{number}{self._path.suffix}")
