"""Settings of the PUMA paper's code as recipes: every key is mapped or named, and the training is the same."""

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import run_cli
from tests.helpers.sudoku import EASY, EASY_SOLUTION, boards, shah_rows
from tests.parity.puma_files import MODEL, SETTINGS, settings, write_yaml
from unmask import files
from unmask.config import recipes
from unmask.tasks.task import build_task
from unmask.training.sources import find

SHIPPED = {
    "sudoku_baseline": "sudoku/paper_uniform",
    "sudoku_puma": "sudoku/paper_puma",
    "tinygsm_baseline": "tinygsm/uniform",
    "tinygsm_puma": "tinygsm/puma",
    "tinygsm_block_baseline": "tinygsm/block_uniform",
    "tinygsm_block_puma": "tinygsm/block_puma",
}
"""The recipe of ours that stands for each of its files."""


def keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def recipe_of(path: Path, tree: dict[str, Any], **options: Any) -> str:
    return find("puma", write_yaml(path / "theirs.yaml", tree), options).shown(None)


def joined(text: str) -> str:
    """With comments of several lines in one."""
    return re.sub(r"\n +# ", " ", text)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_key_is_mapped_or_named_and_the_training_is_the_shipped_one(name: str, tmp_path: Path) -> None:
    script = {"script": "train_block.py"} if "block" in name else {}
    text = recipe_of(tmp_path, SETTINGS[name], gpus=8 if "tiny" in name else 1, **script)
    assert all(re.search(rf"\b{re.escape(key)}\b", text) for key in keys(SETTINGS[name]))
    (tmp_path / "ours.yaml").write_text(text)
    ours, shipped = recipes.load(str(tmp_path / "ours.yaml")), recipes.load(SHIPPED[name])
    assert ours.process == shipped.process
    assert ours.optim == shipped.optim
    assert ours.ema == shipped.ema
    assert ours.model.model_copy(update={"preset": None, "rotary_layout": "standard", "num_kv_heads": None}) == (
        shipped.model.model_copy(update={"preset": None, "num_kv_heads": None})
    )
    assert ours.train.batch_size == shipped.train.batch_size
    assert (ours.eval.orders, ours.eval.tokens_per_step) == (shipped.eval.orders, shipped.eval.tokens_per_step)
    same = ("vocab_size", "mask_id", "eos_id", "length") if "tiny" in name else ("layout", "augment")
    assert all(getattr(ours.data, key) == getattr(shipped.data, key) for key in same)


def test_what_is_read_oddly_is_said(tmp_path: Path) -> None:
    sudoku = recipe_of(tmp_path, SETTINGS["sudoku_puma"])
    assert "training.confidence_threshold: 0.9 (it counts only with mode: confidence_collapse)" in sudoku
    assert "threshold:" not in sudoku.split("# Of no effect:")[0]
    puma = recipe_of(tmp_path, SETTINGS["tinygsm_puma"])
    assert "the first entry's step, 30000, is not read, and neither is training.K" in joined(puma)
    assert "training.block_size: 256 (train.py has no blocks: the script chooses them, not the file." in puma
    assert "steps = epochs x rows / batch_size; a pool sees fewer rows" in joined(puma)
    assert "batch_size: 32  # training.batch_size: 32; of each GPU there, of all here: say --gpus N" in puma


def test_a_causal_model_and_one_that_starts_from_it(tmp_path: Path) -> None:
    ar = recipe_of(tmp_path, settings({**MODEL, "causal": True}, "arm"))
    (tmp_path / "ar.yaml").write_text(ar)
    made = recipes.load(str(tmp_path / "ar.yaml"))
    assert (made.process.name, made.model.causal, made.model.alignment) == ("ar", True, "next")
    assert "without, it learns all the padding" in joined(ar)
    later = recipe_of(tmp_path, settings({**MODEL, "arm_init": "ckpts/step=9.pt"}, "progressive"))
    (tmp_path / "later.yaml").write_text(later)
    made = recipes.load(str(tmp_path / "later.yaml"))
    assert (made.process.name, made.model.alignment, made.train.init) == ("puma", "next", "ckpts/step=9")
    assert "its pool reveals i by what is read at i" in joined(later)


