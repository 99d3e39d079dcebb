"""A family on this adapter, which says in a few lines of data where its checkpoints or its module
tree are not as transformers has them.
"""

from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from trial import run_ours, run_reference, saved, steps

import ollm
from ollm_adapter_transformers import FamilyAdapter
from ollm_core import Capability, CatalogEntry, CheckpointError, UnsupportedError
from ollm_core.testing import PluginError, Registry, as_opened, open_checkpoint, read_config

ENTRY = CatalogEntry("mix", "some/mix", 1, 2, {"model_type": "mixtral"})


class Opt(FamilyAdapter):
    """One with a name, and nothing else."""

    name = "opt"
    model_types = ("opt",)

    def tiny_config(self):
        return {"model_type": "opt"}


class OldOpt(Opt):
    """As checkpoints of before had it: other names, and numbers that nothing reads."""

    name = "old-opt"
    renamed = MappingProxyType({r"^decoder\.": "model.decoder.", r"\.out\.": ".out_proj."})
    ignored = (r"\.running_mean$", "^version$")


class Dense(FamilyAdapter):
    """One whose experts are read with the layer that they are of."""

    name = "dense"
    model_types = ("mixtral",)
    paths = MappingProxyType({"experts": ""})

    def catalog(self):
        return (ENTRY,)

    @property
    def capabilities(self):
        return {"drafts": Capability("unsupported", "it has been told so")}

    def tiny_config(self):
        return {"model_type": "mixtral"}


@pytest.fixture(scope="module")
def old_opt():
    """transformers' model, and the directory of its checkpoint with the names of before."""
    with saved("opt", torch.float32) as (model, directory):
        path = directory / "model.safetensors"
        tensors = {
            name.removeprefix("model.").replace(".out_proj.", ".out."): value
            for name, value in load_file(path).items()
        }
        more = {"version": torch.ones(1), "decoder.layers.0.running_mean": torch.ones(3)}
        save_file({**tensors, **more}, path, {"format": "pt"})
        yield model, directory


def test_other_names_and_tensors_too_many(old_opt):
    """Bit for bit the model whose tensors have been renamed."""
    model, directory = old_opt
    ids = torch.randint(3, 250, (2, 40))
    options = {"device": "cpu", "precision": "exact", "registry": Registry.of(OldOpt())}
    with ollm.load(directory, **options) as ours:
        found = run_ours(ours, ids, steps(40))
    assert torch.equal(found, run_reference(model, ids, steps(40)))
    names = open_checkpoint(directory).tensors
    plan = OldOpt().weights(read_config(directory), names)
    assert plan.ignored == {"version", "decoder.layers.0.running_mean"}


def test_without_its_data_the_checkpoint_is_refused(old_opt):
    """By the name of a tensor."""
    with pytest.raises(CheckpointError, match=r"lacks what makes .* and has 'decoder"):
        ollm.load(old_opt[1], device="cpu", registry=Registry.of(Opt()))


def test_other_paths():
    """In place of what is seen in the module tree; one that is not there is told."""
    adapter = Dense()
    with saved("mixtral", torch.bfloat16) as (_, directory):
        with ollm.load(directory, device="cpu", registry=Registry.of(adapter)) as model:
            assert not model.weights.expert_units
        for part, wrong in {"head": PluginError, "layers": UnsupportedError}.items():
            adapter.paths = {part: "model.nothing"}
            with pytest.raises(wrong, match=r"model\.nothing"):
                ollm.load(directory, device="cpu", registry=Registry.of(adapter))
        adapter.paths = {"layers": "model.layers"}
        assert adapter.layout(read_config(directory)).num_layers == 4


def test_that_of_one_model_is_of_the_family():
    """Its name, what it declares, and what it is given; the family's own has looked at nothing."""
    adapter = Dense()
    one = adapter.for_model({"model_type": "mixtral", "dtype": "bfloat16"})
    assert isinstance(one, Dense)
    assert one.capabilities["drafts"].reason == "it has been told so"
    assert (one.unstated_dtype, adapter.unstated_dtype) == ("bfloat16", "")
    assert one.for_model({}) is one
    assert adapter.built_model({"model_type": "mixtral"}, torch.float32) is None


def test_what_core_adds_hides_nothing():
    """The suite sees a catalog, too, of the adapter with what core finds of a model."""
    adapter = Dense()
    opened = as_opened(adapter, tiny_config("mixtral").to_dict())
    assert opened.catalog() == adapter.catalog() == (ENTRY,)
    assert set(opened.capabilities) == {"drafts"}
