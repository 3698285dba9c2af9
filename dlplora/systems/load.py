"""From the name of a system and the folder of a pipeline to what answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlplora.engine.decisions import DecisionLog
from dlplora.errors import ParamsError, choices
from dlplora.models import load_base
from dlplora.params.fields import named
from dlplora.params.load import load_params, load_served
from dlplora.params.project import PARAMS_FILE, Served
from dlplora.params.systems import System as SystemParams
from dlplora.records.model_card import MODEL_FILE, read_model_card, read_version_name
from dlplora.routing.simple import ConstantRouter
from dlplora.runtime import Place, set_up
from dlplora.systems.arrow import build_arrow
from dlplora.systems.base import build_base
from dlplora.systems.by_task import build_by_task
from dlplora.systems.drawn import build_random, build_uniform
from dlplora.systems.experts import build_experts_by_task, build_gated_experts
from dlplora.systems.fixed import build_fixed
from dlplora.systems.fusion import build_fusion
from dlplora.systems.logo import build_probed
from dlplora.systems.routed import build_routed
from dlplora.systems.system import Inputs, System

BUILDERS: dict[str, Callable[[Any, Inputs], System]] = {
    "base": build_base,
    "by_task": build_by_task,
    "experts_by_task": build_experts_by_task,
    "fixed": build_fixed,
    "random": build_random,
    "uniform": build_uniform,
    "top_p": build_routed,
    "top_k": build_routed,
    "fusion": build_fusion,
    "logo": build_probed,
    "gated_experts": build_gated_experts,
    "arrow": build_arrow,
}


class Systems:
    """The systems of a pipeline's folder or of a model over one base model, each by its name.

    What needs the task is named with it, such as `single:TASK`. The params are those of the
    params.yaml in a model, and beside the folder of a pipeline.

    Args:
        folder: The folder that the stages write to, or a model such as `.models/current`.
        names: The systems that will be asked; None stands for the default. Each is checked before
            anything is loaded: `ParamsError` says which are wrong.
        place: Device and dtype; by default those of the params.
    """

    def __init__(
        self, folder: str | Path, names: Sequence[str | None], *, place: Place | None = None
    ) -> None:
        self._folder = Path(folder)
        self._params: Served
        if not self._folder.is_dir():
            raise ParamsError(f"{folder}: no such folder; expected a pipeline's data, or a model")
        if (self._folder / "dvc.yaml").is_file():
            raise ParamsError(f"{folder}: a project's folder; expected its {folder}/data")
        if (self._folder / PARAMS_FILE).is_file():
            self._folder = self._folder.resolve()  # another model may be promoted meanwhile
            self._params = load_served(self._folder / PARAMS_FILE)
        else:
            self._params = load_params(self._folder.parent / PARAMS_FILE)
        for name in names:
            self._entry(name)
        place = place or set_up(self._params.runtime, seed=self._params.seed)
        self.base = load_base(self._folder / "base", place=place)

    def name(self, name: str | None) -> str:
        """Return a system's name; of None, the default's."""
        return self._params.default_system if name is None else name

    def named(self, name: str | None) -> System:
        """Build a system."""
        entry, task = self._entry(name)
        system = build(entry, self._inputs(entry, [task] if task else sorted(self._params.tasks)))
        router = system.router or ConstantRouter(*system.told([task]))
        return replace(system, router=router)

    def _inputs(self, entry: SystemParams, tasks: list[str]) -> Inputs:
        return Inputs(
            self.base,
            self._folder / "base",
            self._path(entry.adapters),
            self._path(entry.artifact),
            self._path(entry.router),
            tasks,
            self._params.seed,
        )

    def labels(self, task: str) -> tuple[str, ...]:
        """Return the options that all examples of a task have.

        Raises `ParamsError` if it is no task or they have none, and `ModelError` if no model was
        made of the folder yet.
        """
        named(self._params.tasks, task, "tasks")
        is_model = (self._folder / MODEL_FILE).is_file()
        card = read_model_card(self._folder if is_model else self._folder / "model")
        if task not in card.tasks or not (found := card.tasks[task].labels):
            raise ParamsError(f"the examples of {task} have no options, or not all the same")
        return found

    def decision_log(
        self,
        path: str | Path | None,
        name: str | None,
        system: System,
        *,
        max_mib: float | None = None,
    ) -> DecisionLog | None:
        """Return a log of a system's decisions, as the params say; None without a path."""
        if path is None:
            return None
        told, classifier = self._params.log, system.classifier
        return DecisionLog(
            path,
            system=self.name(name),
            version=self.version,
            with_text=told.text,
            embed=classifier.vectors if told.embedding and classifier else None,
            max_mib=max_mib,
        )

    @property
    def version(self) -> str | None:
        """The registered model's version; None of a pipeline's folder."""
        is_model = (self._folder / PARAMS_FILE).is_file()
        return read_version_name(self._folder) if is_model else None

    def _entry(self, name: str | None) -> tuple[SystemParams, str]:
        """Return what the params say of a system, and the task that it is named with."""
        systems = self._params.systems
        chosen = self.name(name)
        system, colon, task = chosen.partition(":")
        if not system or (colon and not task):
            raise ParamsError(f"the system is {chosen!r}; expected NAME, or NAME:TASK")
        if system not in systems:
            known = [f"{key}:TASK" if row.needs_task else key for key, row in systems.items()]
            raise ParamsError(f"params.yaml: no systems.{system}; there are: {choices(known)}")
        entry, where = systems[system], f"params.yaml: systems.{system}"
        if colon and not entry.needs_task:
            raise ParamsError(f"{where} needs no task: leave out :{task}")
        if entry.needs_task and not colon:
            example = f"{system}:{min(self._params.tasks)}"
            raise ParamsError(f"{where} needs the task: name it, such as {example}")
        if colon:
            named(self._params.tasks, task, "tasks")
        return entry, task

    def _path(self, path: str) -> Path:
        """Return where an input of a system, a path under data/ in the params, really stands."""
        return self._folder / Path(path).relative_to("data")


def build(entry: SystemParams, inputs: Inputs) -> System:
    """Build a system on a base model by what the params say of it."""
    system = BUILDERS[entry.kind](entry, inputs)
    return replace(
        system,
        policy=entry.policy,
        fallback_below=inputs.fallback_below() if system.classifier else 0.0,
        sha256=lambda: inputs.sha256(entry),
    )
