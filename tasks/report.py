"""Stage `report`: draw the report."""

import logging
from pathlib import Path

from dlplora.params.load import load_params
from dlplora.params.names import router_names
from dlplora.report.inputs import read_inputs
from dlplora.report.page import write_report
from dlplora.report.stages import timed_stages
from dlplora.stage import run

logger = logging.getLogger(f"dlplora.{__name__}")


def main(
    comparison: Path, findings: Path, adapters: Path, routers: Path, timings: Path, out: Path
) -> None:
    """Draw the COMPARISON, with what earlier stages found, learned and took, to OUT."""
    params = load_params()
    inputs = read_inputs(
        comparison,
        findings,
        adapters,
        routers,
        timings,
        tasks=sorted(params.tasks),
        unseen_tasks=sorted(params.unseen_tasks),
        router_names=router_names(params),
        timed_stages=timed_stages(params),
        runtime=params.runtime.model_dump(),
    )
    write_report(inputs, out)
    logger.info("the report is %s", out / "index.html")


if __name__ == "__main__":
    run(main)
