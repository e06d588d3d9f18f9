"""`benchmarks/continuation_choices.py`: its questions are what it says of them."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.text import write_lines
from unmask.tasks.choices import read_questions

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "continuation_choices.py"


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    spec = importlib.util.spec_from_file_location("continuation_choices", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = folder / f"questions{len(list(folder.glob('questions*')))}.jsonl"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), str(folder / "text.jsonl"), *options])
    module.main()
    return out


def test_one_ending_goes_on_and_the_others_are_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"{word}{i * j % 97}" for j in range(120)) for i, word in enumerate(("ab", "cde", "f"), 1)]
    write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    options = ("--questions", "100", "--context", "30", "--ending", "12")
    file = make(tmp_path, monkeypatch, *options)
    questions = read_questions(file)
    assert len(questions) == 100
    for each in questions:
        assert len({len(choice) for choice in each.choices}) == 1
        assert any(each.context + each.choices[each.answer] in text for text in texts)
        assert all(any(choice in text for text in texts) for choice in each.choices)
        assert len(each.context) == 30
    places = Counter(each.answer for each in questions)
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) < 43  # 4 standard deviations of a fair draw above 25
    assert make(tmp_path, monkeypatch, *options).read_bytes() == file.read_bytes()
    assert make(tmp_path, monkeypatch, *options, "--seed", "1").read_bytes() != file.read_bytes()
    first = json.loads(file.read_text().splitlines()[0])
    assert set(first) == {"context", "choices", "answer"}


@pytest.mark.parametrize("text", ["x" * 400, "ab " * 200], ids=["no space", "one ending"])
def test_a_text_without_places_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    write_lines(tmp_path / "text.jsonl", [{"text": text}])
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path, monkeypatch, "--questions", "2", "--context", "30", "--ending", "11")
    assert "800 places gave too few different endings of 11 characters" in capsys.readouterr().err
    assert not list(tmp_path.glob("questions*"))
