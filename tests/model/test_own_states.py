"""States beside transformers' cache: where they are put, and what is taken out."""

import torch
from torch import nn

from ollm_core.model.own_states import StatePlaces, attributes_of, states_in


class Layer(nn.Module):
    """Keeps a state as an attribute of a part."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.part.state = None


def test_attributes_are_put_taken_and_forgotten():
    """Only those that are tensors, or none yet, can be states."""
    layer, value = Layer(), torch.ones(1, 3)
    found = dict(attributes_of(layer))
    assert found["part", "state"] is None
    assert ("part", "in_features") not in found
    places = StatePlaces((("part", "state"),))
    assert places
    places.put(layer, [value])
    assert layer.part.state is value
    assert places.taken(layer, None, value) == [value]
    places.put(layer, ())
    assert layer.part.state is None


def test_an_argument_that_is_returned_anew():
    """It is found by its shapes, and kept in the dtypes of what was given, as the model does."""
    given = torch.zeros(1, 3).bfloat16(), torch.zeros(1, 2)
    output = torch.ones(1, 5, 8), None, (torch.ones(1, 3), torch.ones(1, 2))
    assert states_in(given, output) == 2
    assert states_in(given, output[0]) == 0
    assert states_in(given[:1], output) == 0
    assert states_in(given[::-1], output) == 0
    assert states_in((), (output[0], ())) == 0
    places = StatePlaces(argument="state", number=2)
    assert places
    assert not StatePlaces()
    taken = places.taken(Layer(), given, output)
    assert [one.dtype for one in taken] == [torch.bfloat16, torch.float32]
    assert all(one.all() for one in taken)
