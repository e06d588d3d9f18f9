"""The folder of a run: its configuration, environment, metrics and checkpoints, locked by the process that trains."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from unmask import files, formats, machine
from unmask.config.registry import found_in
from unmask.config.run import RunConfig
from unmask.config.settings import flatten
from unmask.errors import UserError
from unmask.models.backends import BACKENDS

_MAY_CHANGE = (
    "model.preset",  # what it stands for is compared
    "data.cache_dir",  # what is kept there can be made again
    *(f"train.{key}" for key in ("steps", "epochs", "max_seconds", "max_examples", "threads", "compile")),
    *(f"train.{key}" for key in ("parallel", "cpu_offload", "timeout", "checkpoint_every", "keep_last", "keep_every")),
    *(f"train.{key}" for key in ("on_bad_numbers", "max_skips")),
)
_SECTIONS_MAY_CHANGE = ("decode", "eval", "log")
_MOST_TOLD = 2**20  # bytes of an environment.json, parts of which are printed
_BITS_DEPEND_ON = ("torch", "cpu", "threads", "processes", "device", "dtype", "compiled")


_LOCK = ".lock"
_FILES = (_LOCK, "config.yaml", "environment.json", "metrics.jsonl", "tracker_id")
_FOLDERS = ("checkpoints", "tensorboard", "bad_batches", "vocabulary")
_OURS = (_LOCK, f"{files.ASIDE}config.yaml")  # how all begins that a run that died at its very start may leave behind


class RunFolder:
    """`RUN/`: `config.yaml`, `environment.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.before: RunConfig | None = None
        """The settings that the run has had so far, once it is open; None for a new one."""
        self._lock: files.FileLock | None = None

    def exists(self) -> bool:
        return (self.path / "config.yaml").exists()

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Checks that a run of `config` may start or resume here. Writes nothing, as its data may still turn out wrong.

        Raises:
            UserError: the path is no folder, or holds something else than a run; or it holds a run, and `resume` is not
                set, or settings that may not change differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; name another one with --out")
        if self.exists() and not resume:
            raise UserError(
                f"{self.path} already holds a run; continue it with --resume, or name another folder with --out"
            )
        if self.exists():
            self._check_same(config)
        elif self.path.exists() and any(not path.name.startswith(_OURS) for path in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty, and holds no run; name another folder with --out")

    def open(self, config: RunConfig, *, resume: bool) -> None:
        """Locks the folder and reads the settings `before`. Writes nothing, as the state may still turn out wrong.

        Raises:
            UserError: another process has the lock, the folder cannot be made or written, or `check` fails by now.
        """
        try:
            with files.naming(self.path, "--out "):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = files.FileLock(self.path / _LOCK, wait=False)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process is training here; wait for it, or use another --out"
            ) from None
        self.check(config, resume=resume)  # again: another process may have come and gone since
        files.sweep(self.path)
        self.before = read_config(self.path) if self.exists() else None

    def write(self, config: RunConfig, environment: dict[str, Any] | None, warn: Callable[[str], None]) -> None:
        """Writes the configuration, and the environment of what is to be trained, if anything; warns of another one."""
        if environment is not None:
            self._compare_environment(environment, warn)
        files.write(self.path / "config.yaml", to_yaml(config))
        if environment is not None:
            self.write_environment(environment)

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Writes `environment.json`."""
        files.write(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")

    def is_held(self) -> bool:
        """True if a process is training here now."""
        return files.FileLock.is_held(self.path / _LOCK)  # no such file: never trained here, or copied from elsewhere

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_same(self, config: RunConfig) -> None:
        held = read_config(self.path)
        old, new = (dict(flatten(each.model_dump(mode="json"))) for each in (held, config))
        has_base = getattr(config.model, "lora", None) is not None  # named by a digest too, which resuming checks
        changed = [
            f"  {key}: {old.get(key)!r} in {self.path}, now {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and not (_may_change(key) or (key == "train.init" and has_base))
        ]
        if changed:
            raise UserError(
                "cannot resume: these settings differ from the run's; leave them as they were, or start another run "
                "(train.init starts warm)\n" + "\n".join(changed)
            )

    def _compare_environment(self, environment: dict[str, Any], warn: Callable[[str], None]) -> None:
        old = read_environment(self.path)
        for key in _BITS_DEPEND_ON if old else ():
            if old.get(key) != environment.get(key):
                was = repr(old.get(key))[:100]
                warn(f"{key} was {was}, is {environment.get(key)!r}: results may differ in their last bits")


def _may_change(key: str) -> bool:
    return key in _MAY_CHANGE or key.split(".")[0] in _SECTIONS_MAY_CHANGE


def to_yaml(config: RunConfig) -> str:
    return formats.to_yaml(config.model_dump(mode="json"))


def read_config(path: Path) -> RunConfig:
    """Reads the settings of the run in the folder `path`; keys that are newer than it have their defaults.

    Raises:
        UserError: it is no run folder, or holds wrong settings, or links out of it.
    """
    return resolve_config(read_settings(path), path / "config.yaml")


def read_settings(path: Path) -> dict[str, Any]:
    """Reads config.yaml of the run in the folder `path` as it is, without a check, and imports nothing.

    Raises:
        UserError: it is no run folder, or links out of it.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: not a run folder: {found}; name a run, an export or a Hugging Face checkpoint")
    check_parts(path)
    try:
        tree = formats.read_yaml(path / "config.yaml", is_saved=True)
    except UserError as error:
        raise UserError(f"{path}: not a run folder: cannot read config.yaml: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a run folder: config.yaml holds no settings")
    return tree


def resolve_config(tree: dict[str, Any], file: Path) -> RunConfig:
    """Checks the settings that a run or an export saved in `file`, and imports the components that they name.

    The one place where what a run names becomes code: names that are not unmask's are refused unless they are trusted
    (`registry.found_in`).

    Raises:
        UserError: settings are wrong, or name components that are not there or not trusted.
    """
    try:
        with found_in(file):
            return RunConfig.from_tree(tree)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def schedule_length(config: RunConfig) -> str | None:
    """Returns the length of the learning rate's schedule in words, or None if the rate is constant."""
    train = config.train
    if config.optim.schedule == "constant":
        return None
    return f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"


class _Environment(BaseModel):
    """The fields of `environment.json` that are more than text for people."""

    model_config = ConfigDict(extra="allow")

    attention: str | None = None
    command: str | None = None
    threads: int | None = None
    processes: int | None = None
    compiled: bool | None = None


def read_environment(path: Path) -> dict[str, Any]:
    """Reads `environment.json` of a run folder; empty if there is none.

    Raises:
        UserError: it is damaged; names the field.
    """
    file = path / "environment.json"
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = formats.read_json(file, dict[str, Any], max_bytes=_MOST_TOLD)
        chosen = formats.checked(found, _Environment, str(file)).attention
    except UserError as error:
        raise UserError(f"{error}; put back a copy of the file, or delete it") from error
    if chosen not in (None, *BACKENDS):
        raise UserError(f"{file}: attention={chosen[:40]!r}: use one of {', '.join(BACKENDS)}, or delete the file")
    return found


def check_parts(path: Path) -> None:
    """Checks that what a run's folder holds is there itself, unless `files.follow_links` was called.

    A folder that one was given may have links in place of its parts, to files that opening or resuming it would then
    read or overwrite. The folder itself may be a link.

    Raises:
        UserError: a part is a link out of the folder, or is neither file nor folder.
    """
    parts = [path / name for name in (*_FILES, *_FOLDERS)]
    for name in ("checkpoints", "vocabulary"):
        with suppress(OSError):
            parts += (path / name).iterdir()
    for part in parts:
        if part.is_symlink() and not files.follows_links():
            try:
                is_inside = part.resolve().is_relative_to(path.resolve())
            except (OSError, RuntimeError):  # links in a circle
                is_inside = False
            if not is_inside:
                raise UserError(
                    f"{part}: is a link out of the run's folder, by which other files could be read or overwritten; if "
                    "you made it, add --follow-links (in Python: unmask.files.follow_links())"
                )
        if part.name in _FILES and part.exists() and not part.is_file():
            raise UserError(f"{part}: is no regular file; a run holds one")
        if part.name in _FOLDERS and part.exists() and not part.is_dir():
            raise UserError(f"{part}: is no folder; a run holds one")


def describe_environment(device: torch.device, *, dtype: str, is_compiled: bool, processes: int = 1) -> dict[str, Any]:
    """Collects versions, hardware and revision, which someone who repeats the run needs to know."""
    return {
        "unmask": own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": machine.cpus(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype,
        "compiled": is_compiled,
        "git_revision": _git_revision(),
        "command": command_line(),
    }


def own_version() -> str | None:
    """Returns the version of this package; None if it is not installed, but found on the path."""
    try:
        return metadata.version("unmask")
    except metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """Returns the command that started this process, as one would type it again."""
    program, *arguments = sys.argv
    name = "unmask" if Path(program).name in ("unmask", "__main__.py") else program
    return shlex.join([name, *arguments])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str | None:
    """Returns the revision of this package's checkout, with `-dirty` if it has changes; None if it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
