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
    A kind whose `needs_task` is set cannot choose by itself: it is told the task of a question.
    `how` is the caption of its systems, with their params in braces.
    """

    needs_task: ClassVar[bool] = False
    how: ClassVar[str]

    adapters: CommandPath
    artifact: CommandPath
    router: CommandPath
    policy: Policy
    settings: list[Setting]

    @property
    def caption(self) -> str:
        """Say in a few words how the system answers."""
        said = self.how.format(**dict(self) | {"router": PurePath(self.router).name})
        return said if self.policy == "route_once" else f"{said}; policy: {self.policy}"

    @property
    def is_joint(self) -> bool:
        """Tell whether what it answers by was trained on several tasks together."""
        return self.artifact.startswith(("data/joint/", "data/experts"))


class BaseSystem(SystemEntry):
    """The base model without adapters."""

    how = "the model without adapters"
    kind: Literal["base"]


class ByTask(SystemEntry):
    """Each task by its own of the `adapters`."""

    how = "each task by its own adapter in {adapters} (oracle task)"
    needs_task = True
    kind: Literal["by_task"]


class ExpertsByTask(SystemEntry):
    """CGC-LoRA: each task by its experts in the clusters of `artifact`, folded into one adapter."""

    how = "CGC-LoRA, common and specific experts trained jointly (oracle task)"
    needs_task = True
    kind: Literal["experts_by_task"]
    clusters: list[Name]


class Fixed(SystemEntry):
    """The adapter in `artifact` for every prompt."""

    how = "one adapter for every prompt, {artifact}"
    kind: Literal["fixed"]


class RandomSystem(SystemEntry):
    """One adapter at random for each prompt."""

    how = "one adapter at random"
    kind: Literal["random"]


class UniformSystem(SystemEntry):
    """All adapters for every prompt."""

    how = "all adapters, equal weights"
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

    how = "adapters by the router {router}, top-p {p:g}, weights: {weights}"
    kind: Literal["top_p"]


class TopKSystem(SystemEntry, TopK):
    """The k likeliest tasks of `router`."""

    how = "adapters by the router {router}, top-{k}, weights: {weights}"
    kind: Literal["top_k"]


class FusionSystem(SystemEntry):
    """The k likeliest adapters of `router`, their matrices averaged into one."""

    how = "adapters by the router {router}, top-{k}, their matrices averaged"
    kind: Literal["fusion"]
    k: Count


class LogoSystem(SystemEntry):
    """LoGo: the `k` adapters whose outputs score highest at one layer of the base model.

    The layer is `projection` of a `block`; the score is the norm of an adapter's output or the
    inverse entropy of its softmax. With `neutral` texts each score is divided by the adapter's mean
    over those.
    """

    how = "LoGo, top-{k} by the {score} of each adapter's output at one layer"
    kind: Literal["logo"]
    score: LogoScore
    k: Count
    block: Literal["last"] | Annotated[int, Field(ge=0)]
    projection: str
    neutral: list[str]

    @property
    def caption(self) -> str:
        """Say in a few words how the system answers."""
        return super().caption + (", relative to texts of no task" if self.neutral else "")


class GatedExperts(SystemEntry):
    """The experts in the clusters of `artifact`, mixed by their gate over `router`."""

    how = "CGC-LoRA's experts, mixed by the probabilities of the router {router}"
    kind: Literal["gated_experts"]
    clusters: list[Name]


class ArrowSystem(SystemEntry):
    """For each token and layer the `top_k` adapters nearest to it, weighted by a softmax."""

    how = "Arrow, top-{top_k} adapters for each token on each layer"
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
