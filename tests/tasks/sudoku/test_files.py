import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.sudoku import CONTRADICTORY, EASY, EASY_SOLUTION, EMPTY, NO_SOLUTION, boards, save, shah_rows
from unmask.errors import UserError
from unmask.tasks.sudoku import board, formats
from unmask.tasks.sudoku.generator import generate
from unmask.tasks.sudoku.task import Sudoku, SudokuData


@pytest.fixture(scope="module")
def puzzles() -> tuple[np.ndarray, np.ndarray]:
    return generate(30, givens=(30, 40), difficulty="singles", seed=0)


@pytest.mark.parametrize("order", ["rcvs", "vrcs", "srcv", "rvcs"])
@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_rows_of_325_in_any_order(tmp_path: Path, puzzles, order: str, base: int, dtype: type) -> None:  # type: ignore[no-untyped-def]
    path = save(tmp_path / "x.npy", shah_rows(*puzzles, order, base).astype(dtype))
    loaded = formats.load(path)
    assert (loaded.puzzles == puzzles[0]).all()
    assert (loaded.solutions == puzzles[1]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_rows_of_162(tmp_path: Path, puzzles, dtype: type) -> None:  # type: ignore[no-untyped-def]
    loaded = formats.load(save(tmp_path / "x.npy", np.concatenate(puzzles, axis=1).astype(dtype)))
    assert (loaded.puzzles == puzzles[0]).all()
    assert (loaded.solutions == puzzles[1]).all()


@pytest.mark.parametrize("header", ["puzzle,solution", "quizzes,solutions", "solution,x,puzzle"])
def test_csv(tmp_path: Path, header: str) -> None:
    cells = {"puzzle": EASY, "quizzes": EASY.replace("0", "."), "solution": EASY_SOLUTION, "solutions": EASY_SOLUTION}
    line = ",".join(cells.get(name, "?") for name in header.split(","))
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n{line}\n{line}\n")
    loaded = formats.load(path)
    assert (loaded.puzzles == boards(EASY, EASY)).all()
    assert (loaded.solutions == boards(EASY_SOLUTION, EASY_SOLUTION)).all()


def test_text_is_solved_and_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(f"{EASY.replace('0', '.')}\n\n{EASY}\n".encode()))
    loaded = formats.load(path)
    assert (loaded.solutions == boards(EASY_SOLUTION, EASY_SOLUTION)).all()


BAD_TEXT = {
    "wrong length": (f"{EASY}\n{EASY[:-1]}\n", "line 2: a puzzle has 81 cells, this has 80"),
    "wrong symbol": (f"{EASY}\n\nx{EASY[1:]}\n", "line 3: cell 1 is 'x'"),
    "contradictory": (f"{CONTRADICTORY}\n", "line 1: the givens contradict: 5 stands twice in row 1"),
    "no solution": (f"{EASY}\n{NO_SOLUTION}\n", "line 2: the puzzle has no solution"),
    "several solutions": (f"{EASY}\n{EMPTY}\n", "line 2: the puzzle has several solutions"),
    "empty": ("", "the file is empty"),
    "blank": ("\n\n", "holds no puzzle"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_bad_text_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "puzzles.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"puzzles\.txt") as caught:
        formats.load(path)
    assert message in str(caught.value)


OTHER_SOLUTION = EASY_SOLUTION.translate(str.maketrans("123456789", "234567891"))
BAD_CSV = {
    "no columns": ("a,b\n1,2\n", "line 1: needs the columns puzzle,solution; found a,b"),
    "a column twice": (
        f"puzzle,puzzle,solution\n{'.' * 81},{EASY},{EASY_SOLUTION}\n",
        "line 1: has 2 columns puzzle; rename all but one",
    ),
    "wrong solution": (f"puzzle,solution\n{EASY},{'1' * 81}\n", "line 2: the solution breaks a row, column or box"),
    "other solution": (f"puzzle,solution\n{EASY},{OTHER_SOLUTION}\n", "line 2: the solution changes a given"),
    "short solution": (f"puzzle,solution\n{EASY},123\n", "line 2, column solution: a puzzle has 81 cells, this has 3"),
    "missing field": (f"puzzle,solution\n{EASY}\n", "line 2, column solution: a puzzle has 81 cells, this has 0"),
    "nothing empty": (f"puzzle,solution\n{EASY_SOLUTION},{EASY_SOLUTION}\n", "line 2: the puzzle has no empty cell"),
    "header alone": ("puzzle,solution\n", "holds no puzzle"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.values(), ids=BAD_CSV.keys())
def test_bad_csv_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"puzzles\.csv") as caught:
        formats.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 200, "row 7: claims 200 givens"),
        (1, 99, "row 7: the 81 quadruples do not name every cell once"),
        (3, 0, "row 7: the solution breaks"),
    ],
)
def test_one_bad_row_of_325_is_named(tmp_path: Path, puzzles, position: int, value: int, message: str) -> None:  # type: ignore[no-untyped-def]
    rows = shah_rows(*puzzles)
    rows[7, position] = value
    with pytest.raises(UserError, match=message):
        formats.load(save(tmp_path / "x.npy", rows))


