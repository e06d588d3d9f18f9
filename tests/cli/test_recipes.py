"""Recipes and their settings: other names, alternatives, and components that take the place of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SHORT, lines, run_cli
from unmask.cli import options
from unmask.config import recipes
from unmask.config.run import EvalConfig
from unmask.config.settings import flatten
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool


def test_every_recipe_loads_and_its_methods_differ_in_the_process_alone() -> None:
    for name in recipes.names():
        assert recipes.load(name).train.batch_size > 0
    for baseline in ("sudoku/", "sudoku/paper_", "sudoku/block_", "tinygsm/block_"):
        pair = (f"{baseline}uniform", f"{baseline}puma")
        one, other = (recipes.load(name).model_dump() for name in pair)
        assert [section for section in one if one[section] != other[section]] == ["process"]


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        ("process", "{confidence: margin, order: prob}", "confidence='margin' and order='prob'"),
        ("process", "{confidence: margin, alg: prob}", "confidence='margin' and alg='prob'"),
        ("decode", "{order: margin, confidence: prob}", "order='margin' and confidence='prob'"),
        ("eval", "{orders: [prob], confidences: [margin]}", "orders=['prob'] and confidences=['margin']"),
    ],
)
def test_two_names_of_one_setting_are_the_users_mistake(
    section: str, given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: sudoku/puma\n{section}: {given}\n")
    assert run_cli("settings", mine) == 2
    assert f"{section}: {said} are one setting; give order" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("empty", ["process", "optim", "eval"])
def test_an_empty_section_does_not_drop_the_recipes(
    empty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: sudoku/hard_puma\n{empty}:\n  # all of it commented out\n")
    for asked in ([tmp_path / "mine.yaml"], ["sudoku/hard_puma", f"{empty}=null"]):
        assert run_cli("settings", *asked) == 2
        assert f"{empty}: is empty, which would drop all that it holds" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "own.yaml").write_text("task: {name: toy}\nmodel: {preset: tiny}\ntrain: {steps: 3}\neval:\n")
    assert run_cli("settings", tmp_path / "own.yaml") == 0


ONE_ORDER = [
    ("sudoku/uniform", ["process.name=puma", "process.num_stages=12"], {"process.num_stages": 12}),
    ("sudoku/uniform", ["process.time.name=beta", "process.time.a=7"], {"process.time.a": 7.0}),
    ("sudoku/uniform", ["process={time: {low: 0.5}}", "process.time.name=clipped"], {"process.time.low": 0.5}),
    ("sudoku/uniform", ["task.name=addition", "data.digits=5", "model.dropout=0.1"], {"data.digits": (5, 5)}),
]


@pytest.mark.parametrize(("recipe", "overrides", "expected"), ONE_ORDER)
def test_the_order_of_overrides_does_not_matter(recipe: str, overrides: list[str], expected: dict[str, object]) -> None:
    in_order, reversed_ = (recipes.load(recipe, given) for given in (overrides, overrides[::-1]))
    assert in_order == reversed_
    found = dict(flatten(in_order.model_dump()))
    assert {key: found[key] for key in expected} == expected


def test_of_one_setting_given_twice_the_later_one_wins() -> None:
    found = recipes.load("sudoku/puma", ["process.num_stages=4", "process={name: puma, num_stages: 6}"])
    assert found.process.num_stages == 6
    found = recipes.load("sudoku/uniform", ["process.name=puma", "process.num_stages=4", "process={name: uniform}"])
    assert found == recipes.load("sudoku/uniform")
    found = recipes.load("sudoku/uniform", ["process={name: puma, num_stages: 4}", "process.name=uniform"])
    assert found == recipes.load("sudoku/uniform")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.init=", "has no value; write train.init=null to unset it"),
        ("data.path= ", "has no value; write data.path=null to unset it"),
        ("data.path=a.txt #2.txt", "put the value into quotes of its own"),
    ],
)
def test_a_value_that_is_lost_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipes.load("sudoku/uniform", [override])
    assert message in str(error.value)
    assert recipes.load("text/uniform_small", ["data.path='a.txt #2.txt'"]).data.path == "a.txt #2.txt"
    with pytest.raises(UserError, match="has no value; write threshold=null to unset it"):
        options.read_decoder("prob,threshold=")


def test_overrides_that_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("settings", "sudoku/uniform", "decode.steps=4", "decode.budget=0.2") == 2
    assert "decode.steps and decode.budget exclude each other" in " ".join(capsys.readouterr().err.split())
    assert run_cli("settings", "sudoku/uniform", "decode.steps=4", "decode.steps=null", "decode.budget=0.2") == 0
    assert run_cli("settings", "sudoku/puma", "process.threshold=null", "process.budget=0.1") == 0


def test_a_setting_is_listed_under_its_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["process.K", "decode.confidence", "decode.cfg_scale", "eval.confidences"]
    assert run_cli("settings", "sudoku/puma", *asked, "process.alg=margin", "--json") == 0
    own = ["process.num_stages", "decode.order", "decode.guidance", "eval.orders"]
    assert sorted(json.loads(capsys.readouterr().out)) == sorted(own)
    assert run_cli("settings", "debug", "decod.confidence", "steps.x") == 2


def test_two_names_of_one_setting_of_a_decoder() -> None:
    for text in ("margin,confidence=prob", "alg=prob,confidence=margin", "order=prob,alg=margin"):
        with pytest.raises(UserError, match=rf"^--decoder {text}: decode: .* are one setting; give order alone"):
            options.parse_decoder(text, DecodeConfig())
    assert options.parse_decoder("confidence=margin", DecodeConfig(order="prob")).order == "margin"
    with pytest.raises(UserError, match=r"decode: .* are one setting; give tokens_per_step alone"):
        options.parse_decoder("unmasking_num=2,tokens_per_step=3", DecodeConfig())
    with pytest.raises(UserError, match="threshold and tokens_per_step both say how much a step reveals"):
        options.read_decoder("confidence_threshold=0.5,unmasking_num=2")


def test_names_that_users_of_other_code_bring() -> None:
    settings = [
        "process.K=5",
        "process.block_length=27",
        "process.confidence_threshold=0.7",
        "process.confidence=low_confidence",
        "decode.unmasking_num=3",
        "decode.block_length=9",
        "decode.alg=maskgit_plus",
    ]
    config = recipes.load("sudoku/puma", settings)
    assert config.process.model_dump() == {
        "name": "puma",
        "num_stages": 5,
        "stage_schedule": [],
        "time": {"name": "uniform"},
        "threshold": 0.7,
        "factor": None,
        "entropy_bound": None,
        "budget": None,
        "start": None,
        "run": None,
        "order": "prob",
        "block_size": 27,
    }
    assert config.model.model_dump()["block_size"] == 27  # a model is told what its process asks
    assert config.decode.label == "prob/3/block9"
    assert recipes.load("tinygsm/puma", ["decode.cfg_scale=1.5", "data.prompt_dropout=0.1"]).decode.guidance == 1.5
    assert recipes.load("debug", ["decode.confidence=top_k_margin"]).decode.order == "margin"


def test_other_names_are_those_of_the_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A component's own fields keep their names, whatever other components call by them."""
    (tmp_path / "clusters.py").write_text(CLUSTERS)
    monkeypatch.chdir(tmp_path)
    process = recipes.load("sudoku/puma", ["process.K=5", "process.name=clusters:Clusters"]).process
    assert process.model_dump() == {"name": "clusters:Clusters", "K": 5, "cfg_scale": 1.0}
    process = recipes.load("sudoku/puma", ["process={name: 'clusters:Pool', K: 5, block_length: 9}"]).process
    assert (process.K, process.num_stages, process.block_size) == (5, 8, 9)
    assert run_cli("settings", "debug", "process.name=clusters:Pool", "process.K", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["process.K"]
    with pytest.raises(UserError, match=r"process.K=5: is a setting of process.name=puma, and this is uniform"):
        recipes.load("sudoku/uniform", ["process.K=5"])


CLUSTERS = """
from unmask.config.settings import Section
from unmask.masking.puma import PumaPool

class Clusters:
    class Config(Section):
        name: str
        K: int = 3
        cfg_scale: float = 1.0

    @classmethod
    def from_config(cls, config, context): ...

class Pool(PumaPool):
    class Config(PumaPool.Config):
        K: int = 3
"""


def test_other_names_are_known_in_python() -> None:
    pool = PumaPool(mask_id=10, shard=RowShard.whole(4), K=12, block_length=9, confidence_threshold=0.7)
    assert (pool.config.num_stages, pool.config.block_size, pool.config.threshold) == (12, 9, 0.7)
    with pytest.raises(UserError, match=r"^process: K=3 and num_stages=4 are one setting; give num_stages alone"):
        PumaPool(mask_id=10, shard=RowShard.whole(4), K=3, num_stages=4)
    assert VariablePumaPool.Config(factor=1).threshold is None  # 0.9 by default
    with pytest.raises(UserError, match=r"process.threshold=0.7 and process.factor=1.0: give one of them"):
        PumaPool(mask_id=10, shard=RowShard.whole(4), confidence_threshold=0.7, factor=1)


def test_another_name_is_written_over_the_own_one_and_back(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: debug\nprocess: {name: puma, K: 3}\nmodel: {block_length: 9}\n")
    base = str(tmp_path / "base.yaml")
    assert recipes.load(base).model_dump()["model"]["block_size"] == 9
    for key in ("K", "num_stages"):
        (tmp_path / "mine.yaml").write_text(f"extends: base.yaml\nprocess: {{{key}: 6}}\n")
        assert recipes.load(str(tmp_path / "mine.yaml")).process.num_stages == 6
        assert recipes.load(base, [f"process.{key}=5"]).process.num_stages == 5
    for one, other in (("K", "num_stages"), ("num_stages", "K")):
        found = recipes.load("sudoku/uniform", [f"process.{one}=4", f"process.{other}=6", "process.name=puma"])
        assert found.process.num_stages == 6
    drawn = "{model: judge, decode: {tokens_per_step: 4}}"
    (tmp_path / "drawn.yaml").write_text(f"extends: text/uniform_small\neval: {{generative: {drawn}}}\n")
    key = "eval.generative.decode"
    found = recipes.load(str(tmp_path / "drawn.yaml"), [f"{key}.unmasking_num=2", f"{key}.cfg_scale=1"])
    assert found.eval.generative is not None
    assert found.eval.generative.decode == {"tokens_per_step": 2, "guidance": 1}
    with pytest.raises(UserError, match=rf"^{key}: unmasking_num=1 and tokens_per_step=2 are one setting"):
        recipes.load("text/uniform_small", [f"{key}={{unmasking_num: 1, tokens_per_step: 2}}"])
    assert recipes.load("debug", ["eval.unmasking_num=[1, 3]"]).eval.tokens_per_step == [1, 3]
    assert recipes.load("debug", ["process={name: puma_variable, unmasking_num: 4}"]).process.tokens_per_step == 4


def test_the_later_of_two_alternatives_counts(tmp_path: Path) -> None:
    assert recipes.load("sudoku/uniform", ["train.epochs=2"]).train.steps is None
    assert recipes.load("sudoku/paper_puma", ["train.steps=7"]).train.epochs is None
    (tmp_path / "mine.yaml").write_text("extends: sudoku/puma\ndecode: {steps: 5}\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).decode.label == "prob/steps5"
    assert recipes.load(str(tmp_path / "mine.yaml"), ["decode.unmasking_num=2"]).decode.label == "prob/2"
    process = recipes.load("sudoku/puma", ["process.factor=1"]).process
    assert (process.threshold, process.factor, process.num_stages) == (None, 1.0, 8)
    process = recipes.load("debug", ["process={name: puma_variable, factor: 1}"]).process  # 0.9 by default
    assert (process.threshold, process.factor) == (None, 1.0)
    process = recipes.load("debug", ["process={name: puma_variable, threshold: null}"]).process
    assert process.threshold is None


def test_decoders_take_the_same_names_and_alternatives() -> None:
    base = DecodeConfig(steps=5)
    assert options.parse_decoder("low_confidence,unmasking_num=3", base).label == "prob/3"
    assert options.parse_decoder("margin", base).label == "margin/steps5"
    assert options.parse_decoder("random,seed=2", DecodeConfig()).label == "random/1/seed2"
    for key in ("threshold=0.9", "factor=1.5", "entropy_bound=0.1"):
        assert options.parse_decoder(f"prob,{key}", base).steps is None
        assert options.parse_decoder("prob,steps=2", options.parse_decoder(f"prob,{key}", base)).label == "prob/steps2"


def test_what_goes_with_steps_goes_with_them() -> None:
    base = DecodeConfig(steps=5, schedule="cosine", remask="p2", remask_eta=0.5, block_size=None)
    assert options.parse_decoder("prob,steps=9", base).label == "prob/steps9/cosine/p2/eta0.5"
    assert options.parse_decoder("prob,threshold=0.9", base).label == "prob/threshold0.9"
    grid = EvalConfig(tokens_per_step=[1, 2]).decoders(base.model_copy(update={"seed": 4}))
    assert [decoder.label for decoder in grid] == ["prob/1/seed4", "prob/2/seed4"]
    assert grid == [DecodeConfig.model_validate(decoder.model_dump()) for decoder in grid]  # nothing impossible


MINE = """
from unmask.masking.puma import PumaPool

class Mine(PumaPool):
    def metrics(self):
        return super().metrics() | {"mine": 1.0}
"""


def test_a_process_of_ones_own_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_process.py").write_text(MINE)
    command = [sys.executable, "-c", "from unmask.cli import run; run()", "train", "debug", *SHORT, "--out", "run"]
    command += ["process={name: 'my_process:Mine', num_stages: 3}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["mine"] == 1.0
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["puma/num_stages"] == 3


def test_another_process_starts_its_section_afresh() -> None:
    assert recipes.load("sudoku/puma", ["process.name=uniform"]).process.model_dump() == {
        "name": "uniform",
        "time": {"name": "uniform"},
        "weight": "per_masked",
        "weight_cap": None,
        "masking": "exact",
        "block_size": None,
    }


OPTIM = {"optim.name": "muon", "optim.muon_lr": 2.0, "optim.schedule": "wsd", "optim.decay_share": 0.5}


@pytest.mark.parametrize("keys", [["optim.name"], [*OPTIM], [*reversed(OPTIM)]])
def test_another_optimizer_leaves_its_section_as_it_is(keys: list[str], tmp_path: Path) -> None:
    given = {key: OPTIM[key] for key in keys}
    expected = recipes.load("sudoku/puma").model_dump()
    expected["optim"] |= {key.removeprefix("optim."): value for key, value in given.items()}
    assert recipes.load("sudoku/puma", [f"{key}={value}" for key, value in given.items()]).model_dump() == expected
    changed = ", ".join(f"{key.removeprefix('optim.')}: {value}" for key, value in given.items())
    (tmp_path / "mine.yaml").write_text(f"extends: sudoku/puma\noptim: {{{changed}}}\n")
    (tmp_path / "longer.yaml").write_text("extends: mine.yaml\noptim: {warmup_steps: 3}\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).model_dump() == expected
    expected["optim"]["warmup_steps"] = 3
    assert recipes.load(str(tmp_path / "longer.yaml")).model_dump() == expected


def test_to_name_the_component_that_is_there_changes_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"  # no section has a name: they are those of the defaults
    mine.write_text("process: {block_size: 9}\nmodel: {preset: tiny, dropout: 0.1}\ntrain: {steps: 5}\n")
    same = ["model.name=transformer", "process.name=uniform", "task.name=sudoku"]
    assert recipes.load(str(mine), same) == recipes.load(str(mine))


@pytest.mark.parametrize(
    ("override", "time"),
    [
        ("process.time.name=beta", "{name: beta}"),
        ("process.time={name: beta, a: 4}", "{name: beta, a: 4}"),
        ("process.time.of.name=clipped", "{name: mixture, uniform: 0.5, of: {name: clipped}}"),
        ("process.time.of.a=4", "{name: mixture, uniform: 0.5, of: {name: beta, a: 4, b: 7}}"),
    ],
)
def test_another_density_starts_its_section_afresh(override: str, time: str) -> None:
    mixture = "process.time={name: mixture, uniform: 0.5, of: {name: beta, a: 2, b: 7}}"
    found = recipes.load("sudoku/uniform", [mixture, override])
    assert found == recipes.load("sudoku/uniform", [f"process.time={time}"])


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: {name: toy}\nmodel: {preset: tiny}\ntrain: {steps: 5, batch_size: 8}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nprocess: {name: puma, K: 3}\ntrain: {steps: 2}\n")
    config = recipes.load(str(tmp_path / "mine.yaml"), ["train.seed=4"])
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (2, 8, 4)
    assert config.process.model_dump()["num_stages"] == 3


def test_a_recipe_may_extend_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: sudoku/puma\ntrain: {steps: 2}\n")
    config = recipes.load(str(tmp_path / "mine.yaml"))
    assert config.process == recipes.load("sudoku/puma").process
    assert config.train.steps == 2
