"""Two machines that differ in clock, language, user and hash seed write the same bytes."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.tasks.test_pipeline import CODE, ROOT, Checkout, params
from tests.tiny import choices, opposites, write_raw, write_tiny_folder

HERE = {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1", "USER": "ann", "LOGNAME": "ann"}
THERE = {
    "TZ": "Pacific/Auckland",
    "LC_ALL": "tr_TR.UTF-8",
    "LANG": "de_DE.UTF-8",
    "PYTHONHASHSEED": "2",
    "USER": "ben",
    "LOGNAME": "ben",
    "HOME": "/nonexistent",
}
STAGES = ["router@mlp", "router@tfidf", "evaluate@dlp_mlp"]


def _hashes(folder: Path, environment: dict[str, str], sha256: str, base: Path) -> dict[str, str]:
    root = folder / "project"
    root.mkdir(parents=True)
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / name)  # type: ignore[operator]
    write_raw(root / "suites/opposites.json", opposites(70))
    write_raw(root / "suites/colours.json", choices(70))
    values = params(sha256, base)
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    checkout = Checkout(root, environment | {"DVC_SITE_CACHE_DIR": str(folder / "site")})
    checkout.run("git", "init", "-q")
    checkout.run("dvc", "init", "-q")
    checkout.run("dvc", "repro", *STAGES)
    return checkout.hashes()


@pytest.mark.timeout(300)
def test_clock_language_user_and_hash_seed_change_no_byte(tmp_path: Path) -> None:
    base = tmp_path / "tiny_base"
    sha256 = write_tiny_folder(base)
    here = _hashes(tmp_path / "here", HERE, sha256, base)
    there = _hashes(tmp_path / "there", THERE, sha256, base)
    assert len(here) > 10
    assert there == here
