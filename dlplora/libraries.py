"""The libraries that a stage computes with: the versions that are pinned, and those installed."""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dlplora.errors import DlpLoraError, choices

CONSTRAINTS = Path("constraints.txt")
# Names of packages that are not those of their distributions.
_DISTRIBUTIONS = {
    "ruamel": "ruamel-yaml",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
}
# Libraries that others compute with, and that no module of ours imports.
_REQUIRED = {
    "datasets": ("pandas",),
    "nevergrad": ("bayesian-optimization", "cma"),
    "sacrebleu": ("ipadic", "mecab-python3"),
    "scikit-learn": ("scipy",),
    "transformers": ("jinja2", "tokenizers"),
}
_NO_MATTER = {"grimp", "psutil"}  # they read code and processes, and decide no result


def pinned_versions(packages: Iterable[str], constraints: Path) -> dict[str, str]:
    """Return the pinned version of each library, by its distribution, for imported packages.

    Raises `DlpLoraError` if the constraints pin none.
    """
    pins = {
        _normal(name): pin.strip()
        for name, equal, pin in (
            line.split("#")[0].partition("==") for line in constraints.read_text().splitlines()
        )
        if equal
    }
    found: set[str] = set()
    left = {_distribution(package) for package in packages if package not in _NO_MATTER}
    while left:
        found |= left
        left = {other for name in left for other in _REQUIRED.get(name, ())} - found
    if missing := found - pins.keys():
        raise DlpLoraError(f"{constraints}: no version of {choices(missing)}; pin it with ==")
    return {name: pins[name] for name in sorted(found)}


def check_installed(pins: Mapping[str, str]) -> None:
    """Raise `DlpLoraError` if an installed library is not of its pinned version.

    Local labels such as +cpu do not count.
    """
    odd = [
        f"{name} {found or 'missing'} (pinned: {pin})"
        for name, pin in pins.items()
        if (found := _installed(name)) != _unlabelled(pin)
    ]
    if odd:
        raise DlpLoraError(
            f"installed libraries differ from {CONSTRAINTS}: {'; '.join(odd)}; run `make env`, or "
            f"pin what is installed and run again"
        )


def _installed(name: str) -> str | None:
    try:
        return _unlabelled(version(name))
    except PackageNotFoundError:
        return None


def _unlabelled(version: str) -> str:
    return version.partition("+")[0]


def _distribution(package: str) -> str:
    top = package.partition(".")[0]
    return _DISTRIBUTIONS.get(top, _normal(top))


def _normal(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
