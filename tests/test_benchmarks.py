"""Scripts of `benchmarks/`: they measure what they say that they measure."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.text import write_lines


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_every_file_of_results_is_listed() -> None:
    root = Path(__file__).parents[1]
    files = {file.name for file in (root / "benchmarks" / "results").iterdir()}
    listed = re.findall(r"`(\w\S+\.md)`", (root / "docs" / "lab" / "results.md").read_text())
    assert sorted(listed) == sorted(files)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_timed_in_the_format_that_is_reported(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks, used = load("blocks"), []
    monkeypatch.setattr(blocks, "step", lambda model, batches: lambda: used.append(model.compute_dtype))
    monkeypatch.setattr(blocks, "seconds", lambda run: 1.0)  # after the pass that warms up
    run(blocks, monkeypatch, "--dtype", dtype, "--blocks", 2, "--rows", 1, "--length", 16)
    assert used == [dtype] * 3
    assert json.loads(capsys.readouterr().out)["dtype"] == dtype


def test_preparing_is_timed_for_the_rows_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = load("prepare")
    write_lines(tmp_path / "rows.jsonl", [{"question": "?", "code": "!"}] * 1500)
    monkeypatch.setattr(prepare, "compare", lambda asked: vars(asked))
    for asked, rows in ((20_000, 1500), (1001, 1001)):
        run(prepare, monkeypatch, tmp_path / "rows.jsonl", "--tokenizer", "none", "--rows", asked)
        assert json.loads(capsys.readouterr().out)["rows"] == rows
    with pytest.raises(SystemExit, match="2"):
        run(prepare, monkeypatch, tmp_path / "rows.jsonl", "--tokenizer", "none", "--rows", 1000)
    assert "--rows 1000: " in (said := capsys.readouterr().err)
    assert "gives 1000; give more than 1000" in said
