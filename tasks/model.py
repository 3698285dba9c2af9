"""Stage `model`: put together what serves, the base model apart."""

from pathlib import Path

from dlplora.lifecycle.model import write_model
from dlplora.params.load import load_params
from dlplora.params.overrides import served_of
from dlplora.stage import run, write_timing


def main(
    base: Path,
    examples: Path,
    adapters: Path,
    routers: Path,
    router_data: Path,
    out: Path,
    timing: Path,
) -> None:
    """Write a model to OUT: ADAPTERS and ROUTERS of BASE, and what they learned from."""
    write_model(
        out,
        served_of(load_params()),
        base=base,
        examples=examples,
        adapters=adapters,
        routers=routers,
        calibration=router_data / "validation.parquet",
    )
    write_timing(timing)


if __name__ == "__main__":
    run(main)
