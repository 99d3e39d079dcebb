"""Tries one model type: a tiny random model through oLLM and through transformers, bit by bit."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from torch import Tensor

from ollm_conformance.past import PastCalls

PROMPT, STEPS, CHUNK = 75, 4, 64
"""Tokens of the prompt, more than a window of the tiny models; of decoding; and of a chunk."""

ONE_BY_ONE = "the only chunk_size is 1"
"""What is said of a model whose layers begin anew with each call of several tokens."""


@contextlib.contextmanager
def saved(model_type: str, dtype: torch.dtype, **changes: Any) -> Iterator[tuple[Any, Path]]:
    """A tiny random model of transformers, as loaded from its checkpoint, and the directory."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    config = tiny_config(model_type, **changes)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model.config.model_type != config.model_type:  # of a part, which has no checkpoints
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # what is 0 or 1 by default should be seen
            if parameter.dim() < 2 or not parameter.any():
                parameter += 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory(prefix="ollm-walk-") as directory:
        model.to(dtype).save_pretrained(directory)
        yield reference(type(model), directory, dtype), Path(directory)


def reference(kind: Any, directory: Any, dtype: torch.dtype) -> Any:
    """transformers' own model of a checkpoint, of the class `kind`."""
    model = kind.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    for parameter in model.parameters():  # a view of the file may lie at any byte
        parameter.data = parameter.data.clone()
    return model


def run_reference(model: Any, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits [B, n, V] at the last position of each call, of tokens up to each of `cuts`."""
    calls = PastCalls(model)
    past, found = calls.new_past(), []
    for start, end in zip((0, *cuts), cuts, strict=False):
        found.append(calls.call(ids[:, start:end], past, last_only=True))
    return torch.cat(found, dim=1)


def run_ours(model: Any, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    """The same of a streamed model, whose chunks are its own."""
    found, start = [], 0
    with contextlib.closing(model.new_cache()) as cache:
        for end in cuts:
            logits = model(ids[:, start:end], past_key_values=cache, logits_to_keep=1).logits
            found.append(logits)
            start = end
    return torch.cat(found, dim=1)


def differs(one: Tensor, other: Tensor) -> str:
    """In words; empty: they are equal bit for bit."""
    if one.shape != other.shape:
        return f"shape {list(one.shape)}, need {list(other.shape)}"
    if torch.equal(one, other):
        return ""
    return f"logits differ by {(one.float() - other.float()).abs().max().item():.1e}"


def steps(end: int) -> list[int]:
    """A prompt and some tokens."""
    return [end - STEPS, *range(end - STEPS + 1, end + 1)]


def checks(model_type: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Names of checks, and what is wrong, or nothing. Raises an OllmError if the model is not
    opened.
    """
    import ollm

    with saved(model_type, dtype) as (model, directory):
        size = min(int(getattr(model.config.get_text_config(), "vocab_size", 256)), 250)
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(3, size, (2, PROMPT + STEPS), generator=seeded)
        cuts = steps(ids.shape[1])
        options: dict[str, Any] = {
            "device": "cpu", "dtype": str(dtype)[6:], "precision": "exact", "attention": "exact",
            "device_memory": "2GB",
        }  # fmt: skip
        with ollm.load(directory, **options) as ours:
            expected = run_reference(model, ids[:1], cuts)
            yield "logits", differs(run_ours(ours, ids[:1], cuts), expected)
            expected = run_reference(model, ids, cuts)
            yield "batch", told(lambda: differs(run_ours(ours, ids, cuts), expected))
            if dtype == torch.float32:
                tokens = ours.generate(
                    ids[:1, :20], max_new_tokens=6, do_sample=False, eos_token_id=None,
                    pad_token_id=0, forced_eos_token_id=None,
                )[0, 20:].tolist()  # fmt: skip
                wanted = run_reference_greedy(model, ids[:1, :20])
                yield "greedy", "" if tokens == wanted else f"{tokens}, need {wanted}"
        options |= {"kv": "disk", "kv_dir": directory / "kv"}

        def in_chunks(size: int) -> str:
            whole = [*range(size, cuts[0], size), *cuts]
            with ollm.load(directory, **options, chunk_size=size) as ours:
                expected = run_reference(model, ids[:1], whole)[:, -len(cuts) :]
                return differs(run_ours(ours, ids[:1], cuts), expected)

        found = told(lambda: in_chunks(CHUNK))
        if ONE_BY_ONE in found:
            yield "tokens", told(lambda: in_chunks(1))
        else:
            yield "chunks", found
        if dtype == torch.float32:
            yield "plan", planned(directory, options)


def told(check: Callable[[], str]) -> str:
    """What a check gives, or the refusal of a capability that the model does not have."""
    from ollm_core import UnsupportedError

    try:
        return check()
    except UnsupportedError as error:
        return f"refused: {' '.join(str(error).split())}"


def run_reference_greedy(model: Any, ids: Tensor) -> list[int]:
    """Six tokens."""
    for _ in range(6):
        length = ids.shape[1]
        cuts = [20, *range(21, length + 1)]
        best = run_reference(model, ids, cuts)[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
    return ids[0, 20:].tolist()


def planned(directory: Path, options: dict[str, Any]) -> str:
    """Whether the config alone tells the tensors that are stored."""
    from ollm_adapter_transformers import TransformersAdapter
    from ollm_core.testing import Registry, open_checkpoint, read_config

    config = read_config(directory)
    adapter = Registry.discover().adapter_for(config)
    text = adapter.text_config(config)
    if not isinstance(adapter, TransformersAdapter):
        return ""
    told = adapter.tensors(text, {}, "F32")
    stored = {name: one.shape for name, one in open_checkpoint(directory).tensors.items()}
    if adapter.is_part:  # the rest of the model is there, too
        told_shapes = Counter(shape for _, shape in told.values())
        return "" if told_shapes <= Counter(stored.values()) else "other tensors are stored"
    wrong = {name for name, (_, shape) in told.items() if stored.get(name) != shape}
    wrong |= stored.keys() - told.keys()
    return f"{len(wrong)} tensors are not as told: {min(wrong)}" if wrong else ""


def one_line(error: Exception) -> str:
    """Its first sentence."""
    return " ".join(str(error).split()).partition(". ")[0]


def try_type(model_type: str) -> dict[str, str]:
    """Each check by name: "" if it passed, else what is wrong; or "refused" and the message."""
    from ollm_core import OllmError
    from ollm_core.testing import Registry

    found: dict[str, str] = {}
    try:
        Registry.discover().adapter_for(tiny_config(model_type).to_dict())
        for dtype in (torch.float32, torch.bfloat16):
            for name, wrong in checks(model_type, dtype):
                found[f"{name} {str(dtype)[6:]}"] = wrong
    except OllmError as error:
        return {**found, "refused": " ".join(str(error).split())}
    except ImportError as error:
        return {**found, "untried": f"transformers cannot build it here: {one_line(error)}"}
    return found
