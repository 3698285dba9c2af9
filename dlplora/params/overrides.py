"""The parameters of each training: the section `adapter` with the overrides of one training.

This logic decides what a stage computes, so it counts as the stage's code; sections do not.
"""

from typing import Any

from dlplora.errors import ParamsError
from dlplora.params.fields import checked, named
from dlplora.params.project import ADAPTERS, BASE, Params, Served
from dlplora.params.systems import SystemEntry
from dlplora.params.training import Adapter


def adapter_of(params: Params, task: str) -> Adapter:
    """Return the training parameters of one task: `adapter` with its overrides."""
    overrides = named(params.adapters, task, "adapters")
    return _overridden(params.adapter, overrides, f"adapters.{task}")


def joint_of(params: Params, name: str) -> Adapter:
    """Return the training parameters of an adapter for all tasks: `adapter` with overrides."""
    return _overridden(params.adapter, named(params.joint, name, "joint"), f"joint.{name}")


def expert_training_of(params: Params, cluster: str) -> Adapter:
    """Return the training parameters of a cluster's experts: `adapter` with its overrides.

    Raises `ParamsError` unless the experts of one task have the adapter's rank together.
    """
    experts = named(params.experts, cluster, "experts")
    where = f"experts.{cluster}"
    training = _overridden(params.adapter, experts.training, f"{where}.training")
    active = (experts.common + experts.specific) * experts.expert_rank
    if active != training.rank:
        raise ParamsError(
            f"params.yaml: {where}: ({experts.common} common + {experts.specific} specific) × "
            f"expert_rank {experts.expert_rank} = {active}; expected the rank of an adapter, "
            f"{training.rank}"
        )
    return training


def is_in_model(system: SystemEntry) -> bool:
    """Tell whether a model, which holds adapters and routers of all tasks, can answer by it."""
    return system.adapters in (BASE, ADAPTERS) and system.artifact == BASE


def served_of(params: Params) -> Served:
    """Return what a model holds of the params: the systems that it can answer by."""
    values = {name: getattr(params, name) for name in Served.model_fields}
    values["runtime"] = params.runtime.without_kernels
    systems = {name: system for name, system in params.systems.items() if is_in_model(system)}
    return Served.model_construct(**values | {"systems": systems})


def _overridden(adapter: Adapter, overrides: dict[str, Any], source: str) -> Adapter:
    merged = adapter.model_dump() | overrides
    return checked(Adapter, merged, "params.yaml", within=source)
