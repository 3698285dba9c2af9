"""Stage `embedder`: fetch a sentence embedder that retrieval reads by."""

from pathlib import Path

from dlplora.embedders import make_embedder
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.scratch import DOWNLOADS
from dlplora.stage import run, write_timing


def main(name: str, out: Path, timing: Path) -> None:
    """Write the embedder NAME to OUT."""
    params = load_params()
    make_embedder(named(params.embedders, name, "embedders"), downloads=DOWNLOADS, out=out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
