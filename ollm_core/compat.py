"""The API of ollm 0.x and 1.x on PyPI, so that scripts for the predecessor run unchanged."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from ollm_core.api import load
from ollm_core.checkpoint.hub import pull
from ollm_core.checkpoint.locate import local_path
from ollm_core.device.select import pick_device
from ollm_core.errors import InputError
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.plugins.registry import Registry
from ollm_core.values import Device

logger = logging.getLogger("ollm")


def file_get_contents(path: str | Path) -> str:
    """The text of a UTF-8 file."""
    return Path(path).read_text(encoding="utf-8")


class Inference:
    """A model by id. `ini_model` fetches it if need be and opens it; then `model` and `tokenizer`
    are there.

    Options of `ollm.load` may be given here too: they are how a budget is set.
    """

    def __init__(
        self, model_id: str, device: Device = "cuda:0", logging: bool = True, **load_options: Any
    ) -> None:
        """Raises DeviceError, naming what there is, if this machine does not have `device`."""
        self.model_id = model_id
        self.device: torch.device = pick_device(device)
        self.model: StreamedModel
        self.tokenizer: Any = None
        self._logging = logging
        self._load_options = {"keep_kv": False, **load_options}  # as the predecessor: removed

    def ini_model(self, models_dir: str | Path = "./models/", force_download: bool = False) -> None:
        """Open the model from `models_dir`, fetching it from the hub if it is not there."""
        registry = Registry.discover()
        _, entry = registry.find(self.model_id)
        directory = local_path(entry.id, models_dir)
        if force_download or not (directory / "config.json").is_file():
            directory = pull(entry, models_dir, force=force_download)
        self._open(directory)

    def offload_layers_to_cpu(self, layers_num: int = 2) -> None:
        """Keep `layers_num` layers in the CPU's memory between passes, if the budgets allow so
        many, and read the others again. Not called, as many are kept as the budgets allow.
        """
        _at_least_0(layers_num=layers_num)
        if self.device.type == "cpu":
            self._keep_layers(device=layers_num)
        else:
            self._keep_layers(host=layers_num)

    def offload_layers_to_gpu_cpu(self, gpu_layers_num: int = 0, cpu_layers_num: int = 0) -> None:
        """Keep `gpu_layers_num` layers on the GPU and `cpu_layers_num` others in host memory, if
        the budgets allow so many. On a CPU both are in its memory.
        """
        _at_least_0(gpu_layers_num=gpu_layers_num, cpu_layers_num=cpu_layers_num)
        if self.device.type == "cpu":
            self._keep_layers(device=gpu_layers_num + cpu_layers_num)
        else:
            self._keep_layers(device=gpu_layers_num, host=cpu_layers_num)

    def DiskCache(self, cache_dir: str | Path = "./kv_cache") -> SequenceCache:
        """An empty cache on disk, in a directory of its own inside `cache_dir`, removed with it.
        Nothing else there is touched.
        """
        return self.model.new_cache(kv="disk", kv_dir=cache_dir)

    def _keep_layers(self, device: int | None = None, host: int | None = None) -> None:
        self.model.keep_layers(device, host)
        wanted = {"device": device, "host": host}
        told = ", ".join(f"{n} on the {name}" for name, n in wanted.items() if n is not None)
        self._log("at most so many layers are kept, inside the budgets: %s", told)

    def _open(self, directory: str | Path) -> None:
        self.model = load(directory, device=self.device, **self._load_options)
        self.tokenizer = self.model.tokenizer
        if self.tokenizer is not None:
            # transformers 5 returns a mapping where 4 returned the tensor of token ids.
            self.tokenizer.apply_chat_template = functools.partial(
                self.tokenizer.apply_chat_template, return_dict=False
            )
        self._log("opened %s on %s", directory, self.device)

    def _log(self, message: str, *values: object) -> None:
        if self._logging:
            logger.info(message, *values)


def _at_least_0(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise InputError(f"{name} is {number}, expected at least 0")


class AutoInference(Inference):
    """A model in a local directory, opened at once."""

    def __init__(
        self,
        model_dir: str | Path,
        device: Device = "cuda:0",
        logging: bool = True,
        **load_options: Any,
    ) -> None:
        super().__init__(str(model_dir), device, logging, **load_options)
        self._open(model_dir)
