"""Files are written as the format has them, and nothing else is read."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookstep.header import DTYPES, HEADER_LIMIT, TENSOR_LIMIT
from lookstep.safetensors import Reader, write

MIB = 1 << 20


def pack(header, data=b""):
    """A file of this header, given as bytes or as what JSON makes of it."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def read(path):
    with Reader(path) as file:
        return {name: (tensor.dtype, file.read(name)) for name, tensor in file.tensors.items()}, file.metadata


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def example():
    rng = np.random.default_rng(0)
    return {
        "layer/0/w": rng.normal(size=(3, 4)),
        "layer/0/b": rng.normal(size=4).astype("f4"),
        "half": rng.normal(size=5).astype("f2"),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "bytes": rng.integers(256, size=3, dtype="u1"),
        "shorts": rng.integers(2**16, size=3, dtype="u2"),
        "signed": np.array([-(2**63), 2**63 - 1]),
        "unsigned": np.array(2**64 - 1, "u8"),
        "none": np.empty((0, 7), "f4"),
        "": np.array(1.5, "f4"),
        "emoji 🐈": np.array([np.nan, -0.0, np.inf]),
    }


def bits(array):
    return array.view("u2") if array.dtype == ml_dtypes.bfloat16 else array


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).filter(
    lambda name: ".." not in name and not name.startswith(("/", "\\")) and name != "__metadata__"
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    data = draw(st.randoms(use_true_random=False)).randbytes(int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize)
    array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    return dtype, array


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=6), st.dictionaries(st.text(max_size=9), st.text(max_size=9)))
def test_what_is_written_is_read(tensors, metadata):
    def storable(text):
        return not any("\ud800" <= c <= "\udfff" for c in text)

    metadata = {key: value for key, value in metadata.items() if storable(key + value)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write(path, tensors, metadata)
        first = path.read_bytes()
        found, strings = read(path)
        write(path, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
        assert path.read_bytes() == first
    assert strings == metadata
    assert found.keys() == tensors.keys()
    for name, (dtype, array) in tensors.items():
        assert found[name][0] == dtype
        assert same(found[name][1], array)


def test_every_dtype(tmp_path):
    write(tmp_path / "x", example(), {"steps": "3"})
    found, metadata = read(tmp_path / "x")
    assert metadata == {"steps": "3"}
    for name, array in example().items():
        assert same(found[name][1], bits(array))
    assert found["brain"][0] == "BF16"
    assert found["shorts"][0] == "U16"


def test_no_tensors(tmp_path):
    write(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == b"\x08\0\0\0\0\0\0\0{}      "
    assert read(tmp_path / "x") == ({}, {})


def test_tensors_are_aligned(tmp_path):
    write(tmp_path / "x", {"a": np.ones(3, "u1"), "b": np.ones(3, "f2"), "c": np.ones(3, "f4"), "d": np.ones(3)})
    with Reader(tmp_path / "x") as file:
        start = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
        assert start % 8 == 0
        for tensor in file.tensors.values():
            assert tensor.begin % DTYPES[tensor.dtype].itemsize == 0


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::-2],
        np.arange(3, dtype=">f4"),
        np.broadcast_to(np.float32(2), (2, 3)),
        np.arange(6).astype(ml_dtypes.bfloat16)[::2],
        np.ones((2, 2)).view(np.matrix),
    ],
    ids=["transposed", "reversed", "byte-swapped", "broadcast", "bfloat16", "matrix"],
)
def test_any_layout(array, tmp_path):
    write(tmp_path / "x", {"w": array})
    found = read(tmp_path / "x")[0]["w"][1]
    native = array if array.dtype == ml_dtypes.bfloat16 else array.astype(array.dtype.newbyteorder("<"))
    assert same(found, bits(np.array(native, order="C", subok=False)))


