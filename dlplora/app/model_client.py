"""A client of the model's server: what it serves, answers, routes and scores of options."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from dlplora.errors import DlpLoraError
from dlplora.params.project import REFERENCE

_SECONDS = 600.0  # of the longest answer
_LOOK_SECONDS = 5.0


class ServerError(DlpLoraError):
    """The server does not answer, or refuses what it was asked; the message is its own."""


@dataclass(frozen=True)
class Served:
    """What is served: the version, the systems (the default first) and the adapters."""

    version: str
    systems: tuple[str, ...]
    adapters: tuple[str, ...]

    @property
    def folder_words(self) -> list[str]:
        """The words by which a command reads the same model."""
        return [] if self.version == "data" else ["--data", ".models/current"]

    def words(self, model: str | None) -> list[str]:
        """Return the words that name a system or an adapter on the command line."""
        model = model or self.systems[0]
        system = f"{REFERENCE}:{model}" if model in self.adapters else model
        return ["--system", system, *self.folder_words]


@dataclass(frozen=True)
class Reply:
    """An answer so far; `parts` tell who wrote it once it is whole."""

    text: str
    parts: tuple[Mapping[str, Any], ...] = ()


class ModelClient:
    """A client of the server at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(base_url=url)
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_SECONDS
        )

    def close(self) -> None:
        """Give up its connections."""
        self._http.close()
        self._client.close()

    def served(self) -> Served:
        """Tell what is served."""
        try:
            names = [row["id"] for row in self._get("/v1/models")["data"]]
            adapters = tuple(row["id"] for row in self._get("/lora-adapters"))
            version = self._get("/health")["version"]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self._url} is no server of models") from error
        systems = [name for name in names if name not in {*adapters, "base"}]
        return Served(version, (*systems, "base"), adapters)

    def stream(
        self,
        model: str | None,
        messages: Sequence[Mapping[str, str]],
        *,
        mix: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> Iterator[Reply]:
        """Answer a chat piece by piece; the last reply has the parts. `mix` replaces the router.

        Whoever leaves the iterator frees the answer's place.
        """
        asked: dict[str, Any] = {"model": model or "", "messages": list(messages), **settings}
        if mix:
            asked["extra_body"] = {"lora": _lora(mix)}
        text = ""
        with (
            _one_line(),
            self._client.chat.completions.create(**asked, stream=True) as chunks,
        ):
            for chunk in chunks:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                yield Reply(text, tuple((chunk.model_extra or {}).get("route") or ()))

    def answer(self, model: str | None, question: str, **settings: Any) -> Reply:
        """Return the whole answer to one question."""
        reply = Reply("")
        asked = [{"role": "user", "content": question}]
        for reply in self.stream(model, asked, **settings):  # noqa: B007 – the last one counts
            pass
        return reply

    def typed(
        self,
        model: str | None,
        messages: Sequence[Mapping[str, str]],
        *,
        mix: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> str:
        """Write the request for an answer as a curl command, optionally with a mix."""
        body: dict[str, Any] = {"model": model or "", "messages": list(messages), **settings}
        if mix:
            body["lora"] = _lora(mix)
        told = json.dumps(body, ensure_ascii=False)
        kind = "Content-Type: application/json"
        return shlex.join(["curl", f"{self._url}/v1/chat/completions", "-H", kind, "-d", told])

    def route(self, model: str | None, text: str) -> dict[str, Any]:
        """Return which adapters a system chooses for a text, and the probabilities of tasks."""
        told = self._post("/v1/route", {"model": model or "", "texts": [text]})
        return {"fallback_below": told["fallback_below"], **told["data"][0]}

    def score(self, model: str | None, prompt: str, options: Sequence[str]) -> dict[str, Any]:
        """Weigh the options of a question."""
        body = {"model": model or "", "prompt": prompt, "options": list(options)}
        return self._post("/v1/score", body)

    def _get(self, path: str) -> Any:
        with _one_line():
            return _told(self._http.get(path, timeout=_LOOK_SECONDS))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with _one_line():
            told: dict[str, Any] = _told(self._http.post(path, json=body, timeout=_SECONDS))
            return told


def _lora(mix: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"id": name, "scale": weight} for name, weight in mix.items()]


def _told(reply: httpx.Response) -> Any:
    told = reply.json()
    if reply.is_error:
        error = told.get("error") if isinstance(told, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        raise ServerError(str(message or f"{reply.url} answers {reply.status_code}"))
    return told


@contextmanager
def _one_line() -> Iterator[None]:
    """Tell what a client or the server raises in one line."""
    try:
        yield
    except (httpx.TransportError, openai.APIConnectionError, ValueError) as error:
        raise ServerError("the model's server does not answer") from error
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise ServerError(str(body.get("message", error.message))) from error
    except openai.APIError as error:  # in the middle of a stream
        raise ServerError(error.message) from error
