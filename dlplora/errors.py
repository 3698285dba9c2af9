"""What can go wrong through a user's input.

    DlpLoraError
    ├── ParamsError    params.yaml or a suite holds a value that cannot be used
    ├── DataError      a file of questions and answers cannot be read or holds a bad item
    ├── SourceError    an archive or folder that inputs come from is missing, changed or broken
    ├── ModelError     the base model or its tokenizer cannot be used
    ├── AdapterError   an adapter cannot be read, does not fit the base or cannot be fused
    ├── RouterError    a router does not fit the pool or the base model
    │   └── UnknownAdapterError  a route names an adapter that is not there
    ├── TrainingError  a training cannot go on: a loss is not finite, or memory is out
    ├── GenerationError  a request asks for what cannot be generated
    │   ├── PromptTooLongError  the model cannot read the prompt together with the answer
    │   └── RequestFailedError  a request failed by no fault of its own
    └── of commands and flows, each beside what raises it: CommandError, WorktreeError, StageError,
        RegistryError, PartError, RunError, AppError, ServerError

Each message is one line: which file or value, what was found, what was expected.
They are raised where the value is used and caught only at the edge (`dlplora.stage`, the CLI).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class DlpLoraError(Exception):
    """A mistake in the inputs that the caller can act on."""


class ParamsError(DlpLoraError):
    """params.yaml or a suite holds a value that cannot be used."""


class DataError(DlpLoraError):
    """A file of questions and answers cannot be read or holds a bad item."""


class SourceError(DlpLoraError):
    """An archive or folder that inputs come from is missing, changed or broken."""


class ModelError(DlpLoraError):
    """The base model or its tokenizer cannot be used."""


class AdapterError(DlpLoraError):
    """An adapter cannot be read, does not fit the base model or cannot be fused."""


class RouterError(DlpLoraError):
    """A router does not fit the pool of adapters or the base model."""


class UnknownAdapterError(RouterError):
    """A route names an adapter that is not there, or no longer."""


class TrainingError(DlpLoraError):
    """A training cannot go on: a loss or gradient is not finite, or memory is out."""


class GenerationError(DlpLoraError):
    """A request asks for what cannot be generated."""


class PromptTooLongError(GenerationError):
    """A prompt of `num_tokens` and an answer of `new_tokens` are more than the model's `limit`."""

    def __init__(self, *, num_tokens: int, new_tokens: int, limit: int) -> None:
        self.num_tokens = num_tokens
        self.new_tokens = new_tokens
        self.limit = limit
        super().__init__(
            f"the prompt has {num_tokens:,} tokens and {new_tokens:,} may be generated; the model "
            f"reads {limit:,} in all"
        )


class RequestFailedError(GenerationError):
    """A request failed by no fault of its own: a defect, or a log that cannot be written."""


def unreadable(error: Exception) -> str:
    """Say why a file that the pipeline makes cannot be read; an absent one is yet to be made."""
    if isinstance(error, FileNotFoundError):
        what = error.filename or str(error)  # pyarrow names the file in its text alone
        return f"{what} is not there; `dlplora repro` makes it"
    return str(error)


def one_line(error: BaseException) -> str:
    """Return the kind of another library's error and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, of Python or of a library that wraps it, says that a disk is full."""
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def errors_as(kind: type[DlpLoraError], what: str) -> Iterator[None]:
    """Raise another library's errors within the block as ours, `what` first; not of a full disk."""
    try:
        yield
    except DlpLoraError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise kind(f"{what}: {one_line(error)}") from error


def choices(names: object) -> str:
    """List names for the end of an error message: `a, b, c`."""
    return ", ".join(sorted(map(str, names))) or "none"  # type: ignore[call-overload]