def test_what_is_read_is_the_reader_s_own(tmp_path):
    write(tmp_path / "x", {"w": np.ones(3)})
    with Reader(tmp_path / "x") as file:
        a, b = file.read("w"), file.read("w")
        a[:] = 5
        assert (b == 1).all()
        assert a.flags.owndata
        with pytest.raises(KeyError):
            file.read("v")


def test_bfloat16_is_read_without_ml_dtypes(tmp_path):
    write(tmp_path / "x", {"w": np.ones(2, ml_dtypes.bfloat16)})
    code = """if True:
        import sys
        from lookstep.safetensors import Reader, write
        with Reader(sys.argv[1]) as file:
            bits = file.read("w")
            write(sys.argv[1] + "2", {"w": (file.tensors["w"].dtype, bits)})
        print(bits.dtype, "ml_dtypes" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert run.stdout == "uint16 False\n"
    assert (tmp_path / "x").read_bytes() == (tmp_path / "x2").read_bytes()


def test_the_library_reads_ours(tmp_path):
    library = pytest.importorskip("safetensors")
    write(tmp_path / "x", example(), {"key": "värde", "empty": ""})
    found = dict(library.deserialize((tmp_path / "x").read_bytes()))
    for name, array in example().items():
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()
    assert found["brain"]["dtype"] == "BF16"
    with library.safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"key": "värde", "empty": ""}
        assert same(file.get_tensor("layer/0/w"), example()["layer/0/w"])


def test_we_read_the_library_s(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in example().items() if name != "brain"}
    library.save_file(arrays, tmp_path / "x", {"key": "värde"})
    found, metadata = read(tmp_path / "x")
    assert metadata == {"key": "värde"}
    assert found.keys() == arrays.keys()
    assert all(same(found[name][1], array) for name, array in arrays.items())


BAD_INPUT = {
    "not a name": ({1: np.ones(1)}, {}, TypeError, "tensor names must be str, got int 1"),
    "metadata": ({"__metadata__": np.ones(1)}, {}, ValueError, 'can be called "__metadata__"'),
    "list": ({"w": [1.0]}, {}, TypeError, 'tensor "w" must be a NumPy array, got list'),
    "complex": ({"w": np.ones(1, "c8")}, {}, TypeError, 'tensor "w" has dtype complex64; supported: float64, '),
    "object": ({"w": np.array([None])}, {}, TypeError, 'tensor "w" has dtype object'),
    "other bits": ({"w": ("BF16", np.ones(1, "f2"))}, {}, TypeError, "has dtype float16, which does not hold BF16"),
    "control character": ({"a\nb": np.ones(1)}, {}, ValueError, "'a\\nb' has a control character"),
    "outside": ({"../w": np.ones(1)}, {}, ValueError, '"../w" is a path out of its folder'),
    "half a character": ({"\ud800": np.ones(1)}, {}, ValueError, "is not valid UTF-8"),
    "long name": ({"w" * 5000: np.ones(1)}, {}, ValueError, "name of 5000 bytes; the limit is 4096"),
    "a number as metadata": ({}, {"steps": 3}, TypeError, "metadata must be str, got int 3"),
    "half a character as metadata": ({}, {"steps": "\ud800"}, ValueError, "its metadata is not valid UTF-8"),
    "much metadata": ({}, {"steps": "3" * MIB}, ValueError, "the limit is 1048576"),
}


@pytest.mark.parametrize(("tensors", "metadata", "error", "text"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_what_cannot_be_read_is_not_written(tensors, metadata, error, text, tmp_path):
    with pytest.raises(error) as caught:
        write(tmp_path / "x", tensors, metadata)
    assert caught.type is error
    assert text in str(caught.value)
    assert not os.listdir(tmp_path)


def tensor(dtype="U8", shape=(0,), offsets=(0, 0)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def entry(text):
    """A file of one tensor, described by this text."""
    return pack(b'{"w":' + text + b"}")


def nested(opening, closing, depth):
    return opening * depth + closing * depth


DEEP = 200_000
HOSTILE = {
    "empty": (b"", "truncated, with 0 bytes"),
    "short": (b"\x08\0\0", "truncated, with 3 bytes"),
    "no header": (bytes(8), "must have '{' at byte 0, got b''"),
    "header beyond the file": (pack(b"{}")[:-1], "length is 2 bytes but only 1 follow"),
    "header beyond the limit": (pack(b"{" + b" " * HEADER_LIMIT + b"}"), "is over the limit of 8388608"),
    "header of all bytes": (b"\xff" * 8 + b"{}", "is over the limit of 8388608"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "is over the limit"),
    "starts with space": (pack(b" {}"), "must have '{' at byte 0"),
    "starts with BOM": (pack(b"\xef\xbb\xbf{}"), "must have '{' at byte 0"),
    "array": (pack([]), "must have '{' at byte 0"),
    "unclosed": (pack(b"{"), "must have a name and a colon at byte 1, got b''"),
    "goes on": (pack(b"{} {}"), "goes on after its end, at byte 3"),
    "NUL padding": (pack(b"{}\0\0"), "goes on after its end, at byte 2"),
    "no colon": (pack(b'{"w"}'), "must have a name and a colon at byte 1"),
    "no quotes": (pack(b"{w:1}"), "must have a name and a colon at byte 1"),
    "trailing comma": (pack(b'{"__metadata__":{},}'), "must have a name and a colon at byte 19"),
    "no comma": (pack(b'{"__metadata__":{} "w":1}'), "must have ',' or '}' at byte 18"),
    "UTF-16": (pack('{"w":1}'.encode("utf-16")), "must have '{' at byte 0"),
    "name not UTF-8": (pack(b'{"\xff":{}}'), "the name b'\\xff' is not valid UTF-8"),
    "name of half a character": (pack(b'{"\\ud800":{}}'), "is not valid UTF-8"),
    "name with a bad escape": (pack(b'{"\\x":{}}'), "the name b'\\\\x' is not valid JSON"),
    "name with a raw line break": (pack(b'{"a\nb":{}}'), "must have a name and a colon"),
    "NUL in a name": (pack({"a\0": tensor()}), "'a\\x00' has a control character"),
    "escape in a name": (pack({"\x1b[2J": tensor()}), "has a control character"),
    "parent in a name": (pack({"a/../b": tensor()}), '"a/../b" is a path out of its folder'),
    "parent in Windows": (pack({"a\\..": tensor()}), "is a path out of its folder"),
    "absolute name": (pack({"/etc/passwd": tensor()}), '"/etc/passwd" is a path out of its folder'),
    "long name": (pack({"w" * 5000: tensor()}), "a name of 5000 bytes"),
    "two of a name": (pack(b'{"w":%s,"\\u0077":%s}' % ((json.dumps(tensor()).encode(),) * 2)), '"w" is there twice'),
    "metadata twice": (pack(b'{"__metadata__":{},"__metadata__":{}}'), '"__metadata__" is there twice'),
    "metadata of lists": (pack({"__metadata__": {"a": []}}), "must have metadata as an object of strings"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "its metadata has 'a' as int"),
    "metadata null": (pack({"__metadata__": None}), "must have metadata as an object of strings"),
    "metadata not UTF-8": (pack(b'{"__metadata__":{"a":"\xff"}}'), "its metadata is not valid UTF-8"),
    "metadata of half a character": (pack(b'{"__metadata__":{"a":"\\udead"}}'), "its metadata is not valid UTF-8"),
    "metadata key twice": (pack(b'{"__metadata__":{"a":"b","a":"c"}}'), "its metadata has the key 'a' twice"),
    "much metadata": (pack({"__metadata__": {"a": "b" * MIB}}), "the limit is 1048576"),
    "tensor a list": (pack({"w": []}), 'must have what tensor "w" is, as an object'),
    "tensor in a tensor": (pack({"w": {"dtype": {}}}), 'must have what tensor "w" is, as an object'),
    "tensor not UTF-8": (entry(b'{"\xff":1}'), 'tensor "w" is not described in valid UTF-8'),
    "tensor not JSON": (entry(b"{dtype}"), 'tensor "w" is not valid JSON'),
    "key twice": (entry(b'{"dtype":"U8","dtype":"F4","shape":[0],"data_offsets":[0,0]}'), "has the key 'dtype' twice"),
    "key missing": (pack({"w": {"dtype": "U8", "shape": [0]}}), "must have dtype, shape and data_offsets"),
    "key unknown": (pack({"w": {**tensor(), "code": "import os"}}), "must have dtype, shape and data_offsets"),
    "dtype unknown": (pack({"w": tensor("F8_E4M3")}), "has dtype 'F8_E4M3'; supported: F64, F32"),
    "dtype in lower case": (pack({"w": tensor("f32")}), "has dtype 'f32'"),
    "dtype a number": (pack({"w": tensor(32)}), "has dtype 32"),
    "dtype a list": (pack({"w": tensor(["F32"])}), "has dtype ['F32']"),
    "shape a number": (pack({"w": tensor(shape=0)}), "has shape 0, which must be a list"),
    "shape of bool": (pack({"w": tensor(shape=[False])}), "has shape [False]"),
    "shape of float": (pack({"w": tensor(shape=[0.0])}), "has '0.0', which is no number"),
    "shape of exponents": (
        entry(b'{"dtype":"U8","shape":[1e9],"data_offsets":[0,0]}'),
        "has '1e9', which is no number",
    ),
    "shape of nan": (entry(b'{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}'), "has 'NaN', which is no number"),
    "shape of strings": (pack({"w": tensor(shape=["0"])}), "has shape ['0']"),
    "shape of lists": (pack({"w": tensor(shape=[[0]])}), "has shape [[0]]"),
    "shape negative": (pack({"w": tensor(shape=[-1])}), "has shape [-1]"),
    "shape of minus zero": (entry(b'{"dtype":"U8","shape":[00],"data_offsets":[0,0]}'), "is not valid JSON"),
    "shape of 2**63": (pack({"w": tensor(shape=[2**63, 0])}), "integers from 0 to 2**63 - 1"),
    "shape of a huge number": (entry(b'{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}' % (b"9" * 4000)), "2**63 - 1"),
    "shape of 65": (pack({"w": tensor(shape=[1] * 65, offsets=[0, 1])}, b"1"), "a list of at most 64 integers"),
    "shape overflows": (pack({"w": tensor("F32", [2**31, 2**31, 4])}), "which overflows"),
    "shape wraps to nothing": (pack({"w": tensor("F32", [2**32, 2**32])}), "which overflows"),
    "shape overflows around zero": (pack({"w": tensor(shape=[2**32, 2**32, 0])}), "which overflows"),
    "offsets a number": (pack({"w": tensor(offsets=0)}), "has data_offsets 0"),
    "offsets of one": (pack({"w": tensor(offsets=[0])}), "has data_offsets [0]"),
    "offsets of bool": (pack({"w": tensor(offsets=[False, False])}), "data_offsets [False, False]"),
    "offsets negative": (pack({"w": tensor(offsets=[-4, -4])}), "data_offsets [-4, -4]"),
    "offsets swapped": (pack({"w": tensor(shape=[1], offsets=[1, 0])}, b"1"), "takes 1 bytes"),
    "offsets too near": (pack({"w": tensor("F32", [2], [0, 4])}, bytes(4)), "but F32 of shape [2] takes 8 bytes"),
    "overlap": (
        pack({"a": tensor(shape=[4], offsets=[0, 4]), "b": tensor(shape=[4], offsets=[2, 6])}, bytes(6)),
        'tensors "a" and "b" overlap',
    ),
    "same place": (
        pack({"a": tensor(shape=[4], offsets=[0, 4]), "b": tensor(shape=[4], offsets=[0, 4])}, bytes(4)),
        'tensors "a" and "b" overlap',
    ),
    "empty within another": (
        pack({"a": tensor(shape=[4], offsets=[0, 4]), "b": tensor(shape=[0], offsets=[2, 2])}, bytes(4)),
        'tensors "a" and "b" overlap',
    ),
    "hole": (
        pack({"a": tensor(shape=[4], offsets=[0, 4]), "b": tensor(shape=[4], offsets=[6, 10])}, bytes(10)),
        'a hole of 2 bytes before tensor "b"',
    ),
    "hole at the start": (pack({"a": tensor(shape=[4], offsets=[2, 6])}, bytes(6)), "a hole of 2 bytes before"),
    "data missing": (pack({"a": tensor(shape=[4], offsets=[0, 4])}, bytes(3)), "take 4 bytes of data but it has 3"),
    "data unclaimed": (pack({"a": tensor(shape=[4], offsets=[0, 4])}, bytes(5)), "take 4 bytes of data but it has 5"),
    "data without tensors": (pack(b"{}", b"1"), "take 0 bytes of data but it has 1"),
    "data far away": (pack({"a": tensor("U8", [2**60], [0, 2**60])}), "but it has 0"),
    "deep": (pack(nested(b'{"a":', b"}", DEEP)), "as an object"),
    "deep lists": (pack(b'{"a":' + nested(b"[", b"]", DEEP) + b"}"), "as an object"),
    "deep in a tensor": (entry(b'{"shape":' + nested(b"[", b"]", 2000) + b"}"), 'tensor "w" is nested too deeply'),
    "many lists": (pack(b'{"a":[' + b"[]," * (2 * MIB) + b"[]]}"), "as an object"),
    "many pairs": (pack(b'{"__metadata__":{' + b'"a":1,' * 170_000 + b'"b":1}}'), "has the key 'a' twice"),
    "many escapes": (pack(b'{"__metadata__":{"a":"' + b"\\n" * (4 * MIB - 99) + b'"}}'), "the limit is 1048576"),
    "an endless name": (pack(b'{"' + b"\\n" * (4 * MIB - 99)), "must have a name and a colon at byte 1"),
    "wide characters": (
        pack(b"{" + b",".join(b'"%04d\xf0\x9f\x98\x80%s":{}' % (i, b"a" * 4000) for i in range(2000)) + b"}"),
        "must have dtype, shape",
    ),
    "a million empty tensors": (
        pack(b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"),
        "is over the limit",
    ),
    "too many tensors": (
        pack({f"{i}": tensor() for i in range(TENSOR_LIMIT + 1)}),
        "it has more than 32768 tensors",
    ),
    "many, wrong at the end": (pack({f"{i}": tensor() for i in range(TENSOR_LIMIT)}, b"1"), "but it has 1"),
}


@pytest.mark.parametrize(("content", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(content, text, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(ValueError, match="cannot be read as safetensors: ") as caught:
        Reader(path)
    assert caught.type is ValueError
    assert str(path) in str(caught.value)
    assert text in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [name for name, (content, _) in HOSTILE.items() if len(content) > MIB // 2])
def test_large_hostile_files_are_refused_soon_and_in_little_memory(name, tmp_path):
    (tmp_path / "x").write_bytes(HOSTILE[name][0])
    code = """if True:
        import sys, time
        from lookstep.safetensors import Reader
        def peak():
            return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
        memory, start = peak(), time.process_time()  # Not the time of the clock, since the machine may be busy.
        try:
            Reader(sys.argv[1])
        except ValueError:
            print(time.process_time() - start, peak() - memory)"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, run.stdout.split())
    assert seconds < 1
    assert mebibytes < 64


