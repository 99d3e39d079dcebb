"""Packed experts: decoded bit for bit as transformers does, in memory that is accounted for."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance import CodecConformance
from ollm_conformance.forms import as_published
from ollm_conformance.models import write_random
from ollm_conformance.subject import Subject, greedy
from ollm_core import CheckpointError, ParameterSource, TensorInfo, UnsupportedError
from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.contracts.tensors import WeightPlan
from ollm_core.memory.tracker import AllocationTracker
from ollm_core.weights.experts.sizes import made_bytes
from ollm_core.weights.formats import mxfp4
from ollm_core.weights.formats.codecs import LogicalTensors
from ollm_core.weights.formats.mxfp4 import Mxfp4Codec, dequantize_mxfp4
from ollm_core.weights.units import Parameter, WeightUnit

CONFIG = {"quantization_config": {"quant_method": "mxfp4"}}
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def packed(num_outputs, num_blocks, scales=(90, 140), seed=0):
    """Random blocks and scales of one parameter."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (num_outputs, num_blocks, 16), generator=generator)
    found = torch.randint(*scales, (num_outputs, num_blocks), generator=generator)
    return blocks.to(torch.uint8), found.to(torch.uint8)


def composed(forms, plan, shapes, dtype=torch.bfloat16):
    """`plan` over the stored tensors, all bytes of these shapes, of a checkpoint in MXFP4."""
    file = Path("model.safetensors")
    infos = {n: TensorInfo(n, "U8", shape, file, 0, prod(shape)) for n, shape in forms.items()}
    return LogicalTensors(Checkpoint(file.parent, infos, {}), CONFIG, {}).compose(
        plan, shapes, dtype
    )


def source_of(num_inputs, num_outputs, name="p", dtype=torch.bfloat16):
    """What makes one packed parameter."""
    scales = num_outputs, num_inputs // 32
    forms = {f"{name}_blocks": (*scales, 16), f"{name}_scales": scales}
    plan = WeightPlan({name: ParameterSource((name,))})
    return composed(forms, plan, {name: (num_inputs, num_outputs)}, dtype).parameters[name]


def row_of(name, num_inputs, num_outputs, dtype):
    """What makes one row of a packed stack of two."""
    scales = 2, num_outputs, num_inputs // 32
    forms = {f"{name}_blocks": (*scales, 16), f"{name}_scales": scales}
    plan = WeightPlan({}, experts={name: (ParameterSource((name,), row=1),)})
    shapes = {name: (2, num_inputs, num_outputs)}
    return composed(forms, plan, shapes, dtype).experts[name][0]


def transformers_says(blocks, scales, dtype=torch.bfloat16):
    """What transformers makes of one expert's bytes."""
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]


def same(found, expected):
    """Equal bit for bit, the sign of zero included, and laid out alike."""
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def blocks_of(name, stack):
    """The nearest packed form of a stack [E, in, out]."""
    parts = [
        as_published(CONFIG, {"down_proj": some.clone()}).values()
        for some in stack.split(128, dim=2)  # packing takes many times their memory
    ]
    blocks, scales = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


class TestMxfp4(CodecConformance):
    """Stacks of matrices, such as experts are; what they cannot hold is stored as it is."""

    codec = Mxfp4Codec()
    config = CONFIG

    @classmethod
    def sample(cls, dtype, shape, seed):
        num_rows, num_inputs, num_outputs = {
            1: (2, 32, shape[-1]), 2: (2, shape[0] // 2, shape[-1]), 3: shape,
        }[len(shape)]  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        size = num_rows, max(num_inputs // 32, 1) * 32, num_outputs
        near = torch.randn(size, generator=generator).to(dtype)
        return convert_moe_packed_tensors(*blocks_of("", near).values(), dtype=dtype)

    @classmethod
    def write(cls, tensors, directory):
        stored = {}
        for name, tensor in tensors.items():
            packed = {name: tensor.clone()}
            if tensor.dim() == 3 and tensor.shape[1] % 32 == 0 and tensor.numel():
                blocks = blocks_of(name, tensor)
                made = convert_moe_packed_tensors(*blocks.values(), dtype=tensor.dtype)
                if torch.equal(made.view(torch.int16), tensor.view(torch.int16)):
                    packed = blocks
            stored |= packed
        save_file(stored, directory / "model.safetensors")

    @classmethod
    @contextmanager
    def models(cls):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            packed, plain = Path(name, "packed"), Path(name, "plain")
            write_random(packed, GptOssAdapter().tiny_config(), "bfloat16")
            shutil.copytree(packed, plain)
            config = json.loads((plain / "config.json").read_text())
            assert config.pop("quantization_config")["quant_method"] == "mxfp4"
            (plain / "config.json").write_text(json.dumps(config))
            tensors = load_file(packed / "model.safetensors")
            for tensor in [one for one in tensors if one.endswith("_blocks")]:
                whole = tensor.removesuffix("_blocks")
                parts = tensors.pop(tensor), tensors.pop(f"{whole}_scales")
                tensors[whole] = convert_moe_packed_tensors(*parts)
            save_file(tensors, plain / "model.safetensors", {"format": "pt"})
            yield tuple(
                stack.enter_context(ollm.load(one, device="cpu")) for one in (plain, packed)
            )


@pytest.mark.parametrize("chunk", [32, 1 << 12, 1 << 22])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (64, 3), (192, 2), (2, 90), (33, 7)])
def test_values_are_those_of_transformers(monkeypatch, shape, chunk):
    """Every number has the bits that transformers gives it, however it is cut into chunks."""
    monkeypatch.setattr(mxfp4, "_CHUNK_NUMBERS", chunk)
    blocks, scales = packed(*shape)
    same(dequantize_mxfp4(blocks, scales), transformers_says(blocks, scales))


