"""What `import unmask` promises, and the map of its modules."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import unmask
from unmask.masking.time import Density


@pytest.mark.parametrize("name", unmask.__all__)
def test_every_public_name_and_method_says_what_it_is(name: str) -> None:
    thing = getattr(unmask, name)
    assert inspect.getdoc(thing)
    methods = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
    own = [(key, method) for key, method in methods if method.__module__.startswith("unmask") and key[0] != "_"]
    assert [key for key, method in own if not inspect.getdoc(method)] == []


def test_calls_of_pools_that_say_none_or_give_a_density() -> None:
    place = {"mask_id": 4, "shard": unmask.RowShard.whole(4)}
    bell = Density(torch.tensor([1.0, 3.0, 3.0, 1.0]))
    pool = unmask.PumaPool(**place, stage_schedule=None, time=bell, confidence="margin")
    assert (pool.config.stage_schedule, pool.config.order) == ([], "margin")
    assert pool.revealed_share.mass.tolist() == pytest.approx([0.125, 0.375, 0.375, 0.125], abs=1e-15)
    for time in (None, Density(torch.ones(1))):
        assert unmask.RandomMasking(**place, time=time).time.cells == 1


def test_the_tree_in_the_architecture_names_every_module() -> None:
    package = Path(unmask.__file__).parent
    page = package.parent / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("docs/ is not installed with the package")
    tree = page.read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"\w+", tree))
    modules = [*package.glob("*.py"), *package.glob("[!c]*/*.py"), *package.glob("config/*.py")]  # cli: a file a verb
    assert [str(path) for path in modules if path.stem not in named and not path.stem.startswith("_")] == []