def test_headers_as_others_may_write_them(tmp_path):
    spaced = json.dumps({"w": tensor("F32", [1], [0, 4]), "__metadata__": {"a": '{"b": [1]}'}}, indent=2).encode()
    (tmp_path / "x").write_bytes(pack(spaced + b"\n \t", np.float32(7).tobytes()))
    found, metadata = read(tmp_path / "x")
    assert same(found["w"][1], np.array([7], "f4"))
    assert metadata == {"a": '{"b": [1]}'}


def test_the_caller_may_set_the_limits(tmp_path):
    write(tmp_path / "x", {"w": np.ones(3)})
    with pytest.raises(ValueError, match="is over the limit of 10"):
        Reader(tmp_path / "x", limit=10)
    write(tmp_path / "x", {str(i): np.ones(0, "u1") for i in range(TENSOR_LIMIT + 1)})
    with pytest.raises(ValueError, match="more than 32768 tensors"):
        Reader(tmp_path / "x", tensors=1)
    with Reader(tmp_path / "x", tensors=TENSOR_LIMIT + 1) as file:
        assert len(file.tensors) == TENSOR_LIMIT + 1


def test_a_longer_header_than_strangers_may_have_is_written(tmp_path):
    arrays = {f"{i:04000}": np.full(1, i, "u2") for i in range(2500)}
    write(tmp_path / "x", arrays)
    with pytest.raises(ValueError, match="is over the limit of 8388608"):
        Reader(tmp_path / "x")
    with Reader(tmp_path / "x", limit=2 * HEADER_LIMIT) as file:
        assert file.tensors.keys() == arrays.keys()
        assert file.read(f"{2499:04000}") == 2499


