"""Headers of checkpoints: what is accepted, and one test for each way in which a file can lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ollm_core import CheckpointError, ReadError
from ollm_core.checkpoint import safetensors as checkpoint_module
from ollm_core.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_checkpoint
from ollm_core.contracts.tensors import DTYPE_BYTES
from ollm_core.model.fingerprint import identity

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "U64": torch.uint64, "I32": torch.int32, "U32": torch.uint32,
    "I16": torch.int16, "U16": torch.uint16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
}


def some_bits(num_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (num_bytes,), dtype=torch.uint8, generator=generator)


def tensors_of_every_dtype():
    tensors = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        for shape in ((), (3,), (2, 5), (0,), (4, 0, 2)):
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            bits = some_bits(num_bytes, i).view(dtype).reshape(shape)
            tensors[f"{name}.{'x'.join(map(str, shape))}"] = bits
    return tensors


def write_raw(directory, header, data=bytes(32), name=SINGLE_FILE, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(raw) if length is None else length).to_bytes(8, "little")
    (directory / name).write_bytes(size + raw + data)
    return directory


def write_index(directory, weight_map):
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def two_shards(directory):
    save_file({"a": torch.arange(4.0)}, directory / "one.safetensors")
    save_file({"b": torch.arange(6.0)}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "two.safetensors"})


def refused(directory, *words):
    """Opening must fail with one line that has a hint and all of `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    for word in words:
        assert word in message
    return message


def bytes_at(info):
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.num_bytes)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_finds_the_bytes_that_safetensors_wrote(tmp_path, num_shards):
    """Every dtype and shape, scalars and empty tensors included, lies where safetensors put it."""
    tensors = tensors_of_every_dtype()
    shards = [dict(list(tensors.items())[i::num_shards]) for i in range(num_shards)]
    names = [SINGLE_FILE] if num_shards == 1 else [f"m-{i}.safetensors" for i in range(num_shards)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, tmp_path / name, metadata={"format": "pt"})
    if num_shards > 1:
        write_index(tmp_path, {t: n for n, s in zip(names, shards, strict=True) for t in s})
    found = open_checkpoint(tmp_path)
    assert set(DTYPES) == set(DTYPE_BYTES)
    assert found.tensors.keys() == tensors.keys()
    assert found.total_bytes == sum(t.nbytes for t in tensors.values())
    for name in names:
        with safe_open(tmp_path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                info = found.tensors[key]
                assert info.dtype == file.get_slice(key).get_dtype() == key.split(".")[0]
                assert info.shape == tuple(file.get_slice(key).get_shape())
                assert bytes_at(info) == raw_bytes(tensors[key])


def test_tensors_are_in_the_order_of_their_bytes(tmp_path):
    """Iterating over the tensors walks the files front to back."""
    two_shards(tmp_path)
    places = [(t.path, t.offset) for t in open_checkpoint(tmp_path).tensors.values()]
    assert places == sorted(places)


def test_symlinked_files_are_followed(tmp_path):
    """A directory of links, as hub caches make them, opens like one of files."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    two_shards(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert identity(open_checkpoint(snapshot), {}) == identity(open_checkpoint(blobs), {})


BAD_HEADERS = {
    "empty": (b"", "must start with"),
    "space first": (b" {}", "must start with"),
    "not JSON": (b"{nope", "damaged header"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "lone surrogate": (b'{"\\ud800": 1}', "surrogates"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "nested": (b'{"a":' + b"[" * 100_000, "nested"),
    "long integer": (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    "twice": (b'{"a": {}, "a": {}}', "'a' is there twice"),
    "key twice": (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "'dtype' is there twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "entry": ({"a": []}, "must be an object"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, "dtype None"),
    "unknown dtype": ({"a": {**GOOD["a"], "dtype": "F4"}}, "'F4'"),
    "dtype list": ({"a": {**GOOD["a"], "dtype": ["F32"]}}, "dtype"),
    "negative shape": ({"a": {**GOOD["a"], "shape": [-2, -3]}}, "shape"),
    "bool shape": ({"a": {**GOOD["a"], "shape": [True, 6]}}, "shape"),
    "float shape": ({"a": {**GOOD["a"], "shape": [2.0, 3]}}, "shape"),
    "huge size": ({"a": {**GOOD["a"], "shape": [0, 1 << 70]}}, "shape"),
    "overflow": ({"a": {**GOOD["a"], "shape": [1 << 40, 1 << 40]}}, "larger than any file"),
    "no offsets": ({"a": {"dtype": "U8", "shape": []}}, "data_offsets"),
    "three offsets": ({"a": {**GOOD["a"], "data_offsets": [0, 24, 24]}}, "data_offsets"),
    "bool offsets": ({"a": {"dtype": "U8", "shape": [], "data_offsets": [False, True]}}, "offsets"),
    "wrong length": ({"a": {**GOOD["a"], "data_offsets": [0, 20]}}, "20 bytes"),
    "backwards": ({"a": {**GOOD["a"], "data_offsets": [24, 0]}}, "-24 bytes"),
    "overlap": ({**GOOD, "b": {**GOOD["b"], "data_offsets": [20, 28]}}, "overlaps"),
    "hole": ({**GOOD, "b": {**GOOD["b"], "data_offsets": [28, 36]}}, "hole"),
    "late start": ({"b": GOOD["b"]}, "hole"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path, case):
    """A header that breaks a rule of the format is refused with the rule and the file's name."""
    header, word = BAD_HEADERS[case]
    refused(write_raw(tmp_path, header), SINGLE_FILE, word)


def test_header_longer_than_allowed_is_refused(tmp_path):
    """A length past the format's limit is refused before anything of that size is read."""
    refused(write_raw(tmp_path, GOOD, length=1 << 60), SINGLE_FILE, str(1 << 60), "at most")


@pytest.mark.parametrize("size", [0, 7, 8, 60])
def test_file_cut_in_its_header_is_truncated(tmp_path, size):
    """A file that ends inside its header says so, with the least number of bytes missing."""
    raw = (write_raw(tmp_path, GOOD) / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(raw[:size])
    missing = 8 + int.from_bytes(raw[: min(size, 8)], "little") - size
    refused(tmp_path, SINGLE_FILE, f"at least {missing} bytes are missing", "ollm pull")


def test_truncated_data_says_how_much_is_missing(tmp_path):
    """A cut download names the missing bytes and hints to fetch it again."""
    refused(write_raw(tmp_path, GOOD, bytes(21)), SINGLE_FILE, "11 bytes are missing", "ollm pull")


def test_trailing_bytes_are_refused(tmp_path):
    """A file longer than its header says is refused, with the surplus."""
    refused(write_raw(tmp_path, GOOD, bytes(35)), SINGLE_FILE, "3 extra bytes")


def test_git_lfs_pointer_is_recognised(tmp_path):
    """The small text file that git leaves without LFS gets its own hint."""
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    refused(tmp_path, "Git LFS", "git lfs pull")


def test_nothing_to_open(tmp_path):
    """A directory without weights, or none at all, is an error that names what was looked for."""
    refused(tmp_path, INDEX_FILE, SINGLE_FILE)
    refused(tmp_path / "nowhere", "nowhere")


def test_a_directory_or_a_pipe_is_no_file(tmp_path):
    """Something that is not a regular file is refused rather than waited on."""
    (tmp_path / SINGLE_FILE).mkdir()
    refused(tmp_path, "not a regular file")
    (tmp_path / SINGLE_FILE).rmdir()
    os.mkfifo(tmp_path / SINGLE_FILE)
    refused(tmp_path, "not a regular file")


def test_broken_link_names_the_file(tmp_path):
    """A link whose target is gone is told from a checkpoint that was never there."""
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "gone")
    refused(tmp_path, SINGLE_FILE, "No such file")


BAD_INDEXES = {
    "not JSON": ("{", "Expecting"),
    "not an object": ("[]", "must be a JSON object"),
    "twice": ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
    "no map": ("{}", "weight_map"),
    "map is a list": ('{"weight_map": []}', "weight_map"),
    "empty map": ('{"weight_map": {}}', "weight_map"),
    "file is a number": ('{"weight_map": {"a": 1}}', "plain name"),
    "file is a list": ('{"weight_map": {"a": ["x"]}}', "plain name"),
    "absolute": ('{"weight_map": {"a": "/etc/passwd"}}', "plain name"),
    "parent": ('{"weight_map": {"a": ".."}}', "plain name"),
    "outside": ('{"weight_map": {"a": "../x.safetensors"}}', "plain name"),
    "backslash": (r'{"weight_map": {"a": "..\\x"}}', "plain name"),
    "empty name": ('{"weight_map": {"a": ""}}', "plain name"),
    "null byte": (r'{"weight_map": {"a": "x\u0000y"}}', "plain name"),
    "lone surrogate": (r'{"weight_map": {"a": "x\ud800"}}', "plain name"),
    "long name": ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "File name too long"),
    "missing file": ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: No such file"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused(tmp_path, case):
    """An index that is damaged or points out of its directory is refused."""
    text, word = BAD_INDEXES[case]
    (tmp_path / INDEX_FILE).write_text(text)
    refused(tmp_path, word)


def test_index_names_a_tensor_that_its_file_lacks(tmp_path):
    """A tensor promised by the index must be in the file that the index names."""
    two_shards(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    refused(tmp_path, "one.safetensors", "lacks tensor 'c'")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    refused(tmp_path, "lacks tensor")


def test_tensor_in_two_files(tmp_path):
    """The same name in two files is refused, naming both."""
    two_shards(tmp_path)
    save_file({"a": torch.zeros(4), "b": torch.zeros(6)}, tmp_path / "two.safetensors")
    refused(tmp_path, "two.safetensors", "one.safetensors", "'a'")


def test_tensor_that_the_index_does_not_list(tmp_path):
    """A tensor in a file but not in the index means that they are of different versions."""
    two_shards(tmp_path)
    save_file({"b": torch.zeros(6), "c": torch.zeros(1)}, tmp_path / "two.safetensors")
    refused(tmp_path, "two.safetensors", "'c'", INDEX_FILE)


def test_hostile_names_stay_on_one_line(tmp_path):
    """A name with control characters or of great length cannot spoil the message."""
    message = refused(write_raw(tmp_path, {"\n\x1b[2J" + "x" * 5000: []}), "\\n\\x1b")
    assert len(message) < len(str(tmp_path)) + 300


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """One directory that the property tests write to over and over."""
    return tmp_path_factory.mktemp("playground")


def opened_or_refused(directory):
    """Open; the only failure allowed is the typed one, and what opens lies inside its file."""
    try:
        found = open_checkpoint(directory)
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError("a message must be one line") from error
        return
    size = (directory / SINGLE_FILE).stat().st_size
    for tensor in found.tensors.values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.num_bytes <= size
        assert tensor.num_bytes == torch.Size(tensor.shape).numel() * DTYPE_BYTES[tensor.dtype]


fuzzing = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzzing
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 1 << 16),
)
def test_mutated_bytes_never_escape(playground, changes, cut):
    """Flipped and missing bytes give a CheckpointError or offsets inside the file, nothing else."""
    raw = bytearray((write_raw(playground, GOOD) / SINGLE_FILE).read_bytes())
    header_end = len(raw) - 32
    for place, value in changes:
        raw[place % header_end] = value
    keep = cut % (2 * len(raw))  # half of the time the whole file
    (playground / SINGLE_FILE).write_bytes(raw[:keep])
    opened_or_refused(playground)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
sizes = st.integers(-1, 9) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**400])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BYTES, "F4"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
)


@fuzzing
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3))
def test_mutated_entries_never_escape(playground, header):
    """Headers that are JSON, but of any other content, give a CheckpointError or a sound result."""
    write_raw(playground, header, bytes(8))
    opened_or_refused(playground)


def test_changed_files_are_noticed(tmp_path):
    """A file touched, replaced or gone since it was opened raises ReadError."""
    two_shards(tmp_path)
    found = open_checkpoint(tmp_path)
    found.check_unchanged()
    path = tmp_path / "two.safetensors"
    raw, status = path.read_bytes(), path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ReadError, match="changed"):
        found.check_unchanged()
    (tmp_path / "new").write_bytes(raw)
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(path)
    with pytest.raises(ReadError, match="changed"):
        found.check_unchanged()
    path.unlink()
    with pytest.raises(ReadError, match=r"two\.safetensors"):
        found.check_unchanged()


def test_a_time_that_is_set_back_hides_nothing(tmp_path):
    """A file written in place, with the modification time that it had, raises ReadError."""
    two_shards(tmp_path)
    found = open_checkpoint(tmp_path)
    path = tmp_path / "two.safetensors"
    raw, status = path.read_bytes(), path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # within one tick of the clock
        with path.open("r+b") as file:
            file.write(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    with pytest.raises(ReadError, match=r"two\.safetensors: changed .* \(change time\)"):
        found.check_unchanged()


def test_needs_no_torch():
    """Reading headers imports neither torch nor transformers."""
    code = (
        "import sys, ollm_core.checkpoint.safetensors;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    root = Path(checkpoint_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "set()"
