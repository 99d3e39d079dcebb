"""Every option of `ollm.load`, `ollm.plan` and their verbs, once: its type, default, check, help
text and flag.

A new option is a field here. The keywords of `load` and `plan` with their `help()`, the flags of
the command line and the table in docs/generated/options.md come from the fields. Loads no torch.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast

from ollm_core.contracts.attention import ATTENTIONS
from ollm_core.contracts.kv import KV_TIERS
from ollm_core.errors import InputError
from ollm_core.files.paths import absolute
from ollm_core.memory.budgets import DEVICE_DEFAULT, HOST_DEFAULT
from ollm_core.option_fields import (
    about,
    called_by,
    choice,
    counted,
    default_text,
    directory,
    offered,
    said,
    size,
    switch,
)
from ollm_core.server_options import ServerOptions
from ollm_core.values import (
    DTYPES,
    Count,
    Device,
    DType,
    PathLike,
    Size,
    device_name,
    dtype_name,
    one_of,
    parse_tokens,
)

if TYPE_CHECKING:
    from ollm_core.calibration.rates import Rates
    from ollm_core.contracts.progress import Progress
    from ollm_core.plugins.registry import Registry
    from ollm_core.profiling import Profile

Keywords = ParamSpec("Keywords")
Chosen = TypeVar("Chosen")
Made = TypeVar("Made")

_DRAFTS, _TEXTS = ("run", "chat", "serve"), ("run", "chat", "ask", "batch", "plan", "serve")
_LOADS = ("run", "chat", "ask", "decide", "batch", "serve")
_BOTH = (*_LOADS, "plan")
"""Verbs: those that draft, those that open a model, and those that a plan is made for."""
PRECISIONS = ("fast", "exact")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


_LIMIT = (
    "`8GB`, `512MiB` or a number of bytes; more than the machine has is refused. In a container "
    "its limit counts. On a CPU, weights and activations count as device memory, and KV on the "
    "host as host memory."
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What `load` and `plan` share. Values are checked when the object is made, and kept in one
    form: sizes and counts as int, the dtype by name, paths absolute.
    """

    verb: ClassVar[str]
    """The one of the command line that these options are for."""

    device: Device = said(
        "auto",
        "Device that computes, for example cpu or cuda:0.",
        "auto takes the first GPU, or else the CPU. From Python also a torch.device, or the index "
        "of a GPU (-1 is the CPU). You can plan for cuda where there is no GPU: then with 8 GB.",
        verbs=(*_BOTH, "doctor"),
        metavar="NAME",
        check=called_by(device_name),
    )
    dtype: DType = choice(
        "auto",
        ("auto", *DTYPES),
        "dtype to compute in.",
        "auto takes the checkpoint's. From Python also a torch.dtype.",
        verbs=_BOTH,
        check=called_by(dtype_name),
    )
    device_memory: Size | None = size(
        None, "Device memory limit, for example 8GB.", _LIMIT, verbs=_BOTH, unset=DEVICE_DEFAULT
    )
    host_memory: Size | None = size(
        None,
        "Host memory limit, for example 16GB.",
        "Written as `device_memory` is.",
        verbs=_BOTH,
        unset=HOST_DEFAULT,
    )
    device_layers: Count | None = counted(
        None,
        0,
        "Most layers to keep on the device.",
        verbs=_BOTH,
        unset="as many as the limits allow",
    )
    host_layers: Count | None = counted(
        None,
        0,
        "Most layers to keep in host memory, beside a GPU.",
        verbs=_BOTH,
        unset="as many as the limits allow",
    )
    kv: str = offered(
        "auto",
        "ollm_kv_stores",
        "Where the KV cache is kept.",
        f"auto takes the first of {_listed(KV_TIERS)} that has room.",
        verbs=_BOTH,
        without_plugins=("plan",),
    )
    precision: str = choice(
        "fast",
        PRECISIONS,
        "exact: the numbers of transformers, bit for bit. fast: as close to float32, and faster.",
        "exact is what the un-offloaded model gives in transformers with eager attention and the "
        "same chunks. fast has the same weights, sums products in float32 and "
        "attends block by block: no further from the model in float32 than transformers is in the "
        "same dtype, several times as fast on most processors, and its memory does not grow with "
        "the context. Nothing is quantised in either.",
        verbs=_BOTH,
        idle=lambda told, flags: (
            "attention" in flags and told["attention"] not in ("auto", "exact")
        ),
    )
    attention: str = choice(
        "auto",
        ("auto", *ATTENTIONS),
        "Attention kernel.",
        "exact is transformers' eager attention, and means precision exact; its memory grows with "
        "the context. blockwise does not grow. flash is blockwise by the package flash-attn, on "
        "CUDA. auto goes by `precision`: with fast it is blockwise, or flash where `ollm doctor` "
        "measured that to be faster, and exact for families that have no other.",
        verbs=_BOTH,
        idle=lambda told, flags: (
            "precision" in flags and (told["precision"], told["attention"]) == ("fast", "exact")
        ),
    )
    chunk_size: Count | None = counted(
        None,
        1,
        "Prompt tokens per chunk.",
        verbs=_BOTH,
        unset="as many as fit",
    )
    models_dir: PathLike | None = directory(
        None,
        "Directory of your models.",
        verbs=(*_BOTH, "convert", "doctor", "import", "list-models", "pull"),
        unset="$OLLM_MODELS, or ~/.cache/ollm/models",
        variable="OLLM_MODELS",
        user_only=True,
        check=called_by(lambda value: value and absolute(value)),
    )
    registry: Registry | None = said(
        None, "Plugins to use, a `Registry`.", unset="those that are installed"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            known = about(each)
            if known.hook and not known.takes_plugins(self.verb):
                one_of(each.name, value, known.choices)
            object.__setattr__(self, each.name, known.check(each.name, value))
        if self.precision == "exact":
            if self.attention not in ("auto", "exact"):
                raise InputError(
                    f"precision is 'exact', and attention {self.attention!r} is not",
                    hint="leave attention out (--attention), or use precision='fast'",
                )
            object.__setattr__(self, "attention", "exact")
        elif self.attention == "exact":
            object.__setattr__(self, "precision", "exact")

    def check_names(self, registry: Registry) -> None:
        """Raises InputError for a name that is not built in and that no plugin offers."""
        for each in fields(self):
            if about(each).hook:
                registry.check_name(about(each).hook, getattr(self, each.name))


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ModelOptions):
    """The options of `ollm.load`."""

    verb = "run"

    kv_dir: PathLike | None = directory(
        None,
        "Directory of a KV cache on disk, for example ./kv_cache.",
        "What it holds when a cache is closed stays there, and a later prompt on the same model "
        "that begins alike continues from there. Only files made by this model are ever removed "
        "from it. To know the model, all bytes of its files are hashed when a directory is first "
        "used with it.",
        verbs=_LOADS,
        unset="a temporary one",
        user_only=True,
    )
    keep_kv: bool = switch(
        True,
        "Reuse and save the prefix cache in `kv_dir`.",
        "False leaves nothing there.",
        verbs=_LOADS,
    )
    kv_budget: Size | None = size(
        None,
        "Most disk space of the prefix caches in `kv_dir`, for example 50GB.",
        "For new text the least recently used ones of any model go, but none that is pinned (`ollm "
        "cache pin`) or that another process uses; what then has no room is not kept.",
        verbs=_LOADS,
        unset="no limit",
        user_only=True,
        idle=lambda told, _: told["kv_dir"] is None or not told["keep_kv"],
    )
    reader: str = offered(
        "auto",
        "ollm_reading_engines",
        "Reading engine for the weights.",
        "direct reads by O_DIRECT; kvikio is an extra. auto takes the one that `ollm doctor` "
        "measured to be the fastest here, or else direct where the file system allows it.",
        verbs=_LOADS,
    )
    draft: str = offered(
        "none",
        "ollm_draft_sources",
        "Source of draft tokens.",
        "lookup looks for the last tokens earlier in the text; model asks `draft_model`. Drafts "
        "change the speed, not the text. Texts that share a pass go without.",
        verbs=_DRAFTS,
    )
    draft_model: PathLike | None = said(
        None,
        "Directory or id of a small model of the same vocabulary, for `draft` model.",
        "It is held in memory as a whole, inside `device_memory` and `host_memory`.",
        verbs=_DRAFTS,
        metavar="DIR_OR_ID",
        unset="none",
        idle=lambda told, _: told["draft"] != "model",
    )
    num_draft_tokens: Count | None = counted(
        None,
        1,
        "Draft tokens at a time.",
        "What pays off is known by what drafts have cost and brought so far; none are made while "
        "they do not. With sampling it is 10, so that a seed repeats a text.",
        verbs=_DRAFTS,
        unset="as many as pay off, up to 10",
        idle=lambda told, _: told["draft"] == "none",
    )
    trust_remote_code: bool = switch(
        False,
        "Run a tokenizer that is Python code in the model's directory. Read that code first: it "
        "runs with your rights.",
        "False refuses such a tokenizer. Models that are code of their own are never run.",
        verbs=_LOADS,
        user_only=True,
    )
    on_progress: Callable[[Progress], None] | None = said(
        None,
        "Function that is called with a `Progress` after each step of a weight pass, and "
        "while files are hashed.",
        unset="none",
    )
    profile: Profile | None = said(
        None,
        "A `Profile` that counts where the time goes; see `ollm_core.profiling`.",
        unset="none",
    )

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        if self.draft == "model" and self.draft_model is None:
            raise InputError(
                "draft is 'model': need a draft model, have none",
                hint="name it with draft_model (--draft-model), a directory or an id",
            )
        if self.draft != "model" and self.draft_model is not None:
            raise InputError(
                f"draft_model: need draft 'model', have {self.draft!r}",
                hint="add draft='model' (--draft model)",
            )
        if self.draft == "none" and self.num_draft_tokens is not None:
            raise InputError("num_draft_tokens needs a draft source", hint="add draft='lookup'")
        if self.kv_budget is not None and (self.kv_dir is None or not self.keep_kv):
            raise InputError(
                "kv_budget: need a kv_dir that is kept, have none",
                hint="name one with kv_dir (--kv-dir), or leave kv_budget out",
            )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelOptions):
    """The options of `ollm.plan`."""

    verb = "plan"

    context: str | Count | None = said(
        None,
        "Tokens of each sequence, prompt and answer together, for example 8192 or 100k.",
        verbs=("plan", "serve"),
        metavar="TOKENS",
        unset="8192, or what the model has",
        check=called_by(parse_tokens),
    )
    batch: Count = counted(1, 1, "Number of sequences.", verbs=("plan",))
    max_new_tokens: Count = counted(256, 1, "Most new tokens of an answer.", verbs=_TEXTS)
    rates: Rates | None = said(
        None,
        "Rates of disk, bus, memory and compute that the times are made from, a `Rates`.",
        unset="what `ollm doctor` measured here, else assumed",
    )


