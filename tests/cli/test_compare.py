"""`unmask compare`, with trainings in processes of their own."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import lines, run_cli
from unmask import machine
from unmask.cli.compare import compare
from unmask.config import recipes
from unmask.errors import UserError
from unmask.lab.compare import Method, Plan
from unmask.lab.trainings import Training, TrainingFailed, train_all
from unmask.training.folder import to_yaml
from unmask.training.run import Interrupted

TINY = ["task.name=toy", "train.batch_size=16", "train.checkpoint_every=5", "log.every=5", "log.tensorboard=false"]
TINY += ["eval.every=5", "eval.examples=20", "eval.tokens_per_step=[1]"]


SEVEN = recipes.names()[:7]


@pytest.fixture
def recipes_of_mine(tmp_path: Path) -> list[str]:
    (tmp_path / "plain.yaml").write_text("extends: debug\nprocess: {name: uniform}\n")
    (tmp_path / "pool.yaml").write_text("extends: debug\n")
    return [str(tmp_path / "plain.yaml"), str(tmp_path / "pool.yaml")]


def test_it_trains_says_and_goes_on(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", *recipes_of_mine, *TINY, "optim.schedule=constant", "--out", out]
    assert run_cli(*arguments, "--steps", "5", "--seeds", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["curves"]) == ["plain", "pool"]
    assert result["curves"]["plain"][0]["step"] == [5]
    assert result["curves"]["plain"][0]["examples_seen"] == [80]
    assert json.loads((out / "comparison.json").read_text()) == result
    first = (out / "plain" / "seed_0" / "metrics.jsonl").read_bytes()
    assert run_cli(*arguments, "--steps", "10", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert "what it cost to get to 50%" in printed
    assert "fewer" in printed
    assert "mean over seeds [95 % interval of a share, of the examples]" in " ".join(printed.split())  # of two seeds
    assert (out / "plain" / "seed_0" / "metrics.jsonl").read_bytes().startswith(first)  # not trained again
    assert {
        lines(out / name / f"seed_{n}" / "metrics.jsonl")[-1]["step"] for name in ("plain", "pool") for n in (0, 1)
    } == {10}

    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    monkeypatch.setattr("unmask.cli.compare.train_all", lambda *_: None)  # all of it is there
    assert run_cli(*arguments, "--steps", "10", "--seeds", "2") == 2
    said = capsys.readouterr()
    assert said.out == printed  # before the page
    assert "report.html: is a folder" in " ".join(said.err.split())


def test_threads_of_a_recipe_are_taken_before_a_share_of_the_cores(tmp_path: Path) -> None:
    settings = (*TINY, "train.steps=1", "train.compile=false")
    asked = Training("debug", settings, tmp_path / "asked")  # the recipe has `train.threads: 1`
    shared = Training("debug", (*settings, "train.threads=null"), tmp_path / "shared")
    train_all([asked, shared], jobs=1)
    made = [json.loads((own.folder / "environment.json").read_text()) for own in (asked, shared)]
    assert [own["threads"] for own in made] == [1, machine.cpus()]


def test_methods_of_one_recipe_with_budgets_of_their_own(tmp_path: Path) -> None:
    """The settings for all, then a method's own, then the seed; `shlex` keeps what is quoted together."""
    methods = [
        Method.of_recipe("debug"),
        Method.parse("muon: debug optim.name=muon"),
        Method.parse("short:debug train.steps=5 'process={name: puma, num_stages: 3}'"),
    ]
    plan = Plan.make(methods, ["train.steps=10", "optim.lr=1e-3"], seeds=2, out=tmp_path)
    plan.check_folders()
    assert [own.folder.relative_to(tmp_path).as_posix() for own in plan.queue] == [
        f"{name}/seed_{seed}" for seed in (0, 1) for name in ("debug", "muon", "short")
    ]
    configs = [plan.configs[own] for own in plan.queue[3:]]
    assert [(own.optim.name, own.train.steps) for own in configs] == [("adamw", 10), ("muon", 10), ("adamw", 5)]
    assert all(own.optim.lr == 1e-3 and own.train.seed == 1 for own in configs)
    assert configs[2].process.num_stages == 3


