"""Language models taken out of multimodal checkpoints: the logits of the whole for text alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.families import SIZES, convert, write_family
from dlplora.models import load_base
from tests.device import float32_place, on_device

PLACE = float32_place()
IDS = on_device([[5, 6, 7, 8, 9], [9, 10, 11, 12, 3]])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_the_part_gives_the_logits_of_the_whole_and_holds_nothing_else(
    name: str, is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tie_word_embeddings", is_tied)
    write_family(name, tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    whole.to(PLACE.device)
    convert(tmp_path / "model", tmp_path / "base", PLACE)
    part = load_base(tmp_path / "base", place=PLACE).model
    with torch.inference_mode():
        expected = whole(input_ids=IDS).logits
        torch.testing.assert_close(part(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    parts = {path.split(".")[0] for path, _ in part.named_parameters()}
    assert parts == ({"model"} if is_tied else {"model", "lm_head"})
    assert not any("vision" in path for path, _ in part.named_modules())
