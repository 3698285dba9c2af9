"""Stage `merge`: merge the adapters of all tasks into one."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing
from dlplora.training.merging import merge_adapters


def main(name: str, base: Path, adapters: Path, out: Path, timing: Path) -> None:
    """Merge the ADAPTERS of all tasks on BASE; write the merge NAME to OUT."""
    params = load_params()
    merge_adapters(
        load_base(base, place=set_up(params.runtime, seed=params.seed)),
        [adapters / task for task in sorted(params.tasks)],
        name=name,
        params=named(params.merges, name, "merges"),
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
