"""Options of a server: checked when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from ollm_core.errors import InputError
from ollm_core.server_options import ServerOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": ""}, "host is ''"),
        ({"port": 70_000}, "port is 70000, expected a whole number from 0 to 65535"),
        ({"port": "80"}, "port is '80'"),
        ({"api_key": "short"}, "api_key: need at least 8"),
        ({"api_key": "with a space"}, "api_key: need at least 8"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"max_body": "much"}, "much"),
        ({"allowed_origins": "*"}, "need an API key, have none"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str):
    """In one line, which never has the key."""
    with pytest.raises(InputError) as refused:
        ServerOptions(**options)
    assert message in refused.value.message
    assert str(options.get("api_key", "\n")) not in str(refused.value)


def test_lists_and_sizes_are_read():
    """Names in lower case, and the default of what was left out."""
    options = ServerOptions(
        allowed_hosts="Box.lan, b", allowed_origins="https://A.example/,*", api_key="a-long-key"
    )
    assert options.hosts == ("box.lan", "b")
    assert options.origins == ("https://a.example", "*")
    assert options.max_body_bytes == 16 << 20
    assert ServerOptions(max_body="1MB").max_body_bytes == 10**6
    assert (ServerOptions().hosts, ServerOptions().origins) == ((), ())
