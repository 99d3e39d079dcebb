"""Real models for the tests: tiny random Llamas, and SmolLM2 where `make model` has put it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import write_moe
from transformers import LlamaConfig, LlamaForCausalLM

from ollm_conformance.subject import Reference

TINY = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMOLLM2 = Path(os.environ.get("OLLM_TEST_MODEL", Path(__file__).parents[1] / "models/smollm2-135M"))
_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MakeLlama = Callable[..., Path]
MakeMoe = Callable[..., Path]


def pytest_configure() -> None:
    """Ctrl-C is tried here: a shell that runs the tests in the background has it ignored, and so
    would every process that they start.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CONFIG_HOME"] = os.devnull  # no test goes by the config of who runs it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What measures the whole process comes first, before other tests have filled its heap."""
    items.sort(key=lambda item: "memory" not in item.name and "Codec" not in item.nodeid)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory without rates that this machine has kept, and no models."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OLLM_MODELS", raising=False)
    return tmp_path / "home"


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """Writes a random Llama checkpoint and returns its directory."""

    def make(
        dtype: torch.dtype = torch.float32,
        *,
        name: str = "tiny",
        seed: int = 0,
        shard: str = "1GB",
        **config: Any,
    ) -> Path:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**TINY | config)).to(dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)  # peaked logits: no near-ties
        model.config.dtype = dtype
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture
def make_moe(tmp_path: Path) -> MakeMoe:
    """Writes a random checkpoint of a mixture (see mixtures.py) and returns its directory."""

    def make(
        family: str, dtype: torch.dtype = torch.float32, *, name: str = "", **how: Any
    ) -> Path:
        return write_moe(tmp_path / (name or family), family, dtype, **how)

    return make


@pytest.fixture
def tiny(make_llama: MakeLlama) -> Path:
    """One tiny float32 Llama."""
    return make_llama()


@pytest.fixture
def chat(make_llama: MakeLlama) -> Path:
    """A tiny random Llama with a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = make_llama(bos_token_id=None, eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(199)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=_TEMPLATE
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as Llama 3 has
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.fail(f"{SMOLLM2} is not there: run `make model`, or set OLLM_TEST_MODEL")
    return SMOLLM2


@pytest.fixture(scope="session")
def _speaking(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speaking")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    for path in [*smollm2.glob("tokenizer*"), *smollm2.glob("*.jinja")]:
        shutil.copy(path, directory)
    return directory


@pytest.fixture
def speaking(_speaking: Path, tmp_path: Path) -> Path:
    """A tiny random Llama with SmolLM2's tokenizer and chat template, to be changed at will."""
    return Path(shutil.copytree(_speaking, tmp_path / "speaking"))


@pytest.fixture
def reference() -> type[Reference]:
    """The un-offloaded model to compare with."""
    return Reference


def random_ids(num_tokens: int, vocab_size: int = 199, seed: int = 1) -> torch.Tensor:
    """Token ids [T] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (num_tokens,), generator=generator)


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Makes random prompts."""
    return random_ids
