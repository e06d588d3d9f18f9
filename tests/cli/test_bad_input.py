"""Bad input: exit code 2, and a message that names the key or file, the value and the fix."""

from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli
from tests.helpers.sudoku import CONTRADICTORY, EASY, NO_SOLUTION
from unmask.config import recipes
from unmask.tasks.sudoku import board

BAD_TRAINING = {
    "unknown recipe": (["sudoku/pumma"], ["'sudoku/pumma'", "did you mean sudoku/puma?"]),
    "a file that is no recipe": ([__file__], ["is no recipe, whose name ends in .yaml"]),
    "unknown section": (["debug", "trian.steps=3"], ["unknown key trian", "did you mean train?"]),
    "unknown key": (["debug", "train.step=3"], ["unknown key train.step", "did you mean train.steps?"]),
    "unknown data key": (["debug", "data.given=30"], ["unknown key data.given", "did you mean data.givens?"]),
    "another process's key": (
        ["debug", "process.name=uniform", "process.run=2"],
        ["process.run=2: is a setting of process.name=puma, and this is uniform; remove it"],
    ),
    "another task's key": (["debug", "data.digits=3"], ["data.digits=3: is a setting of task.name=addition"]),
    "a section": (["debug", "process=puma"], ["process='puma': is a section", "such as process.name=puma"]),
    "no section": (["debug", "optim=3"], ["optim=3: is a section; give its settings, such as optim.name=.."]),
    "no list": (["debug", "eval.orders=3"], ["eval.orders=3: Input should be a list, as [.., ..]"]),
    "a section of two lines": (["debug", 'process="a\\nb"'], ["process='a\\nb': is a section", "process.name=.."]),
    "unknown process": (["debug", "process.name=pumma"], ["process.name=pumma", "did you mean 'puma'?"]),
    "unimportable process": (
        ["debug", "process.name=nowhere.at:All"],
        ["process.name=nowhere.at:All", "cannot import"],
    ),
    "no equals sign": (["debug", "train.steps"], ["'train.steps'", "write key=value"]),
    "bad yaml": (["debug", "train.steps=[1"], ["'train.steps=[1'", "not valid YAML"]),
    "a tag": (["debug", "train.steps=!!int 4"], ["'train.steps=!!int 4'", "tags are not read"]),
    "base 60": (["debug", "train.seed=12:30"], ["train.seed='12:30'", "valid integer"]),
    "a date": (["debug", "train.steps=2001-99-99"], ["train.steps='2001-99-99'", "valid integer"]),
    "half a number": (["debug", "train.steps=0x_"], ["train.steps='0x_'", "valid integer"]),
    "a truth value for a number": (["debug", "train.steps=true"], ["train.steps=True", "valid integer"]),
    "a float for a number": (["debug", "train.batch_size=16.0"], ["train.batch_size=16.0", "valid integer"]),
    "a large float for a number": (["debug", "decode.top_k=1e30"], ["decode.top_k=1e+30", "valid integer"]),
    "a seed beyond 63 bits": (["debug", f"train.seed={2**63}"], [f"train.seed={2**63}", "less than or equal to 9223"]),
    "a count beyond 63 bits": (["debug", f"eval.examples={2**63}"], [f"eval.examples={2**63}", "less than or equal"]),
    "a number of 5,000 digits": (["debug", f"train.seed={'5' * 5000}"], ["train.seed=555", "a number of 5,000 digits"]),
    "nested brackets": (["debug", f"train.steps={'[' * 50_000}"], ["train.steps=[[", "nested more than 64 deep"]),
    "a key of 50,000 parts": (["debug", f"a{'.a' * 50_000}=1"], ["'a.a.", "no setting lies 50,001 sections deep"]),
    "one setting under two names": (
        ["debug", "process={K: 3, num_stages: 4}"],
        ["K=3 and num_stages=4 are one setting"],
    ),
    "a key twice": (["debug", "train={steps: 3, steps: 4}"], ["the key 'steps' stands already in line 1"]),
    "wrong type": (["debug", "train.steps=many"], ["train.steps='many'", "valid integer"]),
    "half a step": (["debug", "train.steps=1.5"], ["train.steps=1.5", "valid integer"]),
    "section is no mapping": (["debug", "train=3"], ["train=3: is a section", "such as train.steps=.."]),
    "no stages": (["debug", "process.num_stages=0"], ["process.num_stages=0", "greater than or equal to 1"]),
    "no steps": (["debug", "train.steps=null"], ["train.steps is missing", "train.epochs"]),
    "schedule falls back": (
        ["debug", "process.stage_schedule=[[10, 4], [10, 8]]"],
        ["process.stage_schedule=", "steps must increase, but 10 follows 10"],
    ),
    "schedule without stages": (["debug", "process.stage_schedule=[[10, 0]]"], ["process.stage_schedule.0.1=0"]),
    "threshold of zero": (["debug", "process.threshold=0"], ["process.threshold=0", "greater than 0"]),
    "threshold above one": (["debug", "process.threshold=1.1"], ["process.threshold=1.1", "less than or equal to 1"]),
    "two rules": (
        ["debug", "process={name: puma, threshold: 0.9, factor: 1}"],
        ["process.threshold=0.9 and process.factor=1.0: give one of them"],
    ),
    "a bound on what is not known": (
        ["debug", "process.entropy_bound=0.1"],
        ["process.entropy_bound=0.1 needs the entropy", "set process.order=neg_entropy"],
    ),
    "blocks that do not fill a row": (
        ["debug", "process.block_size=20"],
        ["process.block_size=20 does not divide rows of 81 positions; use 9 or 27"],
    ),
    "two block sizes": (
        ["debug", "process.block_size=27", "model.block_size=9"],
        ["process.block_size=27 and model.block_size=9 differ", "model.block_size=null"],
    ),
    "unknown confidence": (
        ["debug", "process.order=top_k"],
        ["process.order='top_k'", "use one of prob, margin"],
    ),
    "unknown layout": (["debug", "data.layout=flat"], ["data.layout='flat'", "'in_place' or 'two_grid'"]),
    "too few givens": (["debug", "data.givens=17"], ["data.givens=17", "use 24 to 50"]),
    "too many givens": (["debug", "data.givens=[30, 60]"], ["data.givens=[30, 60]: 60 givens", "use 24 to 50"]),
    "half a given": (["debug", "data.givens=30.5"], ["data.givens=30.5: give a whole number, or two of them"]),
    "givens upside down": (["debug", "data.givens=[40, 30]"], ["data.givens=[40, 30]", "the lower end comes first"]),
    "betas": (["debug", "optim.betas=[2, 3]"], ["optim.betas.0=2", "less than 1"]),
    "endless": (["debug", "train.epochs=.inf"], ["train.epochs=inf", "finite"]),
    "both lengths": (["debug", "train={steps: 3, epochs: 2}"], ["Error: train.steps=3 and train.epochs=2.0: give one"]),
    "a function for a process": (["debug", "process.name=os:getcwd"], ["process.name=os:getcwd", "no Config"]),
    "half a path": (["debug", "process.name=:X"], ["process.name=:X", "cannot import it"]),
    "absent data": (["debug", "data.path=nowhere.csv"], ["nowhere.csv", "cannot be read"]),
    "device": (["debug", "train.device=tpu"], ["train.device=tpu: not on this machine; use auto, cpu"]),
    "accumulation": (["debug", "train.accumulate=3"], ["train.accumulate=3 does not divide train.batch_size=16"]),
    "warm start from nothing": (["debug", "train.init=nowhere"], ["nowhere: not a run folder: no such folder"]),
    "no size": (["debug", "model.preset=null"], ["give model.preset (tiny, sudoku-1m", "or model.dim"]),
    "preset": (["debug", "model.preset=sudoku-1g"], ["model.preset=sudoku-1g", "did you mean sudoku-1m?"]),
    "endless epochs": (["debug", "train.epochs=1e308"], ["train.epochs=1e+308", "inf steps", "give train.steps"]),
    "not a step": (["debug", "train.epochs=0.0001"], ["train.epochs=0.0001 of", "steps of train.batch_size=16"]),
    "an endless wait": (["debug", "train.timeout=1e200"], ["train.timeout=1e+200"]),
    "a new pool for a new run": (["debug", "--restart-pool"], ["--restart-pool: goes with --resume"]),
    "several at once": (["debug", "optim.lr=0", "ema.decay=2"], ["optim.lr=0", "ema.decay=2"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", *arguments, "--out", tmp_path / "run") == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert len(message) < 2_000
    assert not (tmp_path / "run").exists()


def test_a_warm_up_beyond_the_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "debug", *SHORT, "optim.warmup_steps=9", "--out", tmp_path / "run") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "optim.warmup_steps=9 is more than the run's steps (4): the learning rate only comes to 0.00133 of" in said
    assert run_cli("train", "debug", *SHORT, "optim.warmup_steps=4", "--out", tmp_path / "other") == 0
    assert "warmup" not in capsys.readouterr().err


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: debug\ntrain: {seed: 010, compile: on}\noptim: {lr: 1e-3}")
    config = recipes.load(str(tmp_path / "mine.yaml"), ["data.seed=011"])
    assert (config.train.seed, config.train.compile, config.optim.lr) == (10, True, 0.001)
    assert config.data.model_dump()["seed"] == 11
    assert recipes.load("debug", [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1


BAD_RECIPES = {
    "extends nothing": ("extends: nowhere.yaml", "extends 'nowhere.yaml', but there is no such file beside it"),
    "extends a number": ("extends: 3", "extends 3, but there is no such file"),
    "extends itself": ("extends: mine.yaml", "`extends` goes in a circle"),
    "a list": ("[1, 2]", "a recipe is a mapping of sections, not list"),
    "no YAML": ("a: [", "mine.yaml, line 1: not valid YAML"),
    "nothing": ("# nothing\n", "mine.yaml: is empty"),
    "a section twice": (
        "train: {steps: 3}\noptim: {}\ntrain: {seed: 1}",
        "line 3: the key 'train' stands already in line 1",
    ),
    "a key twice": ("train:\n  steps: 3\n  steps: 4", "line 3: the key 'steps' stands already in line 2"),
    "one setting under two names": (
        "decode: {cfg_scale: 3, guidance: 4}",
        "cfg_scale=3 and guidance=4 are one setting",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_bad_recipes(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert run_cli("train", tmp_path / "mine.yaml", "--out", tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "mine.yaml") in printed
    assert message in printed


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_file_is_not_taken_for_a_folder(
    resume: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    assert run_cli("train", "debug", *SHORT, "--out", tmp_path / "file", *resume) == 2
    assert "file is not a folder" in capsys.readouterr().err
    assert run_cli("train", "debug", *SHORT, "--out", tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "file"))
    assert run_cli("train", "debug", *SHORT, "--out", tmp_path / "run") == 2
    assert "set data.cache_dir or UNMASK_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [", "3", "{}", "train: {steps: 0}"])
def test_a_run_whose_configuration_is_damaged(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run_cli("eval", tmp_path) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_an_existing_run_is_not_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert run_cli("train", "debug", *SHORT, "--out", run) == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    for resume in ([], ["--resume"]):
        assert run_cli("train", "debug", *SHORT, "--out", tmp_path, *resume) == 2
        assert "is not empty, and holds no run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_resuming_another_configuration_names_the_keys(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["process.num_stages=5", "optim.lr=0.1", "train.steps=9", "eval.examples=3"]
    assert run_cli("train", "debug", *SHORT, "eval.tokens_per_step=[1, 3]", *changes, "--out", run, "--resume") == 2
    message = capsys.readouterr().err
    assert "process.num_stages: 4 in" in message
    assert "now 5" in message
    assert "optim.lr" in message
    assert "train.steps" not in message
    assert "eval.examples" not in message


def test_two_processes_cannot_train_in_one_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with (run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_cli("train", "debug", *SHORT, "eval.tokens_per_step=[1, 3]", "--out", run, "--resume") == 2
    assert "another process is training here" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["eval", "decode", "export"])
def test_a_run_without_a_complete_checkpoint(
    verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    arguments = {"eval": [], "decode": [tmp_path / "puzzles.txt"], "export": [tmp_path / "out"]}[verb]
    (tmp_path / "puzzles.txt").write_text(EASY)
    assert run_cli(verb, unfinished, *arguments) == 2
    assert "not a run folder" in capsys.readouterr().err
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    assert run_cli(verb, unfinished, *arguments) == 2
    assert "no complete checkpoint; has it trained to the first one?" in capsys.readouterr().err
    half = unfinished / "checkpoints" / "step_00000002"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{}")
    assert run_cli(verb, unfinished, *arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "COMPLETE is missing" in message
    assert "no complete checkpoint; bring one back, or train into another folder" in message


BAD_USE = {
    "another task": (
        ["eval", "RUN", "--task", "gsm8k"],
        "--task gsm8k: has other tokens (151645 ids) than RUN, a run of task.name=sudoku (11 ids); leave it out, or",
    ),
    "no task": (["eval", "RUN", "--task", "sudko"], "--task=sudko: no such task; did you mean 'sudoku'?"),
    "another task of small numbers": (["eval", "RUN", "--task", "addition"], "--task addition: has other tokens ("),
    "no such step": (["eval", "RUN", "--step", "3"], "no checkpoint of step 3; there are 2, 4"),
    "no number": (["eval", "RUN", "--step", "first"], "--step first: use a number, `last` or `best`"),
    "weights": (["eval", "RUN", "--weights", "mean"], "--weights mean: use ema or raw"),
    "decoder": (["eval", "RUN", "--decoder", "certain"], "use one of prob, margin"),
    "two amounts": (
        ["eval", "RUN", "--decoder", "prob,steps=3,tokens_per_step=3"],
        "steps and tokens_per_step both say how much a step reveals; give one of them",
    ),
    "decoder key": (
        ["eval", "RUN", "--decoder", "prob,tokens=3"],
        "--decoder prob,tokens=3: unknown key decode.tokens; did you mean decode.tokens_per_step?",
    ),
    "decoder value": (
        ["eval", "RUN", "--decoder", "prob,steps=["],
        "--decoder prob,steps=[: 'steps', line 1: not valid YAML",
    ),
    "a decoder's key twice": (["eval", "RUN", "--decoder", "prob,steps=3,steps=4"], "'steps' is given twice"),
    "a decoder's many brackets": (
        ["decode", "RUN", "GOOD", "--decoder", "forbid=" + "[" * 50_000],
        "nested more than 64",
    ),
    "a decoder's many commas": (["decode", "RUN", "GOOD", "--decoder", "," * 50_000], "a setting is empty"),
    "a decoder twice": (["eval", "RUN", "--decoder", "prob", "--decoder", "prob"], "prob/1 is asked for twice"),
    "answers below a file": (["decode", "RUN", "GOOD", "--out", "FILE/x/y"], "cannot be written"),
    "export below a file": (["export", "RUN", "FILE/x"], "cannot be written"),
    "an empty decoder": (["eval", "RUN", "--decoder", ""], "a setting is empty; write an order or key=value"),
    "a decoder's empty setting": (["eval", "RUN", "--decoder", "prob,,steps=3"], "a setting is empty"),
    "decoder syntax": (["eval", "RUN", "--decoder", "prob,fast"], "'fast' is not key=value"),
    "two dtypes": (
        ["eval", "RUN", "--decoder", "prob,dtype=float64", "--decoder", "margin"],
        "one evaluation runs in one dtype, not in float64 and the run's; run it twice",
    ),
    "absent data": (["eval", "RUN", "--data", "nowhere.csv"], "nowhere.csv: cannot be read"),
    "absent prompts": (["decode", "RUN", "nowhere.txt"], "nowhere.txt: cannot be read"),
    "contradictory prompt": (["decode", "RUN", "FILE"], "line 2: the givens contradict: 5 stands twice in row 1"),
    "device": (["eval", "RUN", "--device", "tpu"], "device tpu: not on this machine"),
    "grader": (["grade", "FILE", "--task", "chess"], "--task chess: no grader"),
    "absent answers": (["grade", "nowhere.jsonl", "--task", "sudoku"], "nowhere.jsonl: cannot be read"),
    "export onto something": (["export", "RUN", "RUN"], "is not an empty folder"),
    "wrong option": (["eval", "RUN", "--jsonn"], "No such option"),
    "wrong verb": (["trian"], "No such command"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_USE.values(), ids=BAD_USE.keys())
def test_bad_use(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.txt"
    file.write_text(f"{EASY}\n{CONTRADICTORY}\n")
    (tmp_path / "good.txt").write_text(f"{EASY}\n")
    places = {"RUN": run, "FILE": file, "GOOD": tmp_path / "good.txt"}
    assert run_cli(*(places.get(argument, argument.replace("FILE", str(file))) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert message.replace("RUN", str(run)) in " ".join(printed.err.split())
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "command",
    [
        ["train", "debug", *SHORT],
        ["prepare", "text", "FILE", "--tokenizer", "bytes"],
        ["eval", "RUN", "--examples", "1"],
        ["decode", "RUN", "FILE"],
        ["grade", "FILE", "--task", "sudoku"],
        ["compare", "debug", "--method", "other: debug optim.lr=1"],
        ["report", "RUN"],
        ["import", "RUN"],
        ["export", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_an_empty_name_is_not_the_current_folder(
    command: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.txt").write_text(f"{EASY}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"RUN": run, "FILE": tmp_path / "file.txt"}
    out = [] if command[0] == "export" else ["--out"]
    assert run_cli(*(places.get(word, word) for word in command), *out, "") == 2
    assert f"{'--out ' * len(out)}'': is empty; name a file or folder" in capsys.readouterr().err
    assert not any(Path.cwd().iterdir())


def test_decode_names_a_puzzle_without_solution(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text(f"{NO_SOLUTION}\n")
    assert run_cli("decode", run, tmp_path / "x.txt") == 2
    assert "x.txt, line 1: the puzzle has no solution" in capsys.readouterr().err


def test_a_damaged_export_and_a_damaged_cache(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", run, tmp_path / "model") == 0
    (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    assert run_cli("eval", tmp_path / "model") == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    assert run_cli("eval", run, "--examples", "1") == 0
    (made,) = (tmp_path / "cache").rglob("*.npy")
    made.write_bytes(b"short")
    assert run_cli("eval", run, "--examples", "1") == 0
    assert "made again" in capsys.readouterr().err
    assert made.stat().st_size > 1000


def test_decode_does_not_write_over_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text(f"{EASY}\n")
    (tmp_path / "out").write_text("precious")
    assert run_cli("decode", run, tmp_path / "x.txt", "--out", tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == "precious"


def test_ema_weights_of_a_run_without_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "debug", *SHORT, "ema.decay=0", "--out", tmp_path / "run") == 0
    assert run_cli("eval", tmp_path / "run", "--weights", "ema") == 2
    assert "has no averaged weights (ema.decay=0); use --weights raw" in capsys.readouterr().err


def test_a_contradiction_is_found_in_every_kind_of_unit() -> None:
    for text, expected in (
        ("5" + "0" * 8 + "5" + "0" * 71, "5 stands twice in column 1"),
        ("5" + "0" * 9 + "5" + "0" * 70, "5 stands twice in box 1"),
    ):
        assert board.find_contradiction(board.parse(text, "test")) == expected
