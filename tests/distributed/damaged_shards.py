"""Damages of a checkpoint whose tensors are in shards, signed as if it were whole, and what two processes say of them.

`train_cases.py` has both of its processes try each.
"""

import json
import math
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.training import checkpoint, restoring
from unmask.training.parallel import local_part
from unmask.training.state import split
from unmask.training.trainer import Trainer

FIRST, SECOND = (f"-0000{number}-of-00002.safetensors" for number in (1, 2))


def change(path: Path, alter: Callable[[Tensor], Tensor | None], part: str = "") -> None:
    """Alters the first tensor of the file, in alphabetical order, whose name has `part` in it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    name = min(name for name in tensors if part in name)
    changed = alter(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, path, metadata)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace(SECOND, FIRST))
    spare = path.with_name("spare")
    for source, target in ((path, spare), (other, path), (spare, other)):
        source.rename(target)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("model" + SECOND, truncate),
    "truncated_first": ("optimizer" + FIRST, truncate),
    "missing": ("model" + SECOND, Path.unlink),
    "missing_average": ("ema" + FIRST, Path.unlink),
    "swapped": ("model" + SECOND, swap),
    "of_another_section": (
        "model" + SECOND,
        lambda path: shutil.copy(path.with_name("ema" + SECOND), path),
    ),
    "without_a_tensor": ("model" + FIRST, lambda path: change(path, lambda value: None)),
    "without_the_last_rows": ("model" + SECOND, lambda path: change(path, lambda value: value[:-1])),
    "without_rows_between": ("model" + FIRST, lambda path: change(path, lambda value: value[:-1])),
    "wider": ("optimizer" + SECOND, lambda path: change(path, lambda value: value.repeat(1, 2), "blocks.0")),
    "in_another_format": ("model" + SECOND, lambda path: change(path, Tensor.float)),
    "of_integers": ("ema" + FIRST, lambda path: change(path, lambda value: value.to(torch.int64))),
    "not_a_number": ("model" + SECOND, lambda path: change(path, lambda value: value * math.nan)),
    "infinite_average": ("ema" + FIRST, lambda path: change(path, lambda value: value + math.inf)),
    "not_a_number_in_a_moment": ("optimizer" + SECOND, lambda path: change(path, lambda value: value * math.nan)),
    "negative_square": ("optimizer" + FIRST, lambda path: change(path, lambda value: value - 1, "exp_avg_sq")),
    "no_tensors": ("model" + SECOND, lambda path: path.write_bytes(b"{}")),
}


def sign(path: Path) -> None:
    """Makes the checksums those of the files that are there."""
    names = [file.name for file in path.iterdir() if file.name != "COMPLETE"]
    (path / "COMPLETE").write_text(json.dumps({name: sha256((path / name).read_bytes()).hexdigest() for name in names}))


def damaged(saved: Path, name: str, folder: Path) -> Path:
    """Copies the checkpoint `saved`, with the damage `name`."""
    path = shutil.copytree(saved, folder / name / saved.name)
    file, damage = DAMAGES[name]
    damage(path / file)
    sign(path)
    return path


def words_of_refusal(trainer: Trainer, path: Path) -> str | None:
    """Returns what is said instead of loading the checkpoint `path`: at the first look, or by all processes."""
    problem = checkpoint.damage(path)
    if problem is None:
        try:
            with trainer.peers.raise_together():
                trainer.read_own(restoring.read_state(path, Trainer.PER_PARAMETER), str(path))
        except UserError as error:
            problem = str(error)
    return problem


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    state = {"model": trainer.model.state_dict(), "process": trainer.process.state_dict()}
    return {
        name: local_part(value).clone() for name, value in split(state | {"ema": trainer.ema.state_dict()})[0].items()
    }


def refuse_all(trainer: Trainer, saved: Path, folder: Path) -> None:
    """Writes to `folder` what is said of each damage, and whether the trainer is as it was. Collective."""
    before, said = tensors_of(trainer), {}
    for name in DAMAGES:
        if trainer.peers.is_main:
            damaged(saved, name, folder)
        trainer.peers.exchange(None)  # it is there
        said[name] = words_of_refusal(trainer, folder / name / saved.name)
    after = tensors_of(trainer)
    is_same = trainer.step_number == 0 and all(torch.equal(value, after[key]) for key, value in before.items())
    (folder / f"said_{trainer.peers.rank}.json").write_text(json.dumps({"is_same": is_same, "said": said}))
