"""What is found of what is installed, and what the environment leaves out."""

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest
from plugin_examples import reason, statuses

from ollm_core import UnknownModelError
from ollm_core.plugins.registry import (
    ENTRY_POINT_GROUP,
    LOAD_PLUGINS,
    Registry,
)


def test_finds_what_is_installed(site):
    """An installed plugin is found through its entry point, with distribution and version."""
    site.install("alpha")
    registry = Registry.discover()
    (plugin,) = (plugin for plugin in registry.plugins if plugin.name == "alpha")
    assert (plugin.distribution, plugin.version) == ("ollm-adapter-alpha", "1.5")
    assert (plugin.status, plugin.reason) == ("ok", "")
    assert plugin.adapters == (registry.adapters["alpha"],)


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
