"""The examples and the guide, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SHORT, lines

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_docs_name_exists() -> None:
    named = []
    for page in (ROOT / "docs").rglob("*.md"):
        file = ""
        for given, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", page.read_text()):
            file = given or file
            if file and (given or test):
                named.append((file, test))
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)


def test_any_model_learns() -> None:
    command = [sys.executable, str(ROOT / "examples" / "any_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(re.findall(r"([\d.]+)%", done.stdout)[-1]) > 95
    assert len((ROOT / "examples" / "any_model.py").read_text().splitlines()) <= 60


def test_hugging_face_trainer_learns() -> None:
    pytest.importorskip("transformers", reason="needs pip install -e '.[hf]'")
    pytest.importorskip("accelerate", reason="needs pip install -e '.[hf]'")
    command = [sys.executable, str(ROOT / "examples" / "hf_trainer.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert float(re.findall(r"([\d.]+)% of 500", done.stdout)[-1]) > 95


def test_the_guide_to_a_process_of_ones_own(tmp_path: Path) -> None:
    """Its code blocks, written to the files that it names."""
    guide = (ROOT / "docs" / "guides" / "extend.md").read_text()
    (code,) = re.findall(r"In `capped\.py`:\n\n```python\n(.*?)```", guide, re.S)
    (recipe,) = re.findall(r"In `capped\.yaml`.*?```yaml\n(.*?)```", guide, re.S)
    (tmp_path / "capped.py").write_text(code)
    (tmp_path / "capped.yaml").write_text(recipe)
    command = [sys.executable, "-m", "unmask", "train", "capped.yaml", *SHORT]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    for row in lines(tmp_path / "runs" / "capped" / "metrics.jsonl")[:4]:
        assert 1 <= row["train/scored_per_row"] <= 0.3 * 41 + 1  # debug's boards have 31 to 41 cells to fill in
    wrong = subprocess.run([*command, "process.cup=0.2", "--out", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean process.cap?" in wrong.stderr


def test_the_guide_to_a_density_of_ones_own(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "extend.md").read_text()
    (code,) = re.findall(r"In `triangle\.py`:\n\n```python\n(.*?)```", guide, re.S)
    (tmp_path / "triangle.py").write_text(code)
    (settings,) = re.findall(r"`unmask (train debug .*?)` trains with it", guide)
    command = [sys.executable, "-m", "unmask", *settings.split(), *SHORT, "--out", "run"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert [row["train/mean_t"] for row in lines(tmp_path / "run" / "metrics.jsonl")[:4]] == pytest.approx([0.5] * 4)


def test_the_reference_lists_the_public_names() -> None:
    import unmask

    public = {name for name in vars(unmask) if name[0] != "_" and hasattr(getattr(unmask, name), "__module__")}
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "reference.md").read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert listed == public
