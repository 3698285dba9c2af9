"""Two machines that differ in clock, language, user and hash seed write the same bytes."""

from pathlib import Path

from tests.project import Checkout

THERE = {
    "TZ": "Pacific/Auckland",
    "LC_ALL": "tr_TR.UTF-8",
    "LANG": "de_DE.UTF-8",
    "PYTHONHASHSEED": "2",
    "USER": "ben",
    "LOGNAME": "ben",
    "HOME": "/nonexistent",
}


def test_clock_language_user_and_hash_seed_change_no_byte(methods: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    there = Checkout(root, THERE | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")})
    Checkout(methods).run("git", "clone", "-q", str(methods), str(root))
    (root / "dvc.lock").unlink()
    there.repro()
    assert there.hashes() == Checkout(methods).hashes()
