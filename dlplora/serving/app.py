"""The paths of the server: OpenAI's API over the engine, and what keeps a server going."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from openai.types import Model
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dlplora.engine.answers import Piece
from dlplora.errors import DlpLoraError, RouterError, choices
from dlplora.serving import replies
from dlplora.serving.bodies import (
    Asked,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
)
from dlplora.serving.errors import (
    ApiError,
    ErrorReply,
    api_error,
    on_api_error,
    on_http_error,
    on_invalid_body,
)
from dlplora.serving.exchange import Exchange
from dlplora.serving.keys import Keys
from dlplora.serving.limits import Limits
from dlplora.serving.metrics import Metrics
from dlplora.serving.models import BASE, Models, Served
from dlplora.serving.shapes import ChatShape, CompletionShape, Shape

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": "An error, in one line"}
    for status in ("4XX", "5XX")
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or a stream of it"}
}


class ModelRow(Model):
    """One name that requests may give as their model."""

    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[ModelRow]


class Tokens(BaseModel):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class Text(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerTold(BaseModel):
    """What a client needs to render prompts by itself."""

    tokenizer_class: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


class AdapterRow(BaseModel):
    """An adapter that a mix may name."""

    id: str


class Done(BaseModel):
    """What was done."""

    message: str


class Health(BaseModel):
    """Whether the server lives, which version serves, and which could not be loaded."""

    status: str
    version: str
    refused: str | None


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for, and how long it may take."""

    max_body_bytes: int
    max_n: int
    max_prompts: int
    seconds: float


