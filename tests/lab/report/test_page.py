"""Seeds on a page, and pages of runs that somebody may have made to harm who looks at them."""

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_cli
from tests.helpers.runs import tiny_run, write_run
from tests.helpers.text import write_lines
from unmask.cli import compare
from unmask.lab.compare import Comparison
from unmask.lab.report.diagnoses import Diagnoses
from unmask.lab.report.models import Study, study
from unmask.lab.report.page import _measure, render
from unmask.lab.report.runs import RunRecord, RunsByMethod, group, read_run
from unmask.training.logging import MetricsFile

RATE = "eval/accuracy/ema/prob/3"


@pytest.fixture
def evaluated(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Makes a method of seeds that were evaluated at given steps: value = step / 100, seconds = 2 steps."""

    def make(*seeds: list[int]) -> RunsByMethod:
        runs = []
        for seed, steps in enumerate(seeds):
            folder = write_run(tmp_path / "puma" / f"seed_{seed}", f"train.seed={seed}")
            (folder / "metrics.jsonl").unlink()
            metrics = MetricsFile(folder / "metrics.jsonl", 0, {})
            for step in steps:
                metrics.write({"step": step, "seconds": 2.0 * step, "examples_seen": step, RATE: step / 100})
            metrics.close()
            runs.append(read_run(folder, pytest.fail))
        return {"puma": runs}

    return make


def test_the_mean_is_drawn_where_all_seeds_have_been(evaluated) -> None:  # type: ignore[no-untyped-def]
    (by_step, by_seconds, _, _) = (
        chart.lines[0] for chart in _measure(evaluated([10, 20, 30], [20, 25]), RATE, has_costs=True).charts
    )
    assert by_step.points == [(20, 0.2), (25, 0.25)]
    assert by_seconds.points == [(40, 0.2), (50, 0.25)]
    assert by_step.seeds == [[(10, 0.1), (20, 0.2), (30, 0.3)], [(20, 0.2), (25, 0.25)]]


def test_seeds_of_one_evaluation_each_can_be_seen(evaluated) -> None:  # type: ignore[no-untyped-def]
    chart = _measure(evaluated([10], [12]), RATE, has_costs=True).charts[0]
    assert chart.lines[0].points == []
    assert chart.svg().count('class="mark s0 reference"') == 2


def test_the_table_says_of_how_many_seeds(evaluated) -> None:  # type: ignore[no-untyped-def]
    curves = [own.curve(RATE) for own in evaluated([10, 20], [10, 20], [10, 22])["puma"]]
    table = compare._curves_table(Comparison({"puma": curves, "other": curves[:1]}), RATE)
    shown = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert shown == [
        ("10", "10.0% (10.0 to 10.0)", "10.0%"),
        ("20", "20.0% (20.0 to 20.0), 2 of 3", "20.0%"),
        ("22", "22.0%, 1 of 3", ""),
    ]


def test_six_methods_fit_on_a_terminal(
    evaluated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "80")
    curves = [run.curve(RATE) for run in evaluated([10, 60], [10, 70], [10, 80])["puma"]]
    names = [f"sudoku/block_{number}" for number in range(6)]
    compare._print(Comparison(dict.fromkeys(names, curves)), RATE)
    printed = capsys.readouterr().out
    assert "…" not in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    for name in names[1:]:
        assert [name, "50 (50 to 50)"] in [row[1:3] for row in rows]


def rendered(*runs: RunRecord, replay: dict[str, Any] | None = None, first: str | None = None) -> str:
    study = Study("prob/1", replay=replay)
    return render(group(runs), study, Diagnoses(), title="A title", first_measure=first, commands=["unmask report"])


def test_settings_are_written_as_they_are_typed_where_they_have_an_effect(tmp_path: Path) -> None:
    loops = ["model.loops={layers: [0, 1], times: [1, 4]}", "model.qk_norm=true", "train.max_seconds=5"]
    plain = write_run(tmp_path / "plain", "process={name: uniform}")
    muon = write_run(tmp_path / "muon", "process={name: uniform}", "optim.name=muon", "optim.muon_lr=2", *loops)
    page = rendered(*(read_run(folder, pytest.fail) for folder in (plain, muon)))
    own, other = re.findall(r'<b>\w+</b> <span class="dim">(.*?)</span>', page)
    assert own.startswith("process uniform")
    for text in ("model.loops.layers [0, 1]", "model.loops.times [1, 4]", "model.qk_norm true", "optim.name muon"):
        assert text in other
    rows = dict(re.findall(r"<th><code>([\w.]+)</code></th>(.*?)</tr>", page))
    assert rows["optim.muon_lr"] == "<td>–</td><td>2.0</td>"
    assert rows["model.qk_norm"] == "<td>false</td><td>true</td>"
    assert rows["train.max_seconds"] == "<td>null</td><td>5.0</td>"


def test_a_likelihood_beside_rates_has_costs_where_it_is_asked_for(tmp_path: Path) -> None:
    found = {RATE: 0.5, "eval/nelbo": 2.0}
    runs = [
        read_run(write_run(tmp_path / name, f"process={{name: {name}}}", evaluation=found), pytest.fail)
        for name in ("uniform", "puma")
    ]
    assert rendered(*runs).count("What it cost to get there") == 1
    assert rendered(*runs, first="eval/nelbo").count("What it cost to get there") == 2


EVIL = "</script><script>alert(1)</script>\x1b[2J\u202egnp.exe"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def hostile(tmp_path: Path) -> RunRecord:
    found = {f"eval/{EVIL}": 0.5}
    found |= {f"eval/multiple_choice/{EVIL}/{key}": 0.5 for key in ("accuracy", "chance")}
    folder = write_run(tmp_path / "x[" / "y]<script>alert(1)<b>\x1b\u202e", evaluation=found | {RATE: 0.5})
    environment = {
        "command": f"unmask train debug\n{EVIL}\nrm -rf /",
        "device": EVIL,
        "threads": 1,
        "dtype": {},
        "torch": 1,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return read_run(folder, lambda line: None)


def test_text_from_a_run_is_text_on_the_page(hostile: RunRecord) -> None:
    replay = {"symbols": {0: EVIL}, "methods": [EVIL], "puzzles": [{"prompt": [0], "traces": []}], "canvas": {}}
    page = rendered(hostile, replay=replay)
    assert "<script>alert" not in page
    assert not CONTROLS.search(page)
    (data,) = re.findall(r'id="replay-data">(.*?)</script>', page)
    assert not CONTROLS.search(str(json.loads(data)["symbols"]["0"] + json.loads(data)["methods"][0]))
    (claim,) = re.findall(r"say they were made by.*?<pre>(.*?)</pre>", page, re.DOTALL)
    assert len(claim.splitlines()) == 1
    assert r"unmask train debug\n" in claim


def test_chance_is_drawn_where_all_runs_have_the_same(tmp_path: Path) -> None:
    def write(name: str, chance: float) -> RunRecord:
        choices = {"eval/multiple_choice/quiz/accuracy": 0.5, "eval/multiple_choice/quiz/chance": chance}
        folder = write_run(tmp_path / name, f"optim.lr={chance}", evaluation=choices | {"eval/nelbo": 2.0})
        return read_run(folder, pytest.fail)

    one, same, other = write("one", 0.25), replace(write("same", 0.5), rows=write("x", 0.25).rows), write("other", 0.5)
    page = rendered(one, same)
    assert "Multiple choice, quiz: accuracy" in page
    assert page.count("by chance 25.0 %") == 4  # on each axis
    assert "by chance" not in rendered(one, other)


def test_the_policy_allows_the_page_s_own_style_and_script_alone(hostile: RunRecord) -> None:
    page = rendered(hostile)
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert page.index(policy) < page.index("<title>")
    style, script = (
        re.findall(r"<style>(.*?)</style>", page, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
    )
    assert (len(style), len(script)) == (1, 1)
    own = (f"{kind}-src &#39;sha256-{b64encode(sha256(text.encode()).digest()).decode()}&#39;"
           for kind, text in (("style", style[0]), ("script", script[0])))  # fmt: skip
    assert policy == "; ".join(
        ["default-src &#39;none&#39;", *own, "base-uri &#39;none&#39;", "form-action &#39;none&#39;"]
    )
    assert not re.search(r"<[^>]* (style|on\w+)=", page)  # which the policy would stop


def test_numbers_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = {"step": 7, "seconds": 1, "examples_seen": 1, RATE: 0.5}
    with (folder / "metrics.jsonl").open("a") as file:
        for value in ("1e308", "-1e308", "1e400", "NaN", "-Infinity", "9" * 400, "null", "-5", "true"):
            file.write(json.dumps(row)[:-1] + f', "eval/nelbo": {value}}}\n')
        for steps in ("-1", "1e300", "NaN"):
            file.write(json.dumps(row).replace("7", steps) + "\n")
    said: list[str] = []
    run = read_run(folder, said.append)
    assert run.curve("eval/nelbo").values == (1.0, -5.0)
    assert f"{folder / 'metrics.jsonl'}, line 2: eval/nelbo is not drawn: 1e+308" in said
    assert said[-1].endswith("and 4 more like these")
    assert "<svg" in rendered(run)


class CountedRows(list):  # type: ignore[type-arg]
    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def test_a_page_reads_the_rows_a_few_times_however_many_measures_there_are(tmp_path: Path) -> None:
    measures = {f"eval/accuracy/ema/prob/{n}": 0.5 for n in range(30)}
    run = read_run(write_run(tmp_path / "run", evaluation=measures), pytest.fail)
    run = replace(run, rows=CountedRows(run.rows))
    page = rendered(run)
    assert page.count('data-measure="') == 30
    assert run.rows.passes <= 3


def test_a_page_holds_protocols_of_corpora_and_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"text": f"They sit. They stand up {n}. " * 9} for n in range(60)]
    own, other = (write_lines(tmp_path / f"{name}.jsonl", texts) for name in ("own", "other"))
    question = {"question": "Is it?", "choices": ["yes", "no"], "answer": 1}
    questions = write_lines(tmp_path / "questions.jsonl", [question] * 5)
    data = [f"data.path={own}", f"data.cache_dir={tmp_path}", "data.length=64", "train.dtype=float64"]
    measures = [f"eval.zero_shot=[{other}]", f"eval.multiple_choice=[{questions}]", "eval.examples=3"]
    tiny_run(tmp_path / "run", "task.name=text", "process.name=uniform", *data, *measures).train()
    methods = group([read_run(tmp_path / "run", pytest.fail)])
    decoder = methods["run"][0].config.decode
    studied = study(methods, decoder, num_examples=1, warn=pytest.fail, on_example=lambda done: None)
    result = studied.evaluations["run"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    capsys.readouterr()
    assert run_cli("eval", "--protocol", tmp_path / "result.json", "--json") == 0
    now = json.loads(capsys.readouterr().out)
    assert now["repeats"]["differs"] == {}
    assert now["protocol"]["multiple_choice"]["questions"]["examples"] == 3
    assert now["protocol"]["zero_shot"]["other"]["data"] == str(other)
    for figure in ("zero_shot.other.nelbo", "multiple_choice.questions.acc_norm"):
        then, again = now["repeats"]["figures"][figure]
        assert then == pytest.approx(again, rel=1e-6)
    write_lines(other, texts[:40])
    assert run_cli("eval", "--protocol", tmp_path / "result.json", "--json") == 0
    assert "zero_shot.other.data_sha256" in json.loads(capsys.readouterr().out)["repeats"]["differs"]


def test_a_page_holds_protocols_that_eval_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods, each with its file: the training's own figures come out again, and nothing differs."""
    for name, *settings in (("puma",), ("plain", "process.name=uniform")):
        tiny_run(tmp_path / name, *settings).train()
    methods = group([read_run(tmp_path / name, pytest.fail) for name in ("puma", "plain")])
    decoder = methods["puma"][0].config.decode
    studied = study(methods, decoder, num_examples=1, warn=pytest.fail, on_example=lambda done: None)
    page = render(methods, studied, Diagnoses(), title="A title", first_measure=None, commands=[])
    assert "decoders.prob/3.temperature" in page
    files = dict(re.findall(r'<a href="data:application/json;base64,([^"]+)" download="([^"]+)">', page))
    assert sorted(files.values()) == ["plain.json", "puma.json"]
    for content, name in files.items():
        (tmp_path / name).write_bytes(b64decode(content))
        capsys.readouterr()
        assert run_cli("eval", "--protocol", tmp_path / name, "--json") == 0
        repeats = json.loads(capsys.readouterr().out)["repeats"]
        assert repeats["differs"] == {}
        (then, now) = repeats["figures"]["nelbo"]
        assert then == pytest.approx(now, rel=1e-6)
        assert "accuracy.prob/3" in repeats["figures"]
