"""Open a model: options are checked here, and `loader` builds it."""

from __future__ import annotations

from collections.abc import Callable

from ollm_core.attention.select import ATTENTIONS
from ollm_core.contracts.progress import Progress
from ollm_core.device.select import pick_device
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.errors import InputError
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.factory import find_directory
from ollm_core.loader import open_model
from ollm_core.memory.budgets import layer_limits, stated_budgets
from ollm_core.options import Count, Device, DType, PathLike, Size, count, dtype_name, one_of
from ollm_core.plugins.registry import Registry
from ollm_core.profiling import Profile


@own_torch_state()
def load(
    path_or_id: PathLike,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    device_layers: Count | None = None,
    host_layers: Count | None = None,
    kv: str = "auto",
    kv_dir: PathLike | None = None,
    keep_kv: bool = True,
    models_dir: PathLike | None = None,
    chunk_size: Count | None = None,
    attention: str = "auto",
    reader: str = "auto",
    draft: str = "none",
    draft_model: PathLike | None = None,
    num_draft_tokens: Count | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    profile: Profile | None = None,
    registry: Registry | None = None,
) -> StreamedModel:
    """Open the model in a directory, or one that is known by id, for running inside a bounded
    memory.

    - `device`: "auto", "cpu", "cuda", "cuda:N", a `torch.device`, or N (-1 is the CPU).
    - `dtype`: "auto" (the checkpoint's), a key of `DTYPES`, or a `torch.dtype`.
    - `device_memory`, `host_memory`: the most bytes to hold there, as `8GB`, `512MiB` or a number.
      Default: what is free now less a reserve, as `ollm_core.memory.budgets` says. More than the
      machine has in all is refused. On a CPU, weights and activations count as device memory, KV on
      the host as host memory.
    - `device_layers`, `host_layers`: the most layers to keep on the device, and in host memory
      beside a GPU. Default: as many as the budgets allow; never more than that.
    - `kv`: where keys and values are kept; "auto" takes the first of device, host and disk that has
      room.
    - `kv_dir`: the directory for KV on disk. Only files made by this model are ever removed from
      it. What it holds is kept there when a cache is closed, and a later prompt on the same model
      that begins alike continues from there. Nothing is kept in the default directory. To know the
      model, all bytes of its files are hashed when a directory is first used with it.
    - `keep_kv`: False neither keeps KV in `kv_dir` nor looks for any.
    - `attention`: "exact" (bit for bit transformers' eager attention; memory grows with the
      context), "blockwise" (it does not), "flash" (the same by the package flash-attn, on CUDA), or
      "auto": exact up to 8,192 tokens where it fits, and else "blockwise", or "flash" where
      `ollm doctor` measured that to be faster.
    - `chunk_size`: tokens of a prompt that go through a layer together. Default: the largest that
      fits.
    - `reader`: the reading engine, "direct", "mmap", "kvikio" (an extra) or "auto": the one that
      `ollm doctor` measured to be the fastest here, else direct reads where the file system allows
      them.
    - `draft`: where tokens guessed ahead come from: "none", "lookup", which looks for the last ones
      earlier in the text, or "model". It changes the speed, not the text; batches go without.
    - `draft_model`: for draft "model": the directory or the id of a model of the same vocabulary.
      It is held in memory as a whole, inside `device_memory` and `host_memory`.
    - `num_draft_tokens`: how many tokens are drafted at a time. Default: as many as pay, up to 10,
      by what drafts have cost and brought so far; none while they do not. With sampling 10, so
      that a seed repeats a text.
    - `trust_remote_code`: run Python code that lies in the directory, where its tokenizer is such
      code. It may do all that you may do: read it first. False refuses such a tokenizer. Models
      that are code of their own are never run.
    - `on_progress`: told of every step of a weight pass, and of that hashing.
    - `profile`: where the time goes is counted in it; see `ollm_core.profiling`.

    `kv`, `reader` and `draft` also take a name that a plugin offers; "auto" never takes one.

    Raises an OllmError: UnknownModelError, ConfigError, CheckpointError, DeviceError,
    DoesNotFitError, InputError, PluginError.
    """
    registry = registry or Registry.discover()
    registry.check_name("ollm_kv_stores", kv)
    registry.check_name("ollm_reading_engines", reader)
    registry.check_name("ollm_draft_sources", draft)
    one_of("attention", attention, ("auto", *ATTENTIONS))
    if not isinstance(trust_remote_code, bool):  # "no" is true
        raise InputError(f"trust_remote_code is {trust_remote_code!r}, expected True or False")
    computing = dtype_name(dtype)
    chunk = None if chunk_size is None else count("chunk_size", chunk_size, 1)
    num_drafted = _check_drafts(draft, num_draft_tokens, draft_model)
    target = pick_device(device)
    layers = layer_limits(target, device_layers, host_layers)
    return open_model(
        path_or_id,
        registry,
        device=target,
        dtype=computing,
        budgets=stated_budgets(target, device_memory, host_memory),
        layers=layers,
        kv=kv,
        kv_dir=find_directory(kv_dir),
        keep_kv=keep_kv,
        models_dir=models_dir,
        chunk_size=chunk,
        attention=attention,
        reader=reader,
        draft=draft,
        draft_model=draft_model,
        num_draft_tokens=num_drafted,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
        profile=profile,
    )


def _check_drafts(
    draft: str, num_draft_tokens: Count | None, draft_model: PathLike | None
) -> int | None:
    """`num_draft_tokens`. Raises InputError for options that do not go together."""
    if draft == "model" and draft_model is None:
        raise InputError(
            "draft is 'model', and no model is named for it",
            hint="name it with draft_model (--draft-model), a directory or an id",
        )
    if draft != "model" and draft_model is not None:
        raise InputError(
            f"a draft model is named, and draft is {draft!r}", hint="draft='model' (--draft model)"
        )
    if num_draft_tokens is None:
        return None
    if draft == "none":
        raise InputError("num_draft_tokens needs a draft source", hint="add draft='lookup'")
    return count("num_draft_tokens", num_draft_tokens, 1)
