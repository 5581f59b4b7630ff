"""Every rule is packed at every instruction set: the disassembly of the library that is installed says so.

The compiler vectorises or does not, and says nothing where it does not: the numbers stay right, and a step takes some
times longer. Which instruction sets this machine has does not matter here, as nothing is run.

A wheel has no symbols, so that a function is not known by its rule; where it begins and ends is told by its unwind
information. Each kernel is two functions of the baseline and eight of each other level: a step in its three phases
(at the baseline these are one function), and a step of arrays as they are stored; both for float32 and float64.
"""

import bisect
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from lookstep import _core

pytestmark = [
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="reads x86-64 machine code of Linux"
    ),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of GNU binutils"),
]

# By the register: bytes, and the functions that a kernel has for each type.
LEVELS = {"xmm": (16, 2), "ymm": (32, 4), "zmm": (64, 4)}
SIZES = {"s": 4, "d": 8}
# Two operations on a tile of 32 float32 numbers, which every rule has; host code that happens to be packed has less.
KERNEL = 256

ARITHMETIC = re.compile(r"^ +([0-9a-f]+):\t(v?)(?:add|sub|mul|div|sqrt)([ps])([sd]) +(.*)$", re.MULTILINE)


def objdump(*options):
    """What it prints of the library."""
    command = ["objdump", *options, _core.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def functions():
    """By address: how many arithmetic instructions there are of each (prefix, type, register or "scalar")."""
    starts = sorted(int(pc, 16) for pc in re.findall(r" FDE .* pc=([0-9a-f]+)\.\.", objdump("--dwarf=frames")))
    found = defaultdict(Counter)
    for at, prefix, packed, kind, operands in ARITHMETIC.findall(objdump("-d", "--no-show-raw-insn")):
        register = max(re.findall(r"%([xyz]mm)", operands)) if packed == "p" else "scalar"
        found[starts[bisect.bisect(starts, int(at, 16)) - 1]][prefix, kind, register] += 1
    return found


def numbers(count, prefix, kind):
    """How many numbers the packed instructions of a function compute, each of them once."""
    return sum(count[prefix, kind, register] * bytes_ // SIZES[kind] for register, (bytes_, _) in LEVELS.items())


# `All::advance` is host code beside the kernels. Doubles of the baseline are left out: the host computes with them one
# by one, and rightly so.
ALONE = {"sse-s": ("", "s", ["All::advance"]), "avx-s": ("v", "s", []), "avx-d": ("v", "d", [])}


@pytest.mark.parametrize(("prefix", "kind", "known"), ALONE.values(), ids=ALONE)
def test_no_function_computes_many_numbers_alone(functions, prefix, kind, known):
    # A third, as every function has some: the ends of arrays. A rule with `black_box` around its `d`, which cannot be
    # packed, had 0.8 or more in most of its functions, at every level.
    alone = {
        f"{address:#x}": count
        for address, count in functions.items()
        if count[prefix, kind, "scalar"] > numbers(count, prefix, kind) / 3
    }
    assert len(alone) <= len(known), f"beside those of {known}: {alone}"


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("register", LEVELS)
def test_there_is_packed_code_for_every_kernel(functions, register, kind):
    bytes_, each = LEVELS[register]
    prefix = "" if register == "xmm" else "v"
    # AVX-512 has narrower instructions in it, for short tiles; they do not count for AVX2.
    packed = [
        count
        for count in functions.values()
        if count[prefix, kind, register] * bytes_ >= KERNEL and (register == "zmm" or not count[prefix, kind, "zmm"])
    ]
    assert len(packed) >= each * len(_core.kernels())