@pytest.mark.parametrize("number", [0, 3, 4, 29])
def test_rows_are_counted_through_the_chunks(
    tmp_path: Path, puzzles, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(formats, "_CHUNK", 4)
    rows = np.concatenate(puzzles, axis=1)
    assert (formats.load(save(tmp_path / "x.npy", rows)).solutions == puzzles[1]).all()
    rows[number, 100] = 0
    with pytest.raises(UserError, match=f"row {number}: the solution breaks"):
        formats.load(save(tmp_path / "x.npy", rows))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 81)), r"shape \(3, 81\); needs \(N, 325\) or \(N, 162\)"),
        (np.zeros(162), r"shape \(162,\)"),
        (np.full((2, 162), 0.5), "dtype float64; needs integers"),
        (np.full((2, 162), "a"), "dtype <U1; needs integers"),
        (np.zeros((2, 162), int), "row 0: the solution breaks"),
        (np.zeros((2, 325), int), "no order of"),
        (np.full((2, 325), 200, np.uint8), "no order of"),
        (np.zeros((0, 162), int), "holds no puzzle"),
    ],
)
def test_bad_arrays_name_shape_and_dtype(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        formats.load(save(tmp_path / "x.npy", array))


def test_pickled_arrays_do_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (pytest.fail, ("ran",))

    path = tmp_path / "x.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Malicious()], dtype=object), allow_pickle=True)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="not a plain"):
        formats.load(path)


def zip_of_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def array_of_shape(shape: str) -> bytes:
    head = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(162 * 8)


DAMAGED_GZIP = bytearray(gzip.compress(b"puzzle,solution\n" + bytes(range(200)), mtime=0))
DAMAGED_GZIP[20:23] = b"\x00\xff\x13"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"a", "unknown format '.parquet'; use .csv, .txt or .npy"),
        ("x", b"a", "unknown format ''"),
        ("x.txt.gz", b"not gzip", "cannot be read"),
        ("x.csv", b"\xff\xfe\xfa", "not UTF-8 text, at byte 0"),
        ("line.csv", b'puzzle,solution\n"' + b"1" * 140_000, "line 1: not CSV"),
        ("archive.npy", zip_of_arrays(), "not a plain .npy array but an archive"),
        ("negative.npy", array_of_shape("(-1, 162)"), "not a plain .npy array"),
        ("zip.npy", b"PK\x03\x04abc", "not a plain .npy array"),
        ("cut.csv.gz", gzip.compress(b"puzzle,solution\n", mtime=0)[:-5], "cannot be read"),
        ("bits.csv.gz", DAMAGED_GZIP, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # bytes may hold the time, ids must not
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        formats.load(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        formats.load(tmp_path / "absent.csv")


@pytest.mark.parametrize("name", ["kaggle_20k", "clue17_singles"])
def test_real_rows_of_325(sudoku_data: Path, name: str) -> None:
    loaded = formats.load(sudoku_data / "shah_format_derived" / f"{name}-sudoku-test-data.npy.gz")
    assert len(loaded) == 1000


def test_real_csv(sudoku_data: Path) -> None:
    assert len(formats.load(sudoku_data / "kaggle_20k.csv.gz")) == 20_000


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("source,question,answer,rating", None),  # sudoku-extreme
        ("id,puzzle,solution,clues,difficulty", None),
        ("quizzes,solutions", None),
        ("a,grid,b,filled", ("grid", "filled")),
        ("puzzle,solution,grid,filled", ("grid", "filled")),
    ],
)
def test_columns_of_well_known_sets_and_those_that_are_named(
    tmp_path: Path, header: str, columns: tuple[str, str] | None
) -> None:
    path = tmp_path / "puzzles.csv"
    names = header.split(",")
    first, second = columns or next(pair for pair in formats._COLUMN_NAMES if set(pair) <= set(names))
    row = dict.fromkeys(names, "x") | {first: EASY.replace("0", "."), second: EASY_SOLUTION}
    path.write_text(f"{header}\n{','.join(row.values())}\n")
    found = formats.load(path, columns=columns)
    assert board.to_text(found.solutions[0]) == EASY_SOLUTION
    task = Sudoku.from_config(SudokuData(columns=["grid", "filled"]))
    assert len(task.examples_from_file(path)) == 1  # another file may have other names


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f"puzzle,solution\n{EASY},{EASY_SOLUTION}\n")
    with pytest.raises(UserError, match=r"line 1: needs the columns a,b; found puzzle,solution .*data\.columns"):
        formats.load(path, columns=("a", "b"))
    with pytest.raises(UserError, match=r"data.columns=\['a', 'b'\]: .* has none"):
        formats.load(tmp_path / "puzzles.txt", columns=("a", "b"))
    with pytest.raises(ValueError, match="names one column twice"):
        SudokuData(columns=["a", "a"])
