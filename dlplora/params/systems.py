"""How systems choose adapters, and how their answers are produced for scoring."""

from typing import Annotated, Literal

from pydantic import Field

from dlplora.params.fields import CommandPath, Count, Name, Section

Weighting = Literal["renormalise", "softmax_probabilities", "softmax_logits", "equal"]
LogoScore = Literal["norm", "entropy"]


class DrawnRoute(Section):
    """A system whose route reads no text: one random adapter, or all alike."""

    artifact: CommandPath
    route: Literal["random", "uniform"]


class FixedRoute(Section):
    """A system of one adapter for every prompt: the artifact's."""

    artifact: CommandPath
    route: Literal["fixed"]


class ByTaskRoute(Section):
    """A system that is told the task: the artifact has an adapter for each."""

    artifact: CommandPath
    route: Literal["by_task"]


class TopP(Section):
    """Keep the smallest set of tasks whose probability reaches `p`."""

    route: Literal["top_p"]
    p: Annotated[float, Field(gt=0, le=1)]
    weights: Weighting


class TopK(Section):
    """Keep the `k` most probable tasks."""

    route: Literal["top_k"]
    k: Count
    weights: Weighting


class TopPRoute(TopP):
    """A system that routes by a classifier's likeliest tasks, down to a sum."""

    artifact: CommandPath


class TopKRoute(TopK):
    """A system that routes by a classifier's k likeliest tasks."""

    artifact: CommandPath


class OwnExpertRoute(Section):
    """A system that is told the task and answers by its experts, folded into one adapter."""

    route: Literal["own_expert"]
    artifact: CommandPath
    clusters: list[Name]


class GatedSystem(Section):
    """A system that mixes the experts of clusters by their gate over a router's probabilities."""

    experts: CommandPath
    router: CommandPath
    clusters: list[Name]


class LogoRoute(Section):
    """A system that asks the adapters themselves, as LoGo does: the `k` loudest answer.

    They are heard at `projection` of a `block` of the base model, by the norm of what they add
    or by the inverse entropy of its softmax. With `neutral` texts each score is relative to the
    adapter's mean over those; without, it is taken as it is.
    """

    artifact: CommandPath
    route: Literal["logo"]
    score: LogoScore
    k: Count
    block: Literal["last"] | Annotated[int, Field(ge=0)]
    projection: str
    neutral: list[str]


class FusionRoute(Section):
    """A system that answers by the average of the k likeliest adapters' matrices."""

    artifact: CommandPath
    route: Literal["fusion"]
    k: Count


System = Annotated[
    DrawnRoute
    | TopPRoute
    | TopKRoute
    | OwnExpertRoute
    | LogoRoute
    | FusionRoute
    | FixedRoute
    | ByTaskRoute,
    Field(discriminator="route"),
]


class Evaluation(Section):
    """How answers are produced for scoring."""

    batch_size: Count


class CompositeSetting(Section):
    """A setting of composite prompts: several questions of different tasks in one."""

    system: Name
    artifact: CommandPath
    parts: Annotated[int, Field(ge=2)]
    count: Count
