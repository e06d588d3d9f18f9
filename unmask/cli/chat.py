"""`unmask chat`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from unmask import paths
from unmask.cli import options, prompts
from unmask.cli.session import DecodeSession
from unmask.config.settings import LARGEST_INT, quoted
from unmask.decoding.config import DecodeConfig
from unmask.errors import Interrupted, UserError
from unmask.formats import to_json
from unmask.progress import console
from unmask.training.loading import LoadedRun

_HELP = """A prompt a line, as in `unmask decode`: a question, a puzzle, or a JSON object. Commands:
/decoder margin,threshold=0.9   change settings of the decoder; alone: show it
/seed 3                         change the seed: with temperature=1, another answer to the same prompt
/new                            begin a new conversation, where the task has such: else a line follows those before
/help                           show this list
/quit                           leave (as does Ctrl-D)"""


def chat(
    run: options.Run,
    decoder: options.Decoder = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Type prompts, and watch them being filled in.

    Each line is a prompt, as in `unmask decode`. Lines that begin with / are commands; `/help` lists them. Lines that
    are piped in are answered one by one. With a model of conversations (task `chat`) a line is the user's next message,
    and the answers before are kept, until `/new`.

    Examples:

    * `unmask chat runs/sudoku-puma --decoder margin`

    * `echo "How many is two and three?" | unmask chat runs/tinygsm-puma`
    """
    loaded = LoadedRun.open(run, weights=weights, step=step, device=device)
    settings = options.parse_decoder(decoder, loaded.config.decode)
    conversation = _Conversation(DecodeSession(loaded, settings))
    if sys.stdin.isatty():
        console.print(conversation.greeting)
    for line in _lines():
        try:
            if not conversation.take(line.strip()):
                return
        except UserError as error:
            console.print(f"Error: {error}", style="red")
        except Interrupted:  # no Ctrl-C, but a signal to end
            raise
        except KeyboardInterrupt:
            console.print("Stopped")


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from paths.stdin_lines()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # history, and keys that move within the line
    while True:
        try:
            yield console.input("> ")
        except Interrupted:
            raise
        except (EOFError, KeyboardInterrupt):
            return


class _Conversation:
    def __init__(self, session: DecodeSession) -> None:
        self.session = session
        self.history: list[dict[str, str]] = []

    @property
    def greeting(self) -> str:
        run, label = self.session.run, self.session.settings.label
        return f"Step {run.step}, {run.weights} weights, decoder {label}; /help lists the commands"

    def take(self, line: str) -> bool:
        """Answers a line; returns False after the last one."""
        if line == "/quit":
            return False
        if line.startswith("/"):
            self._command(*line.partition(" ")[::2])
        elif line:
            self._answer(line)
        return True

    def _command(self, name: str, value: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/decoder": self._change_decoder,
            "/seed": self._change_seed,
            "/new": lambda value: self.history.clear(),
            "/help": lambda value: console.print(_HELP),
        }
        if name not in commands:
            raise UserError(f"{name}: no such command; use {', '.join(commands)} or /quit")
        commands[name](value.strip())

    def _change_decoder(self, value: str) -> None:
        settings = options.parse_decoder(value or None, self.session.settings, "/decoder")
        self._change_settings(settings)

    def _change_seed(self, value: str) -> None:
        if not value.isdecimal() or len(value) > len(str(LARGEST_INT)) or int(value) > LARGEST_INT:
            raise UserError(f"/seed {quoted(value)}: give a whole number from 0 to {LARGEST_INT}")
        self._change_settings(self.session.settings.model_copy(update={"seed": int(value)}))

    def _change_settings(self, settings: DecodeConfig) -> None:
        self.session = DecodeSession(self.session.run, settings)
        console.print(f"decoder {settings.label}")

    def _answer(self, line: str) -> None:
        task = self.session.run.task
        is_message = getattr(task, "has_turns", False) and not line.startswith("{")
        messages = [*self.history, {"role": "user", "content": line}]
        asked = prompts.parse(task, [to_json({"messages": messages}) if is_message else line], "prompt")
        asked.check(self.session)
        is_shown = sys.stdin.isatty() and console.is_terminal
        decoded, seconds = self.session.watch(asked.canvases, asked.keys, is_shown=is_shown)
        record = task.record(asked.canvases[0], decoded.tokens[0].cpu())
        if is_message and record["text"].strip():
            self.history = [*messages, {"role": "assistant", "content": record["text"]}]
        if is_message:
            del record["prompt"]  # all that was said before
        out = options.results()
        for key, value in record.items():
            out.print(f"{key}: {_shown(value)}")
        nfe = int(decoded.nfe[0])
        out.print(f"{nfe} forward pass{'es' * (nfe != 1)}, {seconds:.2f} s")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"\n{text}" if "\n" in text else text
