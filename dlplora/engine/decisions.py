"""Every decision of a router, written down as JSON Lines."""

import hashlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from dlplora.errors import GenerationError
from dlplora.records.routes import Route


class DecisionLog:
    """Append one line a decision to a file: time, prompt, route and confidence.

    Of the prompt its SHA-256 is written, or with `with_text` the text itself. Raises
    `GenerationError` if the file cannot be written.
    """

    def __init__(self, path: str | Path, *, with_text: bool = False) -> None:
        self._path = Path(path)
        folder = self._path.parent
        if not folder.is_dir():
            raise GenerationError(f"{path}: no folder {folder} to log decisions in")
        self._with_text = with_text
        self._writing = threading.Lock()
        self._append("")  # refused now, not at the first decision

    def write(self, text: str, route: Route) -> None:
        """Write down the route that a text got."""
        prompt = (
            {"text": text}
            if self._with_text
            else {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        )
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **prompt,
            "adapters": list(route.adapters),
            "weights": list(route.weights),
            "confidence": route.confidence,
        }
        self._append(json.dumps(line, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self._writing, self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise GenerationError(f"{self._path}: cannot be written: {error.strerror}") from error
