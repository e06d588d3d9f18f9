"""Looking at a run must not run the code that it names, unless its user says so."""

import json
import os
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path

import pytest

import unmask
from tests.helpers import SHORT, run_cli
from unmask.config.registry import resolve, trust_code
from unmask.errors import UserError
from unmask.lab.trainings import Training, train_all

CODE = """
from pathlib import Path

from pydantic import Field

from unmask.masking.time import FormulaConfig
from unmask.masking.uniform import RandomMasking
from unmask.models.transformer import Transformer
from unmask.tasks.sudoku.task import Sudoku

Path(__file__).with_name("was_run").touch()


class Process(RandomMasking):
    pass


class Model(Transformer):
    pass


class Task(Sudoku):
    pass


class Density(FormulaConfig):
    name: str = "strange:Density"

    def log_shape(self, t):
        return 0 * t
"""
NAMED = {
    "process": "process.name=strange:Process",
    "density": "process={name: uniform, time: {name: 'strange:Density'}}",
    "model": "model={name: 'strange:Model', dim: 16, ff_dim: 16, num_layers: 1, num_heads: 2}",
    "task": "task.name=strange:Task",
}
VERBS = {
    "eval": ["eval", "run", "--examples", "4", "--json"],
    "decode": ["decode", "run", "puzzle.txt", "--out", "answers.jsonl"],
    "chat": ["chat", "run"],
    "report": ["report", "run", "--out", "page.html"],
    "diagnose": ["diagnose", "run", "--only", "nll"],
    "export": ["export", "run", "exported"],
    "settings": ["settings", "run"],
    "init": ["train", "debug", *SHORT, "train.init=run", "--out", "warm"],
    "resume": ["train", "debug", *SHORT, "--out", "run", "--resume"],
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs that name code of the module `strange`, which notes when it is imported."""
    folder = tmp_path_factory.mktemp("strange")
    (folder / "strange.py").write_text(CODE)
    (folder / "puzzle.txt").write_text("." * 81 + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, setting in NAMED.items():
            small = [] if kind == "model" else ["model={dim: 16, ff_dim: 16, num_layers: 1, num_heads: 2}"]
            settings = [*SHORT, "train.compile=false", "eval.examples=4", *small, setting]
            assert run_cli("train", "debug", *settings, "--out", kind) == 0  # typed, so trusted
        assert run_cli("export", "process", "as_export", "--trust-code") == 0
    return folder


@pytest.fixture
def here(strange: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(strange)
    sys.modules.pop("strange", None)
    (strange / "was_run").unlink(missing_ok=True)
    return strange


def with_run(arguments: list[str], kind: str) -> list[str]:
    return [word.replace("run", kind) if word in ("run", "train.init=run") else word for word in arguments]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", NAMED)
def test_looking_at_a_run_runs_none_of_its_code(
    kind: str, verb: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123
    assert run_cli(*with_run(VERBS[verb], kind)) == 2
    assert not (here / "was_run").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "strange:" in said
    assert "--trust-code" in said


def test_an_export_is_no_better(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", "as_export", "--examples", "4") == 2
    with pytest.raises(UserError, match=r"trust_code=True"):
        unmask.load("as_export")
    assert not (here / "was_run").exists()


@pytest.mark.parametrize("kind", NAMED)
def test_what_is_trusted_runs_and_says_where_it_comes_from(
    kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("eval", kind, "--examples", "4", "--json", "--trust-code") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["nelbo"] > 0
    assert f"imported from {here / 'strange.py'}" in err.replace("\n", "")
    assert run_cli("eval", kind, "--examples", "4") == 2  # trust ends with the call
    assert unmask.load(kind, trust_code=True)
    assert unmask.export(kind, f"exported_{kind}", trust_code=True).step == 4
    for open_it in (unmask.load, lambda run: unmask.export(run, "exported")):
        with pytest.raises(UserError, match="trust_code"):
            open_it(kind)


def test_a_registered_name_needs_no_trust(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange.py").write_text(CODE)
    (tmp_path / "strange-1.0.dist-info").mkdir()
    (tmp_path / "strange-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (tmp_path / "strange-1.0.dist-info" / "entry_points.txt").write_text("[unmask]\nprocess.odd = strange:Process\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    assert run_cli("train", "debug", *SHORT, "process.name=odd", "eval.examples=4", "--out", run) == 0
    assert run_cli("eval", run, "--examples", "4") == 0


def test_what_lies_in_the_current_folder_is_not_imported_by_chance(here: Path, tmp_path: Path) -> None:
    for name in ("tabulate", "yaml", "rich", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported by chance')\n")
    code = "import sys; from unmask.cli import run; sys.argv[1:] = ['settings', 'debug', 'process']; run()"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "num_stages" in done.stdout) == (0, True), done.stderr


def test_a_training_of_compare_imports_nothing_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("yaml.py").write_text("raise SystemExit('imported by chance')\n")
    training = Training("debug", (*SHORT, "train.compile=false", "eval.examples=4"), tmp_path / "run")
    train_all([training], jobs=1)


def test_trainings_of_compare_trust_what_compare_trusts(tmp_path: Path) -> None:
    training = Training("debug", ("train.init=strange",), tmp_path / "run")

    def trusted_command() -> list[str]:
        trust_code()
        return training.command()

    assert "--trust-code" in copy_context().run(trusted_command)
    assert "--trust-code" not in training.command()


def test_code_of_the_current_folder_may_import_its_neighbours_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neighbour.py").write_text("SIZE = 3\n")
    (tmp_path / "borrower.py").write_text(
        "from unmask.masking.uniform import RandomMasking\n\n"
        "class Process(RandomMasking):\n"
        "    def metrics(self):\n"
        "        import neighbour\n"
        "        return {'size': neighbour.SIZE}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert resolve("process", "borrower:Process").metrics(None) == {"size": 3}
    assert sys.path[-1] == str(tmp_path)
