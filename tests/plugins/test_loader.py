"""Everything that docs/plugins.md shows, taken from there and used for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_examples import DOCS, GREEDY, HOOKS, example, logits, run_cli
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import ollm
from ollm_core import InputError, ReadError
from ollm_core.cli.main import cli
from ollm_core.plugins import hookspecs
from ollm_core.plugins.loader import KINDS


def test_every_hook_has_words_an_example_and_a_test():
    """A hook without a docstring, without a row and an example in the page, or without a test."""
    page, tests = DOCS.read_text(), Path(__file__).read_text()
    assert set(HOOKS) == {"ollm_adapters", "ollm_catalog", *KINDS}
    for hook in HOOKS:
        assert getattr(hookspecs, hook).__doc__, hook
        assert f"| [`{hook}`](#{hook}) |" in page
        assert f"def {hook}():" in example(hook)
        assert f"def test_{hook}(" in tests


def test_examples_are_found(registry):
    """Every example loads, and brings what its section says."""
    assert {p.name: (p.status, p.reason) for p in registry.plugins} == {
        name: ("ok", "") for name in (*HOOKS, "llama")
    }
    assert [list(registry.offers(hook)) for hook in KINDS] == [
        ["checked"], ["buffered"], ["byte-planes"], ["counting"], ["count-tokens"],
    ]  # fmt: skip


def test_built_in_names_are_reserved():
    """What oLLM itself has under a name is reserved, so that no plugin can take it."""
    built_in = set(cli.commands)
    assert built_in <= set(KINDS["ollm_commands"].built_in)


def test_ollm_adapters(registry, tmp_path, ids):
    """The adapter opens a model of its model_type, with the logits of transformers."""
    torch.manual_seed(0)
    config = registry.adapters["full-mistral"].tiny_config()
    dimensions = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    dimensions |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    dimensions |= {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    model = MistralForCausalLM(MistralConfig(**dimensions)).eval()
    model.save_pretrained(tmp_path)
    prompt = ids(50, config["vocab_size"])
    found, _ = logits(tmp_path, prompt, registry=registry)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(prompt[None]).logits[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_ollm_catalog(registry, tmp_path):
    """Its models are found by every name, and say how to get them."""
    for name in ("our-llama", "OUR:1b", "our-company/our-llama"):
        assert registry.find(name)[1].repo == "our-company/our-llama"
    with pytest.raises(InputError, match="ollm pull our-llama"):
        ollm.load("our:1b", registry=registry, models_dir=tmp_path)
    (plugin,) = [one for one in registry.plugins if one.models]
    assert [entry.id for entry in plugin.models] == ["our-llama", "our-other"]


def test_ollm_kv_stores(registry, tiny, ids):
    """The store gives the same bits as the built-in one, and tells when memory changed."""
    expected, _ = logits(tiny, ids(600), kv="host")
    with ollm.load(tiny, device="cpu", chunk_size=64, kv="checked", registry=registry) as model:
        cache = model.new_cache()
        found = model(input_ids=ids(600)[None], past_key_values=cache).logits[0]
        assert model.stats.kv_tier == "checked"
        assert torch.equal(found, expected)
        model(input_ids=ids(3)[None], past_key_values=cache)
        keys, _ = next(cache.store.blocks(1, cache.rows[0]))
        keys[0, 0, 0] += 1
        with pytest.raises(ReadError, match="KV block 0 of layer 1 changed"):
            model(input_ids=ids(3)[None], past_key_values=cache)
        assert cache.num_tokens(0) == 603
        cache.close()
        tokens = model.generate(ids(20)[None], max_new_tokens=8, **GREEDY)
    with ollm.load(tiny, device="cpu", chunk_size=64) as model:
        assert model.generate(ids(20)[None], max_new_tokens=8, **GREEDY).equal(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ollm_reading_engines(registry, make_llama, ids, dtype):
    """The engine brings the same bits as the built-in ones while weights are streamed."""
    directory = make_llama(dtype, hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    expected, _ = logits(directory, ids(80))
    found, stats = logits(
        directory, ids(80), reader="buffered", device_memory="4MB", registry=registry
    )
    assert (stats.reader, stats.resident_bytes < stats.weight_bytes) == ("buffered", True)
    assert stats.device_peak_bytes <= 4_000_000
    assert torch.equal(found, expected)


def split_planes(directory, keep=("model.embed_tokens.weight",)):
    """Store every tensor but `keep` as two byte planes."""
    path = directory / "model.safetensors"
    stored = {}
    for name, tensor in load_file(path).items():
        if name in keep:
            stored[name] = tensor
        else:
            planes = tensor.contiguous().view(torch.uint8).view(*tensor.shape, 2)
            stored[f"{name}.low"] = planes[..., 0].contiguous()
            stored[f"{name}.high"] = planes[..., 1].contiguous()
    save_file(stored, path)


@pytest.mark.parametrize("memory", ["3MB", "1GB"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_ollm_weight_codecs(registry, make_llama, ids, memory, dtype, tied):
    """Byte planes give bitwise the logits of the plain checkpoint, streamed and resident, inside
    the budget.
    """
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12}
    directory = make_llama(torch.bfloat16, tie_word_embeddings=tied, **shape)
    options = {"dtype": dtype, "device_memory": memory, "registry": registry}
    expected, plain = logits(directory, ids(80), **options)
    split_planes(directory)
    found, stats = logits(directory, ids(80), **options)
    assert torch.equal(found, expected)
    assert (stats.weight_bytes, stats.device_limit_bytes) == (
        plain.weight_bytes, plain.device_limit_bytes,
    )  # fmt: skip
    assert stats.device_peak_bytes <= stats.device_limit_bytes
    assert (stats.weight_bytes_read > 0) == (memory == "3MB")


def test_ollm_draft_sources(registry, tiny, ids):
    """The drafter is asked, and the greedy tokens are those of decoding without it."""
    prompt = torch.cat([ids(30), torch.arange(20, 40)])
    with ollm.load(tiny, device="cpu") as model:
        expected = model.generate(prompt[None], max_new_tokens=12, **GREEDY)
    with ollm.load(tiny, device="cpu", draft="counting", registry=registry) as model:
        found = model.generate(prompt[None], max_new_tokens=12, **GREEDY)
        assert model._drafter(torch.tensor([7, 9]), 3) == [11, 13, 15]
    assert found.equal(expected)


def test_ollm_commands(registry, tiny, capsys):
    """The verb is in --help, has a --help, runs, and its bad usage is oLLM's one line."""
    assert registry.offers("ollm_commands")
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert re.search(r"count-tokens +Count the tokens of TEXT", out)
    assert "list-models" in out
    code, out, _ = run_cli(capsys, "count-tokens", "--help")
    assert (code, "MODEL_DIR TEXT" in out) == (0, True)
    code, out, err = run_cli(capsys, "count-tokens", tiny)
    assert (code, out) == (2, "")
    assert err.startswith("error: Missing argument 'TEXT'")


