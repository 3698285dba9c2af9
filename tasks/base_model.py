"""Stage `base_model`: convert the base model to safetensors, once."""

from functools import partial
from pathlib import Path

from dlplora.conversion import make_base
from dlplora.engine.check import check_reading
from dlplora.params.load import load_params
from dlplora.runtime import set_up
from dlplora.scratch import DOWNLOADS
from dlplora.stage import progress, run, write_timing
from dlplora.training.check import check_training


def main(out: Path, timing: Path) -> None:
    """Write the base model, its tokenizer and its card to OUT."""
    params = load_params()
    place = set_up(params.runtime, seed=params.seed)
    with progress("base_model: convert", total=2) as advance:
        make_base(
            params.base_model,
            place=place,
            downloads=DOWNLOADS,
            out=out,
            advance=advance,
            checks=(check_reading, partial(check_training, kernels=params.runtime.kernels)),
        )
    write_timing(timing)


if __name__ == "__main__":
    run(main)
