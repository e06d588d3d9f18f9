"""Rows of token ids with a prompt each, memory-mapped.

A store is a folder of three files, the layout that PUMA's reference implementation writes for TinyGSM:

* `labels.bin`: N x L token ids, uint32;
* `prompt_mask.bin`: N x L / 8 bytes, a bit for each position of the prompt, lowest bit first;
* `meta.json`: an object with at least `num_examples` (N) and `max_len` (L). What it says of formats must be the above,
  but for `prompt_mask_bitorder`: `big` is highest bit first.

That implementation sets room aside before it counts: a store of its own may hold more rows than N, which are not read.
`unmask prepare` (`data/prepare/`) adds to `meta.json`, and puts a `Vocabulary` beside it.

Dimensions: N rows of the store, n rows asked for, L positions.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from unmask import formats
from unmask.data.fingerprint import digest, file_sha256
from unmask.data.vocabulary import VOCABULARY, Vocabulary
from unmask.errors import UserError
from unmask.types import CleanBatch

_META = "meta.json"
_FILES = ("labels.bin", "prompt_mask.bin")
_FORMATS: dict[str, tuple[Any, ...]] = {
    "labels_dtype": ("uint32",),
    "prompt_mask_packed": (True,),
    "prompt_mask_bitorder": ("little", "big"),
}
"""Values that `meta.json` may have."""
SEAL = "seal"
"""Key in `meta.json`: the SHA-256 of its other entries."""


class RowStore:
    """The rows of the store in `folder`, memory-mapped.

    Raises:
        UserError: a file is missing, unreadable, or of another size than `meta.json` says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        self.num_rows, self.length = (_read_positive(self.meta, key, folder) for key in ("num_examples", "max_len"))
        if self.length % 8:
            raise UserError(f"{folder / _META}: max_len={self.length}: must be a multiple of 8, eight positions a byte")
        for key, known in _FORMATS.items():
            if (value := self.meta.get(key, known[0])) not in known:
                raise UserError(f"{folder / _META}: {key}={value!r}: must be {' or '.join(map(repr, known))}")
        self._bitorder = self.meta.get("prompt_mask_bitorder", "little")
        self._labels, self._prompts = self._map_rows()

    def _map_rows(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Maps both files of rows."""
        widths, sizes = (4 * self.length, self.length // 8), [_size(self.folder / name) for name in _FILES]
        held = [size / width for size, width in zip(sizes, widths, strict=True)]
        is_longer = held[0] == held[1] > self.num_rows and held[0].is_integer() and SEAL not in self.meta
        for name, size, width in zip(_FILES, sizes, widths, strict=True):
            if size != self.num_rows * width and not is_longer:
                raise UserError(
                    f"{self.folder / name}: holds {size} bytes, where {_META} says {self.num_rows * width} "
                    f"({self.num_rows} rows); it is cut short, or not of this store: make the store again"
                )
        return (
            _map(self.folder / _FILES[0], np.dtype(np.uint32), (self.num_rows, self.length)),
            _map(self.folder / _FILES[1], np.dtype(np.uint8), (self.num_rows, self.length // 8)),
        )

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the ids, or None if the folder holds none."""
        return Vocabulary.load(self.folder) if (self.folder / VOCABULARY).exists() else None

    @cached_property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file of rows, by name.

        Raises:
            UserError: a file cannot be read.
        """
        try:
            return {name: file_sha256(self.folder / name) for name in _FILES}
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read: {error}") from error

    @property
    def num_bytes(self) -> int:
        """The size of both files of rows."""
        return self._labels.nbytes + self._prompts.nbytes

    def verify(self) -> bool:
        """Compares the files with the SHA-256 in `meta.json`; False where that holds none.

        Raises:
            UserError: a file has another checksum.
        """
        seal = self.meta.get(SEAL)
        if seal is not None and seal != make_seal(self.meta):
            raise UserError(f"{self.folder / _META}: was changed or damaged (SHA-256): make the store again")
        expected = formats.checked(self.meta.get("sha256", {}), dict[str, str], f"{self.folder / _META}: sha256")
        for name in _FILES:
            if name in expected and expected[name] != self.checksums[name]:
                raise UserError(f"{self.folder / name}: was changed or damaged (SHA-256): make the store again")
        return bool(expected)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: Int[Tensor, "n"]) -> CleanBatch:
        index = row.numpy()
        prompt_mask = np.unpackbits(self._prompts[index], axis=-1, bitorder=self._bitorder).astype(np.bool_)
        return CleanBatch(
            x0=torch.from_numpy(self._labels[index].astype(np.int64)), prompt_mask=torch.from_numpy(prompt_mask)
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta.json` of the store in `folder`. Raises `UserError` if there is none."""
    path = folder / _META
    try:
        meta = formats.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; data.path is a folder with labels.bin in it; `unmask prepare` makes one") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path}: holds no JSON object; it needs num_examples and max_len")
    return meta


def make_seal(meta: dict[str, Any]) -> str:
    """Computes the value of `SEAL` for the other entries of a `meta.json`."""
    return digest({key: value for key, value in meta.items() if key != SEAL})


def _read_positive(meta: dict[str, Any], key: str, folder: Path) -> int:
    value = meta.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{folder / _META}: {key}={value!r}: must be a positive whole number")
    return value


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