def test_a_file_that_shrinks(tmp_path):
    write(tmp_path / "x", {"w": np.ones(30_000)})
    with Reader(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 1000)
        with pytest.raises(ValueError, match='truncated within tensor "w"'):
            file.read("w")


def test_what_is_no_file(tmp_path):
    with pytest.raises(OSError, match="x"):
        Reader(tmp_path / "x")
    with pytest.raises(OSError, match=tmp_path.name):
        Reader(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="is not a regular file"):
            Reader(tmp_path / "pipe")
        with pytest.raises(ValueError, match="is not a regular file"):
            Reader("/dev/zero")


def mutations(content, count):
    """The content with a few bytes changed, cut out, doubled or lost at the end; mostly within the header."""
    rng = random.Random(0)
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(count):
        new = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            at = rng.randrange(length)
            match rng.randrange(6):
                case 0:
                    del new[at : at + rng.randrange(1, 9)]
                case 1:
                    new[at:at] = new[at : at + rng.randrange(1, 9)]
                case 2:
                    del new[-rng.randrange(1, 20) :]
                case 3:
                    new[at : at + 1] = rng.choice(b'{}[]",:0123456789- \\').to_bytes()
                case _:
                    new[at : at + 1] = rng.randbytes(1)
        yield bytes(new)


def test_a_damaged_file_is_read_or_refused(tmp_path):
    path = tmp_path / "x"
    write(path, example(), {"steps": "3"})
    outcomes = {True: 0, False: 0}
    for content in mutations(path.read_bytes(), 2000):
        path.unlink()  # To write over a file can make the system flush it.
        path.write_bytes(content)
        try:
            read(path)
        except ValueError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 20


def test_what_the_library_refuses_is_refused(tmp_path):
    library = pytest.importorskip("safetensors")
    path = tmp_path / "x"
    write(path, example(), {"steps": "3"})
    for content in mutations(path.read_bytes(), 2000):
        path.unlink()  # To write over a file can make the system flush it.
        path.write_bytes(content)
        try:
            found, _ = read(path)
        except ValueError:
            continue
        theirs = dict(library.deserialize(content))
        assert found.keys() == theirs.keys()
        for name, (dtype, array) in found.items():
            assert (dtype, list(array.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
            assert array.tobytes() == bytes(theirs[name]["data"])
