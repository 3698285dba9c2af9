"""Who may see the pages, and what they may send."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.answering import write_answering_project
from tests.app.running import app_of


@pytest.fixture
def small(tmp_path: Path, root: Path) -> Path:
    """A project with a tiny model."""
    write_answering_project(root, folder := tmp_path / "project")
    return folder


def test_the_pages_load_no_model_libraries(root: Path) -> None:
    script = (
        "import sys, dlplora.app.server, dlplora.app.pages\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_another_name_of_this_machine_and_other_sites_are_refused(
    small: Path, tmp_path: Path
) -> None:
    """A web page could lead a browser here by a name of its own."""
    with app_of(small, tmp_path) as (address, _):
        assert httpx.get(address).status_code == 200
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
        elsewhere = {"Origin": "http://evil.example"}
        assert httpx.post(f"{address}/gradio_api/upload", headers=elsewhere).status_code == 403
        secret = small / "params.yaml"
        for path in (secret, f"{small}/.scratch/../params.yaml"):
            assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)


def test_a_password_is_asked_for(small: Path, tmp_path: Path) -> None:
    with app_of(small, tmp_path, PASSWORD="open sesame") as (address, _):
        assert httpx.get(f"{address}/config").status_code == 401
        file = {"files": ("a.json", b"[]")}
        assert httpx.post(f"{address}/gradio_api/upload", files=file).status_code == 401
        login = f"{address}/login"
        wrong = {"username": "dlplora", "password": "no"}
        assert httpx.post(login, data=wrong).status_code == 400
        right = httpx.post(login, data={"username": "dlplora", "password": "open sesame"})
        assert right.status_code == 200
        assert httpx.get(f"{address}/config", cookies=right.cookies).status_code == 200


def test_an_upload_that_is_too_large_is_refused(small: Path, tmp_path: Path) -> None:
    with app_of(small, tmp_path, MAX_FILE_MIB="1") as (address, _):
        small = {"files": ("a.json", json.dumps([{"Q": "a", "A": "b"}]).encode())}
        assert httpx.post(f"{address}/gradio_api/upload", files=small).status_code == 200
        large = {"files": ("a.json", b"x" * (2**20 + 2**16))}
        assert httpx.post(f"{address}/gradio_api/upload", files=large).status_code == 413
