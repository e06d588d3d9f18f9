"""The examples and the guide, run as they stand."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import SHORT, lines

ROOT = Path(__file__).parents[2]


HIDDEN = """
from dataclasses import replace

import torch

from sorting import Sorting
from unmask.tasks.task import Grades


class Hidden(Sorting):
    def validation(self, limit):
        known = super().validation(limit)
        return replace(known, x0=known.masked(self.tokens.mask_id), answers=tuple(row.tolist() for row in known.x0))

    def grade(self, examples, tokens):
        is_right = [row.tolist() == answer for row, answer in zip(tokens, examples.answers)]
        return Grades({"accuracy": torch.tensor(is_right)})

    def keep_files(self, folder):
        (folder / "vocabulary").mkdir(exist_ok=True)
        (folder / "vocabulary" / "digits.txt").write_text("0123456789")
"""


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


def test_scripts_import_what_exists() -> None:
    """Most of them take minutes, or want what is not here: nothing else would tell that a name has moved."""
    names = [
        (script.name, str(node.module), each.name)
        for folder in ("benchmarks", "examples", "tools")
        for script in (ROOT / folder).glob("*.py")
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "unmask"
        for each in node.names
    ]
    assert len(names) > 50
    missing = [each for each in names if not _exists(*each[1:])]
    assert not missing


def _exists(module: str, name: str) -> bool:
    return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None


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
    (code,) = re.findall(r"In `spans\.py`:\n\n```python\n(.*?)```", guide, re.S)
    (recipe,) = re.findall(r"In `spans\.yaml`.*?```yaml\n(.*?)```", guide, re.S)
    (tmp_path / "spans.py").write_text(code)
    (tmp_path / "spans.yaml").write_text(recipe)
    command = [sys.executable, "-m", "unmask", "train", "spans.yaml", *SHORT]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    rows = lines(tmp_path / "runs" / "spans" / "metrics.jsonl")[:4]
    for row in rows:
        assert 0.3 * 31 <= row["train/scored_per_row"] <= 0.3 * 41 + 1  # debug's boards have 31 to 41 cells to fill in
    resumed = [*command, "train.steps=6", "--resume", "optim.schedule=cosine"]
    subprocess.run(resumed, cwd=tmp_path, capture_output=True, check=True)
    wrong = subprocess.run([*command, "process.shore=0.2", "--out", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean process.share?" in wrong.stderr


def test_the_guide_to_an_order_and_a_rule_of_ones_own(tmp_path: Path) -> None:
    """Its edits, made to `reveal.py` alone in a copy of the package, reach training, decoding and the command line."""
    guide = (ROOT / "docs" / "guides" / "extend.md").read_text()
    order, rule, line, field = re.findall(r"```python\n(.*?)```", guide.split("## In `reveal.py`")[1], re.S)
    shutil.copytree(ROOT / "unmask", tmp_path / "unmask", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "unmask" / "reveal.py"
    text = file.read_text()
    for place, added in (
        ("_ORDER_ALIASES = {", f"{order}\n"),
        ("PARALLEL_RULES: dict", f"{rule}\n\n"),
        ('    "threshold": Threshold,\n', line),
        ("    threshold: float | None = Field(\n", field),
    ):
        assert text.count(place) == 1
        text = text.replace(place, added + place)
    file.write_text(text)

    def unmask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unmask", *arguments]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    settings = ["process={name: puma, order: right_to_left, relative: 0.9}", "decode.relative=0.8"]
    assert unmask("train", "debug", *SHORT, *settings, "--out", "run").returncode == 0
    shown = unmask("eval", "run", "--examples", "4", "--json", "--decoder", "right_to_left,relative=0.5").stdout
    assert "right_to_left/relative0.5" in json.loads(shown)["accuracy"]
    both = unmask("train", "debug", "process={name: puma, relative: 0.9, threshold: 0.8}", "--out", "x")
    assert (both.returncode, "process.relative=0.9 and process.threshold=0.8: give one" in both.stderr) == (2, True)


def test_the_guide_to_a_model_of_ones_own(tmp_path: Path) -> None:
    """Trained, resumed bit for bit, evaluated and decoded; another seed starts elsewhere."""
    guide = (ROOT / "docs" / "guides" / "extend.md").read_text()
    (code,) = re.findall(r"In `mixer\.py`:\n\n```python\n(.*?)```", guide, re.S)
    (recipe,) = re.findall(r"In `mixer\.yaml`.*?```yaml\n(.*?)```", guide, re.S)
    (tmp_path / "mixer.py").write_text(code)
    (tmp_path / "mixer.yaml").write_text(recipe)
    (tmp_path / "puzzle.txt").write_text("." * 81 + "\n")

    def unmask(*arguments: str) -> str:
        command = [sys.executable, "-m", "unmask", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    unmask("train", "mixer.yaml", *SHORT, "--out", "whole")
    unmask("train", "mixer.yaml", *SHORT, "train.steps=2", "eval.every=2", "--out", "parts")
    unmask("train", "mixer.yaml", *SHORT, "--out", "parts", "--resume")
    unmask("train", "mixer.yaml", *SHORT, "train.seed=1", "--out", "other")
    whole, parts, other = (losses(tmp_path / name) for name in ("whole", "parts", "other"))
    assert whole == parts
    assert whole[0] != other[0]
    assert '"nelbo"' in unmask("eval", "whole", "--examples", "4", "--json", "--trust-code")
    assert '"answer"' in unmask("decode", "whole", "puzzle.txt", "--trust-code")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "sorting.py").read_text()
    (settings,) = re.findall(r"unmask (train .*) --out runs/sorting$", code, re.M)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "sorting.py").write_text(code)
    (tmp_path / "digits.txt").write_text("31415\n")
    (tmp_path / "short.txt").write_text("31415\n3141\n")
    command = [sys.executable, "-m", "unmask"]
    train = [
        *command,
        *shlex.split(settings),
        "eval.every=150",
        "eval.examples=100",
        "train.batch_size=32",
        "--out",
        "run",
    ]
    subprocess.run(train, cwd=tmp_path, capture_output=True, check=True)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval/accuracy"] > 0.9
    decode = [*command, "decode", "run", "--trust-code"]
    done = subprocess.run([*decode, "digits.txt"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["in_order"] == [1, 1, 3, 4, 5]
    wrong = subprocess.run([*decode, "short.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, "short.txt, line 2: '3141': not 5 digits" in wrong.stderr) == (2, True)


def test_a_task_of_ones_own_whose_answers_are_not_known_and_that_keeps_files(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "sorting.py").read_text()
    (settings,) = re.findall(r"unmask (train .*) --out runs/sorting$", code, re.M)
    (tmp_path / "sorting.py").write_text(code)
    (tmp_path / "hidden.py").write_text(HIDDEN)

    def unmask(*arguments: str) -> str:
        command = [sys.executable, "-m", "unmask", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    short = [*SHORT, "train.compile=false", "eval.examples=8"]
    unmask(*shlex.split(settings), "task.name=hidden:Hidden", *short, "--out", "run")
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["eval/accuracy"] >= 0, last["eval/nelbo/raw"]) == (True, None)
    assert (tmp_path / "run" / "vocabulary" / "digits.txt").exists()
    unmask("export", "run", "exported", "--trust-code")
    assert (tmp_path / "exported" / "vocabulary" / "digits.txt").exists()
    found = json.loads(unmask("eval", "exported", "--examples", "8", "--json", "--trust-code"))
    assert "nelbo" not in found or found["nelbo"] is None


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in lines(run / "metrics.jsonl") if "train/loss" in row]


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

    public = set(unmask.__all__)
    assert all(hasattr(unmask, name) for name in public)
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "reference.md").read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert listed == public
