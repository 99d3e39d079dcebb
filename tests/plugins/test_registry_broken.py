"""Plugins that cannot be used, or only with a warning: each is told, and hurts no other."""

import json
import subprocess
import sys
import textwrap

import pytest
from plugin_examples import reason, statuses

from ollm_core.plugins.loader import KINDS

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