class Api:
    """The server's paths.

    Args:
        models: What answers.
        keys: Who may ask.
        bounds: What one request may ask for.
        adapter_folders: Where adapters may be loaded from at run time.
    """

    def __init__(
        self, models: Models, *, keys: Keys, bounds: Bounds, adapter_folders: Sequence[Path]
    ) -> None:
        self.models = models
        self.is_draining = False
        self._keys = keys
        self._bounds = bounds
        self._folders = [folder.resolve() for folder in adapter_folders]
        self._metrics = Metrics(
            running=lambda: models.current.thread.num_open,
            waiting=lambda: models.current.thread.num_waiting,
        )

    def app(self) -> FastAPI:
        """Return the application; the model is loaded by whoever runs it."""
        app = FastAPI(
            title="dlplora",
            description="An OpenAI-compatible server that chooses the adapters itself.",
            docs_url=None,
            redoc_url=None,
        )
        app.add_middleware(Limits, max_bytes=self._bounds.max_body_bytes)
        app.add_exception_handler(ApiError, on_api_error)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_body)
        app.add_exception_handler(Exception, on_api_error)
        for path, method, endpoint, model in (
            ("/v1/models", "GET", self.list_models, ModelList),
            ("/v1/models/{name}", "GET", self.show_model, ModelRow),
            ("/v1/chat/completions", "POST", self.chat, replies.RoutedChat),
            ("/v1/completions", "POST", self.complete, replies.RoutedCompletion),
            ("/tokenize", "POST", self.tokenize, Tokens),
            ("/detokenize", "POST", self.detokenize, Text),
            ("/tokenizer_info", "GET", self.tokenizer, TokenizerTold),
            ("/lora-adapters", "GET", self.list_adapters, list[AdapterRow]),
            ("/v1/load_lora_adapter", "POST", self.load_adapter, Done),
            ("/v1/unload_lora_adapter", "POST", self.unload_adapter, Done),
            ("/health", "GET", self.health, Health),
            ("/ready", "GET", self.ready, Health),
        ):
            streams = _STREAM if path.endswith("/completions") else {}
            app.add_api_route(
                path, endpoint, methods=[method], response_model=model, responses=_ERRORS | streams
            )
        app.add_api_route(
            "/metrics", self.metrics, response_class=PlainTextResponse, responses=_ERRORS
        )
        return app

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """Answer a chat, by the adapters that the model's router chooses."""
        shape = ChatShape(has_logprobs=body.logprobs)
        return await self._answer(body, http, shape)

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Continue one prompt or several, without a chat template."""
        self._check(http)
        chat = self.models.current.engine.base.chat
        texts = [one if isinstance(one, str) else chat.decode(one) for one in body.prompts()]
        echoed = [text for text in texts for _ in range(body.n)] if body.echo else []
        shape = CompletionShape(has_logprobs=body.logprobs is not None, echoed=echoed)
        return await self._answer(body, http, shape)

    async def _answer(
        self, body: ChatBody | CompletionBody, http: HttpRequest, shape: Shape
    ) -> Response:
        self._check(http)
        served = self._serving()
        exchange = Exchange(
            served,
            self._requests(body, served),
            http,
            self._metrics,
            seconds=self._bounds.seconds,
        )
        head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or served.default,
            "system_fingerprint": served.fingerprint,
        }
        if body.stream:
            return await _stream(exchange, shape, head, body)
        answers = await exchange.finish()
        told = {
            **head,
            "object": shape.whole_object,
            "choices": [shape.whole(index, answer) for index, answer in enumerate(answers)],
            "usage": replies.usage(exchange.prompts, answers),
            "route": [replies.route_of(answer) for answer in answers],
        }
        # A score that is not finite is null: JSON has no word for it.
        return Response(
            orjson.dumps(told),
            media_type="application/json",
            headers=replies.route_headers(exchange.routes),
        )

    def _requests(self, body: ChatBody | CompletionBody, served: Served) -> list[Any]:
        """Return what the engine is asked; `ApiError` on what it cannot be."""
        if body.n > self._bounds.max_n:
            raise ApiError(400, f"n is {body.n}, expected at most {self._bounds.max_n}", param="n")
        if isinstance(body, CompletionBody) and len(body.prompts()) > self._bounds.max_prompts:
            raise ApiError(
                400,
                f"{len(body.prompts())} prompts, expected at most {self._bounds.max_prompts}",
                param="prompt",
            )
        told = served.told(body.model) | _told(body, served)
        try:
            if body.max_new_tokens is not None:
                return body.requests(body.max_new_tokens, **told)
            requests = body.requests(served.max_new_tokens, **told)
            room = served.room(requests[0])
            return requests if room is None else body.requests(room, **told)
        except DlpLoraError as error:
            raise api_error(error) from error

    async def list_models(self, http: HttpRequest) -> ModelList:
        """List the base model, the adapters and the systems."""
        self._check(http)
        served = self.models.current
        return ModelList(data=[_row(name, kind, served) for name, kind in served.names.items()])

    async def show_model(self, name: str, http: HttpRequest) -> ModelRow:
        """Show one of them."""
        self._check(http)
        served = self.models.current
        served.told(name)
        return _row(name, served.names[name], served)

    async def tokenize(self, body: TokenizeBody, http: HttpRequest) -> Tokens:
        """Turn a text into tokens; control tokens are read as the tokenizer reads them."""
        self._check(http)
        base = self.models.current.engine.base
        special = body.add_special_tokens
        ids = base.chat.tokenizer.encode(body.prompt, add_special_tokens=special).ids
        return Tokens(tokens=ids, count=len(ids), max_model_len=base.context)

    async def detokenize(self, body: DetokenizeBody, http: HttpRequest) -> Text:
        """Turn tokens into a text."""
        self._check(http)
        base = self.models.current.engine.base
        if wrong := [token for token in body.tokens if token >= base.num_tokens]:
            raise ApiError(
                400, f"found the token {wrong[0]}, of {base.num_tokens:,}", param="tokens"
            )
        return Text(prompt=base.chat.tokenizer.decode(body.tokens, skip_special_tokens=False))

    async def tokenizer(self, http: HttpRequest) -> TokenizerTold:
        """Tell the chat template and the special tokens."""
        self._check(http)
        base = self.models.current.engine.base
        return TokenizerTold(**base.template.told(before=base.chat.frame.before))

    async def list_adapters(self, http: HttpRequest) -> list[AdapterRow]:
        """List the adapters that a mix may name."""
        self._check(http)
        return [AdapterRow(id=name) for name in self.models.current.engine.pool.names]

    async def load_adapter(self, body: LoadBody, http: HttpRequest) -> Done:
        """Load a PEFT folder as an adapter; for administrators."""
        self._check(http, for_admin=True)
        path = self._allowed(body.lora_path)
        try:
            await self.models.add_adapter(body.lora_name, path, replaces=body.load_inplace)
        except DlpLoraError as error:
            told = str(error).replace(str(path), body.lora_path)
            raise ApiError(400, told, param="lora_path", code="adapter_unusable") from error
        return Done(message=f"the adapter {body.lora_name} is there")

    async def unload_adapter(self, body: UnloadBody, http: HttpRequest) -> Done:
        """Let go of an adapter; for administrators."""
        self._check(http, for_admin=True)
        await self.models.remove_adapter(body.lora_name)
        return Done(message=f"the adapter {body.lora_name} is gone")

    async def health(self) -> Response:
        """Tell whether the engine lives."""
        return self._health(200 if self.models.is_alive else 503)

    async def ready(self) -> Response:
        """Tell whether new requests are answered."""
        return self._health(200 if self.models.is_alive and not self.is_draining else 503)

    async def metrics(self, http: HttpRequest) -> Response:
        """Return all figures as Prometheus reads them."""
        self._check(http)
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _health(self, status: int) -> Response:
        if status != 200:
            return ApiError(status, "the server answers no new requests").response()
        health = Health(
            status="ok", version=self.models.current.version, refused=self.models.refused
        )
        return JSONResponse(health.model_dump())

    def _check(self, http: HttpRequest, *, for_admin: bool = False) -> None:
        self._keys.check_host(http.headers.get("host", ""))
        self._keys.check(http.headers.get("authorization"), for_admin=for_admin)

    def _serving(self) -> Served:
        if self.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="unavailable", headers={"Retry-After": "5"}
            )
        return self.models.current

    def _allowed(self, told: str) -> Path:
        """Return the folder of an adapter; `ApiError` unless it stands in an allowed one."""
        for folder in self._folders:
            path = (folder / told).resolve()
            if path.is_relative_to(folder) and path != folder and path.is_dir():
                return path
        raise ApiError(
            400,
            f"lora_path is {told!r}, expected a folder within those that adapters may come from",
            param="lora_path",
            code="path_not_allowed",
        )


def _told(body: Asked, served: Served) -> dict[str, Any]:
    """Return the fields of a request that its body decides, besides what its model does."""
    told: dict[str, Any] = {"visible": body.visible, "fallback_below": body.fallback_below}
    if body.route_policy is not None:
        told["policy"] = body.route_policy
    try:
        route = body.route
    except RouterError as error:
        raise ApiError(400, str(error), param="lora") from error
    if route is not None:
        names = served.engine.pool.names
        if unknown := [name for name in route.adapters if name not in names]:
            raise ApiError(
                404,
                f"no adapter {unknown[0]!r}; there are: {choices(names)}",
                param="lora",
                code="model_not_found",
            )
        told |= {"routes": (route,), "policy": "route_once"}
    return told


def _row(name: str, kind: str, served: Served) -> ModelRow:
    return ModelRow(
        id=name,
        object="model",
        created=served.created,
        owned_by="dlplora",
        root=name,
        parent=None if kind == "base" else BASE,
        max_model_len=served.engine.base.context,
    )


async def _stream(
    exchange: Exchange, shape: Shape, head: dict[str, Any], body: Asked
) -> StreamingResponse:
    """Return a stream; it begins with the first text, so that what fails before has its status."""
    pieces = exchange.pieces()
    first = await anext(pieces)
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"object": shape.chunk_object} | ({"usage": None} if has_usage else {})

    async def events() -> AsyncIterator[bytes]:
        opened: set[int] = set()
        async with aclosing(pieces):
            try:
                async for index, piece in _chained(first, pieces):
                    if index not in opened:
                        opened.add(index)
                        if (opening := shape.opening(index)) is not None:
                            yield _event({**head, "choices": [opening]})
                    if piece.text or piece.tokens:
                        yield _event({**head, "choices": [shape.piece(index, piece)]})
                    if piece.answer is not None:
                        closing = shape.closing(index, piece.answer)
                        route = replies.route_of(piece.answer)
                        yield _event({**head, "choices": [closing], "route": route})
            except ApiError as error:
                yield _event(error.told())
                return
        if has_usage:
            answers = [answer for _, answer in sorted(exchange.answers.items())]
            told = replies.usage(exchange.prompts, answers)
            yield _event({**head, "choices": [], "usage": told})
        yield b"data: [DONE]\n\n"

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", **replies.route_headers([first[1].route])},
    )


async def _chained(
    first: tuple[int, Piece], others: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for one in others:
        yield one


def _event(told: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(told) + b"\n\n"
