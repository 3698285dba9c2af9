"""Errors as OpenAI's API tells them: one object, one line, nothing of the machine."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dlplora.errors import (
    GenerationError,
    PromptTooLongError,
    RequestFailedError,
    UnknownAdapterError,
    choices,
)

logger = logging.getLogger(__name__)
_MOST = 100  # mistakes that are looked at
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong: the message, its kind, the field that is wrong, and a code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every reply that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """What a client is told, with the HTTP status; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def told(self) -> dict[str, Any]:
        """Return the object that OpenAI's clients expect."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.told(), self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error of the engine.

    An adapter that a route names and that is not there is a conflict: it was unloaded meanwhile.
    What is no fault of the request is told by the server's log alone.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UnknownAdapterError):
        return ApiError(409, str(error), code="adapter_unavailable")
    if isinstance(error, GenerationError) and not isinstance(error, RequestFailedError):
        return ApiError(400, str(error))
    found = ApiError(500, "the request failed; the server's log says why", code="internal_error")
    found.__cause__ = error
    return found


def unknown(kind: str, name: str, known: Iterable[str], *, param: str) -> ApiError:
    """Return what a client is told of a name that is not there: which there are."""
    message = f"no {kind} {name!r}; there are: {choices(known)}"
    return ApiError(404, message, param=param, code="model_not_found")


def log_failure(error: ApiError, request_id: str) -> None:
    """Log what failed by no fault of a request, under the id that its reply has."""
    if error.status >= 500:
        logger.error("request %s: %s", request_id, error.message, exc_info=error.__cause__)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of ours."""
    assert isinstance(error, ApiError)
    log_failure(error, request.state.request_id)
    return error.response()


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    return ApiError(
        error.status_code, str(error.detail), headers=dict(error.headers or {})
    ).response()


async def on_invalid_body(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that is not what the schema says, by its most specific mistake."""
    assert isinstance(error, RequestValidationError)
    # Of a field that may be one of several kinds, each kind has its mistake; the last is a list's.
    found = max(
        reversed(error.errors()[:_MOST]),
        key=lambda one: (len(one["loc"]), one["type"] != "missing"),
    )
    param = _field(found, error.body)
    if found["type"] == "extra_forbidden":
        message = f"{param} is not supported"
    elif found["type"] == "json_invalid":
        message, param = "the body is not JSON", None
    elif found["type"] == "value_error":
        message = found["msg"].removeprefix("Value error, ")
    elif param is None:
        message = "expected a JSON object with the header `Content-Type: application/json`"
    else:
        message = f"{param}: {found['msg']}"
    return ApiError(400, message, param=param).response()


def _field(found: Mapping[str, Any], body: Any) -> str | None:
    """Return where in a body a mistake is, such as `messages.0.content`."""
    place, value = [], body
    for part in found["loc"]:
        try:
            value = value[part]
        except (TypeError, KeyError, IndexError):
            if not (found["type"] == "missing" and part == found["loc"][-1] != "body"):
                continue  # where in the request the body is, or one of several kinds of a field
        place.append(str(part))
    return ".".join(place) or None
