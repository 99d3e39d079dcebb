"""Discovery, with real plugins: modules and dist-info directories made for each test."""

import json
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from ollm_core import Capability, InputError, ModelAdapter, UnknownModelError, UnsupportedError
from ollm_core.plugins.loader import KINDS
from ollm_core.plugins.registry import (
    CAPABILITIES,
    ENTRY_POINT_GROUP,
    LOAD_PLUGINS,
    PluginInfo,
    Registry,
    limits,
    require,
)


def statuses(registry):
    return {plugin.name: plugin.status for plugin in registry.plugins}


def reason(registry, name):
    (found,) = (plugin.reason for plugin in registry.plugins if plugin.name == name)
    assert "\n" not in found
    return found


def test_finds_what_is_installed(site):
    """An installed plugin is found through its entry point, with distribution and version."""
    site.install("alpha")
    registry = Registry.discover()
    (plugin,) = (plugin for plugin in registry.plugins if plugin.name == "alpha")
    assert (plugin.distribution, plugin.version) == ("ollm-adapter-alpha", "1.5")
    assert (plugin.status, plugin.reason) == ("ok", "")
    assert plugin.adapters == (registry.adapters["alpha"],)


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


BROKEN = {
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "missing import": ("import nothing_of_this_name", "nothing_of_this_name"),
    "misspelled hook": ("@hookimpl\ndef ollm_adaptors(): return ()", "did you mean ollm_adapters?"),
    "unknown hook": (
        "@hookimpl\ndef zzz(): return ()",
        "unknown hook 'zzz'. hint: there are ollm_a",
    ),
    "unmarked hook": ("ollm_adapters = lambda: (Adapter(),)", "write @hookimpl of ollm_core above"),
    "wrong argument": ("@hookimpl\ndef ollm_adapters(x): return ()", "Argument(s)"),
    "no hook": ("del ollm_adapters", "implements no hook"),
    "hook raises": ("@hookimpl\ndef ollm_adapters(): 1 / 0", "ZeroDivisionError"),
    "hook exits": ("@hookimpl\ndef ollm_adapters(): raise SystemExit", "SystemExit"),
    "not a sequence": ("@hookimpl\ndef ollm_adapters(): return 3", "in a tuple"),
    "one adapter": ("@hookimpl\ndef ollm_adapters(): return Adapter()", "of one too: (adapter,)"),
    "returns nothing": (
        "@hookimpl\ndef ollm_adapters(): Adapter()",
        "ollm_adapters() returned None",
    ),
    "not an adapter": ("@hookimpl\ndef ollm_adapters(): return [3]", "no ModelAdapter"),
    "a class": (
        "@hookimpl\ndef ollm_adapters(): return [Adapter]",
        "an object of the class: Adapter()",
    ),
    "abstract": ("del Adapter.caches; Adapter.__abstractmethods__ = {'caches'}", "caches"),
    "no name": ("Adapter.name = ''", "name must be"),
    "name forgotten": ("del Adapter.name", "give the class a name"),
    "types in a string": ("Adapter.model_types = 'bad'", "hint: model_types = ('bad',)"),
    "other major": ("Adapter.adapter_api = '2.0'", "speaks adapter API 2.0, this core 1.0"),
    "no version": ("Adapter.adapter_api = 'new'", "adapter_api must look like"),
    "catalog raises": ("Adapter.catalog = lambda self: 1 / 0", "ZeroDivisionError"),
    "catalog of ids": ("Adapter.catalog = lambda self: ('a',)", "CatalogEntry"),
    "catalog of dicts": ("Adapter.catalog = lambda self: [{'id': 'x'}]", "with catalog_entry("),
    "catalog of nothing": ("Adapter.catalog = lambda self: None", "catalog() must return"),
    "abilities in a method": ("Adapter.capabilities = lambda self: {}", "a @property that"),
    "unknown ability": (
        "Adapter.capabilities = {'dratfs': Capability()}",
        "'dratfs'. hint: did you mean 'drafts'? there are batch,",
    ),
    "ability in words": ("Adapter.capabilities = {'drafts': 'full'}", "Capability objects"),
    "taken name": ("Adapter.name = 'alpha'", "adapter name 'alpha' is already taken by alpha"),
    "taken type": ("Adapter.model_types = ('bad', 'alpha')", "model_type 'alpha' is already taken"),
    "taken id": (
        "Adapter.catalog = lambda self: (CatalogEntry('ALPHA-small', '', 1, 1, {}),)",
        "model id 'alpha-small' is already taken by alpha (ollm-adapter-alpha 1.5)",
    ),
    "another hook raises": ("@hookimpl\ndef ollm_kv_stores(): 1 / 0", "ZeroDivisionError"),
    "not names": ("@hookimpl\ndef ollm_draft_sources(): return [print]", "names and factories"),
    "not a name": ("@hookimpl\ndef ollm_draft_sources(): return {'My draft': print}", "a-z, 0-9"),
    "not a string": ("@hookimpl\ndef ollm_weight_codecs(): return {3: print}", "a-z, 0-9"),
    "not a factory": ("@hookimpl\ndef ollm_kv_stores(): return {'x': 'y'}", "'x' is a str"),
    "own kv store": (
        "@hookimpl\ndef ollm_kv_stores(): return {'disk': print}",
        "KV store 'disk' is already taken by oLLM itself",
    ),
    "own reader": (
        "@hookimpl\ndef ollm_reading_engines(): return {'auto': print}",
        "reading engine 'auto' is already taken by oLLM itself",
    ),
    "own draft": (
        "@hookimpl\ndef ollm_draft_sources(): return {'lookup': print}",
        "draft source 'lookup' is already taken by oLLM itself",
    ),
    "own verb": (
        "@hookimpl\ndef ollm_commands(): return {'run': print}",
        "command 'run' is already taken by oLLM itself",
    ),
    "taken codec": (
        "@hookimpl\ndef ollm_weight_codecs(): return {'planes': print}",
        "weight codec 'planes' is already taken by alpha (ollm-adapter-alpha 1.5)",
    ),
    "its own type twice": (
        "@hookimpl\ndef ollm_adapters(): return Adapter(), Adapter()",
        "already taken by bad",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_hurts_no_other(site, case):
    """A broken plugin is recorded with its reason, adds nothing, and leaves the others usable."""
    extra, word = BROKEN[case]
    site.install("alpha", "@hookimpl\ndef ollm_weight_codecs(): return {'planes': print}")
    site.install("zeta")
    site.install("bad", extra)
    registry = site.discover()
    assert statuses(registry) == {"alpha": "ok", "bad": "failed", "zeta": "ok"}
    assert word in reason(registry, "bad")
    assert set(registry.adapters) == {"alpha", "zeta"}
    assert len(registry.catalog()) == 2
    (bad,) = (plugin for plugin in registry.plugins if plugin.name == "bad")
    assert (bad.adapters, bad.offers) == ((), ())
    assert {hook: list(registry.offers(hook)) for hook in KINDS if registry.offers(hook)} == {
        "ollm_weight_codecs": ["planes"]
    }


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


def test_one_module_under_two_names(site):
    """Two distributions that name the same module: the first is used, the second has failed."""
    site.install("alpha")
    site.install("beta", module="throwaway_alpha")
    registry = site.discover()
    assert statuses(registry) == {"alpha": "ok", "beta": "failed"}


def test_damaged_metadata_hurts_no_other(site):
    """A distribution whose metadata is gone is listed all the same."""
    site.install("alpha")
    (site.path / "ollm_adapter_alpha-1.5.dist-info" / "METADATA").unlink()
    assert statuses(site.discover()) == {"alpha": "ok"}


def test_newer_minor_is_warned_of(site):
    """A plugin of a newer minor is used, with a warning, even if it declares a new ability."""
    site.install(
        "alpha",
        "Adapter.adapter_api = '1.7'; Adapter.capabilities = {'telepathy': Capability()}",
    )
    registry = site.discover()
    assert statuses(registry) == {"alpha": "ok"}
    assert "1.7, newer than this core's 1.0" in reason(registry, "alpha")
    assert "alpha" in registry.adapters


@pytest.mark.parametrize(
    ("setting", "loaded"),
    [
        ("", set()),
        (" , ", set()),
        ("alpha", {"alpha"}),
        ("Ollm_Adapter.Beta", {"beta"}),
        ("alpha, ollm-adapter-beta", {"alpha", "beta"}),
    ],
)
def test_environment_restricts_what_is_loaded(site, monkeypatch, setting, loaded):
    """OLLM_LOAD_PLUGINS names distributions or entry points; no other is imported."""
    for name in ("alpha", "beta", "bad"):
        site.install(name, "1 / 0" if name == "bad" else "")
    monkeypatch.setenv(LOAD_PLUGINS, setting)
    registry = site.discover()
    assert set(registry.adapters) == loaded
    assert {name for name, status in statuses(registry).items() if status == "ok"} == loaded
    assert {s for name, s in statuses(registry).items() if name not in loaded} == {"skipped"}
    assert LOAD_PLUGINS in reason(registry, "bad")


def test_environment_names_what_is_not_there(site, monkeypatch):
    """A name in OLLM_LOAD_PLUGINS that is not installed is shown as failed, not passed over."""
    site.install("alpha")
    monkeypatch.setenv(LOAD_PLUGINS, "alpha,alhpa")
    registry = site.discover()
    assert statuses(registry) == {"alpha": "ok", "alhpa": "failed"}
    assert "not installed" in reason(registry, "alhpa")


def test_nothing_installed():
    """Without plugins the registry is empty, and says so when asked for a model."""
    registry = Registry.discover([])
    assert not registry.plugins
    with pytest.raises(UnknownModelError, match="no adapter opens model_type 'llama'"):
        registry.adapter_for({"model_type": "llama"})


def test_entry_point_without_distribution(site):
    """An entry point made by hand belongs to no distribution, and loads."""
    site.install("alpha")
    registry = Registry.discover([EntryPoint("alpha", "throwaway_alpha", ENTRY_POINT_GROUP)])
    (plugin,) = registry.plugins
    assert (str(plugin), plugin.status) == ("alpha", "ok")


def test_registries_share_nothing(site, monkeypatch):
    """Two registries of one process do not see each other's plugins."""
    site.install("alpha")
    first = site.discover()
    monkeypatch.setenv(LOAD_PLUGINS, "")
    second = site.discover()
    assert set(first.adapters) == {"alpha"}
    assert not second.adapters


def test_discovery_imports_no_torch():
    """In a fresh process, discovery of what is installed imports no torch or transformers."""
    code = """
        import sys
        from ollm_core.plugins.registry import Registry
        registry = Registry.discover()
        assert "llama" in registry.adapters, registry.plugins
        assert registry.catalog()
        print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


TORCH = {
    "at the top": "import torch",
    "in a hook": "@hookimpl\ndef ollm_kv_stores():\n    import torch\n    return {}",
    "nowhere": "",
}


@pytest.mark.parametrize("case", TORCH)
def test_an_adapter_that_imports_torch_is_told(site, case):
    """In a fresh process, as it slows every verb; the plugins beside it are not blamed."""
    site.install("alpha", TORCH[case])
    site.install("beta")
    code = """
        import json, sys
        from importlib.metadata import distributions
        from ollm_core.plugins.registry import Registry
        sys.path.insert(0, sys.argv[1])
        found = [e for d in distributions(path=[sys.argv[1]]) for e in d.entry_points]
        told = {one.name: [one.status, one.reason] for one in Registry.discover(found).plugins}
        print(json.dumps(told))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(site.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (status, told), beside = json.loads(done.stdout).values()
    assert (status, beside) == ("ok", ["ok", ""])
    assert ("slows every `ollm --help`" in told) is (case != "nowhere")


def test_torch_that_was_there_is_not_told(site):
    """Where torch is loaded already, who would have loaded it is not known."""
    site.install("alpha", "import torch")
    assert "torch" in sys.modules
    (plugin,) = site.discover().plugins
    assert (plugin.status, plugin.reason) == ("ok", "")


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
