"""Renders a chat template in a process of its own, whose memory and time the kernel bounds.

Run as a program, never imported for rendering: `{{ 'a' * 10**10 }}` or loops in loops are a line
each, and nothing inside a Python process can stop them for sure. It imports jinja2 and nothing of
ours or of transformers, so it takes 60 ms where transformers takes a second.

Arguments: bytes of memory, seconds of processor time, characters to write at most, and the
directories of jinja2. On stdin, a JSON object with `template` and `renderings`, a list of objects
of variables. On stdout, `{"texts": [...]}` or `{"refused": reason}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in: the same sandbox, filters and functions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The block `{% generation %}`, which marks what an assistant said, is its content."""

        tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return str(caller())

    class TemplateDict:
        """`dict` without what it inherits."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    class TemplateNamespace(Namespace):
        """A namespace without underscores, which lead to Python's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in it
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            Namespace.__setitem__(self, name, value)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} begins with an underscore")

    def raise_exception(message: object) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        form: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    made.globals["dict"] = TemplateDict()
    made.globals["namespace"] = TemplateNamespace
    return made


def render(template: str, renderings: list[Mapping[str, Any]], max_chars: int) -> dict[str, Any]:
    """`{"texts": [...]}`, one per rendering, or `{"refused": reason}`, one line."""
    try:
        compiled = environment().from_string(template)
        texts = []
        for variables in renderings:
            parts, num_chars = [], 0
            for part in compiled.generate(**variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > max_chars:
                    return {"refused": f"it writes more than {max_chars} characters"}
            texts.append("".join(parts))
    except RecursionError:
        return {"refused": "it is nested too deeply"}
    except MemoryError:
        return {"refused": "it needs too much memory"}
    except Exception as error:  # noqa: BLE001 # a template may raise anything
        line = getattr(error, "lineno", None)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return {"refused": f"{reason} (line {line})" if line else reason}
    return {"texts": texts}


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    memory_bytes, cpu_seconds, max_chars, *directories = arguments
    _limit(int(memory_bytes), int(cpu_seconds))
    sys.path[:] = [*sys.path, *directories]
    request = json.load(sys.stdin)
    answer = render(request["template"], request["renderings"], int(max_chars))
    json.dump(answer, sys.stdout)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    import resource

    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, allowed = resource.getrlimit(kind)
        if allowed == resource.RLIM_INFINITY or most < allowed:
            resource.setrlimit(kind, (most, allowed))


if __name__ == "__main__":
    main(sys.argv[1:])
