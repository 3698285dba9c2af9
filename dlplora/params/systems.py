"""Systems: the named ways of answering, and the settings in which they are evaluated."""

from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dlplora.params.fields import CommandPath, Count, Name, Section
from dlplora.words import Policy, Setting

Weighting = Literal["renormalise", "softmax_probabilities", "softmax_logits", "equal"]
LogoScore = Literal["norm", "entropy"]

NUM_QUESTIONS: dict[Setting, int] = {"iid": 1, "composite_2": 2, "composite_3": 3}


class SystemEntry(Section):
    """What every system says: its inputs, when it routes again, and where it is evaluated.

    `adapters` is a folder of one adapter for each task, `artifact` what else the system is built
    from, `router` a trained router. Where a kind needs none of them, `data/base` stands instead.
    """

    needs_task: ClassVar[bool] = False
    """Whether the task of a question must be named: the system does not choose by itself."""

    adapters: CommandPath
    artifact: CommandPath
    router: CommandPath
    policy: Policy
    settings: list[Setting]

    @property
    def caption(self) -> str:
        """Say in a few words how the system answers."""
        again = {
            "keep": "routed again at each sentence",
            "refill": "re-prefilled by each new route",
        }
        told = self.needs_task or self.policy == "route_once"
        return self._how if told else f"{self._how}; {again[self.policy]}"

    @property
    def _how(self) -> str:
        raise NotImplementedError

    @property
    def is_joint(self) -> bool:
        """Tell whether what it answers by was trained on several tasks together."""
        return self.artifact.startswith(("data/joint/", "data/experts"))


class BaseSystem(SystemEntry):
    """The base model without adapters."""

    kind: Literal["base"]

    @property
    def _how(self) -> str:
        return "the model without adapters"


class ByTask(SystemEntry):
    """Each task by its own of the `adapters`."""

    needs_task: ClassVar[bool] = True
    kind: Literal["by_task"]

    @property
    def _how(self) -> str:
        return f"each task by its own adapter in {self.adapters} (oracle task)"


class ExpertsByTask(SystemEntry):
    """CGC-LoRA: each task by its experts in the clusters of `artifact`, folded into one adapter."""

    needs_task: ClassVar[bool] = True
    kind: Literal["experts_by_task"]
    clusters: list[Name]

    @property
    def _how(self) -> str:
        return "CGC-LoRA, common and specific experts trained jointly (oracle task)"


class Fixed(SystemEntry):
    """The adapter in `artifact` for every prompt."""

    kind: Literal["fixed"]

    @property
    def _how(self) -> str:
        return f"one adapter for every prompt, {self.artifact}"


class Drawn(SystemEntry):
    """No text is read: one adapter at random, or all with the same weight."""

    kind: Literal["random", "uniform"]

    @property
    def _how(self) -> str:
        return "one adapter at random" if self.kind == "random" else "all adapters, equal weights"


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

    kind: Literal["top_p"]

    @property
    def _how(self) -> str:
        return f"the likeliest adapters by {_name(self.router)}, to a probability of {self.p:g}"


class TopKSystem(SystemEntry, TopK):
    """The k likeliest tasks of `router`."""

    kind: Literal["top_k"]

    @property
    def _how(self) -> str:
        weights = "" if self.k == 1 else f", weights: {self.weights}"
        return f"{_likeliest(self.k)} by {_name(self.router)}{weights}"


class FusionSystem(SystemEntry):
    """The k likeliest adapters of `router`, their matrices averaged into one."""

    kind: Literal["fusion"]
    k: Count

    @property
    def _how(self) -> str:
        return f"{_likeliest(self.k)} by {_name(self.router)}, their matrices averaged"


class LogoSystem(SystemEntry):
    """LoGo: the `k` adapters whose outputs score highest at one layer of the base model.

    The layer is `projection` of a `block`; the score is the norm of an adapter's output or the
    inverse entropy of its softmax. With `neutral` texts each score is divided by the adapter's mean
    over those.
    """

    kind: Literal["logo"]
    score: LogoScore
    k: Count
    block: Literal["last"] | Annotated[int, Field(ge=0)]
    projection: str
    neutral: list[str]

    @property
    def _how(self) -> str:
        score = "norm" if self.score == "norm" else "inverse entropy"
        relative = ", relative to texts of no task" if self.neutral else ""
        return f"the {self.k} adapters of the largest output {score} at one layer (LoGo){relative}"


class GatedExperts(SystemEntry):
    """The experts in the clusters of `artifact`, mixed by their gate over `router`."""

    kind: Literal["gated_experts"]
    clusters: list[Name]

    @property
    def _how(self) -> str:
        return f"CGC-LoRA's experts, mixed by the probabilities of {_name(self.router)}"


class ArrowSystem(SystemEntry):
    """For each token and layer the `top_k` adapters nearest to it, weighted by a softmax."""

    kind: Literal["arrow"]
    top_k: Count
    temperature: Annotated[float, Field(gt=0)]

    @property
    def _how(self) -> str:
        return f"the {self.top_k} adapters nearest to each token on each layer (Arrow)"


def _name(router: str) -> str:
    return f"the router {PurePath(router).name}"


def _likeliest(k: int) -> str:
    return "the likeliest adapter" if k == 1 else f"the {k} likeliest adapters"


System = Annotated[
    BaseSystem
    | ByTask
    | ExpertsByTask
    | Fixed
    | Drawn
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
