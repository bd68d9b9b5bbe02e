"""Pickles as Python writes them. Python 3.11, numpy 2.4; equality is exact, since nothing is computed.

- `arrays-P.pkl`: float arrays of one shape in several layouts, with protocol P.
- `layouts-P.pkl`: pairs of an array and the same numbers as a flat list of floats in C order.
- `data-P.pkl`: Python's own types, the same in every protocol.
- `objects-P.pkl`: what a reader can't build: classes with state, arguments, named arguments, and values inside themselves.
- `numpy-1.pkl`, `python-2.pkl`: written out by hand below, opcode by opcode, as numpy 1 and Python 2 write them, and checked here by
  Python's own reader.
- `written.pkl` is what our own writer makes of [[1, 2, 3, 4, 0.5]] and an empty array; it is committed by hand from the test's bytes,
  and this script asserts that Python reads it. The same was tried with numpy 1.26.
"""

import argparse
import collections
import pathlib
import pickle

import numpy as np

HERE = pathlib.Path(__file__).parent


class Slots:
    """Pickled by NEWOBJ and a state of two parts; named arguments by NEWOBJ_EX."""

    def __init__(self, a=1):
        self.a = a

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (7,), {"scale": 0.5}


Slots.__module__, Slots.__qualname__ = "elsewhere", "Slots"


class Items(list):
    pass


Items.__module__, Items.__qualname__ = "elsewhere", "Items"


class Entries(dict):
    pass


Entries.__module__, Entries.__qualname__ = "elsewhere", "Entries"

# Pickling looks classes up where they say they live.
import sys
import types

sys.modules["elsewhere"] = types.ModuleType("elsewhere")
for kind in (Slots, Items, Entries):
    setattr(sys.modules["elsewhere"], kind.__name__, kind)

ramp = np.arange(10, dtype=np.float32).reshape(2, 5) / 4
arrays = [ramp, ramp.astype(np.float64), np.zeros((0, 5), np.float32), np.asfortranarray(ramp)]

cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5
layouts = [
    np.asfortranarray(cube),
    cube.transpose(2, 0, 1),
    cube.astype(">f4"),
    cube.astype(">f8"),
    cube.astype(np.float16),
    np.array([-3, 2, 100], np.int8),
    np.array([-300, 2, 30000], np.int16),
    np.array([-3, 2, 1 << 20], np.int32),
    np.array([-3, 2, 1 << 20], ">i8"),
    np.array([3, 255], np.uint8),
    np.array([3, 65535], np.uint16),
    np.array([3, 1 << 31], np.uint32),
    np.array([3, 1 << 63], np.uint64),
    np.array([True, False]),
    np.array(2.5),
    np.float32(0.25),
    np.int64(-9),
    np.zeros((3, 0, 2), np.float32, order="F"),
]
layouts = [(array, np.asarray(array).astype(np.float64).ravel(order="C").tolist()) for array in layouts]

shared = [1, 2]
data = {
    "int": -300,
    "ints": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)],
    "big": [2**63, -(2**63) - 1, 2**100, -(2**2100), 2**64 - 2**56],
    "float": 0.1,
    "text": "naïve \U0001f426\n\\u",
    "empty": ["", b"", [], (), {}, set()],
    "bytes": b"\x00\xff\n" * 100,
    "bytearray": bytearray(b"\xfe\x01"),
    "set": {5},
    "frozenset": frozenset([6]),
    "nothing": None,
    "tuple": (True, 1 << 40),
    "long list": list(range(2500)),
    "long text": "\u00e4" * 300,
    "ordered": collections.OrderedDict(a=1, b=2),
    "default": collections.defaultdict(list, a=[1]),
    "shared": [shared, shared],
}

circle = Slots()
circle.a = [circle]
items, entries = Items([1, 2]), Entries(a=3)
items.label = "attribute"
objects = {"circle": circle, "items": items, "entries": entries, "namespace": argparse.Namespace(lr=0.1), "class": collections.OrderedDict}

for protocol in (0, 2, 4, 5):
    for name, value in (("arrays", arrays), ("layouts", layouts), ("data", data)):
        HERE.joinpath(f"{name}-{protocol}.pkl").write_bytes(pickle.dumps(value, protocol))
    if protocol >= 2:
        HERE.joinpath(f"objects-{protocol}.pkl").write_bytes(pickle.dumps(objects, protocol))

# Numpy 1 named its module numpy.core; numpy 2 still reads it. Protocol 4, as mmdet writes proposals.
numpy_1 = (
    b"\x80\x04]\x94\x8c\x15numpy.core.multiarray\x94\x8c\x0c_reconstruct\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94C\x01b\x94\x87\x94R\x94"
    b"(K\x01K\x01K\x02\x86\x94\x8c\x05numpy\x94\x8c\x05dtype\x94\x93\x94\x8c\x02f4\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b"
    b"\x89C\x08" + np.array([0.5, -2], "<f4").tobytes() + b"\x94t\x94ba."
)
assert pickle.loads(numpy_1)[0].tolist() == [[0.5, -2.0]]
HERE.joinpath("numpy-1.pkl").write_bytes(numpy_1)

# Python 2: str for bytes, an OrderedDict filled by its constructor, integers as text.
python_2 = (
    b"\x80\x02}q\x00(U\x05arrayq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04"
    b"(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    + np.array([0.5, -2], "<f4").tobytes()
    + b"tbU\x07orderedq\x07ccollections\nOrderedDict\nq\x08]q\t(]q\n(U\x01aK\x01e]q\x0b(U\x01bK\x02ee\x85Rq\x0cU\x05linesS'it\\'s \\xe9\\n'\nu."
)
read = pickle.loads(python_2, encoding="latin1")
assert read["array"].tolist() == [0.5, -2.0] and read["ordered"]["b"] == 2 and read["lines"] == "it's \xe9\n"
HERE.joinpath("python-2.pkl").write_bytes(python_2)

written = pickle.loads(HERE.joinpath("written.pkl").read_bytes())
assert [(a.dtype, a.shape, a.tolist(), a.flags.c_contiguous) for a in written] == [
    (np.float32, (1, 5), [[1.0, 2.0, 3.0, 4.0, 0.5]], True),
    (np.float32, (0, 5), [], True),
]
