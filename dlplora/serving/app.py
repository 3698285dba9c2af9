"""The paths of the server: OpenAI's API over the engine, and what keeps a server going."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dlplora.engine.requests import Request
from dlplora.errors import DlpLoraError
from dlplora.serving import replies
from dlplora.serving.asking import requests_of
from dlplora.serving.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    RouteBody,
    ScoreBody,
    TokenizeBody,
    UnloadBody,
)
from dlplora.serving.decisions import route_texts, score_options
from dlplora.serving.errors import (
    ApiError,
    ErrorReply,
    on_api_error,
    on_http_error,
    on_invalid_body,
)
from dlplora.serving.exchange import Exchange
from dlplora.serving.guard import Guard
from dlplora.serving.keys import Keys
from dlplora.serving.metrics import Metrics
from dlplora.serving.models import BASE, Models, ServedModel
from dlplora.serving.schemas import (
    AdapterRow,
    Done,
    Health,
    ModelList,
    ModelRow,
    RouteReply,
    ScoreReply,
    TextReply,
    TokenizerReply,
    TokensReply,
)
from dlplora.serving.shapes import ChatShape, CompletionShape, Shape
from dlplora.serving.streams import stream

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": "An error, in one line"}
    for status in ("4XX", "5XX")
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or a stream of it"}
}


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
            running=lambda: models.num_open - models.num_waiting,
            waiting=lambda: models.num_waiting,
        )

    def app(self) -> FastAPI:
        """Return the application; the model is loaded by whoever runs it."""
        app = FastAPI(
            title="dlplora",
            description="An OpenAI-compatible server that chooses the adapters itself.",
            docs_url=None,
            redoc_url=None,
        )
        app.add_middleware(Guard, keys=self._keys, max_bytes=self._bounds.max_body_bytes)
        app.add_exception_handler(ApiError, on_api_error)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_body)
        for path, method, endpoint, model in (
            ("/v1/models", "GET", self.list_models, ModelList),
            ("/v1/models/{name}", "GET", self.show_model, ModelRow),
            ("/v1/chat/completions", "POST", self.chat, replies.RoutedChat),
            ("/v1/completions", "POST", self.complete, replies.RoutedCompletion),
            ("/v1/route", "POST", self.route, RouteReply),
            ("/v1/score", "POST", self.score, ScoreReply),
            ("/tokenize", "POST", self.tokenize, TokensReply),
            ("/detokenize", "POST", self.detokenize, TextReply),
            ("/tokenizer_info", "GET", self.tokenizer, TokenizerReply),
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
        return await self._answer(body, http, ChatShape(has_logprobs=body.logprobs))

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Continue one prompt or several, without a chat template."""
        decode = self.models.current.engine.base.chat.decode
        texts = [
            one if isinstance(one, str) else decode(one)
            for one in (body.prompts() if body.echo else [])
        ]
        has_logprobs = body.logprobs is not None
        shape = CompletionShape(has_logprobs=has_logprobs, echoed=texts, n=body.n)
        return await self._answer(body, http, shape)

    async def _answer(
        self, body: ChatBody | CompletionBody, http: HttpRequest, shape: Shape
    ) -> Response:
        self._check_open()
        _check_most(body.n, self._bounds.max_n, told=f"n is {body.n}", param="n")
        self._check_count(body.num_prompts, "prompts", param="prompt")
        served, requests = await self._requests(body)
        exchange = Exchange(served, requests, http, self._metrics, seconds=self._bounds.seconds)
        head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or served.default,
            "system_fingerprint": served.fingerprint,
        }
        if body.stream:
            options = body.stream_options
            return await stream(
                exchange,
                shape,
                head,
                has_usage=options is not None and options.include_usage,
                request_id=http.state.request_id,
            )
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

    async def _requests(self, body: ChatBody | CompletionBody) -> tuple[ServedModel, list[Request]]:
        """Return what the engine is asked, and the model that is in use by then."""
        while True:
            served = self.models.current
            requests = await asyncio.to_thread(requests_of, body, served)
            if served is self.models.current:
                return served, requests

    async def route(self, body: RouteBody, http: HttpRequest) -> Response:
        """Tell which adapters a system chooses for texts, and how sure it is."""
        self._check_count(len(body.texts), "texts", param="texts")
        return await self._decide(partial(route_texts, body), http)

    async def score(self, body: ScoreBody, http: HttpRequest) -> Response:
        """Weigh options as the answer to a prompt."""
        self._check_count(len(body.options), "options", param="options")
        return await self._decide(partial(score_options, body), http)

    async def _decide(
        self, decide: Callable[[ServedModel], BaseModel], http: HttpRequest
    ) -> Response:
        self._check_open()
        served = self.models.current
        reply = await served.calls.run(partial(decide, served), http, seconds=self._bounds.seconds)
        # A score that is not finite is null here, too.
        return Response(reply.model_dump_json(), media_type="application/json")

    def _check_open(self) -> None:
        if self.is_draining or not self.models.is_alive:
            raise ApiError(
                503, "the server is shutting down", code="unavailable", headers={"Retry-After": "5"}
            )

    def _check_count(self, found: int, what: str, *, param: str) -> None:
        _check_most(found, self._bounds.max_prompts, told=f"{found} {what}", param=param)

    async def list_models(self) -> ModelList:
        """List the base model, the adapters and the systems."""
        served = self.models.current
        return ModelList(data=[_row(name, kind, served) for name, kind in served.names.items()])

    async def show_model(self, name: str) -> ModelRow:
        """Show one of them."""
        served = self.models.current
        return _row(name, served.kind_of(name), served)

    async def tokenize(self, body: TokenizeBody) -> TokensReply:
        """Turn a text into tokens; control tokens are read as the tokenizer reads them."""
        base = self.models.current.engine.base
        encoded = await asyncio.to_thread(
            base.chat.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
        )
        ids = encoded.ids
        return TokensReply(tokens=ids, count=len(ids), max_model_len=base.context)

    async def detokenize(self, body: DetokenizeBody) -> TextReply:
        """Turn tokens into a text."""
        base = self.models.current.engine.base
        if wrong := [token for token in body.tokens if token >= base.num_tokens]:
            raise ApiError(
                400, f"found the token {wrong[0]}, of {base.num_tokens:,}", param="tokens"
            )
        return TextReply(prompt=base.chat.tokenizer.decode(body.tokens, skip_special_tokens=False))

    async def tokenizer(self) -> TokenizerReply:
        """Tell the chat template and the special tokens."""
        return TokenizerReply(**self.models.current.tokenizer)

    async def list_adapters(self) -> list[AdapterRow]:
        """List the adapters that a mix may name."""
        return [AdapterRow(id=name) for name in self.models.current.engine.pool.names]

    async def load_adapter(self, body: LoadBody) -> Done:
        """Load a PEFT folder as an adapter; for administrators."""
        path = self._allowed(body.lora_path)
        try:
            await self.models.add_adapter(body.lora_name, path, replaces=body.load_inplace)
        except DlpLoraError as error:
            told = str(error).replace(str(path), body.lora_path)
            told = told.replace(str(self.models.current.folder), "the model")
            raise ApiError(400, told, param="lora_path", code="adapter_unusable") from error
        return Done(message=f"the adapter {body.lora_name} is there")

    async def unload_adapter(self, body: UnloadBody) -> Done:
        """Let go of an adapter; for administrators."""
        await self.models.remove_adapter(body.lora_name)
        return Done(message=f"the adapter {body.lora_name} is gone")

    async def health(self) -> Response:
        """Tell whether the engine lives."""
        return self._health(200 if self.models.is_alive else 503)

    async def ready(self) -> Response:
        """Tell whether new requests are answered."""
        return self._health(200 if self.models.is_alive and not self.is_draining else 503)

    async def metrics(self) -> Response:
        """Return all figures as Prometheus reads them."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _health(self, status: int) -> Response:
        if status != 200:
            return ApiError(status, "the server answers no new requests").response()
        health = Health(
            status="ok", version=self.models.current.version, refused=self.models.refused
        )
        return JSONResponse(health.model_dump())

    def _allowed(self, told: str) -> Path:
        """Return the folder of an adapter; `ApiError` unless it stands in an allowed one."""
        for folder in self._folders:
            try:
                path = (folder / told).resolve()
                if path.is_relative_to(folder) and path != folder and path.is_dir():
                    return path
            except (OSError, ValueError, RuntimeError):  # no path, or a loop of links
                continue
        raise ApiError(
            400,
            f"lora_path is {told!r}, expected a folder within those that adapters may come from",
            param="lora_path",
            code="path_not_allowed",
        )


def _check_most(found: int, most: int, *, told: str, param: str) -> None:
    if found > most:
        raise ApiError(400, f"{told}, expected at most {most}", param=param)


def _row(name: str, kind: str, served: ServedModel) -> ModelRow:
    return ModelRow(
        id=name,
        object="model",
        created=served.created,
        owned_by="dlplora",
        root=name,
        parent=None if kind == "base" else BASE,
        max_model_len=served.engine.base.context,
    )
