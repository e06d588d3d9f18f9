"""Trackers, with packages that stand in for theirs: they get what the log gets, and can do a run no harm."""

import sys
from pathlib import Path

import pytest

from tests.helpers import lines, run_cli
from tests.helpers.runs import tiny_run
from unmask.errors import UserError
from unmask.training import trackers
from unmask.training.trackers import RunInfo, Tracker

PACKAGE = """
import json, os, pathlib
seen = pathlib.Path(os.environ["SEEN"])
def say(**what):
    with seen.open("a") as file:
        file.write(json.dumps(what, default=str) + "\\n")
def Settings(**options):
    return options
class Run:
    def log(self, values, step):
        say(step=step, **values)
    def finish(self):
        say(finished=True)
def init(**options):
    say(**{"config" if key == "config" else f"init_{key}": value for key, value in options.items()})
    return Run()
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the packages write what they are told."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "seen.jsonl"


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str = PACKAGE) -> None:
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, name, None)  # so that the end of the test takes out what was imported
    del sys.modules[name]


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_gets_what_the_log_gets(
    name: str, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, name)
    out = tmp_path / "run"
    tiny_run(out, f"log.to=[{name}]", "log.project=mine").train()
    start, *told, end = lines(seen)
    assert start["init_project"] == "mine"
    assert start["config"]["train"]["steps"] == 2
    assert end == {"finished": True}
    logged = [
        {
            key: value
            for key, value in row.items()
            if key not in ("seconds", "passes", "examples_seen") and value is not None
        }
        for row in lines(out / "metrics.jsonl")  # one example has no standard error
    ]
    assert told == logged
    tiny_run(out, f"log.to=[{name}]", "log.project=mine", "train.steps=3").train(resume=True)
    starts = [row for row in lines(seen) if "init_name" in row]
    assert len({(row["init_name"], row.get("init_id")) for row in starts}) == 1  # one run, for the tracker too
    assert [row["init_resume"] for row in starts] == ["allow", "allow"]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)
def test_wandb_without_a_key_works_offline(
    environment: dict, mode: str, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "wandb")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    Tracker("wandb", RunInfo("p", "n", "i", tmp_path, {})).close()
    assert lines(seen)[0]["init_mode"] == mode


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('one of its packages is missing')",
        PACKAGE.replace("def init(**options):", "def init(**options):\n    raise ConnectionError('no server')"),
        PACKAGE.replace("say(step=step, **values)", "raise RuntimeError('gone')"),
        PACKAGE.replace("say(finished=True)", "raise TimeoutError"),
    ],
    ids=["import", "start", "log", "finish"],
)
def test_a_tracker_that_fails_does_not_stop_the_run(
    text: str, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "wandb", text)
    tiny_run(tmp_path / "run", "log.to=[wandb]").train()
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    assert capsys.readouterr().err.count("the run goes on without it") == 1


def test_a_server_that_never_answers_is_not_waited_for(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = PACKAGE.replace("def init(**options):", "def init(**options):\n    import time; time.sleep(3600)")
    install(tmp_path, monkeypatch, "trackio", hang)
    monkeypatch.setattr(trackers, "_QUEUE_LENGTH", 3)
    tracker = Tracker("trackio", RunInfo("p", "n", "i", tmp_path, {}), patience=0.05)
    for step in range(2):
        tracker.write(step, {"a": 1.0})
    tracker.close()
    assert "not all was sent within 0.05 seconds" in capsys.readouterr().err
    full = Tracker("trackio", RunInfo("p", "n", "i", tmp_path, {}), patience=60.0)
    for step in range(10):
        full.write(step, {"a": 1.0})
    assert "3 lines wait" in capsys.readouterr().err
    full.close()


def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "abacus_online", trackers.TRACKERS["wandb"])
    (tmp_path / "abacus_online").mkdir()  # as wandb leaves a folder of its own name where it worked
    monkeypatch.syspath_prepend(tmp_path)
    assert run_cli("train", "debug", "log.to=[abacus_online]", "--out", tmp_path / "run") == 2
    assert "pip install 'unmask[abacus_online]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown tracker; use one of wandb, trackio"):
        tiny_run(tmp_path, "log.to=[abacus]")


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"../../x", b"a\nb", b"x" * 2000], ids=["none", "bytes", "path", "lines", "long"]
)
def test_an_id_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tracker_id").write_bytes(content)
    with pytest.raises(UserError, match="tracker_id"):
        trackers.tracker_id(tmp_path)
