"""What a report is drawn from, read from the folders of the stages before it."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dlplora.cpu import cpu_flags, cpu_name
from dlplora.records.comparison import Comparison, read_comparisons, read_novelties
from dlplora.records.files import read_json
from dlplora.records.findings import Findings, read_findings
from dlplora.records.novelty import Novelties
from dlplora.records.training import AdapterTraining, read_adapter_training

_VERSIONS = ("torch", "transformers", "peft", "dvc")


@dataclass(frozen=True)
class Timing:
    """What one stage took: wall time, its process's peak memory, and seconds of parts by name."""

    stage: str
    item: str
    seconds: float
    memory_mib: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Everything that a report shows."""

    comparison: Comparison
    others: Mapping[str, Comparison]  # by setting
    novelties: Novelties
    findings: Mapping[str, Findings]
    trainings: Mapping[str, AdapterTraining]
    routers: Mapping[str, Mapping[str, Any]]
    timings: Sequence[Timing]
    machine: Mapping[str, str]


def read_inputs(
    comparison: Path,
    findings: Path,
    adapters: Path,
    routers: Path,
    timings: Path,
    *,
    tasks: Sequence[str],
    unseen_tasks: Sequence[str],
    router_names: Sequence[str],
    timed_stages: Sequence[tuple[str, str]],
    runtime: Mapping[str, Any],
) -> Inputs:
    """Read what the listed tasks, routers and stages left; other files are not looked at."""
    iid, *others = read_comparisons(comparison)
    return Inputs(
        comparison=iid,
        others={found.setting: found for found in others},
        novelties=read_novelties(comparison, unseen_tasks),
        findings={task: read_findings(findings / f"{task}.json") for task in tasks},
        trainings={task: read_adapter_training(adapters / task) for task in tasks},
        routers={name: read_json(routers / name / "training.json") for name in router_names},
        timings=[
            Timing(stage, entry, **read_json((timings / stage / entry).with_suffix(".json")))
            for stage, entry in timed_stages
        ],
        machine=machine() | {name: str(value) for name, value in runtime.items()},
    )


def machine() -> dict[str, str]:
    """Describe this machine: processor, cores, memory, versions."""
    flags = cpu_flags()
    wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    described = {
        "processor": cpu_name(),
        "instructions": ", ".join(wide) or "no AVX-512",
        "cores": str(os.cpu_count()),
        "memory": f"{memory_gib:.0f} GiB",
        "python": platform.python_version(),
    }
    return described | {name: version(name) for name in _VERSIONS}
