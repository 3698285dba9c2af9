"""What benchmarks share: their results as a file, with what they were measured on; tokenizers."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dlplora.data.prompts import ChatFormat
from dlplora.runtime import Place

RESULTS = Path(__file__).parent / "results"


def write_results(
    name: str, found: Mapping[str, Any], *, place: Place, rounds: int, libraries: tuple[str, ...]
) -> dict[str, Any]:
    """Write and print what was found, and where, by which libraries; return all that."""
    told = {
        "device": place.device.type,
        "dtype": str(place.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **found,
        "rounds": rounds,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {library: version(library) for library in libraries},
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(told, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
    return told


def transformers_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerFast:
    """Return a base model's tokenizer as other libraries take it."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=chat.tokenizer,
        eos_token=chat.tokenizer.id_to_token(chat.end_id),
        pad_token=chat.tokenizer.id_to_token(chat.pad_id),
    )
