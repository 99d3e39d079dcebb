"""What a registry finds by name: models, adapters, offers and capabilities."""

import pytest
from plugin_examples import statuses

from ollm_core import Capability, InputError, ModelAdapter, UnknownModelError, UnsupportedError
from ollm_core.plugins.registry import (
    CAPABILITIES,
    PluginInfo,
    limits,
    require,
)


def test_looks_up_models(site):
    """A config is opened by the adapter of its model_type, an id found in whatever case."""
    site.install("alpha")
    site.install("beta")
    registry = site.discover()
    assert registry.adapter_for({"model_type": "beta"}) is registry.adapters["beta"]
    adapter, entry = registry.find("ALPHA-small")
    assert (adapter.name, entry.id) == ("alpha", "alpha-Small")
    assert [
        (adapter.name, entry.id, plugin.distribution)
        for adapter, entry, plugin in registry.catalog()
    ] == [
        ("alpha", "alpha-Small", "ollm-adapter-alpha"),
        ("beta", "beta-Small", "ollm-adapter-beta"),
    ]


class Rest(ModelAdapter):
    """Claims what no other adapter names, and makes one of its own for each model."""

    name = "rest"
    model_types = ()
    claims_rest = True

    def for_model(self, config):
        made = Rest()
        made.model = config["model_type"]
        return made

    layout = weights = caches = tiny_config = None


def test_an_adapter_may_claim_the_rest(site):
    """A family adapter takes precedence; what nobody names goes to the adapter that claims it."""
    site.install("alpha")
    registry = site.discover()
    registry._take(PluginInfo("rest", "", "", adapters=(Rest(),)))
    assert registry.adapter_for({"model_type": "alpha"}).name == "alpha"
    found = registry.adapter_for({"model_type": "mamba"})
    assert (found.name, found.model) == ("rest", "mamba")
    assert found is not registry.adapters["rest"]
    assert registry.claimant({"model_type": "mamba"}) is registry.adapters["rest"]
    for nobodys in (["mamba"], "gamma", "t5"):  # transformers has no gamma, and t5 is no decoder
        with pytest.raises(UnknownModelError):
            registry.adapter_for({"model_type": nobodys})


def test_views_cannot_be_written(site):
    """What the registry hands out does not let a caller change it."""
    site.install("alpha")
    registry = site.discover()
    with pytest.raises(TypeError):
        registry.adapters["x"] = registry.adapters["alpha"]
    registry.catalog().clear()
    assert len(registry.catalog()) == 1


@pytest.mark.parametrize("model_type", ["gamma_2", None, ["x"], "x; rm -rf ~", "\n"])
def test_unknown_model_type(site, model_type):
    """The error names the type and what failed; a config.json cannot steer the hint, least of all
    to a package's name.
    """
    site.install("alpha")
    site.install("bad", "raise ValueError('no luck')")
    with pytest.raises(UnknownModelError) as caught:
        site.discover().adapter_for({"model_type": model_type})
    message = str(caught.value)
    assert ascii(model_type) in message
    assert "bad (ollm-adapter-bad 1.5) failed to load: ValueError: no luck" in message
    assert "\n" not in message
    assert caught.value.hint in (
        "a newer transformers may: pip install -U transformers",
        "fetch the model's config.json again",
    )


def test_unknown_id_names_similar_ones(site):
    """A misspelled id is answered with the one that was meant, another with where to look."""
    site.install("alpha")
    site.install("bad", "raise ValueError")
    registry = site.discover()
    with pytest.raises(UnknownModelError, match=r"did you mean alpha-Small\?") as caught:
        registry.find("alpa-small")
    assert "bad (ollm-adapter-bad 1.5)" in caught.value.message
    with pytest.raises(UnknownModelError, match="list-models"):
        registry.find("zzz")


