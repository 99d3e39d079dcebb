"""config.json: what is read, and what is refused."""

import pytest

from ollm_core import ConfigError
from ollm_core.checkpoint import safetensors as checkpoint_module
from ollm_core.checkpoint.safetensors import read_config


def test_config_is_read(tmp_path):
    """A config comes back as parsed, with the Infinity that some models write."""
    (tmp_path / "config.json").write_text(' {"model_type": "llama", "limit": Infinity}')
    assert read_config(tmp_path) == {"model_type": "llama", "limit": float("inf")}


BAD_CONFIGS = {
    "not JSON": b"{",
    "not UTF-8": b'{"model_type": "\xff"}',
    "not an object": b'["llama"]',
    "nested": b"[" * 100_000,
    "no model type": b"{}",
    "model type is a list": b'{"model_type": ["llama"]}',
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(tmp_path, case):
    """A damaged config.json, or one that does not name its family, is a ConfigError of one line."""
    (tmp_path / "config.json").write_bytes(BAD_CONFIGS[case])
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_missing_and_huge_configs_are_refused(tmp_path, monkeypatch):
    """No config.json, or one too large to be one, is a ConfigError."""
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path)
    monkeypatch.setattr(checkpoint_module, "MAX_CONFIG_BYTES", 10)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="larger than"):
        read_config(tmp_path)
