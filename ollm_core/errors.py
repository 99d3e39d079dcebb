"""Every exception that oLLM raises on purpose, and the exit code that the command line gives it.

    OllmError                 1   something failed while running
    ├── InputError            2   bad usage or bad input
    │   ├── CheckpointError       a checkpoint file is missing, damaged or lying
    │   ├── ConfigError           a config.json is missing, damaged or of an unknown kind
    │   ├── DeviceError           a device that is not there
    │   ├── KVStoreError          a KV directory or a request to a KV store that cannot be served
    │   └── UnsupportedError      an ability that the adapter declares it does not have
    ├── DoesNotFitError       3   more memory or disk than was allowed or is there
    ├── UnknownModelError     4   no installed adapter knows the model
    ├── PluginError           4   a plugin that is broken or missing
    ├── NotFiniteError        1   the model computes what is no number
    └── ReadError             1   the storage failed, or a file changed under a running model
        └── DamagedKVError        a block of KV on disk is not what was written

A message is one line: what was wrong and what was expected. `hint` says what to do about it.
"""

from __future__ import annotations


class OllmError(Exception):
    """Base of all errors raised on purpose. `hint` is one more sentence: what the user can do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. hint: {self.hint}" if self.hint else self.message


class InputError(OllmError):
    """Bad usage or bad input."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint file is missing, damaged or contradicts itself. The message names the file."""


class ConfigError(InputError):
    """A model configuration is missing, damaged or of an unknown kind."""


class DeviceError(InputError):
    """A device that this machine does not have. The message names those that it has."""


class KVStoreError(InputError):
    """A KV directory or a request to a KV store that cannot be served."""


class UnsupportedError(InputError):
    """An ability that the adapter or the library declares it does not have, with its reason."""


class DoesNotFitError(OllmError):
    """More memory or disk than was allowed or is there. The message names what would fit.

    Where a memory's limit is in the way, `memory` is its account's name, and `needed_bytes` the
    limit that this request would need.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, hint: str = "", memory: str = "", needed_bytes: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.memory = memory
        self.needed_bytes = needed_bytes


class UnknownModelError(OllmError):
    """No installed adapter offers the model id or claims the model type."""

    exit_code = 4


class PluginError(OllmError):
    """A plugin that is broken, clashes with another, or is missing."""

    exit_code = 4


class NotFiniteError(OllmError):
    """A model's logits are NaN or infinite: its weights are damaged, or overflow in its dtype."""


class ReadError(OllmError):
    """The storage failed, or a file changed while a model was open on it."""


class DamagedKVError(ReadError):
    """A block of KV on disk is not what was written. The message names file and block."""


def words(error: BaseException) -> str:
    """What an error says in one line, where it is known who says it."""
    return " ".join(str(error).split())


def one_line(error: BaseException) -> str:
    """An error in one line, with its type unless it speaks for itself."""
    text = words(error)
    return text if isinstance(error, OllmError) else f"{type(error).__name__}: {text}".strip(": ")
