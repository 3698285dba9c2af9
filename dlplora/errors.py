"""What can go wrong through a user's input.

    DlpLoraError
    ├── ParamsError    params.yaml or a suite holds a value that cannot be used
    ├── DataError      a file of questions and answers cannot be read or holds a bad item
    ├── SourceError    an archive or folder that inputs come from is missing, changed or broken
    ├── ModelError     the base model or its tokenizer cannot be used
    ├── AdapterError   an adapter cannot be read, does not fit the base or cannot be fused
    ├── RouterError    a router does not fit the pool or the base model
    └── TrainingError  a training cannot go on: a loss is not finite, or memory is out

Each message is one line: which file or value, what was found, what was expected.
They are raised where the value is used and caught only at the edge (`dlplora.stage`, the CLI).
"""


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


class TrainingError(DlpLoraError):
    """A training cannot go on: a loss or gradient is not finite, or memory is out."""


def choices(names: object) -> str:
    """List names for the end of an error message: `a, b, c`."""
    return ", ".join(sorted(map(str, names))) or "none"  # type: ignore[call-overload]
