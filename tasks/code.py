"""Stage `code`: fingerprint the code of every stage, so that each reruns when its own changes."""

from pathlib import Path

from dlplora.fingerprints import fingerprints
from dlplora.records.files import write_json, written_folder
from dlplora.stage import run


def main(out: Path) -> None:
    """Write one file for each stage to OUT: what it is made of, with its hashes."""
    with written_folder(out) as aside:
        for stage, files in fingerprints(Path()).items():
            write_json(aside / f"{stage}.json", files)


if __name__ == "__main__":
    run(main)
