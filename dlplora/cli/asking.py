"""The systems that a question is put to from the command line, by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlplora.engine.runner import Runner
from dlplora.errors import ParamsError, choices
from dlplora.evaluation.run import System
from dlplora.evaluation.systems import Inputs, build_gated, build_system
from dlplora.models import load_base
from dlplora.params import ByTaskRoute, FusionRoute, OwnExpertRoute, Params, load_params, named
from dlplora.routing.simple import BaseRouter, FixedRouter
from dlplora.runtime import set_up


class Asked:
    """Systems over one base model: `base`, `single:TASK`, or a name in params.yaml.

    What is told the task is named with it, such as `cgc:TASK`. Names are checked before anything
    is loaded; `ParamsError` says which are wrong.

    Args:
        names: The systems that will be asked.
        data: The folder that the pipeline writes to.
    """

    def __init__(self, names: list[str], data: Path) -> None:
        self._params = load_params()
        self._data = data
        for name in names:
            _check_name(name, self._params)
        place = set_up(self._params.runtime, seed=self._params.seed)
        self._base = load_base(data / "base", place=place, attention="sdpa")

    @contextmanager
    def runner(self, name: str, **settings: Any) -> Iterator[Runner]:
        """Yield what answers by a system, for the time of a `with` block."""
        kind, _, task = name.partition(":")
        system = self._system(kind, task)
        settings["router"] = system.router_of(task)
        with Runner.over(self._base, system.adapters, **settings) as runner:
            yield runner

    def _system(self, kind: str, task: str) -> System:
        params, data = self._params, self._data
        if kind == "base":
            return System([], lambda _: BaseRouter())
        if kind == "single":
            return System(self._inputs(data / "adapters", [task]).pool(), FixedRouter)
        if gated := params.gated_systems.get(kind):
            return build_gated(
                gated,
                self._base,
                base_folder=data / "base",
                experts=artifact_in(data, gated.experts),
                router=artifact_in(data, gated.router),
            )
        system = params.systems[kind]
        return build_system(
            system, self._inputs(artifact_in(data, system.artifact), list(params.tasks))
        )

    def _inputs(self, artifact: Path, tasks: list[str]) -> Inputs:
        data, seed = self._data, self._params.seed
        return Inputs(self._base, data / "base", data / "adapters", artifact, sorted(tasks), seed)


def artifact_in(data: Path, artifact: str) -> Path:
    """Return where an artifact of params.yaml, a path under data/, stands in a folder."""
    try:
        return data / Path(artifact).relative_to("data")
    except ValueError as error:
        raise ParamsError(
            f"params.yaml: the artifact {artifact} is no path under data/: it is only evaluated"
        ) from error


def _check_name(name: str, params: Params) -> None:
    kind, told, task = name.partition(":")
    if name == "base":
        return
    if kind == "single":
        named(params.tasks, task, "tasks")
        return
    if kind in params.arrow:
        raise ParamsError(f"params.yaml: arrow.{kind} weighs token by token: it is only evaluated")
    known = {**params.systems, **params.gated_systems}
    if kind not in known:
        raise ParamsError(
            f"params.yaml: no systems.{kind}; there are: base, single:TASK, {choices(known)}"
        )
    found = known[kind]
    where = f"params.yaml: systems.{kind}"
    if isinstance(found, FusionRoute):
        raise ParamsError(f"{where} makes an adapter for each text: it is only evaluated")
    if isinstance(found, ByTaskRoute | OwnExpertRoute):
        if not told:
            example = f"{kind}:{min(params.tasks)}"
            raise ParamsError(f"{where} is told the task: name it, such as {example}")
        named(params.tasks, task, "tasks")
    elif told:
        raise ParamsError(f"{where} is not told the task: leave out :{task}")
