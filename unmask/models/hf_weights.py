"""Reads the weights of Hugging Face checkpoints, under our names.

They are in `model.safetensors`, or in several files that `model.safetensors.index.json` lists.
Dimensions: R rows of a checkpoint's vocabulary, V of ours, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.errors import UserError
from unmask.models.families import BY_TOKEN
from unmask.models.hf import read_checkpoint, read_checkpoint_json
from unmask.models.on_demand import OnDemand, outline
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.progress import warn
from unmask.types import TokenSpec

_FEW = 16
"""Tokens without a row that every tokenizer may have."""
_LONGEST_NAME = 255  # bytes that file systems take
_FUSED = ("query_key_value", "qkv_proj", "att_proj", "attn_qkv", "gate_up_proj")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(
    folder: str | Path, *, original_ids: Sequence[int | None] | None, vocab_size: int, keeps_bfloat16: bool = False
) -> OnDemand:
    """Reads a checkpoint's weights in fp32, by their names in `Denoiser.state_dict()`, each when it is asked for.

    A new token's row, in embedding and head, is the mean of the checkpoint's R rows.

    Args:
        folder: the checkpoint.
        original_ids: the checkpoint's id of each of our tokens, None for a new one, such as the mask. Default: ids are
            the checkpoint's; rows beyond `vocab_size` are dropped. A few ids may lie behind the checkpoint's last row:
            these are new too.
        vocab_size: V, including the mask token.
        keeps_bfloat16: if all of it is in bfloat16, it stays so.

    Raises:
        UserError: as `read_checkpoint`; a file that is missing or damaged; tensors that are missing, unknown or of
            other shapes than `config.json` says; tokens that the checkpoint does not have. When one is asked for: it
            is quantised, or its numbers are not finite.
    """
    folder = Path(folder)
    expected = _expected(folder)
    found = _check_heads(folder, expected)
    theirs = {ours: name for name, (ours, _) in expected.items()}
    rows = _rows(_list_of_weights(folder), expected[theirs["embedding.weight"]][1][0], original_ids, vocab_size)
    is_rounded = keeps_bfloat16 and all(kind == "BF16" for _, kind in found.values())
    dtype = torch.bfloat16 if is_rounded else torch.float32

    def read(name: str) -> Tensor:
        ours = name.removeprefix("backbone.")
        tensor = _read_tensor(found[theirs[ours]][0], theirs[ours])
        return (_select(tensor, rows) if ours in BY_TOKEN else tensor).to(dtype)

    shapes = {
        ours: torch.Size([vocab_size, *shape[1:]]) if ours in BY_TOKEN else shape for ours, shape in expected.values()
    }
    return OnDemand({f"backbone.{ours}": outline(shape, dtype) for ours, shape in shapes.items()}, read)


def read_formats(folder: str | Path) -> set[str]:
    """Returns the number formats of a checkpoint's tensors, such as `BF16`; reads the heads of its files alone.

    Raises:
        UserError: as `read_weights`, but for what only the numbers show.
    """
    return {kind for _, kind in _check_heads(Path(folder), _expected(Path(folder))).values()}


def _check_heads(folder: Path, expected: dict[str, tuple[str, torch.Size]]) -> dict[str, tuple[Path, str]]:
    """Checks names and shapes of all tensors; returns the file and the format of each."""
    tied = read_checkpoint(folder).family.names.theirs("head.weight")
    found: dict[str, tuple[Path, str]] = {}
    for file in _files(folder):
        with _opened(file) as opened:
            for theirs in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(theirs)
                if theirs in expected:
                    found[theirs] = file, part.get_dtype()
                    _check_shape(file, theirs, tuple(part.get_shape()), tuple(expected[theirs][1]))
                elif any(fused in theirs for fused in _FUSED):
                    raise UserError(f"{file}: {theirs} is of a fused layout, which is not read; save it unfused")
                # Ignored, as transformers does: the angles that old checkpoints hold, and the copy of a tied head.
                elif not theirs.endswith("rotary_emb.inv_freq") and theirs != tied:
                    raise UserError(f"{file}: {theirs} is not part of the model in config.json; download both again")
    for theirs in expected:
        if theirs not in found:
            raise UserError(f"{_list_of_weights(folder)}: lacks {theirs}; download the checkpoint again")
    return found


def _check_shape(file: Path, name: str, shape: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if shape != needed:
        raise UserError(f"{file}: {name} has shape {shape}, its config.json says {needed}; download both again")


def _expected(folder: Path) -> dict[str, tuple[str, torch.Size]]:
    """Maps the checkpoint's names of its tensors to our names and shapes."""
    given = read_checkpoint(folder)
    with torch.device("meta"):
        tokens = TokenSpec(vocab_size=given.num_rows, length=1, mask_id=0)
        model = Transformer(TransformerConfig(**given.settings), tokens)
    return {given.family.names.theirs(ours): (ours, each.shape) for ours, each in model.named_parameters()}


