"""Writes docs/generated/options.md: every option of `ollm.load`, `ollm.plan` and their verbs.

python docs/generated/options_table.py > docs/generated/options.md
"""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from ollm_core.option_fields import about, default_text
from ollm_core.options import OPTION_SETS, OPTIONS

_HEAD = """# Options

Written from `ollm_core/options.py` by `options_table.py` here (`make options`); a test compares.
Each option is a keyword of `ollm.load` or `ollm.plan`, and a flag of the verbs that are named
behind it, spelled with dashes: `device_memory` is `--device-memory`. It is also a variable,
`OLLM_DEVICE_MEMORY`, and a key of config files, but those marked † not of a project's: see
[configuration.md](../configuration.md). The verbs have a few flags more, which `--help` shows.

A plugin may offer more names where PLUGIN stands. Values may be what you pass to transformers; see
[running.md](../running.md#values-of-options).
"""

_TABLE = """
## {title}

| option | values | default | what it does | flag of |
| --- | --- | --- | --- | --- |
"""


def options_page() -> str:
    """The page."""
    loads, plans, serves = ({each.name for each in fields(kind)} for kind in OPTION_SETS)
    page = _HEAD
    for title, names in (
        ("`load` and `plan`", loads & plans),
        ("`load` alone", loads - plans),
        ("`plan` alone", plans - loads),
        ("A server alone", serves),
    ):
        page += _TABLE.format(title=title)
        page += "".join(_row(option) for name, option in OPTIONS.items() if name in names)
    return page


def _row(option: Field[Any]) -> str:
    known = about(option)
    verbs = ", ".join(f"`{verb}`" for verb in known.verbs)
    cells = (
        f"`{option.name}`" + " †" * known.user_only,
        _values(option),
        default_text(option),
        f"{known.help} {known.more}".rstrip(),
        verbs or "Python only",
    )
    return f"| {' | '.join(cells)} |\n"


def _values(option: Field[Any]) -> str:
    """What may be passed."""
    known = about(option)
    if known.choices:
        names = ", ".join(f"`{name}`" for name in known.choices)
        without = "".join(f" (not for `{verb}`)" for verb in known.without_plugins)
        return f"{names}, PLUGIN{without}" if known.hook else names
    if isinstance(option.default, bool):
        return "on, off"
    if known.least is not None:
        return f"{known.least} or more"
    return known.metavar or "an object"


if __name__ == "__main__":
    print(options_page(), end="")  # noqa: T201
