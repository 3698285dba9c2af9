"""Stage `code`: fingerprint each stage's code and libraries, so that it reruns when they change."""

from dataclasses import asdict
from pathlib import Path

from dlplora.fingerprints import stage_codes
from dlplora.records.files import write_json, written_folder
from dlplora.stage import run


def main(out: Path) -> None:
    """Write one file for each stage to OUT: its files by hash, its libraries by version."""
    with written_folder(out) as aside:
        for stage, code in stage_codes(Path()).items():
            write_json(aside / f"{stage}.json", asdict(code))


if __name__ == "__main__":
    run(main)
