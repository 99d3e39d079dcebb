"""Operation modes in which a forward is followed without data."""

import torch

from ollm_core.model.operation_modes import AllAreTrue, Marks


def test_all_that_is_chosen_from_is_chosen():
    """Masks without data choose everything, by `nonzero` and by indexing."""
    mask = torch.empty(2, 3, dtype=torch.bool, device="meta")
    states = torch.empty(2, 3, 5, device="meta")
    with AllAreTrue():
        assert mask.nonzero().shape == (6, 2)
        assert states[mask].shape == (6, 5)
        assert states[:, mask[0]].shape == (2, 3, 5)
        assert bool(mask.any())


def test_numbers_that_are_asked_for():
    """Each is 1, and what is there is told as it is."""
    with AllAreTrue():
        assert torch.empty(1, dtype=torch.int64, device="meta").item() == 1
        assert torch.tensor([7]).item() == 7
        assert torch.tensor([0, 3]).nonzero().tolist() == [[1]]


def test_marks_go_from_tensor_to_tensor():
    """Through every operation, to each of its results, and not to what is made of others."""
    first, other = torch.ones(2), torch.ones(2)
    marks = Marks()
    marks.add(first, "first")
    with marks:
        halves = (first + other).chunk(2)
        apart = other * 2
    assert [set(marks.of(one)) for one in halves] == [{"first"}] * 2
    assert not marks.of(apart)