def test_a_budget_of_examples(recipes_of_mine: list[str], tmp_path: Path) -> None:
    arguments = ["--examples", "100", "--steps", "50", "--seeds", "1", "--out", tmp_path / "out"]
    assert run_cli("compare", *recipes_of_mine, *TINY, *arguments) == 0
    last = {name: lines(tmp_path / "out" / name / "seed_0" / "metrics.jsonl")[-1] for name in ("plain", "pool")}
    assert last["plain"]["step"] == 7  # 16 new ones a step
    assert last["pool"]["step"] > 7
    assert all(100 <= row["examples_seen"] < 116 for row in last.values())


def trained(folder: Path, *settings: str) -> Path:
    """A training of the recipe `plain`, as far as `compare` looks at it before it trains."""
    folder.mkdir(parents=True)
    config = recipes.load(str(folder.parents[2] / "plain.yaml"), [*TINY, *settings])
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        (["train.steps=10"], ["--steps", "5"], "train.steps=10, not 5"),
        (
            ["train.steps=5", "optim.schedule=cosine"],
            ["--steps", "10", "optim.schedule=cosine"],
            "optim.schedule=cosine of 5 steps, not 10 steps",
        ),
        (["train.steps=10"], ["--steps", "10", "--examples", "9"], "train.max_examples=null, not 9"),
        (
            ["train.steps=10", "train.max_seconds=9"],
            ["--steps", "10", "--seconds", "8"],
            "train.max_seconds=9.0, not 8.0",
        ),
    ],
    ids=["fewer steps", "another cosine", "fewer examples", "fewer seconds"],
)
def test_a_training_of_another_budget_is_not_taken_for_one_of_this(
    held: list[str],
    asked: list[str],
    message: str,
    recipes_of_mine: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained(tmp_path / "out" / "plain" / "seed_0", "optim.schedule=constant", *held)
    asked = ["optim.schedule=constant", *asked]
    assert run_cli("compare", *recipes_of_mine, *TINY, *asked, "--seeds", "1", "--out", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "another folder with --out" in said
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_signal_stops_all_of_them_and_the_same_command_goes_on(recipes_of_mine: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "unmask", "compare", *recipes_of_mine, *TINY, "--steps", "3000", "--seeds", "1"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, env=os.environ, text=True)
    deadline = time.monotonic() + 120
    metrics = [out / name / "seed_0" / "metrics.jsonl" for name in ("plain", "pool")]
    while not all(path.exists() and path.stat().st_size for path in metrics):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    for name in ("plain", "pool"):
        assert "continue with --resume" in (out / name / "seed_0.log").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trainings_end_with_a_comparison_that_is_killed(recipes_of_mine: list[str], tmp_path: Path) -> None:
    """By SIGKILL, so that nothing can clean up; they save, and go on later."""
    out, names = tmp_path / "out", ("plain", "pool")
    command = [sys.executable, "-m", "unmask", "compare", *recipes_of_mine, *TINY, "--steps", "3000", "--seeds", "1"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, env=os.environ, text=True)
    wait_for(lambda: all((out / name / "seed_0" / "metrics.jsonl").exists() for name in names))
    process.kill()
    process.wait()

    trainings = [
        Training(recipe, (*TINY, "train.steps=3000", "train.seed=0"), out / name / "seed_0")
        for recipe, name in zip(recipes_of_mine, names, strict=True)
    ]

    def stop_once_they_go_on() -> None:
        if all("Resuming" in own.log.read_text() for own in trainings):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):  # at once: it waits until the former trainings have ended
        train_all(trainings, 2, stop_once_they_go_on)
    assert not processes_with(str(out))
    for own in trainings:
        # The second time it may be stopped before its first step, and says so in other words.
        assert len(re.findall("(continue|start again) with --resume", own.log.read_text())) == 2


def processes_with(word: str) -> list[str]:
    """The command lines of the processes of this machine that name `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [own for own in found if word in own]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_signals_stop_the_trainings(stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(Training, "command", lambda *_: [sys.executable, str(script)])
    training = Training("debug", (), tmp_path / "run")
    with pytest.raises(Interrupted):
        train_all([training], 1, lambda: os.kill(os.getpid(), stop))
    assert not processes_with(str(script))
    assert signal.getsignal(stop) is not signal.default_int_handler


def test_a_failure_is_told_whenever_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends with an error right after one look is still there at the next."""

    class Child(subprocess.Popen):  # type: ignore[type-arg]
        looks = 0

        def __init__(self) -> None: ...

        def poll(self) -> int | None:
            self.looks += 1
            return None if self.looks == 1 else 1

        def send_signal(self, _: int) -> None: ...

        def kill(self) -> None: ...

        def wait(self, _: float | None = None) -> None: ...

    child = Child()
    monkeypatch.setattr(Training, "start", lambda *_: child)
    with pytest.raises(TrainingFailed, match=r"run failed \(exit code 1\)"):
        train_all([Training("debug", (), tmp_path / "run")], 1)


def test_the_examples_of_help_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(plan: Plan) -> None:
        planned.append(plan)
        raise UserError("far enough")

    planned: list[Plan] = []
    monkeypatch.setattr(Plan, "check_folders", stop)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"`unmask (compare [^`]*)`", compare.__doc__ or "")
    for example in examples:
        run_cli(*shlex.split(example))
    assert len(planned) == len(examples) > 3


