"""Makes multiple-choice questions of any text: which of N endings is the one that goes on from a passage?

    python benchmarks/continuation_choices.py OUT.jsonl TEXT.. [--questions 200] [--context 200] [--ending 40]

TEXT: files as `unmask prepare text` reads them, best ones that no model was trained on. Passages and endings are taken
at places that a hash of the seed and of their number chooses: the same command always writes the same file. False
endings come from other places of all the files together, start at a word, and are as long as the true one. OUT is what
`unmask eval --task multiple_choice` and `eval.multiple_choice` read; by chance 1/N are right.
"""

import argparse
import json
from pathlib import Path

from unmask import noise
from unmask.data.prepare.sources import FileSource
from unmask.errors import UserError
from unmask.noise import Purpose

_DRAWS = 100  # for each piece, on average: most of a text's places will do


def read(paths: list[str]) -> list[str]:
    """Reads the documents, each with its spaces and line ends as single spaces."""
    rows = (row.fields["text"] for path in paths for row in FileSource(path).rows(("text",)))
    return [" ".join(text.split()) for text in rows]


class Places:
    """Draws pieces of documents, from `most` places at most; the n-th piece depends on the seed and n alone."""

    def __init__(self, documents: list[str], seed: int, most: int) -> None:
        self.documents, self.seed, self.most, self.drawn = documents, seed, most, 0

    def uniform(self, *keys: int) -> float:
        return noise.integer(self.seed, Purpose.BENCHMARK, *keys) / 2**63

    def draw(self, before: int, after: int) -> tuple[str, str]:
        """Returns `before` characters that end with a word, and the `after` characters that follow the space.

        Raises:
            UserError: all places were drawn.
        """
        while self.drawn < self.most:
            self.drawn += 1
            text = self.documents[int(self.uniform(0, self.drawn) * len(self.documents))]
            space = text.find(" ", before + int(self.uniform(1, self.drawn) * (len(text) - before - after)))
            ending = text[space + 1 : space + 1 + after]
            if space > 0 and len(ending) == after and ending == ending.strip():
                return text[space - before : space], ending
        raise UserError(
            f"TEXT: {self.most} places gave too few different endings of {after} characters after a space; give more "
            "text, with spaces between its words, or fewer --questions or --choices"
        )


def make(places: Places, number: int, *, choices: int, context: int, ending: int) -> dict[str, object]:
    """Makes the question `number`."""
    passage, true = places.draw(context, ending)
    false: list[str] = []
    while len(false) < choices - 1:
        _, other = places.draw(context, ending)
        if other not in (true, *false):
            false.append(other)
    answer = int(places.uniform(2, number) * choices)
    return {"context": passage, "choices": [*false[:answer], true, *false[answer:]], "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--context", type=int, default=200, help="characters of the passage")
    parser.add_argument("--ending", type=int, default=40, help="characters of an ending")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not (documents := [text for text in read(asked.text) if len(text) > asked.context + asked.ending]):
        parser.error(f"no document is longer than {asked.context} + {asked.ending} characters")
    places = Places(documents, asked.seed, _DRAWS * asked.questions * asked.choices)
    sizes = {name: getattr(asked, name) for name in ("choices", "context", "ending")}
    try:
        rows = [make(places, number, **sizes) for number in range(asked.questions)]
    except UserError as error:
        parser.error(str(error))
    with asked.out.open("x") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
