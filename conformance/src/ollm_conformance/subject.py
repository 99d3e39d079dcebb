"""The adapter under test, with what the checks need of it: random checkpoints, the un-offloaded
model, and ways to open it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import ollm
from ollm_conformance.forms import reference_options
from ollm_conformance.models import DTYPES, model_config, write_random
from ollm_conformance.past import Past, PastCalls
from ollm_conformance.seeds import drawn
from ollm_core import Config, DoesNotFitError, ModelAdapter
from ollm_core.testing import (
    DTYPE_BYTES,
    DryRun,
    Registry,
    SequenceCache,
    StreamedModel,
    as_opened,
    logical_tensors,
    open_checkpoint,
    open_dry_run,
    read_config,
    remembering_outside,
    share_traces,
    supports,
)

CHUNK = 96
"""Tokens of a chunk in most checks: no divisor and no multiple of a KV block."""
PROMPT = 600
"""Tokens of a long prompt: more than two KV blocks and six chunks."""


class Reference:
    """The un-offloaded transformers model of a checkpoint: eager attention and experts, prompt in
    chunks.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: str = "cpu", chunk_size: int = CHUNK
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            trust_remote_code=False,
            **reference_options(read_config(directory)),
        )
        self.model: PreTrainedModel = model.eval().to(device)
        with torch.no_grad():
            for parameter in self.model.parameters():
                # In bfloat16 transformers 5.17 leaves what it has unpacked, whatever is asked for.
                wanted = dtype if parameter.dtype == torch.bfloat16 else parameter.dtype
                # A copy, for aligned memory, as a fresh model has.
                parameter.data = parameter.data.to(wanted, copy=True)
        self._calls = PastCalls(self.model)
        self._chunk_size = chunk_size
        self._known: dict[tuple[tuple[int, ...], int, bool], Tensor] = {}
        self._continued: dict[tuple[tuple[int, ...], int], Tensor] = {}

    @functools.cached_property
    def in_float64(self) -> Reference:
        """The same weights, computed with in float64: what rounding does shows against it."""
        return self.with_model(copy.deepcopy(self.model).double())

    def with_model(self, model: PreTrainedModel) -> Reference:
        """The same for another model, of which nothing is known yet."""
        found = copy.copy(self)
        found.model, found._calls = model, PastCalls(model)
        found._known, found._continued = {}, {}
        vars(found).pop("in_float64", None)
        return found

    def new_cache(self) -> Past:
        """An empty cache of the right kind for each layer."""
        return self._calls.new_past()

    def run(
        self,
        ids: Tensor,
        chunk_size: int | None = None,
        cache: DynamicCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [T, V] of `ids` [T], after what is in `cache`; of the last token alone with
        `last_only`, as `generate` asks for them. A model that would begin anew in the middle of a
        text goes on token by token.
        """
        chunk_size = chunk_size or self._chunk_size
        key = tuple(ids.tolist()), chunk_size, last_only
        if cache is None and key in self._known:
            return self._known[key]
        used = self.new_cache() if cache is None else cache
        assert isinstance(used, Past), "a cache of `new_cache`"
        ids = ids.to(self.model.device)
        found: list[Tensor] = []
        for chunk in ids.split(chunk_size):
            alone = used.num_tokens and len(chunk) > 1 and self._calls.begins_anew
            pieces = chunk.split(1) if alone else (chunk,)
            found += (self._calls.call(one[None], used, last_only=last_only)[0] for one in pieces)
        logits = found[-1] if last_only else torch.cat(found)
        if cache is None:
            self._known[key] = logits
        return logits

    def run_pieces(
        self,
        pieces: Sequence[Tensor],
        chunk_size: int | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Logits [T, V] of `pieces` [n] of tokens, one after the other on one cache, each in chunks
        of its own, after what is in `cache`.
        """
        cache = self.new_cache() if cache is None else cache
        return torch.cat([self.run(piece, chunk_size, cache) for piece in pieces])

    @torch.no_grad()
    def greedy(
        self, ids: Tensor, num_new: int, chunk_size: int | None = None
    ) -> tuple[list[int], Tensor]:
        """Greedy tokens after a prompt [T], EOS ignored, and the logits [num_new, V] behind
        them.
        """
        key = tuple(ids.tolist()), chunk_size or self._chunk_size
        logits = self._continued.get(key)
        if logits is None or len(logits) < num_new:
            cache = self.new_cache()
            found = [self.run(ids, chunk_size, cache, last_only=True)]
            while len(found) < num_new:
                found.append(self.run(found[-1].argmax(-1), cache=cache))
            logits = self._continued[key] = torch.cat(found)
        logits = logits[:num_new]
        return logits.argmax(-1).tolist(), logits


class Subject:
    """One adapter under test. Checkpoints and references are made once and kept."""

    def __init__(
        self,
        adapter: ModelAdapter,
        directory: Path,
        load: Callable[..., StreamedModel] = ollm.load,
        checkpoint: Path | None = None,
        tiny_config: Config | None = None,
        dry_run: type[DryRun] = DryRun,
        small_configs: Mapping[str, Config] | None = None,
    ) -> None:
        """`directory` is an empty one for files; `checkpoint` that of a real model, if there is
        one; `tiny_config` stands for the adapter's own, `small_configs` for those that the suite
        makes of entries of the catalog, by id.
        """
        self.given_adapter = adapter
        """As the test class names it."""
        self._tiny_config = tiny_config
        self.adapter = as_opened(adapter, self.given_config)
        """With what core finds of a model that it leaves to the model's own forward."""
        self.small_configs = small_configs or {}
        self.directory = directory
        self.real_checkpoint = checkpoint
        self._load = load
        self._dry_run = dry_run
        self._dry_runs: dict[tuple[Path, str], DryRun] = {}
        self._references: dict[tuple[Path, str], Reference] = {}
        self._traces: dict[Hashable, Any] = {}
        self._outside: dict[Hashable, Any] = {}
        self._least_to_open: dict[tuple[str, ...], int] = {}
        self._made: dict[tuple[Hashable, ...], Any] = {}
        self._num_kv_directories = 0

    @functools.cached_property
    def registry(self) -> Registry:
        """A registry of this adapter alone. Raises PluginError if it cannot be used."""
        return Registry.of(self.given_adapter)

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the tiny config."""
        return copy.deepcopy(dict(self.given_config))

    @property
    def given_config(self) -> Config:
        """The tiny config as the adapter, or the test class, gives it."""
        return self._tiny_config or self.given_adapter.tiny_config()

    def once(self, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        """What `make` gave when it was called for this `key`, the first time alone."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def vocab_size(self) -> int:
        """Of the tiny model."""
        return int(model_config(self.config).get_text_config().vocab_size)

    def tiny(
        self,
        dtype: str = "float32",
        *,
        shards: bool = False,
        changes: Mapping[str, Any] | None = None,
    ) -> Path:
        """The directory of a tiny random checkpoint, written by transformers, `changes` made to its
        config. Its tensors are packed if the config says so.
        """
        told = "-".join(f"{key}={value}" for key, value in sorted((changes or {}).items()))
        directory = self.directory / re.sub(r"[^\w=.-]", "_", f"tiny-{dtype}-{shards}-{told}")
        if not directory.is_dir():
            write_random(directory, {**self.config, **(changes or {})}, dtype, shards=shards)
        return directory

    def checkpoint(self, config: Config, dtype: str = "float32") -> Path:
        """The directory of a random checkpoint in `dtype` whose config.json is `config`, word for
        word but for its dtype: nothing that it does not state is filled in.
        """
        stated: dict[str, Any] = copy.deepcopy(dict(config))
        stated.pop("torch_dtype", None)
        stated["dtype"] = dtype
        words = json.dumps(stated)
        name = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
        directory = self.directory / f"config-{name}"
        if not directory.is_dir():
            write_random(directory, stated, dtype)
            (directory / "config.json").write_text(words)
        return directory

    def reference(self, dtype: str = "float32", directory: Path | None = None) -> Reference:
        """The un-offloaded model of `directory` (default: `tiny(dtype)`)."""
        directory = directory or self.tiny(dtype)
        key = directory, dtype
        if key not in self._references:
            chunk_size = CHUNK if supports(self.adapter, "chunked-prefill") else 1 << 20
            self._references[key] = Reference(directory, DTYPES[dtype], chunk_size=chunk_size)
        return self._references[key]

    def open(self, directory: Path | None = None, **options: Any) -> StreamedModel:
        """The model under test; default: `tiny()`, exact attention, chunks of `CHUNK` tokens."""
        if supports(self.adapter, "chunked-prefill"):
            options.setdefault("chunk_size", CHUNK)
        options = {
            "device": "cpu", "device_memory": "1GB", "host_memory": "1GB",
            "attention": "exact", "registry": self.registry, "keep_kv": False,
        } | options  # fmt: skip
        if options.get("kv") == "disk":
            options.setdefault("kv_dir", self.new_directory())
        directory = directory or self.tiny()
        with remembering_outside(self._outside):
            model = self._load(directory, **options)
        share_traces(model, self._traces, (directory / "config.json").read_text())
        return model

    def dry_run(self, directory: Path, dtype: str = "auto") -> DryRun:
        """What plans runs of the model in `directory` on a CPU."""
        key = directory, dtype
        if key not in self._dry_runs:
            with remembering_outside(self._outside):
                found = open_dry_run(self.adapter, directory, self.registry, dtype, self._dry_run)
            share_traces(found, self._traces, (directory / "config.json").read_text())
            self._dry_runs[key] = found
        return self._dry_runs[key]

    def copy(self, directory: Path) -> Path:
        """The directory of a copy of a checkpoint, with its times, to be changed."""
        return Path(shutil.copytree(directory, self.new_directory()))

    def overwrite(self, directory: Path, *, last_file: bool = False) -> None:
        """Give a checkpoint other weights, in place: the middle half of its embedding, or of the
        largest tensor of its last file, reversed. Headers, sizes, modification times and both ends
        of every tensor stay as they are.
        """
        checkpoint, config = open_checkpoint(directory), read_config(directory)
        layout = self.adapter.layout(config)
        logical = logical_tensors(directory)
        plan = self.adapter.weights(config, logical.names)
        table = checkpoint.tensors[plan.parameters[f"{layout.embedding}.weight"].tensors[0]]
        if last_file:
            named = (name for one in plan.sources() for name in one.tensors)
            used = [checkpoint.tensors[part] for name in named for part in logical.stored(name)]
            table = max(used, key=lambda tensor: (tensor.path, tensor.num_bytes))
        size = DTYPE_BYTES[table.dtype]
        start, count = table.offset + table.num_bytes // size // 4 * size, table.num_bytes // 2
        status = table.path.stat()
        with table.path.open("r+b") as file:
            file.seek(start)
            numbers = torch.frombuffer(bytearray(file.read(count)), dtype=torch.uint8)
            file.seek(start)
            file.write(numbers.view(-1, size).flip(0).numpy().tobytes())
        os.utime(table.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def new_directory(self) -> Path:
        """A path that nothing has used."""
        self._num_kv_directories += 1
        return self.directory / f"kv-{self._num_kv_directories}"

    def prompt(self, num_tokens: int, seed: int = 0, vocab_size: int | None = None) -> Tensor:
        """Random token ids [num_tokens] without the first few, which are often special. Default:
        of the tiny model.
        """
        generator = drawn(seed)
        return torch.randint(5, vocab_size or self.vocab_size, (num_tokens,), generator=generator)

    def prompts(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Two of token ids [num_tokens]: `prompt`, and one token again and again, all of which a
        router sends to the same few experts. A plan must allow for that.
        """
        return self.prompt(num_tokens), self.prompt(1).expand(num_tokens)

    def least_memory(
        self,
        work: Callable[[StreamedModel], object],
        directory: Path | None = None,
        **options: Any,
    ) -> int:
        """The smallest `device_memory` that `work` runs in, by following what refusals name."""
        form = str(directory), *(f"{key}={options[key]}" for key in sorted(options))
        num_bytes = self._least_to_open.get(form, 1)
        for attempt in range(10):
            try:
                with self.open(directory, device_memory=num_bytes, **options) as model:
                    work(model)
                    return num_bytes
            except DoesNotFitError as error:
                named = re.search(r"at least (\d+) bytes", error.hint)
                if not named or int(named[1]) <= num_bytes:
                    raise AssertionError(
                        f"expected a refusal at {num_bytes} bytes to name a larger number that "
                        f"would do, got: {error}"
                    ) from error
                num_bytes = int(named[1])
                if not attempt:  # one byte is too little to open it, whatever the work
                    self._least_to_open.setdefault(form, num_bytes)
        raise AssertionError(f"expected refusals to name what would do, still refused: {num_bytes}")


def generate(model: StreamedModel, ids: Tensor, num_new: int, **options: Any) -> Any:
    """What transformers' `generate` returns, greedy, for prompts [B, T]; EOS is ignored unless
    given, and a 0 in a prompt is a token, no padding, unless `attention_mask` says so.
    """
    ids = ids.to(model.device)  # generate warns of another one
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options = plain | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=num_new, **options)  # type: ignore[misc]


def greedy(model: StreamedModel, ids: Tensor, num_new: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of `generate` after a prompt [T], EOS ignored, and the logits behind them."""
    found = generate(model, ids[None], num_new, return_dict_in_generate=True, output_logits=True)
    return found.sequences[0, len(ids) :].tolist(), torch.cat(found.logits)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [T] as one batch [B, S], padded on the left with 0, and its attention mask."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def run_pieces(
    model: StreamedModel, pieces: Sequence[Tensor], cache: SequenceCache | None = None
) -> Tensor:
    """Logits [T, V] of `pieces` [n] of tokens, each a pass, after what is in `cache`."""
    cache = model.new_cache() if cache is None else cache
    return torch.cat([model(input_ids=p[None], past_key_values=cache).logits[0] for p in pieces])
