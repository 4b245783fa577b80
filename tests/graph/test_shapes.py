"""How tensors lie in memory."""

from __future__ import annotations

import pytest
import torch

from fuse_pass.graph.shapes import is_permuted_contiguous, memory_order


@pytest.mark.parametrize(("value", "order"), [
    (torch.empty(3, 5, 7), [0, 1, 2]),
    (torch.empty(3, 5, 7).transpose(1, 2), [0, 2, 1]),
    (torch.empty(3, 5, 7).permute(2, 0, 1), [1, 2, 0]),
    (torch.empty(2, 3, 5, 7).to(memory_format=torch.channels_last), [0, 2, 3, 1]),
])  # fmt: skip
def test_a_permutation_of_a_new_tensor(value: torch.Tensor, order: list[int]) -> None:
    assert memory_order(value) == order
    assert is_permuted_contiguous(value)


@pytest.mark.parametrize("value", [torch.empty(3, 5)[:, :4], torch.empty(1, 5).expand(3, 5), torch.empty(6, 5)[::2]])
def test_gaps_and_repeats(value: torch.Tensor) -> None:
    assert not is_permuted_contiguous(value)
