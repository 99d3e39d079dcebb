"""The kernels of block-wise attention on a CUDA device, beside plain products. Skipped where there
is none.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import ollm
from ollm_core import CacheKind, InputError
from ollm_core.attention.blockwise import BlockwiseAttention, kernels_on
from ollm_core.attention.kernels import Products
from ollm_core.attention.trial import flash_works, trial
from ollm_core.calibration.attention import measure_attention
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.tracker import traced_peak
from ollm_core.testing import KVView

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda:0")
PACKAGE = pytest.param(
    True,
    marks=pytest.mark.skipif(
        importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"
    ),
    id="flash-attn",
)
SOURCES = [pytest.param(False, id="torch"), PACKAGE]
ERRORS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def attend(kernels, dtype, head_dim, num_past, num_new, window):
    """Block-wise attention with sinks over a random past: [T, H, D] in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(CUDA)

    keys, values = (random(2, num_past + num_new, head_dim) for _ in "kv")
    query, sinks = random(1, 8, num_new, head_dim), random(8)
    kind = CacheKind("full", num_kv_heads=2, head_dim=head_dim)
    geometry = KVGeometry((kind,), dtype, CUDA)
    attention = BlockwiseAttention(kernels)
    with DeviceKVStore(geometry, MemoryAccount("device memory", 10**9)) as store:
        sequence = store.new_sequence()
        if num_past:
            store.append(0, sequence, keys[:, :num_past], values[:, :num_past])
        new = keys[None, :, num_past:], values[None, :, num_past:]
        view = KVView(*new, 0, (sequence,), (num_past,), store, attention)
        options = {"scaling": head_dim**-0.5, "sliding_window": window, "s_aux": sinks}
        return attention(torch.nn.Module(), query, view, **options)[0].float()


@pytest.mark.parametrize("package", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 128, 192, 256])
def test_a_trial_passes(package, dtype, head_dim):
    """Each kind of call, with heads that are padded too."""
    assert trial(kernels_on(CUDA, package=package)[0], CUDA, dtype, head_dim) == ""


@pytest.mark.parametrize("package", SOURCES)
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("window", [None, 128, 700])
@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1500), (4001, 1), (900, 6), (513, 900)])
def test_block_wise_is_what_products_give(package, dtype, window, num_past, num_new):
    """Pasts, windows, sinks and groups; float32 goes through products itself."""
    shape = (dtype, 64, num_past, num_new, window)
    found = attend(kernels_on(CUDA, package=package), *shape)
    expected = attend((Products(),), *shape)
    assert (found - expected).abs().max() < ERRORS[dtype]


def test_large_heads():
    """Past what the kernels take: products."""
    found = attend(kernels_on(CUDA), torch.bfloat16, 320, 300, 40, None)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("package", SOURCES)
@pytest.mark.parametrize(("num_new", "num_keys"), [(1, 256), (64, 256), (512, 256), (2048, 2048)])
def test_a_kernel_takes_no_more_than_is_traced(package, num_new, num_keys):
    """Results of split keys included; 1 MB is allowed for seeds and rounding."""
    kernel = kernels_on(CUDA, package=package)[0]

    def call(device):
        query = torch.zeros(8, 4, num_new, 128, dtype=torch.bfloat16, device=device)
        keys = torch.zeros(8, num_keys, 128, dtype=torch.bfloat16, device=device)
        return kernel(query, keys, keys, 0.1, causal=num_new == num_keys)

    call(CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(CUDA)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= traced_peak(lambda: call(torch.device("meta"))) + 10**6


def test_the_doctor_measures_what_works():
    """Products everywhere, torch's kernels from Ampere on."""
    found = measure_attention(CUDA, torch.bfloat16)
    assert found["products"] > 0
    assert found["blockwise"] > 0
    assert ("flash" in found) == flash_works(CUDA, torch.bfloat16)


def test_flash_gives_the_tokens_of_block_wise(make_llama, ids):
    """Or says in one line why it cannot be used."""
    directory = make_llama(torch.bfloat16)
    options = {"device": "cuda:0", "device_memory": "64MB", "chunk_size": 128}
    prompt = ids(700)[None].cuda()
    with ollm.load(directory, attention="blockwise", **options) as model:
        expected = model(input_ids=prompt).logits.float()
    if not flash_works(CUDA, torch.bfloat16):
        with pytest.raises(InputError, match="flash"):
            ollm.load(directory, attention="flash", **options)
        return
    with ollm.load(directory, attention="flash", **options) as model:
        found = model(input_ids=prompt).logits.float()
    assert (found - expected).abs().max() <= 4e-2 * expected.abs().max()
