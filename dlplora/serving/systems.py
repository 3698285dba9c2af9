"""Which systems of a folder can be served without the name of a task."""

import logging
from pathlib import Path

from dlplora.errors import AdapterError, DlpLoraError, ParamsError, RouterError
from dlplora.params.load import load_params, load_served
from dlplora.params.project import PARAMS_FILE, Served
from dlplora.params.systems import OverClusters
from dlplora.records.base_card import read_base_card
from dlplora.records.router_card import read_router_card
from dlplora.records.training import read_adapter_training

logger = logging.getLogger(__name__)


def servable_systems(folder: Path) -> list[str]:
    """Return the systems of a model or a pipeline's folder that can be built, the default first.

    What is left out is logged, each with the reason. Raises `ParamsError` if nothing is left.
    """
    is_model = (folder / PARAMS_FILE).is_file()
    params = (
        load_served(folder / PARAMS_FILE) if is_model else load_params(folder.parent / PARAMS_FILE)
    )
    found = []
    for name in sorted(params.systems, key=lambda name: name != params.default_system):
        try:
            _check(name, params, folder)
        except DlpLoraError as error:
            logger.info("the system %s is left out: %s", name, error)
        else:
            found.append(name)
    if not found:
        raise ParamsError(f"{folder}: no system can be served; `make repro` makes what they need")
    return found


def _check(name: str, params: Served, folder: Path) -> None:
    """Raise a `DlpLoraError` unless what a system is built from is there, and for these tasks."""
    system = params.systems[name]
    if system.needs_task:
        raise ParamsError(f"it needs the task; name it: --system {name}:TASK")
    base = read_base_card(folder / "base").fingerprint
    adapters, artifact, router = (
        folder / Path(path).relative_to("data")
        for path in (system.adapters, system.artifact, system.router)
    )
    if "adapters" in system.needs:
        for task in params.tasks:
            _check_adapter(adapters / task, base)
    if isinstance(system, OverClusters):
        for cluster in system.clusters:
            if not (artifact / cluster).is_dir():
                raise AdapterError(f"{artifact / cluster} is not there; `dlplora repro` makes it")
    elif "artifact" in system.needs:
        _check_adapter(artifact, base)
    if "router" in system.needs:
        card = read_router_card(router)
        if set(card["labels"]) != set(params.tasks) or card["base_fingerprint"] not in (None, base):
            raise RouterError(f"{router}: trained for other tasks or another base model")


def _check_adapter(folder: Path, base: str) -> None:
    if read_adapter_training(folder).base_fingerprint != base:
        raise AdapterError(f"{folder}: trained on another base model")