def _list_of_weights(folder: Path) -> Path:
    """Returns the file of weights, or, if only that exists, the index of several; in this order, as transformers."""
    single, index = folder / _SINGLE, folder / _INDEX
    return single if single.exists() or not index.exists() else index


def _files(folder: Path) -> list[Path]:
    file = _list_of_weights(folder)
    return [file] if file.name == _SINGLE else listed_files(file)


def listed_files(index: Path) -> list[Path]:
    """Returns the files of weights that an index lists.

    Raises:
        UserError: it lists something else than safetensors in its own folder.
    """
    weight_map = read_checkpoint_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of file names; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or len(name.encode()) > _LONGEST_NAME:
            raise UserError(f"{index}: weight_map names {name[:100]!r}, which is no safetensors file beside it")
    return [index.with_name(name) for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a file of tensors, in the order of its names.

    Raises:
        UserError: it is missing or damaged.
    """
    if not file.exists():
        raise UserError(f"{file}: is missing; download it, or save the checkpoint again as safetensors")
    if not file.is_file():  # a fifo would wait for its writer
        raise UserError(f"{file}: is no regular file; download it again")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged: {error}; download it again") from error


def _read_tensor(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    if not tensor.is_floating_point():
        raise UserError(f"{file}: {name} is of {tensor.dtype}; use the checkpoint that was not quantised")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{file}: {name} holds nan or infinity; download it again")
    return tensor


def _rows(
    file: Path, num_rows: int, original_ids: Sequence[int | None] | None, vocab_size: int
) -> Sequence[int | None]:
    """Returns the checkpoint's row of each of V tokens, None for a new one and for those behind its last row.

    A tokenizer may have tokens that were added to it, a mask among them, and to the embedding not. Where many have no
    row, it is the tokenizer of another model.
    """
    ids = range(vocab_size) if original_ids is None else original_ids
    if len(ids) != vocab_size:
        raise UserError(f"{file}: {len(ids)} original ids for {vocab_size} tokens; give one for each")
    behind = [token for token, row in enumerate(ids) if row is not None and not 0 <= row < num_rows]
    negative = any(row is not None and row < 0 for row in ids)
    if negative or len(behind) > max(_FEW, vocab_size // 20):
        raise UserError(
            f"{file}: has {num_rows} tokens, and none for {len(behind)} of this run's {vocab_size} (token {behind[0]} "
            f"stands for its {ids[behind[0]]}); prepare the data with the checkpoint's tokenizer"
        )
    if len(behind) > (original_ids is None):  # without a tokenizer, one more than there are rows is the mask
        warn(
            f"{file}: has {num_rows} tokens, and no row for {len(behind)} of this run's; they start as the mean of all "
            f"rows (the first is token {behind[0]})"
        )
    return [None if row is not None and row >= num_rows else row for row in ids]


def _select(matrix: Float[Tensor, "R D"], rows: Sequence[int | None]) -> Float[Tensor, "V D"]:
    """Selects rows of `matrix`; None: the mean of all, in fp32."""
    index = torch.tensor([0 if row is None else row for row in rows])
    is_new = torch.tensor([row is None for row in rows])
    chosen = matrix[index]
    if is_new.any():
        chosen[is_new] = matrix.float().mean(dim=0).to(chosen.dtype)
    return chosen
