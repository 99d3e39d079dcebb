"""Which experts core may run one by one."""

import pytest
import torch
from torch import nn

from ollm_core.model.apart import run_apart


class Experts(nn.Module):
    """Two products for each token, added up in `dtype`; None: that of the states."""

    def __init__(self, dtype=None):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(4, 12, 8))
        self.down_proj = nn.Parameter(torch.empty(4, 8, 12))
        self.dtype = dtype

    def forward(self, states, chosen, weights):
        total = torch.zeros_like(states, dtype=self.dtype)
        mask = nn.functional.one_hot(chosen, num_classes=4).permute(2, 1, 0)
        for expert in mask.sum(dim=(-1, -2)).nonzero().flatten():
            place, token = torch.where(mask[expert])
            found = nn.functional.linear(states[token], self.up_proj[expert])
            found = nn.functional.linear(found.relu(), self.down_proj[expert])
            found = found * weights[token, place, None].to(found.dtype)
            total.index_add_(0, token, found.to(total.dtype))
        return total.to(states.dtype)


class Strange(Experts):
    def forward(self, states, chosen, weights):
        raise ValueError("not like this")


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        (Experts, True),
        (lambda: Experts(torch.float32), False),
        (Strange, False),
    ],
)
def test_sums_in_the_dtype_of_the_result(kind, apart):
    """What is added up in float32 and rounded once cannot be added up rounded."""
    with torch.device("meta"):
        experts = kind()
    assert run_apart(experts) is apart