BAD = {
    "one folder of two": (["sudoku/puma", "SUDOKU-PUMA"], "each once and of another name"),
    "seven": (SEVEN, "7 recipes are more than a page can tell apart; give 6 at most"),
    "one recipe": (["debug"], "give two recipes or more"),
    "the same twice": (["debug", "debug"], "give two recipes or more"),
    "unknown recipe": (["debug", "sudoku/pumma"], "did you mean sudoku/puma?"),
    "two tasks": (["debug", "TOY"], "of different tasks (sudoku, toy)"),
    "a method without a name": (["debug", "--method", "sudoku/puma optim.lr=1"], "write 'NAME: RECIPE key=value ..'"),
    "a method of two recipes": (["debug", "--method", "a: debug sudoku/puma"], "'sudoku/puma' is no key=value"),
    "a method of no recipe": (["debug", "--method", "a: optim.lr=1"], "the recipe is missing"),
    "a method that leaves the folder": (["debug", "--method", "../a: debug"], "is a folder's too"),
    "a quote that is open": (["debug", "--method", "a: debug 'x"], "No closing quotation"),
    "a recipe's folder": (["sudoku/puma", "--method", "Sudoku-Puma: debug"], "each once and of another name"),
    "nothing that differs": (["debug", "--method", "a: debug"], "debug and a have the same settings"),
    "a method's wrong setting": (["debug", "--method", "a: debug optim.lrr=1"], "optim.lrr"),
    "a seed": (["debug", "--method", "a: debug train.seed=3"], "train.seed=3: a comparison trains the seeds 0, 1, .."),
    "a seed in its section": (["debug", "--method", "a: debug", "train={seed: 3}"], "train={seed: 3}: a comparison"),
    "two budgets": (
        ["debug", "sudoku/puma", "train.steps=5", "--steps", "2"],
        "train.steps=5 and --steps 2 both say how long to train; give one",
    ),
    "nothing": ([], "give two recipes or more"),
    "a loss": (["debug", "sudoku/puma", "--measure", "train/loss"], "give one of eval/accuracy/ema/prob/3, eval/nelbo"),
    "wrong setting": (["debug", "sudoku/puma", "train.batch_size=0"], "train.batch_size=0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = {
        "TOY": "extends: debug\ntask: {name: toy}\neval: {tokens_per_step: [1]}\n",
        "SUDOKU-PUMA": "extends: debug\n",
    }
    for name, text in mine.items():
        (tmp_path / f"{name.lower()}.yaml").write_text(text)
    arguments = [str(tmp_path / f"{word.lower()}.yaml") if word in mine else word for word in arguments]
    assert run_cli("compare", *arguments, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_file", [True, False], ids=["a file", "within a file"])
def test_a_folder_that_cannot_be(
    is_file: bool, recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" if is_file else tmp_path / "file" / "out"
    assert run_cli("compare", *recipes_of_mine, *TINY, "--seeds", "1", "--out", out) == 2
    assert f"--out {out}: cannot be written" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_training_is_no_place_for_a_comparison(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    assert run_cli("compare", *recipes_of_mine, *TINY, "--seeds", "1", "--out", tmp_path / "run") == 2
    assert "holds a training; name another folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_training_that_fails_ends_the_comparison(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "pool" / "seed_0").mkdir(parents=True)
    (tmp_path / "out" / "pool" / "seed_0" / "metrics.jsonl").mkdir()
    assert run_cli("compare", *recipes_of_mine, *TINY, "--seeds", "1", "--out", tmp_path / "out") == 2
    assert "is not empty, and holds no run" in capsys.readouterr().err
    assert run_cli("compare", *recipes_of_mine, *TINY, "optim.lr=1e30", "--seeds", "1", "--out", tmp_path / "x") == 1
    assert "the loss is" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_log_that_is_no_file_of_its_own_is_not_written_to(
    kind: str, recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, log = tmp_path / "mine", tmp_path / "out" / "pool" / "seed_0.log"
    mine.write_text("mine\n")
    log.parent.mkdir(parents=True)
    if kind == "link":
        log.symlink_to(mine)
    else:
        os.mkfifo(log)
    assert run_cli("compare", *recipes_of_mine, *TINY, "--seeds", "1", "--out", tmp_path / "out") == 2
    assert f"{log}: cannot be written: " in " ".join(capsys.readouterr().err.split())
    assert mine.read_text() == "mine\n"


def test_results_of_something_else_are_not_overwritten(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    asked = ["compare", *recipes_of_mine, *TINY, "train.steps=5", "--seeds", "1", "--out", out]
    for name, content in (("report.html", "my own page"), ("comparison.json", '{"mine": 1}')):
        (out / name).write_text(content)
        assert run_cli(*asked) == 2
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == content
        (out / name).unlink()
    (out / "comparison.json").write_text('{"methods": {"other": {"recipe": "debug"}}}')
    assert run_cli(*asked) == 2
    assert "holds the comparison of other; name another folder" in " ".join(capsys.readouterr().err.split())
    (out / "comparison.json").write_text(json.dumps({"methods": {"pool": {"recipe": recipes_of_mine[1]}}}))
    assert run_cli(*asked) == 0  # one more method beside those of before
    assert run_cli(*asked[:-4], "--seeds", "2", "--out", out) == 0


def test_a_method_is_not_called_as_a_file_of_the_comparison(tmp_path: Path) -> None:
    methods = [Method.of_recipe("debug"), Method.parse("report.html: debug optim.lr=1e-3")]
    with pytest.raises(UserError, match=r"report.html: is the name of a file that a comparison writes"):
        Plan.make(methods, [], seeds=1, out=tmp_path)


def test_methods_on_other_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("one", "abcd " * 400), ("other", "efgh " * 500)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([text] * 40))
    tiny = ["data.length=32", "train.batch_size=4", "train.compile=false", "eval.every=2", "eval.examples=4"]
    tiny += ["model.dim=16", "model.ff_dim=32", "model.num_layers=1", "model.num_heads=2", "log.tensorboard=false"]
    other = f"other: text/uniform_small data.path={tmp_path / 'other.txt'}"
    asked = ["compare", "text/uniform_small", f"data.path={tmp_path / 'one.txt'}", *tiny, "train.steps=2"]
    assert run_cli(*asked, "--method", other, "--seeds", "1", "--out", tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the data of other are not those of text/uniform_small: their figures do not compare" in said
