"""Checksums that pin local files in params.yaml: models and folders of data."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dlplora.errors import SourceError
from dlplora.records.files import file_sha256

# What is read of a model's folder, and so what its fingerprint covers.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
# What is read of a sentence embedder's folder: its modules beside the transformer, too.
EMBEDDER_FILES = (
    *MODEL_FILES,
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]*_*/config.json",
    "[0-9]*_*/tokenizer.json",
    "[0-9]*_*/*.safetensors",
)


def pin_of(path: Path, *, with_code: bool) -> str:
    """Return the hash that pins a transformers folder, an embedder's, a GGUF file or data."""
    if path.is_dir():
        if has_modules(path):
            return embedder_sha256(path)
        is_model = (path / "config.json").is_file()
        return folder_sha256(path, with_code=with_code) if is_model else data_folder_sha256(path)
    if not path.is_file() or path.suffix.lower() != ".gguf":
        found = "a file of another kind" if path.exists() else "nothing"
        raise SourceError(f"{path}: found {found}; expected a folder or a .gguf file")
    return file_sha256(path)


def check_pin(path: Path, found: str, expected: str, *, section: str) -> None:
    """Raise `SourceError` unless a hash is the one that a section of params.yaml pins."""
    if found != expected:
        raise SourceError(f"{path}: found sha256 {found}; params.yaml: {section} has {expected}")


def folder_sha256(folder: Path, *, with_code: bool) -> str:
    """Return the hash of the names and contents of all that is read of a model's folder."""
    patterns = [*MODEL_FILES, "*.py"] if with_code else MODEL_FILES
    return _sha256_of(folder, _files(folder, patterns))


def has_modules(folder: Path) -> bool:
    """Tell whether a folder is one of sentence-transformers."""
    return (folder / "modules.json").is_file()


def embedder_sha256(folder: Path) -> str:
    """Return the hash of the names and contents of all that is read of an embedder's folder."""
    return _sha256_of(folder, embedder_files(folder))


def embedder_files(folder: Path) -> list[Path]:
    """List what is read of an embedder's folder."""
    return _files(folder, EMBEDDER_FILES)


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    if not any(file.suffix == ".safetensors" for file in files):
        raise SourceError(
            f"{folder}: found no .safetensors; expected a transformers folder with them (weights "
            f"in other formats are not read: they can hold code)"
        )
    return files


def data_folder_sha256(folder: Path) -> str:
    """Return the hash of the names and contents of all files of a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise SourceError(f"{folder}: found no files; expected a folder of data")
    return _sha256_of(folder, files)


def _sha256_of(folder: Path, files: Iterable[Path]) -> str:
    told = "".join(
        f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n" for file in files
    )
    return hashlib.sha256(told.encode()).hexdigest()
