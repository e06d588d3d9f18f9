"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const measure = find("measure");
  if (measure) {
    const show = () => document.querySelectorAll(".measure").forEach((each) => {
      each.style.display = each.dataset.measure === measure.value ? "" : "none";
    });
    measure.addEventListener("change", show);
    show();
  }

  const holder = find("replay-data");
  if (!holder) return;
  const { canvas, symbols, mask_id: maskId, methods, styles, puzzles } = JSON.parse(holder.textContent);
  const slider = find("step"), puzzle = find("puzzle"), play = find("play");
  let timer = null;

  const isGraded = puzzles[0].traces[0].is_solved !== null;

  puzzles.forEach((each, number) => {
    const solved = each.traces.map((trace, m) => `${methods[m]}: ${trace.is_solved ? "solved" : "not"}`).join(", ");
    puzzle.append(new Option(isGraded ? `${number + 1} (${solved})` : number + 1, number));
  });

  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const boards = methods.map((name, number) => {
    const board = make("div", "board"), title = make("h4"), status = make("p", "dim"), cells = make("div", "cells");
    const mark = document.querySelectorAll(".legend .key")[styles[number]];
    if (mark) title.append(mark.cloneNode(true));
    title.append(name);
    cells.style.gridTemplateColumns = `repeat(${canvas.columns}, 1fr)`;
    cells.setAttribute("role", "img");
    if (canvas.is_text) cells.classList.add("text");
    board.append(title, cells, status);
    find("boards").append(board);
    return { cells, status, name };
  });

  const rows = Math.ceil((puzzles[0].prompt.length - canvas.start) / canvas.columns);

  const longest = (p) => Math.max(...puzzles[p].traces.map((trace) => trace.steps.length));

  function cellAt(position, index, shown) {
    const cell = make("div", "cell");
    const column = index % canvas.columns, row = Math.floor(index / canvas.columns);
    if (canvas.box && column % canvas.box === canvas.box - 1 && column < canvas.columns - 1) cell.classList.add("box-right");
    if (canvas.box && row % canvas.box === canvas.box - 1 && row < rows - 1) cell.classList.add("box-below");
    const { given, step, masked, trace, truth, prompt } = shown;
    const clue = canvas.clue_start === null ? "" : symbols[prompt[canvas.clue_start + index]];
    if (given[position] || (clue && masked.has(position))) {
      cell.classList.add("given");
      cell.append(clue || symbols[prompt[position]]);
    } else if (masked.has(position)) {
      const said = masked.get(position);
      cell.classList.add("masked");
      cell.style.setProperty("--p", said ? said.sure : 0);
      if (said) cell.title = `${symbols[said.guess]}: ${said.sure} %`;
      if (said) cell.append(symbols[said.guess]);
    } else {
      const when = shown.when.get(position), own = when.value;
      cell.classList.add("filled");
      if (clue) cell.classList.add("given");
      if (when.step === step - 1) cell.classList.add("fresh");
      if (trace.is_solved === false && own !== truth[position]) cell.classList.add("wrong");
      cell.title = `step ${when.step + 1}` + (when.sure === undefined ? "" : `, ${when.sure} % sure`);
      cell.append(make("small", "", when.step + 1), symbols[own]);
    }
    return cell;
  }

  function draw() {
    const at = Number(slider.value), { prompt, truth, traces } = puzzles[puzzle.value];
    const given = prompt.map((token) => token !== maskId);
    find("at").textContent = `step ${at} of ${slider.max}`;
    slider.setAttribute("aria-valuetext", find("at").textContent);
    boards.forEach(({ cells, status, name }, m) => {
      const trace = traces[m], step = Math.min(at, trace.steps.length);
      const masked = new Map(), when = new Map();
      trace.steps.slice(0, step).forEach((each, number) => {
        each.again.forEach((position) => when.delete(position));
        each.revealed.forEach((position, i) => {
          when.set(position, { step: number, value: each.values[i], sure: each.sure[each.at.indexOf(position)] });
        });
      });
      given.forEach((isGiven, position) => { if (!isGiven && !when.has(position)) masked.set(position, null); });
      const now = trace.steps[step];
      if (now) now.at.forEach((position, i) => masked.set(position, { guess: now.guess[i], sure: now.sure[i] }));
      const shown = { given, step, masked, when, trace, truth, prompt };
      cells.replaceChildren();
      for (let position = canvas.start; position < prompt.length; position++) {
        cells.append(cellAt(position, position - canvas.start, shown));
      }
      const last = [...when.values()].filter((each) => each.step === step - 1);
      const known = last.map((each) => each.sure).filter((each) => each !== undefined);
      const sure = known.length ? `, the last with ${Math.min(...known)} %` : "";
      const wrong = [...when].filter(([position, { value }]) => value !== truth[position]).length;
      const end = step < trace.steps.length || !isGraded ? "" : trace.is_solved ? "; solved" : `; not solved, ${wrong} wrong`;
      status.textContent = `${when.size} of ${when.size + masked.size} filled${sure}${end}`;
      cells.setAttribute("aria-label", `${name}: ${status.textContent}`);
    });
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
  }
  function go(to) {
    slider.value = to;
    draw();
  }
  function toggle() {
    if (timer !== null) return stop();
    if (slider.value === slider.max) go(0);
    play.textContent = "❚❚ Pause";
    timer = setInterval(() => {
      if (slider.value === slider.max) stop();
      else go(Number(slider.value) + 1);
    }, 250);
  }
  function choose(number) {
    stop();
    puzzle.value = (number + puzzles.length) % puzzles.length;
    slider.max = longest(puzzle.value);
    go(0);
  }

  slider.addEventListener("input", () => { stop(); draw(); });
  puzzle.addEventListener("change", () => choose(Number(puzzle.value)));
  play.addEventListener("click", toggle);
  const keys = {
    " ": toggle,
    ArrowLeft: () => { stop(); go(Number(slider.value) - 1); },
    ArrowRight: () => { stop(); go(Number(slider.value) + 1); },
    Home: () => { stop(); go(0); },
    End: () => { stop(); go(slider.max); },
    ArrowUp: () => choose(Number(puzzle.value) - 1),
    ArrowDown: () => choose(Number(puzzle.value) + 1),
  };
  const isInView = () => {
    const { top, bottom } = find("boards").getBoundingClientRect();
    return top < 0.8 * window.innerHeight && bottom > 0.2 * window.innerHeight;
  };
  document.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (event.target.closest("select") || (event.key === " " && event.target.closest("button"))) return;
    // Where the page would scroll, it still does, but for the arrows that it has no use for.
    const isSideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
    if (!event.target.closest("#replay") && !(isSideways && isInView())) return;
    event.preventDefault();
    keys[event.key]();
  });
  find("boards").addEventListener("click", () => find("boards").focus());
  window.addEventListener("beforeprint", () => { stop(); go(slider.max); });
  choose(0);
})();
