"""Compiled products that are kept are bounded."""

from __future__ import annotations

import subprocess
import sys

from ollm_core.products.primitives import VARIABLES, bound_primitives

MANY_LENGTHS = """
import sys
import torch
from ollm_core.products.select import choose_products

def used():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

choose_products(torch.bfloat16, torch.device("cpu"), "exact")
weight = torch.zeros(512, 512, dtype=torch.bfloat16)
states = torch.zeros(700, 512, dtype=torch.bfloat16)
before = 0
for num_tokens in range(33, 633, 2):
    torch.nn.functional.linear(states[:num_tokens], weight)
    before = before or used()
print(used() - before)
"""


def test_it_is_said_unless_somebody_has():
    """The first product of the process asks for it."""
    environ = {}
    bound_primitives(environ)
    assert environ == dict.fromkeys(VARIABLES, "48")
    environ = {VARIABLES[0]: "7"}
    bound_primitives(environ)
    assert environ == {VARIABLES[0]: "7", VARIABLES[1]: "48"}


def test_memory_does_not_grow_with_the_lengths_of_prompts():
    """Three hundred of them, which take 240 MB where the processor has such products."""
    command = [sys.executable, "-c", MANY_LENGTHS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 130e6
