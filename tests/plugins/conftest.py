"""Plugins installed for one test: modules and dist-info directories, found as real ones are."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import distributions

import pytest
from plugin_examples import HOOKS, example

from ollm_core.plugins.registry import ENTRY_POINT_GROUP, LOAD_PLUGINS, Registry

PLUGIN = """
    from ollm_core import (
        CacheKind, Capability, CatalogEntry, Layout, ModelAdapter, WeightPlan, hookimpl
    )

    class Adapter(ModelAdapter):
        name = "{name}"
        model_types = ("{name}",)

        def layout(self, config):
            return Layout(1)

        def weights(self, config, tensor_names):
            return WeightPlan({{}})

        def caches(self, config):
            return (CacheKind(),)

        def tiny_config(self):
            return {{"model_type": self.name}}

        def catalog(self):
            return (CatalogEntry(f"{{self.name}}-Small", "x/y", 1, 2, {{}}),)

    @hookimpl
    def ollm_adapters():
        return (Adapter(),)
"""


class Site:
    """A site-packages directory into which tests install plugins."""

    def __init__(self, path):
        self.path = path
        self.modules = set()

    def install(self, name, extra="", *, body=PLUGIN, module=None, distribution=None):
        """A distribution `ollm-adapter-NAME` with one entry point NAME."""
        distribution = distribution or f"ollm-adapter-{name}"
        module = module or f"throwaway_{name}"
        self.modules.add(module)
        source = textwrap.dedent(body.format(name=name)) + textwrap.dedent(extra)
        (self.path / f"{module}.py").write_text(source)
        info = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n"
        )
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {module}\n")

    def discover(self):
        """A registry of what was installed here, and nothing else."""
        found = [e for d in distributions(path=[str(self.path)]) for e in d.entry_points]
        return Registry.discover(found)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages directory on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(LOAD_PLUGINS, raising=False)
    site = Site(tmp_path)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """Puts plugin modules on sys.path as distributions; gives a registry of them and of Llama."""
    site = tmp_path_factory.mktemp("site")
    modules = []
    monkeypatch.syspath_prepend(site)

    def install(**sources):
        for name, source in sources.items():
            module = f"installed_{name}"
            modules.append(module)
            (site / f"{module}.py").write_text(textwrap.dedent(source))
            info = site / f"ollm_example_{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: ollm-example-{name}\nVersion: 1.0\n"
            )
            entry = f"[{ENTRY_POINT_GROUP}]\n{name} = {module}\n"
            (info / "entry_points.txt").write_text(entry)
        found = [e for d in distributions(path=[str(site)]) for e in d.entry_points]
        found += [e for e in _installed() if e.value == "ollm_adapter_llama"]
        return Registry.discover(found)

    install.site = site
    yield install
    for module in modules:
        sys.modules.pop(module, None)


def _installed():
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


@pytest.fixture
def registry(install):
    """All examples of the page, installed together."""
    return install(**{hook: example(hook) for hook in HOOKS})
