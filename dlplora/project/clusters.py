"""The clusters of tasks that experts are trained for, in params.yaml."""

import copy
from collections.abc import Sequence

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from dlplora.errors import ParamsError
from dlplora.project.files import Project, drop, dump


def join_cluster(params: CommentedMap, task: str) -> None:
    """Put a task into the smallest cluster, of equals the first, if there is any."""
    if params["experts"]:
        smallest = min(params["experts"].values(), key=lambda cluster: len(cluster["tasks"]))
        smallest["tasks"].append(task)


def leave_cluster(params: CommentedMap, task: str) -> None:
    """Take a task out of its cluster, and a cluster that is empty then out of all systems."""
    for name, cluster in list(params["experts"].items()):
        if task not in cluster["tasks"]:
            continue
        cluster["tasks"].remove(task)
        if not cluster["tasks"]:
            drop(params["experts"], name)
            for system in _systems(params):
                system["clusters"].remove(name)


def set_clusters(project: Project, clusters: Sequence[Sequence[str]]) -> list[str]:
    """Replace the clusters of params.yaml, in all systems too; return their names.

    Each has the other settings of the first that was there; `ParamsError` if there was none.
    """
    params = project.read()
    if not params["experts"]:
        raise ParamsError(
            "params.yaml: experts is empty; add one entry, as suites/compare.yaml has, whose "
            "settings all clusters get"
        )
    first = next(iter(params["experts"].values()))
    names = [f"cluster_{number}" for number in range(1, len(clusters) + 1)]
    for old in list(params["experts"]):
        drop(params["experts"], old)
    for name, tasks in zip(names, clusters, strict=True):
        params["experts"][name] = copy.deepcopy(first)
        params["experts"][name]["tasks"] = _flow(tasks)
    for system in _systems(params):
        system["clusters"] = _flow(names)
    params["experts"].fa.set_block_style()
    project.write(dump(params))
    return names


def _systems(params: CommentedMap) -> list[CommentedMap]:
    """Return the systems that name clusters."""
    return [system for system in params["systems"].values() if "clusters" in system]


def _flow(values: Sequence[str]) -> CommentedSeq:
    listed = CommentedSeq(values)
    listed.fa.set_flow_style()
    return listed