def test_every_number_with_every_scale():
    """All 256 bytes under all 256 scales, those included that no model has."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    expected = transformers_says(blocks, scales)
    assert expected.isinf().any()
    same(dequantize_mxfp4(blocks, scales), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_lose_nothing_on_the_way(dtype):
    """bfloat16 holds every number, so that another dtype made from it is what transformers makes
    directly.
    """
    blocks, scales = packed(64, 4, scales=(100, 135))
    found = dequantize_mxfp4(blocks, scales).to(dtype)
    assert torch.equal(found, transformers_says(blocks, scales, dtype))


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_bytes_may_begin_anywhere(skip):
    """Tensors of bytes are not aligned in a file, nor then in the buffer they are read into."""
    blocks, scales = packed(40, 3)
    memory = torch.cat([torch.zeros(skip, dtype=torch.uint8), blocks.flatten(), scales.flatten()])
    found = dequantize_mxfp4(
        memory[skip : skip + blocks.numel()].view(blocks.shape),
        memory[skip + blocks.numel() :].view(scales.shape),
    )
    same(found, transformers_says(blocks, scales))


def test_nothing_is_asked_of_a_device():
    """On another device than the CPU no value comes back to decide anything."""
    blocks, scales = (part.to("meta") for part in packed(64, 4))
    found = dequantize_mxfp4(blocks, scales)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (128, 64), torch.bfloat16)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(192, 2), (5760, 90), (96, 3)])
def test_scratch_is_what_is_taken(shape, large):
    """The declared scratch memory is never too small, and hardly too large where scales are large;
    beside the result of a large parameter it is small.
    """
    blocks, scales = packed(*shape, scales=(90, 250 if large else 140))
    source = source_of(shape[1] * 32, shape[0])
    with AllocationTracker("cpu") as tracker:
        made = dequantize_mxfp4(blocks, scales)
    taken = tracker.peak - made.nbytes
    assert taken <= source.scratch_bytes <= (1.02 if large else 1.12) * taken
    assert source.scratch_bytes < made.nbytes * (0.4 if shape[1] == 90 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_planned_bytes_of_an_expert(tmp_path, dtype):
    """What is reserved for an expert in the making is what torch takes for it, also where it is
    made in another dtype than the one wanted.
    """
    infos, values, offset = {}, [], 0
    for name, (num_outputs, num_blocks) in {"up": (192, 2), "down": (64, 3)}.items():
        for leaf, part in zip(("blocks", "scales"), packed(num_outputs, num_blocks), strict=True):
            infos[f"{name}_{leaf}"] = TensorInfo(
                f"{name}_{leaf}", "U8", tuple(part.shape), tmp_path / "f", offset, part.nbytes
            )
            values.append(part.flatten())
            offset += part.nbytes
    unit = WeightUnit(
        "expert",
        tuple(
            Parameter(name, (inputs, outputs), row_of(name, inputs, outputs, dtype), parts)
            for name, inputs, outputs, parts in (
                ("up", 64, 192, (infos["up_blocks"], infos["up_scales"])),
                ("down", 96, 64, (infos["down_blocks"], infos["down_scales"])),
            )
        ),
    )
    buffer = torch.cat(values)
    with AllocationTracker("cpu") as tracker:
        unit.build(buffer, [info.offset for info in unit.tensors], dtype)
    assert tracker.peak <= made_bytes(unit, dtype) <= 1.1 * tracker.peak


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """The tiny model of gpt-oss, packed."""
    return Subject(GptOssAdapter(), tmp_path_factory.mktemp("gpt-oss"))


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_tokens_and_bits_of_from_pretrained(subject, kv):
    """250 greedy tokens across several windows, from a packed checkpoint with more experts than
    there is room for, are those of transformers' own dequantised model, and so is every logit.
    """
    prompt = subject.prompt(150)
    directory = subject.tiny("bfloat16", changes={"num_local_experts": 64})
    tokens, logits = subject.reference("bfloat16", directory).greedy(prompt, 250)
    stored = load_file(directory / "model.safetensors")
    assert stored[f"{STACK}_blocks"].dtype == torch.uint8
    assert STACK not in stored

    def work(model):  # where the cache is longest
        model(input_ids=subject.prompt(400)[None], logits_to_keep=1)

    least = subject.least_memory(work, directory, kv=kv)
    with subject.open(directory, device_memory=least, kv=kv) as model:
        found_tokens, found = greedy(model, prompt, 250)
        assert model.stats.experts_read > 500
        assert model.stats.experts_hit > 100
    assert found_tokens == tokens
    assert len(set(tokens)) > 20
    assert torch.equal(found, logits.float())


def damaged(subject, directory, change):
    """A copy of the packed checkpoint with other tensors."""
    shutil.copytree(subject.tiny("bfloat16"), directory)
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def without(tensors, *names):
    """All tensors but some."""
    return {name: value for name, value in tensors.items() if name not in names}


BLOCKS, SCALES = f"{STACK}_blocks", f"{STACK}_scales"
WHOLE = torch.zeros(5, 64, 64, dtype=torch.bfloat16)
DAMAGES = {
    "blocks without scales": (lambda t: without(t, SCALES), f"lacks tensor {SCALES}"),
    "scales without blocks": (lambda t: without(t, BLOCKS), f"lacks tensor {BLOCKS}"),
    "a stack that is not packed": (
        lambda t: without(t, BLOCKS, SCALES) | {STACK: WHOLE},
        f"lacks tensor {BLOCKS} and has {STACK}, config.json says mxfp4",
    ),
    "both": (lambda t: t | {STACK: WHOLE}, f"{STACK} is stored both as it is and encoded"),
    "blocks of another width": (
        lambda t: t | {BLOCKS: t[BLOCKS][:, :, :1].clone()},
        r"is U8 \[64, 1, 16\], .* needs U8 \[64, 2, 16\]",
    ),
    "fewer scales": (
        lambda t: t | {SCALES: t[SCALES][:, :-1].clone()},
        r"is U8 \[63, 2\], .* needs U8 \[64, 2\]",
    ),
    "scales as floats": (lambda t: t | {SCALES: t[SCALES].float()}, r"is F32 .* needs U8"),
    "fewer experts": (
        lambda t: t | {BLOCKS: t[BLOCKS][:4].clone()},
        r"has shape \[4, 64, 2, 16\], .* needs row 4",
    ),
    "more experts": (
        lambda t: t | {BLOCKS: torch.cat([t[BLOCKS]] * 2)},
        r"has shape \[10, 64, 2, 16\], only 5 rows of it are used",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(subject, tmp_path, damage):
    """One clear line when it is opened, before anything is computed."""
    change, message = DAMAGES[damage]
    directory = damaged(subject, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message) as refused:
        subject.open(directory)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ({"quant_method": "gptq"}, UnsupportedError, "quant_method 'gptq' is not supported"),
        ({}, UnsupportedError, "quant_method None is not supported"),
        (None, CheckpointError, "lacks tensor .* and has .*_blocks, .* no quantisation"),
    ],
)
def test_another_quantisation_is_refused(subject, tmp_path, quantization, error, message):
    """A config.json that says something else than the files hold, or than can be opened."""
    directory = tmp_path / "model"
    shutil.copytree(subject.tiny("bfloat16"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        subject.open(directory)


def test_a_row_says_what_it_takes():
    """Rows of a stack by name, packed, and what is made of them; not of another shape."""
    source = row_of("m.up", 64, 192, torch.float32)
    assert (source.tensors, source.row, source.makes) == (("m.up_blocks", "m.up_scales"), 1, "BF16")
    assert [form.shape for form in source.stored] == [(192, 2, 16), (192, 2)]
    assert source == row_of("m.up", 64, 192, torch.float32)
    assert source.scratch_bytes == source_of(64, 192).scratch_bytes
    assert source_of(64, 192, dtype=torch.float32).scratch_bytes == (
        source.scratch_bytes + 64 * 192 * 2
    )


@pytest.mark.parametrize("shape", [(5, 0, 2, 16), (5, 64, 0, 16), (0, 64, 2, 16), (16,), ()])
def test_odd_headers_are_refused(subject, tmp_path, shape):
    """Blocks of no number, or of other dimensions: one line, before anything is read."""
    directory = damaged(
        subject, tmp_path / "model", lambda t: t | {BLOCKS: torch.zeros(shape, dtype=torch.uint8)}
    )
    with pytest.raises(CheckpointError, match=f"{BLOCKS}.* (needs|expected) ") as refused:
        subject.open(directory)
    assert "\n" not in str(refused.value)
