"""The libraries that stages compute with: which versions are pinned, and whether they are there."""

from importlib.metadata import version
from pathlib import Path

import pytest

from dlplora.errors import DlpLoraError
from dlplora.libraries import check_installed, pinned_versions


def test_pinned_versions_are_found_by_the_names_of_packages(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("Scikit_Learn==1.2  # a comment\nscipy==3.4+cpu\nruamel.yaml==5\nother==6\n")
    found = pinned_versions(["sklearn", "ruamel", "psutil"], file)
    assert found == {"ruamel-yaml": "5", "scikit-learn": "1.2", "scipy": "3.4+cpu"}


def test_a_library_without_a_pin_is_named(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("numpy>=2\n")
    with pytest.raises(DlpLoraError, match=r"constraints\.txt: no version of numpy, torch; pin it"):
        pinned_versions(["torch", "numpy"], file)


def test_local_labels_do_not_count_and_other_or_missing_versions_are_named() -> None:
    own = version("numpy")
    check_installed({"numpy": own, "pyarrow": f"{version('pyarrow')}+cpu"})
    with pytest.raises(DlpLoraError) as caught:
        check_installed({"numpy": "0.1", "no-such-library": "2"})
    assert str(caught.value).startswith(
        f"installed libraries differ from constraints.txt: numpy {own} (pinned: 0.1); "
        f"no-such-library missing (pinned: 2); run `make env`"
    )
