"""`unmask settings`: every setting of every recipe and component, with what it means."""

import json
from pathlib import Path

import pytest

from tests.helpers import run_cli
from tests.helpers.runs import write_run
from unmask.cli.settings import explain
from unmask.config import recipes
from unmask.config.registry import COMPONENTS, resolve
from unmask.config.settings import flatten
from unmask.errors import UserError


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_setting_of_a_recipe_has_its_value_and_a_meaning(recipe: str) -> None:
    config = recipes.load(recipe)
    rows = list(explain(config))
    assert [key for key, _, meaning in rows if not meaning] == []
    values = {key: value for key, value, _ in rows}
    for key, value in flatten(config.model_dump(mode="json")):
        assert values.get(key, value) == value  # but for settings that are dicts
        assert any(key == each or key.startswith(f"{each}.") for each in values), key


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, own in COMPONENTS.items() for name in own])
def test_every_setting_of_a_component_has_a_meaning(kind: str, name: str) -> None:
    component = resolve(kind, name)
    fields = getattr(component, "Config", component).model_fields
    assert [key for key, field in fields.items() if key != "name" and not field.description] == []


def test_what_is_chosen_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("settings", "sudoku/puma", "process", "train.seed", "process.num_stages=5", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["process.num_stages"]["value"] == 5
    assert "K: masks that a row passes through" in said["process.num_stages"]["meaning"]
    assert said["process.name"]["meaning"].startswith("uniform, puma")
    assert {key.split(".")[0] for key in said} == {"process", "train"}
    assert [key for key in said if key.startswith("train")] == ["train.seed"]


def test_a_run_is_listed_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "debug", "train.seed=7")
    assert run_cli("settings", folder, "train.seed", "--json") == 0
    assert json.loads(capsys.readouterr().out)["train.seed"]["value"] == 7
    assert run_cli("settings", folder, "train.seed=8") == 2
    assert "the settings of a run stand" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run_cli("settings", "debug", "train.seed", "--json") == 0
    assert json.loads(capsys.readouterr().out)["train.seed"]["value"] == 0  # a recipe's name is the recipe's


def test_the_densities_are_listed_wherever_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    start = "process.start={name: mixture, of: beta}"
    assert run_cli("settings", "sudoku/puma", "process.start", start, "process.time.name", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    names = [key for key in said if key.endswith(".name")]
    assert names == ["process.time.name", "process.start.name", "process.start.of.name"]
    assert all(said[key]["meaning"].startswith(", ".join(COMPONENTS["time"])) for key in names)


def test_people_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("settings", "sudoku/puma", "process.num_stages", "optim.schedule") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "process.num_stages 8 K: masks that a row passes through" in printed
    assert "optim.schedule cosine cosine, wsd, constant; learning rate after the warm-up" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sudoku/puma", "procss"], "did you mean process?"),
        (["sudoku/puma", "train.sed"], "did you mean train.seed?"),
        (["sudoku/pumma"], "did you mean sudoku/puma?"),
        (["sudoku/puma", "process.num_stages=0"], "process.num_stages=0"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("settings", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_start_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are listed all the same: a recipe may be for another machine."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "here")
    assert run_cli("settings", "debug", "train.init", "train.init=nowhere") == 0
    printed = capsys.readouterr()
    assert "nowhere" in printed.out
    assert "train.init=nowhere: is no run, export or Hugging Face checkpoint here" in " ".join(printed.err.split())
    assert run_cli("settings", "debug", "train.init", "train.init=here") == 0
    assert capsys.readouterr().err == ""


def test_a_component_of_ones_own_reads_keys_that_others_have_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_too.py").write_text(
        "from pydantic import Field\nfrom unmask.config.settings import Section\n"
        "class Mine:\n"
        "    class Config(Section):\n"
        "        name: str\n"
        "        stages: int = Field(1, alias='num_stages')\n"
        "    @classmethod\n"
        "    def from_config(cls, config, context): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    own = recipes.load("debug", ["process.name=mine_too:Mine", "process.num_stages=5"]).process
    assert own.stages == 5
    with pytest.raises(UserError, match=r"process.run=2: is a setting of process.name=puma, and this is mine_too:Mine"):
        recipes.load("debug", ["process.name=mine_too:Mine", "process.run=2"])
