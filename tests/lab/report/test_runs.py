"""Which runs a report takes, and what it calls them."""

import json
from pathlib import Path

import pytest

from tests.helpers.runs import ACCURACY, write_run
from unmask.config import recipes
from unmask.errors import UserError
from unmask.evaluation.statistics import wilson
from unmask.lab.compare import Comparison
from unmask.lab.finals import Finals, SeedMean
from unmask.lab.report.curves import read_metrics
from unmask.lab.report.measures import Measure
from unmask.lab.report.runs import about_other_data, common_measures, differing_settings, group, read_run
from unmask.training.folder import RunFolder


def read(*folders: Path):  # type: ignore[no-untyped-def]
    return [read_run(folder, pytest.fail) for folder in folders]


def test_seeds_of_one_method_go_together(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "puma" / f"seed_{seed}", f"train.seed={seed}", f"train.threads={seed + 1}")
        for seed in (0, 1)
    ]
    runs.append(write_run(tmp_path / "mine", "process.num_stages=9"))
    methods = group(read(*runs))
    assert {name: [own.seed for own in same] for name, same in methods.items()} == {"puma": [0, 1], "mine": [0]}
    assert differing_settings(methods) == {"process.num_stages": [4, 9]}


def test_a_setting_that_only_one_method_has(tmp_path: Path) -> None:
    methods = group(read(write_run(tmp_path / "a"), write_run(tmp_path / "b", "process.name=uniform")))
    assert differing_settings(methods)["process.threshold"] == [0.9, None]
    assert differing_settings(methods)["process.name"] == ["puma", "uniform"]


def test_equal_folder_names_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", "optim.lr=1")]
    assert list(group(read(*folders))) == [str(folder) for folder in folders]


def test_measures_that_all_have(tmp_path: Path) -> None:
    more = {**ACCURACY, "eval/accuracy/ema/prob/1": 0.7}
    methods = group(read(write_run(tmp_path / "a", evaluation=more), write_run(tmp_path / "b", "optim.lr=1")))
    assert common_measures(methods) == ["eval/accuracy/ema/prob/3", "eval/nelbo"]


def test_measures_are_drawn_with_what_is_known_of_them(tmp_path: Path) -> None:
    choices = {"accuracy": 0.5, "accuracy_stderr": 0.1, "acc_norm": 0.25, "chance": 0.25, "examples": 40}
    samples = {"gen_ppl": 90.0, "gen_ppl_stderr": 3.0, "unigram_entropy": 2.5, "distinct_1": 0.1, "distinct_2": 0.4}
    found = {
        **{f"eval/multiple_choice/a/b/{key}": value for key, value in choices.items()},
        "eval/zero_shot/other/ppl": 9.0,
        "eval/zero_shot/other/bits_per_byte": 3.0,
        "eval/nelbo/ema": 1.0,
        **{f"eval/{key}": value for key, value in samples.items()},
        **{f"eval/real/{key}": value / 2 for key, value in samples.items()},
    }
    methods = group(read(write_run(tmp_path / "run", evaluation=ACCURACY | found)))
    keys = common_measures(methods)
    assert keys == [
        *("eval/accuracy/ema/prob/3", "eval/nelbo"),
        *("eval/multiple_choice/a/b/accuracy", "eval/multiple_choice/a/b/acc_norm"),
        *("eval/zero_shot/other/bits_per_byte", "eval/gen_ppl", "eval/unigram_entropy", "eval/distinct_2"),
    ]
    ((run,),) = methods.values()
    accuracy, ppl = Measure.of(keys[2]), Measure.of("eval/gen_ppl")
    assert accuracy is not None
    assert ppl is not None
    assert accuracy.name == "Multiple choice, a/b: accuracy"
    assert run.level(accuracy.level) == 0.25
    assert run.level(ppl.level) == 45.0
    assert (run.curve(keys[2]).is_share, run.curve(keys[2]).examples) == (True, 40)
    assert (run.curve("eval/gen_ppl").is_share, run.curve("eval/gen_ppl").examples) == (False, None)


def test_means_over_seeds_have_students_interval(tmp_path: Path) -> None:
    """Of 1, 2, 3 the mean is 2 ± 4.303 x 1 / sqrt(3); of two seeds nothing is said."""
    for number in range(3):
        write_run(tmp_path / "a" / f"seed_{number}", f"train.seed={number}", evaluation={"eval/nelbo": number + 1.0})
    found = Finals.of(group(read(*sorted((tmp_path / "a").iterdir()))))
    own = found.means["eval/nelbo"]["a"]
    assert own.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert found.table().rows == [("NELBO (nats)", "2.000 [-0.484, 4.484]")]
    assert SeedMean((1500.0, 1500.0, 1500.0)).text() == "1,500 [1,500, 1,500]"


def test_means_of_shares_have_wilsons_interval_on_the_examples(tmp_path: Path) -> None:
    key, evaluation = "eval/accuracy/ema/prob/3", {**ACCURACY, "eval/examples": 12}
    for number, share in enumerate((0.0, 0.0, 0.25)):
        values = {**evaluation, key: share}
        write_run(tmp_path / "a" / f"seed_{number}", f"train.seed={number}", evaluation=values)
    own = Finals.of(group(read(*sorted((tmp_path / "a").iterdir())))).means[key]["a"]
    assert own.interval == pytest.approx(wilson(1, 12))
    assert SeedMean((0.0, 0.0, 0.0), is_share=True, examples=12).text() == "0.0% [0.0, 24.3]"
    assert SeedMean((0.25, 0.5), is_share=True).text() == "37.5%"
    assert SeedMean((0.0, 0.0, 0.0), is_share=True).interval is None


