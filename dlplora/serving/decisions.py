"""What a model decides without an answer: the adapters for texts, and the likeliest option."""

from dlplora.errors import choices
from dlplora.serving.asking import mix_of
from dlplora.serving.bodies import RouteBody, ScoreBody
from dlplora.serving.errors import ApiError
from dlplora.serving.models import ServedModel
from dlplora.serving.replies import weights_of
from dlplora.serving.schemas import (
    ChosenRoute,
    RoutedText,
    RouteReply,
    ScoredOption,
    ScoreReply,
)


def route_texts(body: RouteBody, served: ServedModel) -> RouteReply:
    """Tell which adapters a system chooses for each text, its fallback included."""
    model = body.model or served.default
    if (kind := served.kind_of(model)) != "system":
        raise ApiError(
            400,
            f"{model!r} is {'the base model' if kind == 'base' else 'an adapter'}, which routes "
            f"nothing; expected a system: {choices(served.engine.systems)}",
            param="model",
        )
    engine = served.engine
    least = engine.fallback_of(model) if body.fallback_below is None else body.fallback_below
    routes = engine.runner_of(model, fallback_below=least).route(body.texts)
    return RouteReply(
        model=model,
        system_fingerprint=served.fingerprint,
        data=[
            RoutedText(
                adapters=weights_of(route), confidence=route.confidence, probabilities=probabilities
            )
            for route, probabilities in zip(
                routes, engine.probabilities(model, body.texts), strict=True
            )
        ],
        fallback_below=least,
    )


def score_options(body: ScoreBody, served: ServedModel) -> ScoreReply:
    """Tell how likely each option is as the answer to a prompt, by its route."""
    model = body.model or served.default
    engine = served.engine
    own = served.route_of(model)
    if (route := mix_of(body, served) or own) is None:
        runner = engine.runner_of(model, fallback_below=body.fallback_below)
        (route,) = runner.route([body.prompt])
    else:
        runner = engine
    scores = runner.score(body.prompt, body.options, route=route)
    return ScoreReply(
        model=model,
        system_fingerprint=served.fingerprint,
        best=scores.best,
        options=[
            ScoredOption(option=option, logprob=logprob, tokens=tokens, bytes=num_bytes)
            for option, logprob, tokens, num_bytes in zip(
                scores.options, scores.logprobs, scores.tokens, scores.bytes, strict=True
            )
        ],
        route=ChosenRoute(adapters=weights_of(route), confidence=route.confidence),
    )
