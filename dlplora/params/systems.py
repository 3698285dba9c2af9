"""Systems: the named ways of answering, and the settings in which they are evaluated."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from dlplora.params.fields import Count, DataPath, Name, Section
from dlplora.words import Policy, Setting

Weighting = Literal["renormalise", "softmax_probabilities", "softmax_logits", "equal"]
LogoScore = Literal["norm", "entropy"]


def _different(settings: list[Setting]) -> list[Setting]:
    if len(set(settings)) < len(settings):
        raise ValueError("expected each setting once")
    return settings


class SystemEntry(Section):
    """What every system says: its inputs, when it routes again, and where it is evaluated.

    `adapters` is a folder of one adapter for each task, `artifact` what else the system is built
    from, `router` a trained router. Where a kind needs none of them, `data/base` stands instead.
    A kind whose `needs_task` is set is an oracle: it needs the task of a question. `needs` are the
    inputs that a kind reads.
    """

    needs_task: ClassVar[bool] = False
    needs: ClassVar[tuple[Literal["adapters", "artifact", "router"], ...]] = ()

    adapters: DataPath
    artifact: DataPath
    router: DataPath
    policy: Policy
    settings: Annotated[list[Setting], AfterValidator(_different)]


class BaseSystem(SystemEntry):
    """The base model without adapters."""

    kind: Literal["base"]


class ByTask(SystemEntry):
    """Each task by its own of the `adapters`."""

    needs_task = True
    needs = ("adapters",)
    kind: Literal["by_task"]


class OverClusters(SystemEntry):
    """A system over the experts of `clusters`, in `artifact`."""

    clusters: list[Name]


class ExpertsByTask(OverClusters):
    """CGC-LoRA: each task by its experts, folded into one adapter."""

    needs_task = True
    needs = ("artifact",)
    kind: Literal["experts_by_task"]


class Fixed(SystemEntry):
    """The adapter in `artifact` for every prompt."""

    needs = ("artifact",)
    kind: Literal["fixed"]


class RandomSystem(SystemEntry):
    """One adapter at random for each prompt."""

    needs = ("adapters",)
    kind: Literal["random"]


class UniformSystem(SystemEntry):
    """All adapters for every prompt."""

    needs = ("adapters",)
    kind: Literal["uniform"]


class TopP(Section):
    """Keep the smallest set of tasks whose probability reaches `p`."""

    p: Annotated[float, Field(gt=0, le=1)]
    weights: Weighting


class TopK(Section):
    """Keep the `k` most probable tasks."""

    k: Count
    weights: Weighting


class TopPSystem(SystemEntry, TopP):
    """The likeliest tasks of `router`, down to a sum."""

    needs = ("adapters", "router")
    kind: Literal["top_p"]


class TopKSystem(SystemEntry, TopK):
    """The k likeliest tasks of `router`."""

    needs = ("adapters", "router")
    kind: Literal["top_k"]


class FusionSystem(SystemEntry):
    """The k likeliest adapters of `router`, their matrices averaged into one."""

    needs = ("adapters", "router")
    kind: Literal["fusion"]
    k: Count


class LogoSystem(SystemEntry):
    """LoGo: the `k` adapters whose outputs score highest at one layer of the base model.

    The layer is `projection` of a `block`; the score is the norm of an adapter's output or the
    inverse entropy of its softmax. With `neutral` texts each score is divided by the adapter's mean
    over those.
    """

    needs = ("adapters",)
    kind: Literal["logo"]
    score: LogoScore
    k: Count
    block: Literal["last"] | Annotated[int, Field(ge=0)]
    projection: str
    neutral: list[str]


class GatedExperts(OverClusters):
    """The experts of clusters, mixed by their gate over `router`."""

    needs = ("artifact", "router")
    kind: Literal["gated_experts"]


class ArrowSystem(SystemEntry):
    """For each token and layer the `top_k` adapters nearest to it, weighted by a softmax."""

    needs = ("adapters",)
    kind: Literal["arrow"]
    top_k: Count
    temperature: Annotated[float, Field(gt=0)]


System = Annotated[
    BaseSystem
    | ByTask
    | ExpertsByTask
    | Fixed
    | RandomSystem
    | UniformSystem
    | TopPSystem
    | TopKSystem
    | FusionSystem
    | LogoSystem
    | GatedExperts
    | ArrowSystem,
    Field(discriminator="kind"),
]


class Evaluation(Section):
    """How systems are evaluated: batches of so many prompts, so many multi-question prompts."""

    batch_size: Count
    multi_question_prompts: Count
