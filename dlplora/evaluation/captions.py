"""What a report says of a system, from its params."""

from pathlib import PurePath

from dlplora.params.systems import SystemEntry

# By kind, with the entry's params in braces.
HOW = {
    "base": "the model without adapters",
    "by_task": "each task by its own adapter in {adapters} (oracle task)",
    "experts_by_task": "CGC-LoRA, common and specific experts trained jointly (oracle task)",
    "fixed": "one adapter for every prompt, {artifact}",
    "random": "one adapter at random",
    "uniform": "all adapters, equal weights",
    "top_p": "adapters by the router {router}, top-p {p:g}, weights: {weights}",
    "top_k": "adapters by the router {router}, top-{k}, weights: {weights}",
    "fusion": "adapters by the router {router}, top-{k}, their matrices averaged",
    "logo": "LoGo, top-{k} by the {score} of each adapter's output{relative}",
    "gated_experts": "CGC-LoRA's experts, mixed by the probabilities of the router {router}",
    "arrow": "Arrow, top-{top_k} adapters for each token on each layer",
}
_JOINT = {("data", "joint"), ("data", "experts")}


def caption(system: SystemEntry) -> str:
    """Say in a few words how a system answers."""
    values = dict(system) | {"router": PurePath(system.router).name}
    values["relative"] = ", relative to texts of no task" if values.get("neutral") else ""
    said = HOW[values["kind"]].format(**values)
    return said if system.policy == "route_once" else f"{said}, policy {system.policy}"


def is_joint(system: SystemEntry) -> bool:
    """Tell whether what a system answers by was trained on several tasks together."""
    return PurePath(system.artifact).parts[:2] in _JOINT
