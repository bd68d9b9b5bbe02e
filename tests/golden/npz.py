"""Converts arrays of numpy to safetensors, which the tests read."""

import json
import struct

import numpy as np

KINDS = {"bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8"}


def convert(source: str, target: str) -> None:
    """Writes every array of the `.npz` under its name, in the order of names."""
    arrays = np.load(source)
    header, data = {}, b""
    for name in sorted(arrays.files):
        array = np.ascontiguousarray(arrays[name])
        end = len(data) + array.nbytes
        header[name] = {"dtype": KINDS[array.dtype.name], "shape": list(arrays[name].shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    with open(target, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