def test_a_measure_that_one_run_only_ever_failed_at_is_not_common(tmp_path: Path) -> None:
    diverged = {**ACCURACY, "eval/accuracy/ema/prob/3": None}
    methods = group(read(write_run(tmp_path / "a"), write_run(tmp_path / "b", "optim.lr=1", evaluation=diverged)))
    assert common_measures(methods) == ["eval/nelbo"]


def test_a_run_that_is_still_training_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write("broken\n")
        metrics.write('{"step": 10, "sec')  # as far as it has been written
    said: list[str] = []
    holder = RunFolder(folder)
    holder.open(recipes.load("debug"), resume=True)
    try:
        recorded = read_run(folder, said.append)
    finally:
        holder.close()
    assert recorded.is_running
    assert recorded.last_step == 5
    broken, training = said  # and not a word of the line that is being written
    assert "line 2: not a line of metrics; skipped" in broken
    assert "still training" in training
    assert not read_run(folder, said.append).is_running


def test_broken_lines_are_named_and_skipped(tmp_path: Path) -> None:
    rows = [{"step": s, "seconds": s, "examples_seen": s, "eval/accuracy": s / 10} for s in (1, 2)]
    text = "\n".join(
        ["{", json.dumps(rows[0]), "[1]", json.dumps({"step": 3}), json.dumps(rows[1]), '{"step": 4, "sec']
    )
    (tmp_path / "metrics.jsonl").write_text(text)
    warnings: list[str] = []
    assert read_metrics(tmp_path, warnings.append) == rows
    assert [w.split(", ")[1].split(":")[0] for w in warnings] == ["line 1", "line 3", "line 4", "line 6"]
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "nowhere", warnings.append)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": ' + "9" * 500 + ', "seconds": 1, "examples_seen": 1}',
        '{"step": NaN, "seconds": 1, "examples_seen": 1}',
        *(
            '{"step": 2, "seconds": 1, "examples_seen": 1, "resumed_at_byte": ' + at + "}"
            for at in ('"x"', "null", "-1", "true", "[]")
        ),
        '"resumed_at_byte"',
        '["resumed_at_byte"]',
        "\x00\xff",
    ],
    ids=lambda line: line[-40:],
)
def test_any_broken_line_is_named(line: str, tmp_path: Path) -> None:
    row = {"step": 1, "seconds": 1, "examples_seen": 1}
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([json.dumps(row).encode(), line.encode("latin1"), b""]))
    warnings: list[str] = []
    assert read_metrics(tmp_path, warnings.append) == [row]
    assert len(warnings) == 1
    assert "line 2" in warnings[0]


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    good, toy = write_run(tmp_path / "good"), write_run(tmp_path / "toy", "task.name=toy")
    bare = write_run(tmp_path / "bare", "optim.lr=1", evaluation={"train/loss": 2.0})
    with pytest.raises(UserError, match=r"of the task sudoku, .*toy of toy"):
        group(read(good, toy))
    with pytest.raises(UserError, match=r"no evaluation in common.*good: eval/accuracy.*bare: no evaluation yet"):
        common_measures(group(read(good, bare)))
    with pytest.raises(UserError, match="the same settings and seed"):
        group(read(good, good))
    with pytest.raises(UserError, match="no evaluation has written eval/accuracy; there is nothing yet"):
        read(bare)[0].curve("eval/accuracy")
    (bare / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds nothing yet"):
        read(bare)
    (bare / "config.yaml").write_text("optim: {lr: -1}")
    with pytest.raises(UserError, match=r"(?s)bare.*optim.lr=-1"):
        read(bare)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (["process.name=uniform"], [5]),
        (["model.self_conditioning=true"], None),
        (["process={name: uniform, block_size: 27}"], None),
    ],
    ids=["one pass a step", "self-conditioned", "blocks"],
)
def test_passes_of_a_run_that_did_not_count_them(settings: list[str], passes: list[int] | None, tmp_path: Path) -> None:
    """They are the steps, where a step was one pass. Where not, no axis of them is drawn, and counts are kept."""
    old = read_run(write_run(tmp_path / "old", *settings), pytest.fail)
    assert [row["passes"] for row in old.rows if "passes" in row] == (passes or [])
    assert ("passes" in old.curve("eval/nelbo").spent) == (passes is not None)
    new = read_run(write_run(tmp_path / "new", *settings, evaluation=ACCURACY | {"passes": 7.5}), pytest.fail)
    assert new.rows[0]["passes"] == 7.5
    comparison = Comparison({"old": [old.curve("eval/nelbo")], "new": [new.curve("eval/nelbo")]})
    assert ("passes" in [row.axis for row in comparison.rows()]) == (passes is not None)


def test_settings_of_data_that_differ_are_told_where_runs_have_no_fingerprint(tmp_path: Path) -> None:
    def methods(*data: str | None, key: str = "data.givens=[30,33]") -> dict:
        runs, place = {}, tmp_path / str(len([*tmp_path.iterdir()]))
        for name, own in zip("tx", data, strict=True):
            folder = write_run(place / name, *[key] * (name == "x"))
            (folder / "environment.json").write_text(json.dumps({"data": own}))
            runs[name] = read(folder)
        return runs

    assert "methods differ in data.givens: " in (about_other_data(methods(None, None)) or "")
    assert about_other_data(methods(None, None, key="optim.lr=1")) is None
    assert about_other_data(methods("one", "one")) is None
    assert "methods differ in data.givens: " in (about_other_data(methods("one", None)) or "")
    assert about_other_data(methods("one", "two")) == "the data of x are not those of t: their figures do not compare"
