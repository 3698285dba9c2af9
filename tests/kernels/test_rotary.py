"""Rotary embeddings against their reference, and which functions of transformers it knows."""

from functools import partial
from types import ModuleType

import pytest
import torch
from transformers import Phi3Config, PhiConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2

from dlplora.kernels.autograd import apply
from dlplora.kernels.rotary import Rotary, fast_function, matches, reference, rotates_parts
from tests.kernels.beside import assert_like_reference, drawn
from tests.tiny import tiny_sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    angles = drawn(2, 1, 5, 8, seed=1)
    assert_like_reference(
        partial(apply, Rotary),
        reference,
        learned=[drawn(2, 3, 5, 8)],
        fixed=[angles.cos(), angles.sin()],
        dtype=dtype,
    )


@pytest.mark.parametrize("home", [modeling_llama, modeling_qwen2, modeling_phi3])
def test_the_usual_function_is_known(home: ModuleType) -> None:
    assert matches(home)


@pytest.mark.parametrize("home", [modeling_cohere, modeling_gptj])
def test_functions_that_rotate_otherwise_are_not(home: ModuleType) -> None:
    assert not matches(home)


def test_whether_heads_are_rotated_in_part_is_told_by_function_and_configuration() -> None:
    half, whole = (Phi3Config(**tiny_sizes(32), partial_rotary_factor=x) for x in (0.5, 1.0))
    assert rotates_parts(modeling_phi3, half)
    assert not rotates_parts(modeling_phi3, whole)
    assert not rotates_parts(modeling_phi, PhiConfig(**tiny_sizes(32)))  # the model cuts heads


def test_heads_that_are_rotated_in_part_are_left_to_the_own_function() -> None:
    query, key, (cos, sin) = drawn(1, 2, 3, 8), drawn(1, 1, 3, 8), drawn(2, 1, 3, 4)
    own = modeling_phi3.apply_rotary_pos_emb(query, key, cos, sin)
    found = fast_function(modeling_phi3)(query, key, cos, sin)
    assert all(map(torch.equal, found, own))