OPTION_SETS: tuple[type[Any], ...] = (LoadOptions, PlanOptions, ServerOptions)
OPTIONS: Mapping[str, Field[Any]] = MappingProxyType(
    {each.name: each for kind in OPTION_SETS for each in fields(kind)}
)
"""Every option by name: those of `load`, then those that only `plan` has, then those of a server
alone.
"""


def takes(
    kind: Callable[Keywords, Chosen],
) -> Callable[
    [Callable[[PathLike, Chosen], Made]], Callable[Concatenate[PathLike, Keywords], Made]
]:
    """Gives a function of a model and its options, an object of the class `kind`, the fields of
    that class as keywords: for callers, type checkers, editors, `inspect.signature` and `help()`.
    """

    def decorate(
        function: Callable[[PathLike, Chosen], Made],
    ) -> Callable[Concatenate[PathLike, Keywords], Made]:
        own, name = inspect.signature(function), getattr(function, "__name__", "")
        model = next(iter(own.parameters.values()))
        keywords = inspect.signature(kind).parameters.values()
        signature = own.replace(parameters=[model, *keywords])

        @functools.wraps(function)
        def called(path_or_id: PathLike, *args: Keywords.args, **kwargs: Keywords.kwargs) -> Made:
            try:
                signature.bind(path_or_id, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}() {error}") from None
            return function(path_or_id, kind(*args, **kwargs))

        shown = {each.name: each.annotation for each in signature.parameters.values()}
        called.__annotations__ = {**shown, "return": signature.return_annotation}
        called.__signature__ = signature  # type: ignore[attr-defined] # inspect and help() read it
        called.__doc__ = f"{inspect.getdoc(function)}\n\n{_help(signature.parameters)}"
        return cast("Callable[Concatenate[PathLike, Keywords], Made]", called)

    return decorate


def _help(names: Mapping[str, object]) -> str:
    lines = []
    for name in names:
        if option := OPTIONS.get(name):
            known = about(option)
            words = f"{known.help} {known.more}".rstrip()
            text = f"- `{name}`: {words} Default: {default_text(option)}."
            lines += textwrap.wrap(text, 96, subsequent_indent="  ")
    return "\n".join(lines)
