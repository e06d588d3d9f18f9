"""What `import unmask` promises."""

import inspect

import pytest

import unmask


@pytest.mark.parametrize("name", unmask.__all__)
def test_every_public_name_and_method_says_what_it_is(name: str) -> None:
    thing = getattr(unmask, name)
    assert inspect.getdoc(thing)
    methods = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
    own = [(key, method) for key, method in methods if method.__module__.startswith("unmask") and key[0] != "_"]
    assert [key for key, method in own if not inspect.getdoc(method)] == []
