"""From a source in params to the raw items of its tasks: the look-up table of kinds."""

from pathlib import Path
from typing import Any

from dlplora.data.hub import read_datasets
from dlplora.data.sources import download_package, read_bigbench
from dlplora.params.inputs import BigbenchPackage, Source
from dlplora.words import Advance


def fetch(source: Source, *, downloads: Path, advance: Advance) -> dict[str, list[dict[str, Any]]]:
    """Read the raw items of each task of a source; `advance` is called once for each task."""
    if not isinstance(source, BigbenchPackage):
        return read_datasets(source, downloads=downloads, advance=advance)
    archive = download_package(
        "bigbench", source.version, sha256=source.sha256, downloads=downloads
    )
    return read_bigbench(archive, source.members, advance=advance)
