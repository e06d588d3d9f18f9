"""`unmask prepare` beside the loop that people write: one process, the tokenizer called once for each text.

    python benchmarks/prepare.py rows.jsonl --tokenizer ./qwen --rows 20000 --times 5

Both read the same rows and write the same arrays, in turn; what is timed begins when tokenizer and processes are there.
Prints one JSON object: rows a second of each (the median, and all), and the ratio of the medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unmask.data.prepare import PrepareSettings, workers
from unmask.data.prepare.run import batched
from unmask.data.prepare.sources import FileSource
from unmask.data.prepare.workers import WorkFolder
from unmask.data.prepare.writing import finish_rows, write_store
from unmask.data.vocabulary import Vocabulary


def loop(file: str, tokenizer: Any, num_rows: int, length: int, folder: Path) -> float:
    """Seconds for `num_rows` rows."""
    start = time.perf_counter()
    labels = np.memmap(folder / "labels.bin", np.uint32, "w+", shape=(num_rows, length))
    prompts = np.memmap(folder / "prompt_mask.bin", np.uint8, "w+", shape=(num_rows, length // 8))
    separator = tokenizer("\n", add_special_tokens=False).input_ids
    with Path(file).open(encoding="utf-8") as lines:
        for i, line in enumerate(islice(lines, num_rows)):
            row = json.loads(line)
            prompt = tokenizer(row["question"].strip(), add_special_tokens=False).input_ids + separator
            ids = (prompt + tokenizer(row["code"].strip(), add_special_tokens=False).input_ids)[:length]
            labels[i] = ids + [tokenizer.eos_token_id] * (length - len(ids))
            prompts[i] = np.packbits(np.arange(length) < len(prompt), bitorder="little")
    labels.flush()
    prompts.flush()
    return time.perf_counter() - start


def count_rows(file: str, most: int) -> int:
    """Counts the rows of `file`, up to `most`."""
    return sum(1 for _ in islice(FileSource(file).rows(("question", "code")), most))


def prepare(settings: PrepareSettings, vocabulary: Vocabulary, num_rows: int) -> float:
    """Seconds from the first shard, for which the processes had to start, to the store."""
    with WorkFolder(settings.partial, {}) as work:
        rows = islice(FileSource(settings.sources[0]).rows(settings.fields), num_rows)
        batches = iter(batched(rows, settings.batch_rows))
        reports = workers.tokenise(batches, vocabulary, settings, work)
        first = next(reports).counts["read"]
        start = time.perf_counter()
        num_shards = 1 + sum(1 for _ in reports)
        write_store(work.store, [work.shard(i) for i in range(num_shards)], vocabulary, settings, {}, finish_rows)
        seconds = time.perf_counter() - start
        work.delete()
    return seconds * num_rows / (num_rows - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="JSON lines with question and code")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=20_000, help="rows at most; the result names those there were")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    asked.rows, given = count_rows(asked.file, asked.rows), asked.rows
    if asked.rows <= (batch := PrepareSettings.batch_rows):
        parser.error(
            f"--rows {given}: {asked.file} gives {asked.rows}; give more than {batch}: the first {batch} are not timed"
        )
    print(json.dumps(compare(asked), indent=1))


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(asked.tokenizer), Vocabulary.from_source(asked.tokenizer)
    rates: dict[str, list[float]] = {"loop": [], "prepare": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = PrepareSettings(
            "tinygsm", asked.tokenizer, Path(folder) / "out", (asked.file,), asked.length, workers=asked.workers
        )
        for _ in range(asked.times):
            rates["loop"].append(asked.rows / loop(asked.file, theirs, asked.rows, asked.length, Path(folder)))
            rates["prepare"].append(asked.rows / prepare(settings, ours, asked.rows))
    median = {name: statistics.median(each) for name, each in rates.items()}
    return {"rows_per_second": median, "all": rates, "ratio": median["prepare"] / median["loop"], **vars(asked)}


if __name__ == "__main__":
    main()
