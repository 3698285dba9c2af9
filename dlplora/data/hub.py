"""Data sets and models of the Hugging Face hub, by pinned revision, and data sets in folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.data.checksums import check_pin, data_folder_sha256
from dlplora.data.items import BadRowError, joined
from dlplora.data.values import UnreadableValueError, value_to_text
from dlplora.errors import SourceError, choices, is_disk_full, one_line
from dlplora.params.inputs import DatasetFolder, DatasetMember, HubDataset, Keys
from dlplora.words import Advance

_ADVICE = "check the name, the revision and the network, then run the same command again"


def download_model(
    identity: str, revision: str, *, patterns: Sequence[str], downloads: Path
) -> Path:
    """Return the folder of a model of the hub, downloaded once; only files of these patterns."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            identity,
            revision=revision,
            allow_patterns=list(patterns),
            cache_dir=downloads / "hub",
        )
    except (OSError, ValueError) as error:  # all of the hub's own errors are one of them
        if is_disk_full(error):
            raise
        raise _unreachable(identity, revision, error) from error
    return Path(folder)


def read_datasets(
    source: HubDataset | DatasetFolder, *, downloads: Path, advance: Advance
) -> dict[str, list[dict[str, Any]]]:
    """Read the tasks of a source as raw items; `advance` is called once for each.

    Labels that the data set knows by name are given by name.
    """
    found = {}
    for name, member in source.members.items():
        found[name] = _read_member(source, member, downloads)
        advance(task=name)
    return found


def _read_member(
    source: HubDataset | DatasetFolder, member: DatasetMember, downloads: Path
) -> list[dict[str, Any]]:
    path, loaded = _load(source, member, downloads)
    keys = member.keys
    columns = [*keys.context, keys.question, keys.answer, *([keys.options] if keys.options else [])]
    if missing := sorted(set(columns) - set(loaded.column_names)):
        raise SourceError(
            f"{path}: no column {missing[0]!r}; there are: {choices(loaded.column_names)}"
        )
    names = {column: _label_names(loaded.features[column]) for column in columns}
    return [
        _raw_item(
            path, number, {column: _named(row[column], names[column]) for column in columns}, keys
        )
        for number, row in enumerate(loaded, start=1)
    ]


def _raw_item(path: str, number: int, row: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Return a row as a raw file holds it, scalars as the text that they are read as."""
    try:
        question = row[keys.question]
        if keys.context:
            question = joined(row, keys.question, (*keys.context, keys.question))
        item = {"Q": _readable(question), "A": _readable(row[keys.answer])}
        return item | ({"options": _readable(row[keys.options])} if keys.options else {})
    except (BadRowError, UnreadableValueError) as error:
        raise SourceError(f"{path}: row {number} has {error}".replace("has has", "has")) from error


def _readable(value: Any) -> Any:
    """Return a value as JSON holds it."""
    if isinstance(value, list):
        return [_readable(part) for part in value]
    if isinstance(value, dict):
        return {name: _readable(part) for name, part in value.items()}
    return value_to_text(value)


def _load(
    source: HubDataset | DatasetFolder, member: DatasetMember, downloads: Path
) -> tuple[str, Any]:
    """Return where a split of a data set comes from, and it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it, too
    if isinstance(source, HubDataset):
        path, revision = source.id, source.revision
        if Path(path).exists():  # datasets would read it instead, whatever the revision
            raise SourceError(f"{path}: stands here as a file or folder; expected an id of the hub")
    else:
        folder, revision = Path(source.path).resolve(), None
        if not folder.is_dir():
            raise SourceError(f"{folder}: no such folder; expected one with files of data")
        check_pin(folder, data_folder_sha256(folder), source.sha256, section="sources")
        path = str(folder)
    try:
        loaded = datasets.load_dataset(
            path,
            member.config,
            split=member.split,
            revision=revision,
            cache_dir=str(downloads / "datasets"),
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if is_disk_full(error):
            raise
        if revision is not None:
            raise _unreachable(path, revision, error) from error
        reason = one_line(error.__cause__ or error)
        raise SourceError(f"{path}: datasets cannot read it: {reason}") from error
    return path, loaded


def _label_names(feature: Any) -> list[str] | None:
    """Return the names of a column of labels or lists of them, or None for any other column."""
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    if names and isinstance(value, int):
        return names[value] if value >= 0 else None
    return value


def _unreachable(identity: str, revision: str, error: Exception) -> SourceError:
    return SourceError(
        f"{identity} at {revision[:12]} could not be had from the Hugging Face hub: "
        f"{one_line(error)}; {_ADVICE}"
    )
