"""What every request passes before its body is read: host, key, a bound on the body, an id."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlplora.serving.errors import ApiError, api_error, log_failure
from dlplora.serving.keys import Keys

_OPEN = ("/health", "/ready")
_FOR_ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Guard:
    """Refuse whoever may not ask and bodies of more than `max_bytes`; give replies an id.

    What the application itself fails at is answered here, too, so that no reply lacks the header
    `x-request-id`.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, max_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = number
        has_begun, num_read = False, 0

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        async def receive_counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        try:
            self._check(scope["path"], Headers(scope=scope))
            await self._app(scope, receive_counted, send_with_id)
        except Exception as error:
            told = api_error(error)
            log_failure(told, number)
            if not has_begun:
                await told.response()(scope, receive, send_with_id)

    def _check(self, path: str, headers: Headers) -> None:
        if path not in _OPEN:
            self._keys.check_host(headers.get("host", ""))
            self._keys.check(headers.get("authorization"), for_admin=path in _FOR_ADMIN)
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_bytes:,} bytes")
