"""The format of files of tensors, safetensors, as far as writing them one tensor after the other needs it.

A file is the length of its head in 8 bytes, the head (JSON: format, shape and place of each tensor), and the bytes of
all tensors. Reading is the library's.
"""

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from unmask.errors import UserError

Tensors = Mapping[str, Tensor]
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Number formats by their names in a file, the narrowest first."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    file: BinaryIO, tensors: Tensors, outlines: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` into the new `file`, each as soon as it is read, in the order of the mapping.

    Args:
        file: opened for writing, and empty.
        tensors: read once each, and not kept.
        outlines: tensors of their names, shapes and formats, of which nothing else is read.
        metadata: texts that the head holds as well.

    Raises:
        UserError: a number format has no name in such files.
    """
    head, starts = _head(outlines, metadata)
    file.write(head)
    for name in tensors:
        value = tensors[name].detach().cpu().contiguous()
        assert (value.shape, value.dtype) == (outlines[name].shape, outlines[name].dtype), (
            f"{name} is not as its head says"
        )
        file.seek(len(head) + starts[name])
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _head(outlines: Tensors, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Returns the head of a file, and where behind it the bytes of each tensor begin."""
    for name, value in outlines.items():
        if value.dtype not in _NAMES:
            raise UserError(f"{name}: is of {value.dtype}, which cannot be saved; keep it in another format")
    described: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    order, starts, end = [*_NAMES], {}, 0
    # The widest first: so each begins at a multiple of its width, and may be read where it lies.
    for name in sorted(outlines, key=lambda name: (-order.index(outlines[name].dtype), name)):
        starts[name], end = end, end + outlines[name].nbytes
        kind, shape = _NAMES[outlines[name].dtype], [*outlines[name].shape]
        described[name] = {"dtype": kind, "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts
