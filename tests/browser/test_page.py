"""The report in headless Chromium: it draws, the controls work, and nothing is logged or fetched.

What a test does on the page is a script added to a copy of it, which writes what it saw into the page; Chromium then
prints the page.
"""

import html
import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import SHORT, run_cli
from unmask.config import recipes
from unmask.training.folder import to_yaml

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of two short runs, of which one has two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"uniform": ["process.name=uniform"], "puma/seed_0": [], "puma/seed_1": ["train.seed=1"]}
    for name, own in settings.items():
        assert run_cli("train", "debug", *SHORT, "eval.every=2", *own, "--out", folder / name) == 0
    assert (
        run_cli("report", *(folder / name for name in settings), "--out", folder / "page.html", "--examples", "2") == 0
    )
    return (folder / "page.html").read_text()


@pytest.fixture(scope="module")
def bare_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run folder without checkpoints."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(recipes.load("debug")))
    row = {"step": 1, "seconds": 1, "examples_seen": 1, "eval/accuracy/ema/prob/3": 0.5, "eval/nelbo": 1.0}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run_cli("report", folder / "run", "--out", folder / "page.html") == 0
    return (folder / "page.html").read_text()


def allowed(page: str) -> str:
    """Makes the page's policy, if it has one, allow the styles and scripts that a test has put into it."""
    for tag in ("style", "script"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sources = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)
        page = re.sub(f'(<meta http-equiv="Content-Security-Policy"[^>]*{tag}-src ).*?&#39;; ', rf"\1{sources}; ", page)
    return page


def browse(page: str, script: str, tmp_path: Path, *flags: str) -> Any:
    """What `script`, the body of an async function, returns on the page."""
    assert CHROMIUM is not None
    probe = (
        "<script>(async () => {"
        f"const seen = await (async () => {{ {script} }})();"
        "const out = document.createElement('pre'); out.id = 'seen'; out.textContent = JSON.stringify(seen);"
        "document.body.append(out); })();</script>"
    )
    path = tmp_path / "page.html"
    path.write_text(allowed(page.replace("</body>", probe + "</body>")))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


HELP = """
const slider = document.getElementById('step'), boards = [...document.querySelectorAll('.board')];
const count = (kind) => boards.map((board) => board.querySelectorAll('.cell.' + kind).length);
const options = {bubbles: true, cancelable: true};
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, ...options}));
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
"""


def test_it_draws_and_fetches_nothing(page: str, tmp_path: Path) -> None:
    assert not re.search(r"(?:src|href)=\"(?!#|data:)|url\(|@import|https?://", page)
    seen = browse(
        page,
        HELP
        + """
        return {charts: document.querySelectorAll('figure svg').length,
                sizes: [...document.querySelectorAll('#masks figure svg')].map((svg) => svg.clientHeight),
                lines: document.querySelectorAll('.measure:not([style*=none]) .line').length,
                legend: [...document.querySelectorAll('.legend b')].map((name) => name.textContent),
                cells: boards.map((board) => board.querySelectorAll('.cell').length)};""",
        tmp_path,
    )
    assert seen["legend"] == ["uniform", "puma"]
    assert seen["charts"] == 3 * 4 + 3 + 3  # two rates and the NELBO, against four axes; the masks; the diagnostics
    assert all(height > 100 for height in seen["sizes"])
    assert seen["lines"] == 4 * 2
    assert seen["cells"] == [81, 81]


def test_the_slider_fills_the_boards(page: str, tmp_path: Path) -> None:
    seen = browse(
        page,
        HELP
        + """
        const at = (value) => { slider.value = value; slider.dispatchEvent(new Event('input')); };
        const result = [];
        for (const value of [0, 1, 5, slider.max]) { at(value); result.push([count('masked'), count('filled')]); }
        const status = boards.map((board) => board.querySelector('p').textContent);
        return {result, max: Number(slider.max), status, given: count('given'), fresh: count('fresh')};""",
        tmp_path,
    )
    blank = 81 - seen["given"][0]
    for (masked, filled), step in zip(seen["result"], [0, 1, 5, seen["max"]], strict=True):
        expected = min(step, blank)  # a cell a step
        assert filled == [expected, expected]
        assert masked == [blank - expected, blank - expected]
    assert seen["fresh"] == [1, 1]
    assert all(re.search(r"; (not )?solved", status) for status in seen["status"])


def test_keys_and_buttons(page: str, tmp_path: Path) -> None:
    seen = browse(
        page,
        HELP
        + """
        press('ArrowRight');
        const away = slider.value;
        document.getElementById('boards').scrollIntoView();
        await wait(300);
        const steps = [];
        for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End', 'Home']) {
            if (key === 'End') document.getElementById('boards').focus();
            press(key);
            steps.push(slider.value);
        }
        const max = slider.max, play = document.getElementById('play');
        play.click();
        await wait(1100);
        const while_playing = [Number(slider.value), play.textContent];
        play.blur();
        document.getElementById('boards').focus();
        press(' ');
        const paused = slider.value;
        await wait(600);
        const still = slider.value === paused;
        press('ArrowDown');
        const puzzle = document.getElementById('puzzle').value;
        const measure = document.getElementById('measure');
        measure.value = 1;
        measure.dispatchEvent(new Event('change'));
        const shown = [...document.querySelectorAll('.measure')].map((each) => each.style.display !== 'none');
        return {away, steps, max, while_playing, still, puzzle, shown, label: play.textContent};""",
        tmp_path,
    )
    assert seen["away"] == "0"  # the boards are below the window: the keys are the page's
    assert seen["steps"] == ["1", "2", "1", seen["max"], "0"]
    assert 2 <= seen["while_playing"][0] <= 5  # four steps a second
    assert seen["while_playing"][1].endswith("Pause")
    assert seen["label"].endswith("Play")
    assert seen["still"]
    assert seen["puzzle"] == "1"
    assert seen["shown"] == [False, True, False]


def test_without_a_replay_the_menu_still_chooses(bare_page: str, tmp_path: Path) -> None:
    seen = browse(
        bare_page,
        """const measure = document.getElementById('measure');
        const shown = () => [...document.querySelectorAll('.measure')].map((each) => each.style.display !== 'none');
        const before = shown();
        measure.value = 1;
        measure.dispatchEvent(new Event('change'));
        return {before, after: shown(), slider: document.getElementById('step')};""",
        tmp_path,
    )
    assert seen == {"before": [True, False], "after": [False, True], "slider": None}


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(page: str, width: int, tmp_path: Path) -> None:
    """In a frame, since a window of Chromium's is never narrower than 500."""
    frame = f"<html><body><iframe style='border:0;width:{width}px;height:800px' srcdoc='{html.escape(page)}'></iframe>"
    seen = browse(
        frame + "</body></html>",
        """const frame = document.querySelector('iframe');
        const hasDrawn = () => frame.contentDocument.querySelector('.cells .cell');
        for (let n = 0; n < 40 && !hasDrawn(); n++) await new Promise((done) => setTimeout(done, 100));
        const root = frame.contentDocument.documentElement;
        return {scroll: root.scrollWidth, client: root.clientWidth,
                board: frame.contentDocument.querySelector('.cells').clientWidth};""",
        tmp_path,
        "--window-size=1400,900",
    )
    assert seen["scroll"] <= seen["client"] <= width
    assert seen["board"] > 250


def test_without_colour_lines_differ_in_dash_and_marker(page: str, tmp_path: Path) -> None:
    seen = browse(
        page,
        """const lines = [...document.querySelectorAll('.measure:first-of-type figure:first-child .line')];
        return lines.map((line) => getComputedStyle(line).strokeDasharray);""",
        tmp_path,
    )
    assert len(set(seen)) == 2
    marks = set(re.findall(r'<use href="#(mark\d)"', page))
    assert len(marks) == 2


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's ratio of two colours written rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_can_be_told_from_the_paper(page: str, scheme: str, tmp_path: Path) -> None:
    if scheme == "dark":  # what the browser would choose, made the only choice
        page = page.replace("(prefers-color-scheme: dark)", "all")
    seen = browse(
        page,
        """const colour = (name, property) => getComputedStyle(document.querySelector(name))[property];
        return {paper: colour('body', 'backgroundColor'), ink: colour('body', 'color'), dim: colour('.dim', 'color'),
                masked: colour('.cell.masked', 'color'),
                one: colour('.line.s0', 'stroke'), two: colour('.line.s1', 'stroke')};""",
        tmp_path,
    )
    paper = seen["paper"]
    assert contrast("rgb(0,0,0)", paper) < 3 if scheme == "dark" else contrast("rgb(0,0,0)", paper) > 15
    for name in ("ink", "dim", "masked"):
        assert contrast(seen[name], paper) >= 4.5, name
    for name in ("one", "two"):
        assert contrast(seen[name], paper) >= 3, name


def test_the_policy_stops_what_is_not_the_page_s_own(page: str, tmp_path: Path) -> None:
    """Of scripts and styles put into the page, none acts, while the page's own do: the browser says so, and obeys."""
    foreign = "<script>document.title = 'taken over'</script><style>body { display: none }</style>"
    foreign += (
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=" onerror="document.title = \'taken over\'">'
    )
    path = tmp_path / "page.html"
    path.write_text(page.replace("<header>", foreign + "<header>"))
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>taken over" not in done.stdout
    assert 'class="board"' in done.stdout  # its own script has drawn the puzzles
    assert done.stderr.count("Content Security Policy") >= 3
