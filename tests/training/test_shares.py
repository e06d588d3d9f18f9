"""A model of which each process has a share: it is saved by all of them, and read by any number."""

import errno
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from tests.helpers import assert_same
from unmask import files
from unmask.peers import Peers
from unmask.training import checkpoint, parallel
from unmask.training.parallel import TensorShard

SIZE = 3
WHOLE: dict[str, Any] = {
    "model": {
        "wide": torch.randn(7, 4),  # 3, 3 and 1 rows
        "short": torch.randn(2, dtype=torch.float64),  # 1, 1 and none
        "both": torch.randn(6, 2, 2).to(torch.bfloat16),
    },
    "optimizer": {"wide": {"exp_avg": torch.randn(7, 4), "step": torch.tensor(5.0)}},
    "process": {"pool": torch.tensor([True, False]), "step": 3},
    "progress": {"step": 7},
}


class Told(Peers):
    """One of several threads that play processes."""

    size = SIZE

    def __init__(self, rank: int, told: dict[str, str], seconds: float = 10.0) -> None:
        self.rank, self.told, self.seconds = rank, told, seconds

    def kv_set(self, key: str, words: str = "") -> None:
        self.told[key] = words

    def kv_get(self, key: str) -> str:
        deadline = time.monotonic() + self.seconds
        while key not in self.told:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {self.rank} was told nothing of {key}")
            time.sleep(0.001)
        return self.told[key]


def local_shard(tree: Any, rank: int) -> Any:
    """The share of `rank` in all but the pool and single numbers."""
    if isinstance(tree, dict):
        return {key: value if key == "process" else local_shard(value, rank) for key, value in tree.items()}
    if not isinstance(tree, Tensor) or not tree.ndim:
        return tree
    parts = tree.chunk(SIZE)
    own = parts[rank] if rank < len(parts) else tree[:0]
    return TensorShard(own, min(len(tree), rank * -(-len(tree) // SIZE)))


def save(folder: Path, ranks: range = range(SIZE), folders: dict[int, Path] | None = None) -> dict[int, object]:
    """What `checkpoint.save` returned or raised, by rank."""
    told: dict[str, str] = {}
    ended: dict[int, object] = {}

    def work(rank: int) -> None:
        peers = Told(rank, told, seconds=10.0 if len(ranks) == SIZE else 0.1)
        try:
            ended[rank] = checkpoint.save((folders or {}).get(rank, folder), 7, local_shard(WHOLE, rank), peers)
        except OSError as error:
            ended[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    assert save(folder) == dict.fromkeys(range(SIZE), folder / "step_00000007")
    return folder / "step_00000007"


def test_what_all_saved_is_read_by_one(saved: Path) -> None:
    assert checkpoint.damage(saved) is None
    assert_same(checkpoint.load(saved), WHOLE)
    assert_same(dict(checkpoint.load_part(saved, "model")), WHOLE["model"])
    assert_same(dict(checkpoint.load_part(saved, "optimizer/wide")), WHOLE["optimizer"]["wide"])
    assert checkpoint.load_part(saved, "ema/shadow") == {}


def test_each_writes_its_own_file(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    own = {f"{part}-{n:05d}-of-00003.safetensors" for part in ("model", "optimizer") for n in (1, 2, 3)}
    assert names == own | {"COMPLETE", "state.json", "process.safetensors", "optimizer.safetensors"}


@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(3, 6), slice(6, 7), slice(7, 7), slice(0, 1)])
def test_rows_that_are_asked_for_are_read(saved: Path, rows: slice) -> None:
    state = checkpoint.load(saved, unread=("model", "optimizer"))
    assert state["model"]["wide"].shape == (7, 4)
    assert torch.equal(state["model"]["wide"][rows], WHOLE["model"]["wide"][rows])
    assert state["optimizer"]["wide"]["step"].shape == ()
    assert torch.equal(state["optimizer"]["wide"]["step"].whole(), torch.tensor(5.0))
    assert isinstance(state["process"]["pool"], Tensor)


def test_pytorch_reads_it(saved: Path) -> None:
    found = {f"model/{name}": torch.zeros_like(value) for name, value in WHOLE["model"].items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(saved)), no_dist=True)
    assert_same(found, {f"model/{name}": value for name, value in WHOLE["model"].items()})


def test_rows_that_are_nowhere_are_missed(tmp_path: Path) -> None:
    for start in (0, 4):
        parallel.write(tmp_path / f"{start}.safetensors", {"a": TensorShard(torch.ones(2, 3), start)})
    stored = parallel.read(sorted(tmp_path.iterdir()))["a"]
    assert torch.equal(stored[0:2], torch.ones(2, 3))
    with pytest.raises(ValueError, match="a: rows 0 to 6 are not all there"):
        stored.whole()


@pytest.mark.parametrize("offsets", ['{"a": 5}', '{"a": {}}', '"a"', "{"])
def test_offsets_that_are_none_are_damage(offsets: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, WHOLE)
    save_file({"a": torch.ones(2)}, path / "a.safetensors", {"DCP_SHARDING_INFO": offsets})
    listed = json.loads((path / "COMPLETE").read_text())
    listed["a.safetensors"] = hashlib.sha256((path / "a.safetensors").read_bytes()).hexdigest()
    (path / "COMPLETE").write_text(json.dumps(listed))
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) is None
    assert "step_00000007" in said[0]


@pytest.mark.parametrize("broken", range(SIZE))
def test_a_process_that_cannot_write_ends_the_saving_of_all(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tensors, remove = files.put_tensors, files.remove
    writing: set[str] = set()

    def put(path: Path, *values: Any) -> None:
        if f"-0000{broken + 1}-of" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        writing.add(path.name)
        time.sleep(0.3 if "00003-of" in path.name else 0.05)  # the last still writes when the broken one has failed
        put_tensors(path, *values)
        writing.remove(path.name)

    def remove_what_none_writes_to(path: Path) -> None:
        assert not writing, writing
        remove(path)

    monkeypatch.setattr(files, "put_tensors", put)
    monkeypatch.setattr(files, "remove", remove_what_none_writes_to)
    ended = save(tmp_path)
    assert set(ended) == set(range(SIZE))
    for error in ended.values():
        assert str(error).startswith(f"rank {broken}: [Errno 28]" if broken else "[Errno 28]")
    assert not [*tmp_path.iterdir()]


def test_a_main_process_that_cannot_begin_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "make_folder", denied)
    for error in save(tmp_path).values():
        assert "Permission denied" in str(error)


def test_a_process_that_does_not_come_is_waited_for_no_longer(tmp_path: Path) -> None:
    ended = save(tmp_path, range(SIZE - 1))
    assert "rank 0 was told nothing of : step_00000007, rank 2" in str(ended[0])
    assert not [*tmp_path.iterdir()]


def test_shares_that_the_main_process_does_not_see_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_PATIENCE", 0.2)
    here, there = tmp_path / "here", tmp_path / "there"
    (there / ".writing_step_00000007").mkdir(parents=True)
    ended = save(here, folders={2: there})
    assert "rank 2 wrote model-00003-of-00003.safetensors, but not here; put the run where all" in str(ended[0])
    assert checkpoint.steps(here) == []


def test_a_copy_of_a_share_does_not_change_any_more() -> None:
    own = torch.ones(2)
    taken = checkpoint.snapshot({"a": TensorShard(own, 3)})
    own.zero_()
    assert_same(taken["a"].own, torch.ones(2))
    assert taken["a"].start == 3
