"""The Python that a program gets: harmless builtins, and modules cut down to harmless names."""

import builtins
import collections
import datetime
import decimal
import fractions
import functools
import itertools
import math
import statistics
import typing
from types import ModuleType
from typing import Any

# No `type`, `object`, `getattr`, `vars`, `open`, `input`, `id`, `memoryview`, `super`, `__build_class__`, ..
_BUILTINS = """
abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format frozenset
hash hex int isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice
sorted str sum tuple zip Ellipsis NotImplemented
ArithmeticError AssertionError AttributeError BaseException EOFError Exception FloatingPointError GeneratorExit
ImportError IndexError KeyError KeyboardInterrupt LookupError MemoryError ModuleNotFoundError NameError
NotImplementedError OverflowError RecursionError RuntimeError StopIteration SystemExit TypeError
UnboundLocalError UnicodeError ValueError ZeroDivisionError
"""

_MODULES: dict[ModuleType, str] = {
    math: " ".join(name for name in dir(math) if not name.startswith("_")),
    itertools: " ".join(name for name in dir(itertools) if not name.startswith("_")),
    fractions: "Fraction",
    decimal: "Decimal ROUND_CEILING ROUND_DOWN ROUND_FLOOR ROUND_HALF_DOWN ROUND_HALF_EVEN ROUND_HALF_UP ROUND_UP",
    functools: "cache lru_cache partial reduce",
    collections: "Counter OrderedDict defaultdict deque",
    statistics: "fmean geometric_mean harmonic_mean mean median mode pstdev pvariance stdev variance",
    datetime: "date datetime time timedelta",
    typing: "Any Callable Dict Final Iterable Iterator List Optional Sequence Set Tuple Union",
}

SAFE_BUILTINS = frozenset(_BUILTINS.split())
ALL_BUILTINS = frozenset(dir(builtins))
MODULES = {module.__name__: frozenset(names.split()) for module, names in _MODULES.items()}


def namespace() -> dict[str, Any]:
    """Globals for a program. `__name__` is not `__main__`: its own tests stay asleep, as on an import."""
    safe = {name: getattr(builtins, name) for name in SAFE_BUILTINS}
    return {"__builtins__": safe | {"__import__": _importer()}, "__name__": "program"}


def _importer() -> Any:
    modules = {module.__name__: _cut_down(module) for module in _MODULES}

    def import_(name: str, _globals: Any = None, _locals: Any = None, _names: Any = (), level: int = 0) -> ModuleType:
        if level or name not in modules:
            raise ImportError(f"no module {name!r} for programs")
        return modules[name]

    return import_


def _cut_down(module: ModuleType) -> ModuleType:
    small = ModuleType(module.__name__)
    for name in MODULES[module.__name__]:
        setattr(small, name, getattr(module, name))
    return small
