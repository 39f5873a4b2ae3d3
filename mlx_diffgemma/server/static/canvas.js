// Every token of one canvas: pinned, typed over, chosen among alternatives, renoised, and gone back to.

import { Live } from "./live.js";
import { Fault, Range, html, plural, tint, useEffect, useRedraw, useRef, useState, useStored } from "./ui.js";

const DWELL = 250; // milliseconds over a token before its alternatives are asked for

export function Canvas({ about }) {
  const redraw = useRedraw();
  const live = useRef(null);
  live.current ||= new Live(redraw, "canvas steps");
  const canvas = live.current;
  const [prompt, setPrompt] = useStored("canvas prompt", about.demo ? "count\n28 41" : "Write a short poem about the sea.");
  const [strength, setStrength] = useStored("canvas strength", 60);
  const [slow, setSlow] = useStored("canvas slow", about.demo);
  const [pins, setPins] = useStored("canvas pins", null); // places held, where they differ from the server's
  const [cursor, setCursor] = useState(0);
  const spanned = useRef(null); // [first, last]
  const [typing, setTyping] = useState(null); // place that is typed over
  const [others, setOthers] = useState(null); // {place, list}
  const [fault, setFault] = useState("");
  const tokens = useRef([]);
  const dwell = useRef(0);
  const drag = useRef(null);
  const wanted = useRef(null);
  useEffect(() => () => { canvas.close(); clearTimeout(dwell.current); }, []);

  const span = spanned.current;
  const setSpan = (value) => {
    spanned.current = value; // keys may come faster than the page is drawn
    redraw();
  };
  const frame = canvas.frame;
  const pace = slow ? 400 : 0;
  const held = new Set(pins || (frame ? frame.pins : []));
  const word = (id) => canvas.words[id];
  const text = (at) => (typeof word(frame.ids[at]) === "string" ? word(frame.ids[at]) : "");
  const end = frame ? frame.ids.findIndex((id) => Array.isArray(word(id)) && word(id)[0] === "end") : -1;
  const selected = (at) => span && at >= span[0] && at <= span[1];

  function form() {
    setPins(null);
    setSpan(null);
    setOthers(null);
    canvas.start({ prompt }, pace);
  }

  /** What makes the server's pins ours. */
  function differing() {
    if (!frame || !pins) return [];
    const theirs = new Set(frame.pins), changes = [];
    for (const at of held) if (!theirs.has(at)) changes.push({ kind: "pin", place: at, token: frame.ids[at] });
    for (const at of theirs) if (!held.has(at)) changes.push({ kind: "free", place: at });
    return changes;
  }

  async function send(changes, amount = strength / 100) {
    const all = [...differing(), ...changes];
    const at = canvas.shown < canvas.frames.length - 1 && !canvas.running ? canvas.shown : null;
    setPins(null);
    setOthers(null);
    await canvas.order({ changes: all, at, strength: amount }, pace);
  }

  function toggle(at) {
    if (canvas.running) {
      send([held.has(at) ? { kind: "free", place: at } : { kind: "pin", place: at, token: frame.ids[at] }]);
      return;
    }
    const next = new Set(held);
    if (!next.delete(at)) next.add(at);
    setPins([...next].sort((a, b) => a - b));
  }

  function set(at, choice) {
    setTyping(null);
    send([{ kind: "pin", place: at, ...choice }]);
    focus(at);
  }

  function focus(at) {
    const to = Math.max(0, Math.min(frame.ids.length - 1, at));
    setCursor(to);
    tokens.current[to]?.focus();
    requestAnimationFrame(() => tokens.current[to]?.focus()); // where an input was in its place
  }

  async function look(at) {
    wanted.current = at;
    try {
      const list = await canvas.alternatives(at);
      if (wanted.current === at) setOthers({ place: at, list });
    } catch (error) {
      if (wanted.current === at) setOthers(null);
      setFault(error.status === 404 ? "The server has forgotten this canvas; form it again to see alternatives." : error.message);
    }
  }

  function enter(at) {
    if (drag.current !== null) {
      const from = drag.current;
      if (from !== at || spanned.current) setSpan([Math.min(from, at), Math.max(from, at)]);
      return;
    }
    clearTimeout(dwell.current);
    if (!canvas.running && typing === null) dwell.current = setTimeout(() => look(at), DWELL);
  }

  function leave() {
    clearTimeout(dwell.current);
    wanted.current = null;
  }

  function press(event, at) {
    if (event.button !== 0 || typing !== null) return;
    event.target.releasePointerCapture?.(event.pointerId);
    drag.current = at;
    setSpan(null);
  }

  useEffect(() => {
    const up = () => (drag.current = null);
    const out = (event) => {
      if (!event.target.closest?.(".alternatives, .tokens")) setOthers(null);
    };
    addEventListener("pointerup", up);
    addEventListener("pointerdown", out);
    return () => {
      removeEventListener("pointerup", up);
      removeEventListener("pointerdown", out);
    };
  }, []);

  function onKey(event, at) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -at, End: frame.ids.length - 1 - at };
    const line = event.key === "ArrowUp" ? -1 : event.key === "ArrowDown" ? 1 : 0;
    if (event.altKey && event.key === "ArrowDown") look(at);
    else if (event.key in moves || line) {
      const to = line ? beside(tokens.current, at, line) : Math.max(0, Math.min(frame.ids.length - 1, at + moves[event.key]));
      if (event.shiftKey) {
        const now = spanned.current;
        const other = now ? (now[0] === at ? now[1] : now[0]) : at;
        setSpan([Math.min(other, to), Math.max(other, to)]);
      } else setSpan(null);
      focus(to);
    } else if (event.key === "Enter" || event.key === " ") toggle(at);
    else if (event.key === "F2") setTyping({ place: at, text: text(at) });
    else if (event.key === "Escape") {
      setSpan(null);
      setOthers(null);
    } else if (event.key === "Delete" || event.key === "Backspace") renoise(spanned.current || [at, at]);
    else if (event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey) setTyping({ place: at, text: event.key });
    else return;
    event.preventDefault();
  }

  function renoise([first, last]) {
    setSpan(null);
    send([{ kind: "renoise", place: first, count: last - first + 1, strength: strength / 100 }], 0);
  }

  function pinSpan(pin) {
    const next = new Set(held);
    for (let at = span[0]; at <= span[1]; at++) pin ? next.add(at) : next.delete(at);
    if (canvas.running) {
      const changes = [];
      for (let at = span[0]; at <= span[1]; at++) changes.push(pin ? { kind: "pin", place: at, token: frame.ids[at] } : { kind: "free", place: at });
      send(changes);
    } else setPins([...next].sort((a, b) => a - b));
    setSpan(null);
  }

  const token = (at) => {
    const id = frame.ids[at], spelt = word(id), pinned = held.has(at);
    const special = Array.isArray(spelt);
    const behind = end >= 0 && at > end && special;
    const level = pinned ? 0 : tint(frame.nats[at]);
    const name = special ? spelt[0] : spelt === "\n" ? "new line" : spelt === " " ? "space" : spelt;
    const sure = pinned ? "pinned" : frame.nats[at] < 0 ? "noise" : `${(frame.nats[at] / 100).toFixed(2)} nats unsure`;
    if (typing && typing.place === at)
      return html`<input class="type-over" aria-label=${`Text for token ${at + 1}`} value=${typing.text} size=${Math.max(3, typing.text.length + 1)}
        ref=${(element) => element && document.activeElement !== element && element.focus()}
        onInput=${(e) => setTyping({ place: at, text: e.target.value })}
        onBlur=${() => setTyping(null)}
        onKeyDown=${(e) => {
          if (e.key === "Enter" && typing.text) set(at, { text: typing.text });
          if (e.key === "Escape") { setTyping(null); focus(at); }
          e.stopPropagation();
        }} />`;
    const glyph = special ? (behind ? "·" : spelt[0]) : spelt === "\n" ? "↵" : spelt;
    const classes = ["token", `t${level}`, pinned && "pinned", special && "special", behind && "behind", selected(at) && "selected", spelt === " " && "space"];
    return html`<button type="button" class=${classes.filter(Boolean).join(" ")} data-place=${at}
      ref=${(element) => (tokens.current[at] = element)} tabindex=${at === cursor ? 0 : -1}
      aria-pressed=${pinned} aria-label=${`token ${at + 1}: ${name}, ${sure}`} title=${sure}
      onPointerDown=${(e) => press(e, at)} onPointerEnter=${() => enter(at)} onPointerLeave=${leave}
      onClick=${(e) => { if (!spanned.current && e.detail < 2) { setCursor(at); toggle(at); } }}
      onDblClick=${() => { if (held.has(at) !== new Set(frame.pins).has(at)) toggle(at); setTyping({ place: at, text: text(at) }); }}
      onFocus=${() => setCursor(at)} onKeyDown=${(e) => onKey(e, at)}>${glyph}</button>${spelt === "\n" ? html`<br />` : null}`;
  };

  const differs = differing().length > 0;
  const past = frame && canvas.shown < canvas.frames.length - 1;
  let said = "Nothing has formed yet.";
  if (canvas.lost) said = "The connection was cut; it goes on as soon as the server answers.";
  else if (canvas.running) said = frame ? `Step ${frame.step} of at most ${frame.total}. What you pin now, it forms around.` : "The prompt is read.";
  else if (past) said = "An earlier step. Continue from here, or change something: what came after is replaced.";
  else if (frame && frame.done) said = `Done after ${plural(canvas.frames.length - 1, "step")}, seed ${canvas.seed}.`;
  else if (frame) said = `Stopped at step ${frame.step}.`;

  return html`<section class="view" aria-labelledby="title">
    <header class="intro">
      <h1 id="title">Canvas</h1>
      <p>Every token is yours to hold, replace or let go, while the text forms.</p>
    </header>
    <form class="ask" onSubmit=${(e) => { e.preventDefault(); form(); }}>
      <label for="canvas-prompt">Prompt</label>
      <textarea id="canvas-prompt" rows=${Math.min(6, Math.max(2, prompt.split("\n").length))} value=${prompt} onInput=${(e) => setPrompt(e.target.value)}
        onKeyDown=${(e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); form(); } }}></textarea>
      <div class="buttons">
        ${canvas.running
          ? html`<button type="button" class="primary" onClick=${() => canvas.stop()}>Stop</button>`
          : html`<button type="submit" class="primary">Form</button>`}
        ${frame && !canvas.running && !frame.done && !past && html`<button type="button" onClick=${() => send([], 0)}>Go on</button>`}
        ${frame && !canvas.running && html`<button type="button" onClick=${() => send([{ kind: "renoise", place: 0, count: frame.ids.length, strength: strength / 100 }], 0)}>Re-form around pins</button>`}
        ${differs && !canvas.running && html`<span class="hint">pins changed</span>`}
        <label class="check"><input type="checkbox" checked=${slow} onChange=${(e) => setSlow(e.target.checked)} /> Slowly</label>
      </div>
    </form>
    ${frame && html`<div>
      <div class="tokens" role="group" aria-label="Tokens of the canvas" dir="auto">${frame.ids.map((_, at) => token(at))}</div>
      ${span && span[1] > span[0] && html`<div class="selection" role="toolbar" aria-label="Selected tokens">
        <span>${plural(span[1] - span[0] + 1, "token")}</span>
        <button type="button" class="primary" onClick=${() => renoise(span)}>Renoise</button>
        <button type="button" onClick=${() => pinSpan(true)}>Pin</button>
        <button type="button" onClick=${() => pinSpan(false)}>Free</button>
        <button type="button" class="quiet" onClick=${() => setSpan(null)}>Cancel</button>
      </div>`}
      ${others && frame && html`<div class="alternatives" role="group" aria-label=${`Alternatives for token ${others.place + 1}`}>
        <h2>Token ${others.place + 1}, given the rest</h2>
        <div class="options">
        ${others.list.map((each) => {
          const spelt = Array.isArray(each.word) ? each.word[0] : each.word === "\n" ? "↵" : each.word === " " ? "space" : each.word;
          const percent = each.probability * 100;
          return html`<button type="button" class=${each.token === frame.ids[others.place] ? "option standing" : "option"}
            aria-label=${`${spelt}, ${percent.toFixed(1)} percent`} onClick=${() => set(others.place, { token: each.token })}>
            <span class="option-word">${spelt}</span>
            <meter min="0" max="1" value=${each.probability} aria-hidden="true"></meter>
            <span class="percent">${percent >= 0.1 ? percent.toFixed(1) : "<0.1"}%</span>
          </button>`;
        })}</div>
      </div>`}
    </div>`}
    <p class="status" role="status">${said}</p>
    <${Fault} text=${fault || canvas.fault} />
    ${frame && html`<div class="travel">
      <${Range} label="Step" min=${0} max=${canvas.frames.length - 1} value=${canvas.shown} disabled=${canvas.running}
        said=${`${canvas.shown} of ${canvas.frames.length - 1}`} onInput=${(at) => { setPins(null); setOthers(null); canvas.show(at); }} />
      ${past && !canvas.running && html`<button type="button" onClick=${() => send([])}>Continue from here</button>`}
      <${Range} label="Strength" min=${5} max=${100} step=${5} value=${strength} said=${`${strength}%`} onInput=${setStrength} />
    </div>`}
    <details class="keys"><summary>Mouse and keyboard</summary>
      <p>Click pins a token or frees it, a double click types over it, hovering shows what else might stand there, dragging selects.</p>
      <p><kbd>←↑→↓</kbd> move, with <kbd>Shift</kbd> they select; <kbd>Enter</kbd> pins or frees; any letter or <kbd>F2</kbd> types over;
        <kbd>Alt</kbd>+<kbd>↓</kbd> shows alternatives; <kbd>Delete</kbd> renoises; <kbd>Esc</kbd> lets go.</p>
      <p>Strength is the share of what is not pinned that turns to noise before the rest forms again.</p>
    </details>
  </section>`;
}

/** The token nearest above or below another. */
function beside(elements, at, line) {
  const here = elements[at].getBoundingClientRect();
  const middle = (here.left + here.right) / 2;
  let best = at, least = Infinity;
  elements.forEach((element, place) => {
    if (!element || !element.isConnected) return;
    const box = element.getBoundingClientRect();
    const down = (box.top - here.top) * line;
    if (down < here.height / 2) return;
    const far = down * 4 + Math.abs((box.left + box.right) / 2 - middle);
    if (far < least) [best, least] = [place, far];
  });
  return best;
}
