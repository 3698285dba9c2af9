"""What every request passes: a bound on its body, and an id on its reply."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlplora.serving.errors import ApiError


class Limits:
    """Refuse bodies of more than `max_bytes`, and give every reply the header `x-request-id`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = number

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        told = Headers(scope=scope).get("content-length", "")
        if told.isdigit() and int(told) > self._max_bytes:
            await self._too_large().response()(scope, receive, send_with_id)
            return
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        await self._app(scope, receive_counted, send_with_id)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_bytes:,} bytes")
