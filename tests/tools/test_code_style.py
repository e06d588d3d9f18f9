"""The measures of `tools/code_style.py`, on a package whose numbers are counted by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "code_style.py"
SHAPES = '''"""Shapes."""

# areas alone
SIDES = 4  # of a square


class Square:
    """What has four sides."""

    def area(self, side):
        """Of the square: # no comment"""
        return self._square(side)

    def _square(self, side):
        return side**2


def _helper():
    """Returns one."""
    return 1


def total():
    """Adds."""
    x = _helper()
    y = _helper()
    return x + y
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "shapes.py").write_text(SHAPES)
    (folder / "long.py").write_text("x = 1\n" * 401)
    (folder / "tests" / "test_shapes.py").write_text("def test():\n    assert True\n")
    return folder


def measure(*arguments: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_measures(package: Path) -> None:
    assert json.loads(measure(package, "--json"))[str(package)] == {
        "files": 3,
        "not_empty": 2,
        "lines": 428,
        "file_p50": 214,
        "file_max": 401,
        "over_400": 1,
        "function_p50": 3,
        "function_max": 5,
        "per_100": pytest.approx(100 * 4 / 428),
        "one_use": 1 / 4,  # _square, of four functions; _helper is called twice
        "comments": 2 / 428,
        "fragments": 2 / 5,
    }


def test_a_row_for_each_folder(package: Path) -> None:
    rows = measure(package, package / "tests").splitlines()
    assert len(rows) == 4
    assert rows[2].startswith(f"| {package} | 3 | 2 | 428 | 214 | 401 | 1 | 3 | 5 | 0.9 | 25.0% | 0.5% | 40.0% |")


def test_list_names_what_was_counted(package: Path) -> None:
    listed = measure(package, "--list")
    for entry in (
        "  401  long.py",
        "    5  shapes.py:23 total",
        "shapes.py:14 _square",
        "shapes.py:7 What has four sides.",
        "shapes.py:10 Of the square: # no comment",
    ):
        assert entry in listed.splitlines()
    assert "_helper" not in listed.split("lines or fewer, one use")[1]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path / 'no'}: is not a folder" in done.stderr
