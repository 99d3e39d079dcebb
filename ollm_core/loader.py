"""Opens one model in accounts that are given: the model itself, or one that drafts for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ollm_core.calibration.rates import fastest_blocks, fastest_reader
from ollm_core.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from ollm_core.contracts.progress import Progress
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.memory import DeviceMemory
from ollm_core.engine.engine import Engine
from ollm_core.engine.pass_planner import Admission
from ollm_core.errors import InputError, PluginError, one_line
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.factory import StoreOpener
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.cuda_limit import free_device_bytes
from ollm_core.memory.host import HostMemory
from ollm_core.model.fingerprint import identity
from ollm_core.model.spec import ModelParts, take_apart
from ollm_core.plugins.factories import KVRequest
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry, require
from ollm_core.profiling import Span, no_span
from ollm_core.text.generation_config import read_generation_config
from ollm_core.text.tokenizer import open_tokenizer
from ollm_core.weights.eviction import Pressure, reserve_bytes
from ollm_core.weights.sources.posix import check_source, open_source
from ollm_core.weights.streamer import TieredWeights


@dataclass(frozen=True, slots=True)
class Opening:
    """What the models of one call of `load` have in common."""

    registry: Registry
    reader: str
    dtype: str
    device: torch.device
    cap: Callable[[], AbstractContextManager[None]]
    """Held during each pass of either."""
    memory: DeviceMemory
    """That of the device."""
    trust_remote_code: bool = False
    """Whether a tokenizer may run Python code of its checkpoint."""

    def take_apart(self, directory: Path) -> ModelParts:
        """The model in `directory`. Raises ConfigError, CheckpointError, UnknownModelError."""
        config = read_config(directory)
        adapter = self.registry.adapter_for(config)
        parts = take_apart(
            adapter,
            config,
            open_checkpoint(directory),
            self.registry.offers("ollm_weight_codecs"),
            dtype=self.dtype,
            device=self.device,
            where=directory,
            memory=self.memory,
        )
        return replace(
            parts,
            blocks=fastest_blocks(self.device, parts.dtype),
            proven=self.registry.proven,
        )

    def source(self, parts: ModelParts) -> ByteSource:
        """What reads its weights. Raises ReadError, PluginError."""
        engine = self.registry.check_name("ollm_reading_engines", self.reader)
        checkpoint = parts.checkpoint
        if self.reader == "auto":
            try:
                return _open_source(checkpoint, fastest_reader(checkpoint.directory), None)
            except InputError:  # one that worked when it was measured; CheckpointError comes again
                pass
        return _open_source(checkpoint, self.reader, engine)

    def pressure(self, weights: TieredWeights) -> Pressure:
        """Lets kept weights give way when others take the machine's memory."""
        on_gpu = self.device.type == "cuda"
        free = functools.partial(free_device_bytes, self.device) if on_gpu else None
        host = HostMemory()
        return Pressure(weights, host.free, free, reserve_bytes=reserve_bytes(host.total()))

    def open(
        self,
        parts: ModelParts,
        source: ByteSource,
        accounts: Accounts,
        admission: Callable[[TieredWeights], Admission],
        kv: str,
        kv_dir: Path | None = None,
        keep_kv: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        span: Span = no_span,
    ) -> StreamedModel:
        """The model, without a draft source; it closes `source`. Raises DoesNotFitError."""
        skeleton, checkpoint = parts.skeleton, parts.checkpoint
        directory = checkpoint.directory
        with ExitStack() as opened:  # what fails from here on leaves nothing open
            weights = opened.enter_context(
                TieredWeights(
                    parts.units,
                    source,
                    parts.dtype,
                    self.device,
                    accounts,
                    buffer_bytes=skeleton.buffer_bytes,
                    span=span,
                    memory=parts.memory,
                )
            )
            skeleton.bind_norm(weights.norm)
            admitting = admission(weights)
            engine = Engine(
                skeleton,
                weights,
                admitting,
                on_progress,
                self.cap,
                span,
                checkpoint.check_unchanged,
            )
            kv_request = KVRequest(
                parts.geometry,
                accounts.device,
                accounts.host,
                kv_dir,
                functools.cache(
                    functools.partial(
                        identity,
                        checkpoint,
                        parts.config,
                        engine.report_check,
                        exact=admitting.exact,
                    )
                ),
                keep_kv,
            )
            model = StreamedModel(
                skeleton,
                weights,
                engine,
                accounts,
                StoreOpener(kv, kv_request, parts.adapter, self.registry, parts.memory),
                parts.kinds,
                weight_bytes=checkpoint.total_bytes,
                generation_config=read_generation_config(directory, skeleton.config.to_dict()),
                tokenizer=open_tokenizer(directory, trust_remote_code=self.trust_remote_code),
                demand=functools.partial(require, parts.adapter),
            )
            opened.pop_all()
        return model


def _open_source(checkpoint: Checkpoint, reader: str, engine: Offer | None) -> ByteSource:
    checkpoint.check_unchanged()
    paths = list(checkpoint.files)
    if engine is None:
        return open_source(paths, reader)
    source: ByteSource = engine.make(ByteSource, paths)
    try:
        check_source(source, checkpoint.tensors.values())
    except Exception as error:
        source.close()
        raise PluginError(
            f"{engine} failed its test read: {one_line(error)}", hint="use reader='auto'"
        ) from error
    return source
