"""`unmask report`, as a user types it."""

from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert run_cli("train", "debug", *SHORT, "eval.every=2", "--out", folder / "puma") == 0
    assert run_cli("train", "debug", *SHORT, "process.name=uniform", "--out", folder / "uniform") == 0
    toy = ["task.name=toy", "eval.tokens_per_step=[1]", "model.rotary=false"]
    assert run_cli("train", "debug", *SHORT, *toy, "--out", folder / "toy") == 0
    return folder


def test_a_page_of_two_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert run_cli("report", runs / "uniform", runs / "puma", "--out", out, "--examples", "1", "--title", "A & B") == 0
    page = out.read_text()
    assert "<title>A &amp; B</title>" in page
    assert "process.num_stages" in page
    for figure in ("NLL by how much is masked", "Distance of masks to those of decoding", "Known by heart?"):
        assert figure in page
    assert "Share solved, order prob, 3 at a step, ema weights" in page
    said = capsys.readouterr().err
    assert str(out) in said
    assert "Warning" not in said
    assert run_cli("report", runs / "puma", "--out", out, "--examples", "1") == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == page
    assert run_cli("report", runs / "puma", "--out", out, "--examples", "1", "--force") == 0
    assert "<title>puma</title>" in out.read_text()


def test_a_task_without_boxes(runs: Path, tmp_path: Path) -> None:
    assert run_cli("report", runs / "toy", "--out", tmp_path / "toy.html") == 0
    assert '"columns":4' in (tmp_path / "toy.html").read_text()


def test_a_run_without_checkpoints_loses_the_replay_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (bare / name).write_bytes((runs / "puma" / name).read_bytes())
    assert run_cli("report", bare, "--out", tmp_path / "page.html") == 0
    said = capsys.readouterr().err
    assert "The replay of bare: " in said
    assert "checkpoint" in said
    page = (tmp_path / "page.html").read_text()
    assert page.count("Not shown.") == 4  # the replay, its masks, what is hard, and the protocol
    assert "its command was not recorded" in page


BAD = {
    "no folder": (["nowhere"], "not a run folder"),
    "two tasks": (["puma", "toy"], "a report holds runs of one task beside each other"),
    "the same twice": (["puma", "puma"], "the same settings and seed"),
    "unknown measure": (["puma", "--measure", "eval/wit"], "they share eval/accuracy/ema/prob/3"),
    "wrong decoder": (["puma", "--decoder", "wit"], "unknown order"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    arguments: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(runs / word) if word in ("puma", "toy", "nowhere") else word for word in arguments]
    assert run_cli("report", *names, "--out", tmp_path / "page.html") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