def test_run_takes_names_of_plugins(registry, capsys):
    """`ollm run` accepts what is offered: it comes to the model, which is not there."""
    assert registry.plugins
    names = ["--kv", "checked", "--reader", "buffered", "--draft", "counting"]
    code, _, err = run_cli(capsys, "run", "x/y", "--prompt", "hi", *names)
    assert (code, "no directory" in err) == (2, True)
    code, _, err = run_cli(capsys, "run", "x/y", "--prompt", "hi", "--kv", "chequed")
    assert (code, "one of: auto, device, host, disk, checked" in err) == (2, True)


def test_plugins_shows_what_each_brings(registry, capsys):
    """`ollm plugins` names everything, in words and as JSON."""
    assert registry.plugins
    _, out, _ = run_cli(capsys, "plugins", "--json")
    found = {plugin["name"]: plugin for plugin in json.loads(out)["plugins"]}
    for hook, kind in KINDS.items():
        (name,) = found[hook][kind.field]
        assert found["llama"][kind.field] == []
        _, out, _ = run_cli(capsys, "plugins")
        assert f"{kind.title} {name}" in out


def test_looking_around_loads_no_torch(registry, install):
    """With every example installed, --help and plugins load neither torch nor transformers."""
    assert registry.plugins
    code = (
        "import sys\nfrom ollm_core.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["plugins"]):
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | {"PYTHONPATH": str(install.site)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert "count-tokens" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


def test_auto_takes_no_engine_of_a_plugin(registry, tiny, ids):
    """Only who names a plugin's engine gets it."""
    _, stats = logits(tiny, ids(5), registry=registry)
    assert stats.reader in ("direct", "mmap")
