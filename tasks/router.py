"""Stage `router`: train one router."""

from pathlib import Path

from dlplora.data.balance import read_labelled
from dlplora.params import load_params, named
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing
from dlplora.training.router import train_router


def main(name: str, router_data: Path, base: Path, out: Path, timing: Path) -> None:
    """Train the router NAME on ROUTER_DATA, reading by the tokenizer of BASE; write it to OUT."""
    params = load_params()
    set_up(params.runtime, seed=params.seed)
    trained = train_router(
        read_labelled(router_data / "train.parquet"),
        read_labelled(router_data / "validation.parquet"),
        named(params.routers, name, "routers"),
        base=base,
        seed=params.seed,
        title=f"router {name}",
    )
    trained.save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
