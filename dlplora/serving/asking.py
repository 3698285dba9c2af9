"""From the body of a chat or completion to what the engine is asked."""

from typing import Any

from dlplora.engine.requests import Request
from dlplora.errors import DlpLoraError, RouterError
from dlplora.records.routes import Route
from dlplora.serving.bodies import Asked, ChatBody, CompletionBody, Mixed
from dlplora.serving.errors import ApiError, api_error, unknown
from dlplora.serving.models import ServedModel


def requests_of(body: ChatBody | CompletionBody, served: ServedModel) -> list[Request]:
    """Return what the engine is asked; `ApiError` on what it cannot be."""
    told = served.told(body.model, splits=isinstance(body, ChatBody)) | _told(body, served)
    try:
        if body.max_new_tokens is not None:
            return body.requests(body.max_new_tokens, **told)
        requests = body.requests(served.max_new_tokens, **told)
        room = served.room(requests[0])
        return requests if room is None else body.requests(room, **told)
    except DlpLoraError as error:
        raise api_error(error) from error


def _told(body: Asked, served: ServedModel) -> dict[str, Any]:
    """Return the fields of a request that its body decides, besides what its model does."""
    told: dict[str, Any] = {"visible": body.visible, "fallback_below": body.fallback_below}
    if body.route_policy is not None:
        told["policy"] = body.route_policy
    if (mix := mix_of(body, served)) is not None:
        told |= {"routes": (mix,), "policy": "route_once", "system": None}
    return told


def mix_of(body: Mixed, served: ServedModel) -> Route | None:
    """Return the mix that a client chose, if any; `ApiError` on one that is none.

    It is one of the default system's adapters, whatever the model: those that are listed.
    """
    try:
        mix = body.route
    except RouterError as error:
        raise ApiError(400, str(error), param="lora") from error
    names = served.engine.pool.names
    if gone := [name for name in (mix.adapters if mix else ()) if name not in names]:
        raise unknown("adapter", gone[0], names, param="lora")
    return mix
