"""Chat templates: which one it is, what transformers makes of it too, and what it may take."""

import json
import shutil
import time
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from ollm_core import ConfigError
from ollm_core.text import template_process
from ollm_core.text.templates import ChatTemplate, Limits

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Ünï \n{{ code }} 'quoted'\n"},
]
LLAMA = (
    "{{- bos_token }}{%- if tools is not none %}tools{%- endif %}"
    "{%- set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m['content']|trim %}{% endfor %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ns.system }}\n"
    "{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {{- m['role'] ~ m['content'] | trim ~ '<|eot_id|>' }}\n  {% endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant' }}{%- endif %}"
)
TEMPLATES = [
    LLAMA,
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | tojson(true, 1) }}",
    "{{ messages[0].content | upper | replace('B', 'x') }}{{ dict(a=1) }}{{ '%s' % documents }}",
    "{% macro say(m) %}{{ m.role }}: {{ m.content.split() | join(',') }}{% endmacro %}"
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ say(m) }}{% endfor %}",
    "\n{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}\n  {# no #}\n x \n",
    "{{ messages[1].content[2:5] }}{{ messages[::-1][0]['role'] }}{{ messages | length }}{{ x }}",
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "dir/chat_template.jinja", {"bos_token": "<s>"})


@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers(source):
    """The same text, character by character."""
    options = {"reasoning_effort": "low"}
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>", **options
    )
    assert template(source).render([MESSAGES, MESSAGES], options) == expected * 2


def test_the_environment_is_that_of_transformers():
    """Its filters, tests, functions and settings, so that a template finds what it asks for."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    ours, theirs = template_process.environment(), _compile_jinja_template("").environment
    for what in ("filters", "tests", "globals"):
        assert set(getattr(ours, what)) == set(getattr(theirs, what))
    for what in (
        "trim_blocks",
        "lstrip_blocks",
        "keep_trailing_newline",
        "autoescape",
        "undefined",
    ):
        assert getattr(ours, what) == getattr(theirs, what)
    assert len(ours.extensions) == len(theirs.extensions)


def test_today():
    """`strftime_now` gives today's date, as Llama 3 asks for it."""
    before = datetime.now().year
    assert int(template("{{ strftime_now('%Y') }}").render([MESSAGES])[0]) in (before, before + 1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('System role\nnot supported') }}", "System role not supported"),
        ("{% if messages %}\n{{ messages[0].content ", "line 2"),
        ("{{ messages | tojsonn }}", "tojsonn"),
        ("{{ messages[0].content.text.upper() }}", "no attribute 'text'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory"),
        ("{{ ('a' * 2000000) }}", "characters"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}",
            "writes",
        ),
        ("{% for i in range(99999999) %}{% endfor %}", "Range too big"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "deep"),
        ("{% if 1 %}" * 5_000 + "{% endif %}" * 5_000, "deep"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deep"),
        ("{{ '\ud800' }}", "Unicode"),
        ("{{ 1 / 0 }}", "zero"),
    ],
)
def test_refuses(source, words):
    """A damaged or hostile template is one line with its file, in little time."""
    start = time.monotonic()
    with pytest.raises(ConfigError, match=words) as refused:
        template(source).render([MESSAGES])
    assert refused.value.message.startswith("dir/chat_template.jinja: ")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 500
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("limits", "words"),
    [(Limits(cpu_seconds=1), "1 s of processor time"), (Limits(seconds=0.3), "more than 0.3 s")],
)
def test_loops_for_ever(limits, words):
    """Loops in loops that write nothing end with the time that they may take."""
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=words):
        template(loops).render([MESSAGES], limits=limits)


def test_a_long_document_is_within_the_limits():
    """What rendering may take grows with the text: 5 MB go through a common template."""
    long = [{"role": "user", "content": "wörds and words. " * 300_000}]
    (text,) = template(LLAMA).render([long])
    assert len(text) > len(long[0]["content"])


def test_which_template(smollm2, tmp_path):
    """A file, the tokenizer's config, the default of several, or one clear line with the names."""
    for path in smollm2.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def found(chat_template):
        said = json.dumps(config | {"chat_template": chat_template})
        (tmp_path / "tokenizer_config.json").write_text(said)
        return ChatTemplate.of(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False))

    assert found(None) is None
    one = found("{{ eos_token }}")
    assert one.render([MESSAGES]) == ["<|im_end|>"]
    assert one.where.endswith("tokenizer_config.json")
    several = [{"name": name, "template": name} for name in ("rag", "tool_use")]
    assert found([*several, {"name": "default", "template": "d"}]).source == "d"
    with pytest.raises(ConfigError, match=r"'default', have 'rag', 'tool_use'"):
        found(several)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert found(None).where.endswith("chat_template.jinja")


PIECES = st.sampled_from(
    [
        *("{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- for m in messages %}", "{% endfor %}"),
        *("{% if x %}", "{% else %}", "{% endif %}", "{% set x = ", "messages[0].content", "'a'"),
        *(" * 10**9", " | tojson", " | trim", "range(99999)", "[", "(", ")", "]", "\x00", "loop"),
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join))
def test_anything_is_rendered_or_refused(source):
    """Whatever a template is made of: texts, or a ConfigError, within the limits."""
    try:
        (text,) = template(source).render([MESSAGES], limits=Limits(64 << 20, 1, 30))
    except ConfigError:
        return
    assert len(text) < 2_000_000