def test_a_plugin_needs_no_adapter(site):
    """One that implements another hook only is taken, and what it offers is found by its name."""
    site.install(
        "alpha",
        body="from ollm_core import hookimpl\n@hookimpl\n"
        "def ollm_kv_stores(): return {{'{name}-store': print}}\n",
    )
    registry = site.discover()
    assert statuses(registry) == {"alpha": "ok"}
    offer = registry.check_name("ollm_kv_stores", "alpha-store")
    assert offer is not None
    assert offer.factory is print
    assert str(offer) == "KV store 'alpha-store' of alpha (ollm-adapter-alpha 1.5)"
    assert registry.check_name("ollm_kv_stores", "disk") is None


def test_unknown_name_of_an_offer(site):
    """The error names what there is, and a plugin that failed and might have brought it."""
    site.install("alpha", "@hookimpl\ndef ollm_kv_stores(): return {'tape': print}")
    site.install("bad", "1 / 0")
    with pytest.raises(InputError, match="no KV store 'tap'") as caught:
        site.discover().check_name("ollm_kv_stores", "tap")
    assert "bad (ollm-adapter-bad 1.5) failed to load" in caught.value.message
    assert caught.value.hint == "one of: auto, device, host, disk, tape"


def test_require(site):
    """What is declared unsupported raises with the adapter's reason; the undeclared is full."""
    site.install("alpha")
    adapter = site.discover().adapters["alpha"]
    type(adapter).capabilities = {
        "drafts": Capability("unsupported", "state cannot go back"),
        "batch": Capability("not-implemented", "one at a time"),
        "truncate": Capability(),
    }
    require(adapter, "truncate")
    require(adapter, "kv-disk")
    assert limits(adapter) == {"batch": "one at a time", "drafts": "state cannot go back"}
    with pytest.raises(UnsupportedError, match="alpha does not support drafts: state cannot"):
        require(adapter, "drafts")
    with pytest.raises(UnsupportedError, match="does not support batch yet: one at a time"):
        require(adapter, "batch")
    with pytest.raises(ValueError, match="unknown capability"):
        require(adapter, "dratfs")


def test_capabilities_are_explained():
    """Every ability has a meaning of one line."""
    assert all(meaning and "\n" not in meaning for meaning in CAPABILITIES.values())


CATALOG = """
from ollm_core import CatalogEntry

@hookimpl
def ollm_catalog():
    return (
        CatalogEntry("other", "a/other", 0, 0, {}, aliases=("other:1b", "alpha-again")),
        CatalogEntry("ALPHA-small", "b/another", 0, 0, {}, aliases=("alpha:1b",)),
        CatalogEntry("third", "c/third", 5, 10, {"model_type": "alpha"}, aliases=("other:1b",)),
    )
"""


def test_an_adapters_own_models_come_first(site):
    """Of a catalog, an entry whose id an adapter has is another name of that; an alias belongs to
    the first that has it; and whoever claims the model_type opens it.
    """
    site.install("alpha")
    site.install("zeta", CATALOG)
    registry = site.discover()
    assert [entry.id for _, entry, _ in registry.catalog()] == [
        "alpha-Small",
        "zeta-Small",
        "other",
        "third",
    ]
    assert registry.find("alpha:1b")[1].id == registry.find("alpha-small")[1].id == "alpha-Small"
    assert registry.find("OTHER:1b")[1].id == registry.find("a/Other")[1].id == "other"
    assert registry.find("third:latest")[0] is registry.adapters["alpha"]
    assert registry.find("other")[0] is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("CatalogEntry('a/b', 'o/x', 0, 0, {})", "id or alias the str 'a/b'"),
        ("CatalogEntry('x', 'o/x', 0, 0, {}, aliases=('two words',))", "cannot be a name"),
        ("3", "entry 0 is the int 3"),
    ],
)
def test_a_catalog_that_cannot_be_used(site, entry, reason):
    """The plugin is left out, with the entry that is wrong."""
    site.install(
        "bad", f"{CATALOG.split('@')[0]}\n@hookimpl\ndef ollm_catalog(): return ({entry},)"
    )
    assert reason in site.discover().plugins[0].reason