@pytest.mark.parametrize(
    ("section", "change", "options", "message"),
    [
        (
            "training",
            {"strategy": "block"},
            {"script": "train.py"},
            "strategy=block: train.py has .*--script train_block.py",
        ),
        (
            "training",
            {"strategy": "nonsense"},
            {},
            "training.strategy=nonsense: train.py has standard, progressive, arm",
        ),
        ("training", {"strategy": "progressive", "mode": "mixed"}, {}, "mode=mixed: must be standard or"),
        ("training", {"strategy": "progressive", "mode": "confidence_collapse"}, {}, "confidence_threshold is missing"),
        ("training", {"strategy": "progressive", "k_schedule": [[4, 5], [8, 5]]}, {}, r"\[8, 5\] comes after step 5"),
        ("training", {"strategy": "progressive", "K": None}, {}, "training.K is missing"),
        ("training", {"batch_size": "a lot"}, {}, "training.batch_size='a lot': Input should be a valid integer"),
        ("training", {"batch_size": "${data.seed.x}"}, {}, "cannot be resolved; write the value itself"),
        ("training", {"learning_rate": None}, {}, "training.learning_rate='None'"),
        ("training", {}, {"script": "train_blocks.py"}, "--script train_blocks.py: unknown; use one of train.py"),
        ("training", {}, {"weights": "ema"}, "--weights: is for a checkpoint"),
        ("model", {"rope_base": 5}, {}, "model.rope_base='5': the paper's code has no such part of a model"),
        ("model", {"causal": True}, {}, "model.causal=true with training.strategy=standard"),
        ("model", {"num_kv_heads": 3}, {}, "has no counterpart here: .*model.num_kv_heads=3 does not divide"),
        ("data", {"mask_id": 13}, {}, "data.mask_id=13: must be below model.vocab_size=13"),
        ("data", {"dataset": "sudoku"}, {}, "a Sudoku has 11 ids"),
        ("data", {"dataset": "maze"}, {}, "data.dataset='maze'"),
        (
            "validation",
            {"sampling": {"confidence": ["luck"]}},
            {},
            "confidence: 'luck': use top_k, top_k_margin, entropy",
        ),
    ],
)
def test_wrong_settings_are_named(
    section: str, change: dict, options: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = settings(MODEL)
    file = write_yaml(tmp_path / "theirs.yaml", tree | {section: tree[section] | change})
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert run_cli("import", "--from", "puma", file, *given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_recipe_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = write_yaml(tmp_path / "theirs.yaml", SETTINGS["sudoku_puma"]), tmp_path / "ours.yaml"
    assert run_cli("import", "--from", "puma", theirs) == 0
    recipe = capsys.readouterr().out
    assert run_cli("import", "--from", "puma", theirs, "--out", ours) == 0
    assert capsys.readouterr().out == ""
    assert ours.read_text() == recipe
    assert run_cli("settings", ours) == 0
    assert run_cli("import", "--from", "puma", theirs, "--out", ours) == 2
    assert "ours.yaml: exists already; name another one" in capsys.readouterr().err
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nothing.yaml")
    assert run_cli("import", "--from", "puma", theirs, "--out", tmp_path / "link.yaml") == 2
    assert "link.yaml: exists already; name another one" in capsys.readouterr().err
    assert run_cli("import", "--from", "puma", theirs, "--out", tmp_path / "nowhere" / "ours.yaml") == 2
    assert "cannot be written: No such file or directory; name another one" in capsys.readouterr().err
    assert run_cli("import", "--from", "puma", theirs, "--out", tmp_path / "folder") == 2
    assert "a recipe is a .yaml file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sudoku-train-data.npy", "train_mdm.npy"])
def test_its_puzzles_are_read_where_they_are(name: str, tmp_path: Path) -> None:
    """Its rows of 325 integers; or what its own code makes of them, if only that is left: rows of 162, as floats."""
    puzzles, solutions = boards(EASY), boards(EASY_SOLUTION)
    turned = (
        [np.where(puzzles, (puzzles + k) % 9 + 1, 0) for k in range(9)],
        [(solutions + k) % 9 + 1 for k in range(9)],
    )
    puzzles, solutions = (np.concatenate(each) for each in turned)
    rows = shah_rows(puzzles, solutions) if "train-data" in name else np.hstack([puzzles, solutions]).astype(float)
    np.save(tmp_path / name, rows)
    before = (tmp_path / name).read_bytes()
    tree = SETTINGS["sudoku_puma"]
    (tmp_path / "ours.yaml").write_text(
        recipe_of(tmp_path, tree | {"data": tree["data"] | {"data_dir": str(tmp_path), "val_ratio": 0.3}})
    )
    task = build_task(recipes.load(str(tmp_path / "ours.yaml")))
    seen = task.train_stream(0)[torch.arange(6)].x0.numpy()
    assert {row.tobytes() for row in seen} < {row.tobytes() for row in np.hstack([puzzles, solutions]).astype(int)}
    assert (tmp_path / name).read_bytes() == before


def test_a_full_disk_is_not_blamed_on_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = write_yaml(tmp_path / "theirs.yaml", SETTINGS["sudoku_puma"])

    def is_full(*asked: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", is_full)
    assert run_cli("import", "--from", "puma", theirs, "--out", tmp_path / "ours.yaml") == 1
