"""Stage `fetch`: read the wanted tasks out of one source's archive."""

from pathlib import Path

from dlplora.data.fetch import fetch
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.records.files import write_json, written_folder
from dlplora.scratch import DOWNLOADS
from dlplora.stage import progress, run, write_timing


def main(source: str, out: Path, timing: Path) -> None:
    """Write the raw items of each task of SOURCE to OUT."""
    params = named(load_params().sources, source, "sources")
    with progress(f"fetch {source}", total=len(params.members)) as advance:
        fetched = fetch(params, downloads=DOWNLOADS, advance=advance)
    with written_folder(out) as aside:
        for task, items in sorted(fetched.items()):
            write_json(aside / f"{task}.json", items)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
