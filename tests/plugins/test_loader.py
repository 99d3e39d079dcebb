"""Everything that docs/plugins.md shows, taken from there and used for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import ollm
from ollm_core import ReadError
from ollm_core.cli.main import cli, main
from ollm_core.errors import PluginError
from ollm_core.plugins import hookspecs
from ollm_core.plugins.loader import KINDS
from ollm_core.plugins.registry import ENTRY_POINT_GROUP, Registry

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"
HOOKS = [n for n, v in vars(hookspecs).items() if hasattr(v, f"{hookspecs.PROJECT}_spec")]
GREEDY = {"do_sample": False, "eos_token_id": None}


def example(hook):
    """The plugin module in the section of a hook."""
    section = DOCS.read_text().split(f"\n## {hook}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


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


def run_cli(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def logits(directory, ids, **options):
    """Logits [T, V] of a prompt, and the model's stats."""
    with ollm.load(directory, device="cpu", chunk_size=64, **options) as model:
        return model(input_ids=ids[None]).logits[0], model.stats


def test_every_hook_has_words_an_example_and_a_test():
    """A hook without a docstring, without a row and an example in the page, or without a test."""
    page, tests = DOCS.read_text(), Path(__file__).read_text()
    assert set(HOOKS) == {"ollm_adapters", *KINDS}
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
    assert [list(registry.offers(hook)) for hook in HOOKS[1:]] == [
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


@pytest.mark.parametrize("verb", ["adapter", "conformance"])
def test_a_verb_of_another_distribution(verb, monkeypatch, capsys):
    """Without ollm-conformance its verbs say what to install; they are not in --help."""
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-llama")
    code, out, err = run_cli(capsys, verb, "new", "olmo2")
    assert (code, out) == (4, "")
    assert f"`ollm {verb}` is a verb of ollm-conformance" in err
    assert "hint: pip install ollm-conformance" in err
    assert f"  {verb} " not in run_cli(capsys, "--help")[1]


def test_the_verb_counts(registry, tmp_path, capsys):
    """The example verb does what it says."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert registry.offers("ollm_commands")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert run_cli(capsys, "count-tokens", tmp_path, "a b a")[:2] == (0, "3\n")


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


USED = """
    from ollm_core import hookimpl

    def broken(*request):
        raise RuntimeError("no such thing\\nhere")

    def wrong(*request):
        return 3

    @hookimpl
    def ollm_kv_stores():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_reading_engines():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_draft_sources():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_commands():
        return {"broken": broken, "wrong": wrong, "exits": exit}
"""


@pytest.mark.parametrize("option", ["kv", "reader", "draft"])
@pytest.mark.parametrize("name", ["broken", "wrong"])
def test_a_factory_that_fails(install, tiny, ids, option, name):
    """A factory that raises, or returns something else, is one line that names the plugin."""
    registry = install(bad=USED)
    words = "RuntimeError: no such thing here" if name == "broken" else "is a int, expected a"
    with pytest.raises(PluginError, match=words) as caught:
        logits(tiny, ids(5), registry=registry, **{option: name})
    assert f"{name!r} of bad (ollm-example-bad 1.0)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("broken", "no such"), ("wrong", "is a int")])
def test_a_verb_that_cannot_be_loaded(install, capsys, name, words):
    """It is listed, fails in one line when it is run, and hurts no other verb."""
    install(bad=USED)
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert re.search(rf"{name} +\(cannot be loaded\)", out)
    code, out, err = run_cli(capsys, name, "--option", "x")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: command {name!r} of bad")
    assert words in err
    assert run_cli(capsys, "plugins")[0] == 0


VERBS = """
    import click
    from ollm_core import DoesNotFitError, hookimpl

    @click.group()
    def verbs():
        "Several."

    @verbs.command()
    def returns():
        return "no exit code"

    @verbs.command()
    def refuses():
        raise DoesNotFitError("too large", hint="less")

    @verbs.command()
    @click.pass_context
    def ends(context):
        context.exit(7)

    @hookimpl
    def ollm_commands():
        return {"verbs": lambda: verbs}
"""


@pytest.mark.parametrize(
    ("name", "code", "err"),
    [("returns", 0, ""), ("refuses", 3, "error: too large\nhint: less\n"), ("ends", 7, "")],
)
def test_exit_codes_of_verbs(install, capsys, name, code, err):
    """A plugin's verb has the exit codes and errors of oLLM's own; what it returns is no code."""
    install(good=VERBS)
    assert run_cli(capsys, "verbs", name) == (code, "", err)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("buffer[0:64] = bytes(64)", "other bytes of"),
        ("offsets = [offset + 1 for offset in offsets]", "other bytes of"),
        ("raise OSError('no device')", "OSError: no device"),
    ],
)
def test_an_engine_is_tried_before_it_is_used(install, tiny, change, words):
    """An engine that does not bring the file's bytes is refused before a weight is read."""
    source = example("ollm_reading_engines")
    broken = source.replace(
        "        return offsets\n", f"        {change}\n        return offsets\n"
    )
    registry = install(bad=broken)
    with pytest.raises(PluginError, match=f"'buffered' of bad .*failed its test read.*{words}"):
        ollm.load(tiny, device="cpu", reader="buffered", registry=registry)


def test_auto_takes_no_engine_of_a_plugin(registry, tiny, ids):
    """Only who names a plugin's engine gets it."""
    _, stats = logits(tiny, ids(5), registry=registry)
    assert stats.reader in ("direct", "mmap")


def test_help_needs_no_runner(registry):
    """The group works in click's own test runner too, as authors of verbs will use it."""
    assert registry.plugins
    assert "count-tokens" in CliRunner().invoke(cli, ["--help"]).output
