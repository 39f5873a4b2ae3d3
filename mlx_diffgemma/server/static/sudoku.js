// The grid as a grid: givens are pinned, the rest forms around them.

import { json } from "./api.js";
import { Live } from "./live.js";
import { Fault, Range, html, plural, tint, useCallback, useEffect, useRedraw, useRef, useState, useStored } from "./ui.js";

const SIDE = 6;
const SLOW = 450; // milliseconds from step to step, for the eye
const BLANK = ".".repeat(SIDE * SIDE);
const place = (cell) => Math.floor(cell / SIDE) * (SIDE + 1) + (cell % SIDE);
const rows = (cells) => Array.from({ length: SIDE }, (_, r) => cells.slice(r * SIDE, (r + 1) * SIDE)).join("\n");

const HOUSES = [];
for (let n = 0; n < SIDE; n++) {
  const band = 2 * Math.floor(n / 2), stack = 3 * (n % 2);
  const every = (cell) => Array.from({ length: SIDE }, (_, k) => cell(k));
  HOUSES.push({ name: `row ${n + 1}`, cells: every((k) => n * SIDE + k) });
  HOUSES.push({ name: `column ${n + 1}`, cells: every((k) => k * SIDE + n) });
  HOUSES.push({ name: `box ${n + 1}`, cells: every((k) => (band + Math.floor(k / 3)) * SIDE + stack + (k % 3)) });
}

/** The cells that stand twice in a row, column or box, and where. */
function clashes(digits) {
  const cells = new Set(), names = [];
  for (const house of HOUSES) {
    const twice = house.cells.filter((cell) => digits[cell] && house.cells.some((o) => o !== cell && digits[o] === digits[cell]));
    if (twice.length) names.push(house.name);
    twice.forEach((cell) => cells.add(cell));
  }
  return { cells, names };
}

export function Sudoku() {
  const redraw = useRedraw();
  const live = useRef(null);
  live.current ||= new Live(redraw, "sudoku steps");
  const [givens, setGivens] = useStored("sudoku givens", null);
  const [slow, setSlow] = useStored("sudoku slow", true);
  const [fault, setFault] = useState("");
  const [focus, setFocus] = useState(0);
  const buttons = useRef([]);
  const canvas = live.current, pace = slow ? SLOW : 0;

  const fresh = useCallback(async () => {
    try {
      setFault("");
      const puzzle = await json("/v1/page/sudoku");
      canvas.stop();
      canvas.reset();
      canvas.remember();
      setGivens(puzzle.givens.replaceAll("\n", ""));
      redraw();
    } catch (error) {
      setFault(error.message);
    }
  }, []);
  useEffect(() => {
    if (givens === null) fresh();
    return () => canvas.close();
  }, []);

  const cells = givens || BLANK;
  const frame = canvas.frame;
  const digits = Array.from(cells, (given, cell) => {
    if (given !== ".") return given;
    if (!frame) return "";
    const word = canvas.words[frame.ids[place(cell)]];
    return typeof word === "string" && /[1-6]/.test(word) ? word : "";
  });
  const clash = clashes(frame ? digits : Array.from(cells, (c) => (c === "." ? "" : c)));
  const solve = () => canvas.start({ sudoku: rows(cells) }, pace);

  async function put(cell, digit) {
    if (cells[cell] === digit) return;
    const next = cells.slice(0, cell) + digit + cells.slice(cell + 1);
    setGivens(next);
    if (canvas.running) {
      const change = digit === "." ? { kind: "free", place: place(cell) } : { kind: "pin", place: place(cell), text: digit };
      await canvas.order({ changes: [change] }, pace);
    } else if (frame) await canvas.start({ sudoku: rows(next) }, pace);
  }

  function toggle(cell) {
    if (cells[cell] !== ".") put(cell, ".");
    else if (digits[cell]) put(cell, digits[cell]);
  }

  function onKey(event, cell) {
    const row = Math.floor(cell / SIDE), column = cell % SIDE;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) {
      const [down, right] = moves[event.key];
      const to = ((row + down + SIDE) % SIDE) * SIDE + ((column + right + SIDE) % SIDE);
      setFocus(to);
      buttons.current[to].focus();
    } else if (/^[1-6]$/.test(event.key)) put(cell, event.key);
    else if (["Backspace", "Delete", "0", "."].includes(event.key)) put(cell, ".");
    else return;
    event.preventDefault();
  }

  const forked = async () => canvas.order({ at: canvas.shown }, pace);
  const whole = digits.every(Boolean);
  let said = "Click a cell to clear it, or type a digit to pin it.";
  if (canvas.lost) said = "The connection was cut; it goes on as soon as the server answers.";
  else if (canvas.running) said = frame ? `Step ${canvas.shown} of at most ${frame.total}.` : "The prompt is read.";
  else if (frame && canvas.shown < canvas.frames.length - 1) said = `Step ${canvas.shown} of ${canvas.frames.length - 1}, as it was.`;
  else if (frame && !whole) said = "Stopped before every cell had a digit.";
  else if (frame && clash.cells.size) said = `Not a solution: a digit stands twice in ${clash.names.slice(0, 3).join(", ")}.`;
  else if (frame) said = `Solved in ${plural(canvas.frames.length - 1, "step")}: every row, column and box holds 1 to 6.`;
  else if (clash.cells.size) said = `These givens have no solution: a digit stands twice in ${clash.names[0]}.`;

  return html`<section class="view sudoku" aria-labelledby="title">
    <header class="intro">
      <h1 id="title">Sudoku</h1>
      <p>All cells form at once, out of noise. What you pin stays, and the rest forms around it.</p>
    </header>
    <div class="board-and-side">
      <div class="board" role="grid" aria-label="Sudoku of six by six">
        ${Array.from({ length: SIDE }, (_, r) => html`<div role="row" class="board-row">
          ${Array.from({ length: SIDE }, (_, c) => {
            const cell = r * SIDE + c, pinned = cells[cell] !== ".", digit = digits[cell];
            const level = !pinned && frame ? tint(frame.nats[place(cell)]) : 0;
            const kind = pinned ? "pinned" : `found t${level}`;
            const label = `row ${r + 1}, column ${c + 1}: ${digit || "blank"}${pinned ? ", pinned" : ""}${clash.cells.has(cell) ? ", twice" : ""}`;
            return html`<div role="gridcell" class="cell-box">
              <button type="button" class=${`cell ${kind} ${clash.cells.has(cell) ? "clash" : ""}`}
                ref=${(element) => (buttons.current[cell] = element)} tabindex=${cell === focus ? 0 : -1}
                aria-label=${label} aria-pressed=${pinned} data-cell=${cell}
                onFocus=${() => setFocus(cell)} onClick=${() => toggle(cell)} onKeyDown=${(e) => onKey(e, cell)}>${digit}</button>
            </div>`;
          })}
        </div>`)}
      </div>
      <div class="side">
        <div class="buttons">
          ${canvas.running
            ? html`<button type="button" class="primary" onClick=${() => canvas.stop()}>Stop</button>`
            : html`<button type="button" class="primary" onClick=${solve}>Solve</button>`}
          <button type="button" onClick=${fresh}>New puzzle</button>
          <button type="button" onClick=${() => { canvas.stop(); canvas.reset(); canvas.remember(); setGivens(BLANK); }}>Clear</button>
        </div>
        <label class="check"><input type="checkbox" checked=${slow} onChange=${(e) => setSlow(e.target.checked)} /> Slowly, to watch</label>
        <p class="status" role="status">${said}</p>
        <${Fault} text=${fault || canvas.fault} />
        ${canvas.frames.length > 1 && html`<div class="travel">
          <${Range} label="Step" min=${0} max=${canvas.frames.length - 1} value=${canvas.shown}
            said=${`${canvas.shown} of ${canvas.frames.length - 1}`} disabled=${canvas.running} onInput=${(at) => canvas.show(at)} />
          ${!canvas.running && canvas.shown < canvas.frames.length - 1 && html`<button type="button" onClick=${forked}>Continue from here</button>`}
        </div>`}
        <details class="keys"><summary>Keyboard</summary>
          <p><kbd>←↑→↓</kbd> move, <kbd>1</kbd>–<kbd>6</kbd> pin, <kbd>⌫</kbd> clears, <kbd>Enter</kbd> pins what stands there or frees it.</p>
        </details>
      </div>
    </div>
  </section>`;
}
