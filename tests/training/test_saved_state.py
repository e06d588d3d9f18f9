"""A checkpoint that somebody else has made, or changed: it is refused with the field's name, or goes on soundly."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmask
from tests.helpers import assert_same, run_cli
from tests.helpers.runs import tiny_run
from unmask.errors import RunFailed, UserError
from unmask.training import checkpoint, restoring
from unmask.training.folder import RunFolder
from unmask.training.loading import LoadedRun
from unmask.training.run import Run
from unmask.training.state import Progress, progress_of

EMA = "ema.decay=0.9"
BAD = ["text", -1, 10**30, 1e308, True, None, [], {}, [[0]], "missing"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tiny_run(tmp_path_factory.mktemp("trained") / "run", EMA, "process.name=puma")
    run.train()
    return run


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(trained.folder.path, tmp_path / "run"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000002"


def sign(path: Path) -> None:
    """Makes the checksums of a checkpoint those of its files."""
    listed = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in os.listdir(path)}  # noqa: PTH208
    listed.pop("COMPLETE")
    (path / "COMPLETE").write_text(json.dumps(listed))


def change_tensor(path: Path, section: str, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    file = path / f"{section}.safetensors"
    tensors = load_file(file)
    full = next(key for key in tensors if key.endswith(name))
    changed = change(tensors.pop(full))
    save_file(tensors if changed is None else tensors | {full: changed.contiguous()}, file)
    sign(path)


def fields(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from fields(value, (*above, key))


def with_field(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value == "missing":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def resume(run: Run, path: Path) -> None:
    """Does what --resume does with the checkpoint, without its start and end."""
    before = run.folder
    run.folder = RunFolder(path.parents[1])
    try:
        state = restoring.read_state(path, ())
        run._check_data(state.get("data"), f"checkpoints/{path.name}/state.json")
        progress = progress_of(state, str(path), 2)
        run.trainer.load_state_dict(state, str(path))
        run.progress = progress
        run.trainer.step()
        run.progress.spent(run.trainer.process.examples_seen)
        run._votes()
        run.trainer.process.metrics()
    finally:
        run.folder = before


def refused(work: Callable[[], object]) -> str | None:
    """Returns the words of the `UserError`, or None if there is none; lets any other error pass."""
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def test_every_field_of_the_state_is_checked(trained: Run, copied: Path) -> None:
    path = newest(copied)
    file = path / "state.json"
    whole = json.loads(file.read_text())
    accepted = set()
    for field in fields(whole):
        for value in BAD:
            changed = with_field(whole, field, value)
            if changed == whole:
                continue
            file.write_text(json.dumps(changed))
            said = refused(lambda: resume(trained, path))
            if said is None:
                accepted.add((".".join(field), str(value)))
            else:
                assert str(path) in said
                assert any(part in said for part in field[-3:]), (field, value, said)
    counters = {name for name, _ in accepted}
    free = {"seconds", "passes", "metrics_position", "evaluated_step", "skips", "best_step", "best_score", "best_nelbo"}
    assert counters <= {f"progress.{name}" for name in free} | {"process.estimate", "process.pool", "data"} | {
        "trainer.dropout_rng"
    }
    for name, value in accepted:
        is_large_but_sound = name.startswith("progress.best_") or name in ("progress.seconds", "progress.passes")
        assert value in ("None", "missing") or is_large_but_sound, (name, value)


def test_a_pool_that_was_left_out(trained: Run, copied: Path) -> None:
    path = newest(copied)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(with_field(state, ("process", "pool"), "missing")))
    (path / "process.safetensors").unlink()
    sign(path)
    said = refused(lambda: resume(trained, path))
    assert said is not None
    assert str(path) in said
    assert "pool" in said


TENSORS = [
    ("optimizer", "embedding.weight/exp_avg", lambda value: value[:1], "exp_avg is"),
    ("optimizer", "embedding.weight/exp_avg_sq", lambda value: value.repeat(2, 1), "exp_avg_sq is"),
    ("optimizer", "embedding.weight/exp_avg_sq", lambda value: value - 1, "exp_avg_sq holds -"),
    ("optimizer", "norm.weight/step", lambda value: value.repeat(7), "step is"),
    ("optimizer", "norm.weight/step", lambda value: value.double(), "step is"),
    ("optimizer", "norm.weight/exp_avg", lambda value: value.half(), "float16"),
    ("optimizer", "norm.weight/exp_avg", lambda value: value * torch.inf, "exp_avg holds"),
    ("optimizer", "norm.weight/exp_avg", lambda value: None, "exp_avg is missing"),
    ("ema", "norm.weight", lambda value: value[:1], r"norm.weight is \(1,\)"),
    ("ema", "norm.weight", lambda value: value * torch.nan, "norm.weight holds nan"),
    ("ema", "norm.weight", lambda value: None, "norm.weight is missing"),
    ("model", "norm.weight", lambda value: value[:1], r"norm.weight is \(1,\)"),
    ("model", "norm.weight", lambda value: value.long(), "int64"),
    ("model", "norm.weight", lambda value: value * torch.nan, "norm.weight holds nan"),
    ("process", "pool/x0", lambda value: value + 1000, "pool.x0: holds"),
    ("process", "pool/x0", lambda value: value[:, :1], "pool.x0: is"),
    ("process", "pool/x0", lambda value: value.int(), "int32"),
    ("process", "pool/stage", lambda value: value - 9, "pool.stage: holds"),
    ("process", "pool/example", lambda value: value + 2**60, "pool.example: holds"),
    ("process", "pool/is_masked", lambda value: value.long(), "pool.is_masked: is"),
    ("process", "pool/visit", lambda value: None, "pool: holds"),
]


@pytest.mark.parametrize(("section", "name", "change", "words"), TENSORS)
def test_every_tensor_is_checked_before_any_is_loaded(
    section: str, name: str, change: Callable[[Tensor], Tensor | None], words: str, trained: Run, copied: Path
) -> None:
    path = newest(copied)
    resume(trained, path)
    before = copy.deepcopy(trained.trainer.state_dict())
    change_tensor(path, section, name, change)
    with pytest.raises(UserError, match=words) as refused:
        resume(trained, path)
    assert str(path) in str(refused.value)
    assert_same(trained.trainer.state_dict(), before)


@pytest.mark.parametrize("harm", ["nan", "shape"])
def test_resume_eval_and_export_refuse_in_one_line(
    harm: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = (lambda value: value * torch.nan) if harm == "nan" else (lambda value: value[:1])
    for section in ("model", "ema"):
        change_tensor(newest(copied), section, "norm.weight", change)
    config = (copied / "config.yaml").read_text()
    for arguments in (
        ("train", copied / "config.yaml", "train.steps=3", "--resume", "--out", copied),
        ("eval", copied),
        ("export", copied, tmp_path / "export"),
    ):
        code = run_cli(*arguments)
        said = capsys.readouterr().err
        assert code in (1, 2), said
        assert "norm.weight" in said
        assert "Traceback" not in said
    assert not (tmp_path / "export").exists()
    assert (copied / "config.yaml").read_text() == config


@pytest.mark.parametrize("harmed", ["model", "ema"])
def test_an_export_holds_finite_weights_whatever_the_others_are(harmed: str, copied: Path, tmp_path: Path) -> None:
    """The average may be sound where the weights of the moment are not, and only what is exported matters."""
    change_tensor(newest(copied), harmed, "norm.weight", lambda value: value * torch.inf)
    sound, unsound = ("ema", "raw") if harmed == "model" else ("raw", "ema")
    assert run_cli("export", copied, tmp_path / "model", "--weights", sound) == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())
    assert run_cli("export", copied, tmp_path / "none", "--weights", unsound) == 1
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_under_the_name_of_another_step_is_refused(copied: Path) -> None:
    newest(copied).rename(copied / "checkpoints" / "step_00000009")
    with pytest.raises(UserError, match=r"step_00000009.*step=2: its checkpoint is of step 9"):
        LoadedRun.open(copied)
    with pytest.raises(UserError, match="its checkpoint is of step 9"):
        tiny_run(copied, EMA, "process.name=puma", "train.steps=9").train(resume=True)


@pytest.mark.parametrize(
    "name", ["../../config.yaml", "/etc/hostname", "..", "fifo", "link", "folder", "a/b", "\0", ""]
)
def test_a_checkpoint_lists_plain_files_of_its_own(name: str, copied: Path) -> None:
    path = newest(copied)
    os.mkfifo(path / "fifo")
    (path / "link").symlink_to("/etc/hostname")
    (path / "folder").mkdir()
    listed = json.loads((path / "COMPLETE").read_text()) | {name: "0" * 64}
    (path / "COMPLETE").write_text(json.dumps(listed))
    assert "no name of a file" in str(checkpoint.damage(path)) or "no regular file" in str(checkpoint.damage(path))


def test_a_tensor_with_no_place_in_the_state_is_refused(copied: Path) -> None:
    path = newest(copied)
    for name in ("trainer/step_number", "nowhere/a", "model/a/b", "alone"):
        own = path / f"{name.split('/')[0]}-00001-of-00001.safetensors"
        for file, said in ((own, "has no place for the saved tensor"), (path / "a.safetensors", "has no place there")):
            save_file({name: torch.ones(2)}, file)
            sign(path)
            with pytest.raises(UserError, match=said):
                checkpoint.load(path)
            file.unlink()


def test_rows_that_are_saved_twice_or_nowhere_are_refused(copied: Path) -> None:
    path = newest(copied)
    save_file({"model/backbone.norm.weight": torch.ones(8)}, path / "model2.safetensors")
    sign(path)
    with pytest.raises(UserError, match=r"model\.safetensors: rows of .* are in model2\.safetensors too"):
        checkpoint.load(path)
    for start in ("-1", "true", "1.5", "[1]", str(10**30)):
        offsets = f'{{"model/a": {{"saved_offsets": [{start}]}}}}'
        save_file({"model/a": torch.ones(8)}, path / "model2.safetensors", {"DCP_SHARDING_INFO": offsets})
        sign(path)
        assert "which is no row" in str(checkpoint.damage(path))


def test_older_states_hold_infinity_where_nothing_was_evaluated(trained: Run, copied: Path) -> None:
    path = newest(copied)
    whole = json.loads((path / "state.json").read_text())
    for none in (torch.inf, None):
        whole["progress"] |= {"best_score": none and -none, "best_nelbo": none}
        (path / "state.json").write_text(json.dumps(whole))
        resume(trained, path)
        assert trained.progress.is_better(0.0, 1e9)


def test_a_state_is_json_also_before_the_first_evaluation(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"progress": asdict(Progress(step=1))})
    assert json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)["progress"]["best_score"] is None
    assert checkpoint.best_step(path) == 1


def test_an_export_is_checked_field_by_field(copied: Path, tmp_path: Path) -> None:
    unmask.export(copied, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    whole = json.loads(file.read_text())
    described = whole | {"run": {"seed": 0}}
    for field in [path for path in fields(described) if path[0] != "run"] + [("run",)]:
        for value in BAD:
            if (field, value) in ((("tokens", name), None) for name in ("eos_id", "pad_id", "fingerprint")):
                continue
            file.write_text(json.dumps(with_field(whole, field, value)))
            said = refused(lambda: unmask.load(tmp_path / "export"))
            is_for_others = field[0] in ("model_type", "architectures", "auto_map", "dtype")
            is_optional = (
                is_for_others
                or field[0] in ("format", "data")
                or field[-1] in ("eos_id", "pad_id", "fingerprint", "step")
            )
            assert str(tmp_path / "export") in (said or str(tmp_path / "export" if is_optional else None)), (
                field,
                value,
            )
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json.*nested too deeply"):
        unmask.load(tmp_path / "export")


def test_an_export_with_nan_says_that_the_model_gives_nan(copied: Path, tmp_path: Path) -> None:
    unmask.export(copied, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.norm.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RunFailed, match=r"backbone.norm.weight holds nan.*the model gives nan"):
        unmask.load(tmp_path / "export")
    warm = tiny_run(tmp_path / "warm", f"train.init={tmp_path / 'export'}")
    with pytest.raises(UserError, match=r"train.init=.*backbone.norm.weight holds nan"):
        warm.train()
    assert not (tmp_path / "warm").exists()


@pytest.mark.parametrize(
    "part", ["config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "checkpoint", "tensorboard"]
)
def test_a_run_whose_parts_are_links_out_of_it_is_refused(
    part: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = newest(copied) if part == "checkpoint" else copied / part
    (copied / "tensorboard").mkdir()
    moved = tmp_path / "elsewhere"
    own.rename(moved)
    own.symlink_to(moved)
    before = moved.read_bytes() if moved.is_file() else sorted(moved.iterdir())
    for arguments in (
        ("train", tmp_path / "run" / "config.yaml", "train.steps=3", "--resume", "--out", copied),
        ("eval", copied),
        ("report", copied, "--out", tmp_path / "report"),
    ):
        assert run_cli(*arguments) == 2
        said = capsys.readouterr().err
        assert "is a link out of the run's folder" in said
        assert "--follow-links" in said
    assert before == (moved.read_bytes() if moved.is_file() else sorted(moved.iterdir()))
    (tmp_path / "a_link").symlink_to(copied)
    assert run_cli("eval", tmp_path / "a_link", "--follow-links", "--examples", 1) == 0


def test_checkpoints_may_be_a_link_within_the_run_and_the_run_itself_a_link(copied: Path, tmp_path: Path) -> None:
    (copied / "checkpoints").rename(copied / "kept")
    (copied / "checkpoints").symlink_to("kept")
    (tmp_path / "a_link").symlink_to(copied)
    assert LoadedRun.open(tmp_path / "a_link").step == 2


def test_checkpoints_on_another_disk_are_trained_on_with_the_option(copied: Path, tmp_path: Path) -> None:
    (copied / "checkpoints").rename(tmp_path / "big")
    (copied / "checkpoints").symlink_to(tmp_path / "big")
    arguments = ("train", copied / "config.yaml", "train.steps=3", "--resume", "--out", copied)
    assert run_cli(*arguments) == 2
    assert run_cli(*arguments, "--follow-links") == 0
    assert checkpoint.steps(tmp_path / "big") == [3]


@pytest.mark.parametrize(
    "environment",
    [
        "[1]",
        "{",
        '{"attention": 5}',
        '{"attention": "x"}',
        '{"threads": "many"}',
        "[" * 99_999,
        '{"data": [1]}',
        f'{{"torch": "{"x" * 2**20}"}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_environment_is_refused_with_its_name(environment: str, copied: Path) -> None:
    (copied / "environment.json").write_text(environment)
    with pytest.raises(UserError, match=r"environment\.json") as error:
        tiny_run(copied, EMA, "process.name=puma").train(resume=True)
    assert "delete" in str(error.value) or "data" in environment
    (copied / "environment.json").unlink()
    tiny_run(copied, EMA, "process.name=puma").train(resume=True)  # the fix is one
