// A text, a selection, and changes that are shown before they are made.

import { lines } from "./api.js";
import { diff } from "./diff.js";
import { Fault, Range, Runs, html, load, plural, save, useEffect, useRedraw, useRef, useState, useStored } from "./ui.js";

const DEMO = "532461\n456132\n146253\n253146\n314625\n625314";
const REAL = "The sea was calm. We set out early, and nobody spoke until the island was in sight.\n";
const MOST_UNDONE = 100;
const KEPT_UNDONE = 1_000_000; // characters of earlier texts that a reload does not lose

export function Document({ about }) {
  const redraw = useRedraw();
  const [doc, setDoc] = useStored("document", { text: about.demo ? DEMO : REAL, eol: "\n", name: "text.txt" });
  const [instruction, setInstruction] = useStored("document instruction", about.demo ? "make it valid" : "Make it shorter.");
  const [prompt, setPrompt] = useStored("document prompt", about.demo ? "sudoku" : "");
  const [strength, setStrength] = useStored("document strength", about.demo ? 50 : 100);
  const [proposal, setProposal] = useStored("document proposal", null); // {left, pieces, right}
  const [span, setSpan] = useStored("document span", about.demo ? [7, 13] : [0, 0]);
  const [fault, setFault] = useState("");
  const past = useRef(null), future = useRef([]), typed = useRef(0);
  past.current ||= load("document past", []);
  const area = useRef(null), controller = useRef(null), forming = useRef(null), file = useRef(null);
  useEffect(() => {
    const keep = () => {
      let room = KEPT_UNDONE;
      const fit = past.current.toReversed().filter((text) => (room -= text.length) >= 0);
      save("document past", fit.reverse());
    };
    addEventListener("pagehide", keep);
    return () => {
      keep();
      removeEventListener("pagehide", keep);
      controller.current?.abort();
    };
  }, []);

  function write(text, { typing = false } = {}) {
    const now = Date.now();
    if (!typing || now - typed.current > 1000) {
      past.current.push(doc.text);
      if (past.current.length > MOST_UNDONE) past.current.shift();
    }
    typed.current = typing ? now : 0;
    future.current = [];
    setDoc({ ...doc, text });
  }

  function turn(from, to) {
    if (!from.current.length || proposal || forming.current) return;
    to.current.push(doc.text);
    typed.current = 0;
    setDoc({ ...doc, text: from.current.pop() });
  }
  const undo = () => turn(past, future), redo = () => turn(future, past);

  function select() {
    const { selectionStart, selectionEnd } = area.current;
    setSpan([selectionStart, selectionEnd]);
  }

  async function ask(path, body, left, present, right) {
    const own = (controller.current = new AbortController());
    forming.current = { left, right, runs: [], step: 0, present };
    setFault("");
    redraw();
    try {
      let found = null, text = "", ended = false;
      for await (const line of lines(path, body, own.signal)) {
        if (line.runs) Object.assign(forming.current, { runs: line.runs, step: line.step });
        if (line.text) text += line.text;
        if (line.after !== undefined) found = line;
        if (line.end) ended = true;
        if (path.endsWith("chat")) forming.current.written = text;
        redraw();
      }
      if (ended) found = { before: "", after: text };
      if (!found) throw new Error("The connection was cut; the text is as it was.");
      const pieces = diff(present, found.after);
      if (pieces.every((piece) => piece.kind === "same")) setFault("The model would leave it as it is.");
      else setProposal({ left, pieces: pieces.map((piece) => ({ ...piece, taken: null })), right, passes: found.passes });
    } catch (error) {
      if (error.name !== "AbortError") setFault(error.message);
    }
    forming.current = null;
    controller.current = null;
    redraw();
  }

  const [from, to] = [Math.min(span[0], doc.text.length), Math.min(span[1], doc.text.length)];
  const start = doc.text.lastIndexOf("\n", from - 1) + 1;
  const last = to > from && doc.text[to - 1] === "\n" ? to - 1 : to;
  const stop = doc.text.indexOf("\n", last) < 0 ? doc.text.length : doc.text.indexOf("\n", last);
  const line = (at) => doc.text.slice(0, at).split("\n").length;
  const first = line(start), final = line(Math.max(start, last));

  const common = () => (prompt.trim() ? { prompt } : {});
  const rewrite = () =>
    ask("/v1/page/rewrite", { text: doc.text, first, last: final, instruction, strength: strength / 100, ...common() },
      doc.text.slice(0, start), doc.text.slice(start, stop), doc.text.slice(stop));
  const infill = () =>
    ask("/v1/page/hole", { left: doc.text.slice(0, from), right: doc.text.slice(to), ...common() }, doc.text.slice(0, from), doc.text.slice(from, to), doc.text.slice(to));
  const goOn = () => {
    const at = from === to && to > 0 ? to : doc.text.length;
    const left = doc.text.slice(0, at);
    ask("/v1/page/chat", { messages: [{ role: "user", content: prompt.trim() || "Continue this text." }], prefill: left, max_tokens: 256 }, left, "", doc.text.slice(at));
  };

  function decide(at, taken) {
    const pieces = proposal.pieces.map((piece, n) => (at === null ? piece.kind === "change" && piece.taken === null : n === at) ? { ...piece, taken } : piece);
    if (pieces.some((piece) => piece.kind === "change" && piece.taken === null)) {
      setProposal({ ...proposal, pieces });
      return;
    }
    const middle = pieces.map((piece) => (piece.kind === "same" ? piece.text : piece.taken ? piece.after : piece.before)).join("");
    const text = proposal.left + middle + proposal.right;
    setProposal(null);
    setSpan([proposal.left.length, proposal.left.length + middle.length]);
    if (text !== doc.text) write(text);
    setTimeout(() => area.current?.focus());
  }

  async function open(event) {
    const chosen = event.target.files[0];
    event.target.value = "";
    if (!chosen) return;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await chosen.arrayBuffer());
    } catch {
      setFault(`${chosen.name} is not UTF-8.`);
      return;
    }
    const ends = new Set(text.match(/\r\n|\r|\n/g) || []);
    if (ends.size > 1 || ends.has("\r")) {
      setFault(`${chosen.name} mixes ends of lines, which a text field cannot keep; make them one kind first.`);
      return;
    }
    past.current.push(doc.text);
    setProposal(null);
    setDoc({ text: text.replaceAll("\r\n", "\n"), eol: ends.has("\r\n") ? "\r\n" : "\n", name: chosen.name });
    setSpan([0, 0]);
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([doc.text.replaceAll("\n", doc.eol)], { type: "text/plain" }));
    link.download = doc.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function onKey(event) {
    if (!(event.ctrlKey || event.metaKey)) return;
    const key = event.key.toLowerCase();
    if (key === "z" && !event.shiftKey) undo();
    else if (key === "y" || key === "z") redo();
    else if (key === "enter") rewrite();
    else return;
    event.preventDefault();
  }

  const running = forming.current;
  const open_ = proposal ? proposal.pieces.filter((piece) => piece.kind === "change" && piece.taken === null).length : 0;
  return html`<section class="view document" aria-labelledby="title" onKeyDown=${(e) => { if (e.key === "Escape" && running) controller.current.abort(); }}>
    <header class="intro"><h1 id="title">Document</h1>
      <p>Select some lines, say what should become of them, and take the change piece by piece. All else stays as it is.</p></header>
    <div class="bar">
      <button type="button" onClick=${undo} disabled=${!past.current.length || proposal || running}>Undo</button>
      <button type="button" onClick=${redo} disabled=${!future.current.length || proposal || running}>Redo</button>
      <span class="gap"></span>
      <button type="button" class="quiet" onClick=${() => file.current.click()}>Open…</button>
      <button type="button" class="quiet" onClick=${download}>Save</button>
      <input ref=${file} type="file" class="unseen" tabindex="-1" aria-label="Open a file" onChange=${open} />
    </div>
    ${proposal
      ? html`<div class="paper proposal" dir="auto" tabindex="0" role="region" aria-label="The text with what would change">${proposal.left}${proposal.pieces.map((piece, at) =>
          piece.kind === "same" ? piece.text
          : piece.taken !== null ? html`<span class="decided">${piece.taken ? piece.after : piece.before}</span>`
          : html`<span class="change">${piece.before && html`<del>${piece.before}</del>`}${piece.after && html`<ins>${piece.after}</ins>`}<span class="decide"><button type="button" aria-label=${`Accept ${piece.after || "the deletion"}`} title="Accept" onClick=${() => decide(at, true)}>✓</button><button type="button" aria-label=${`Reject ${piece.after || "the deletion"}`} title="Reject" onClick=${() => decide(at, false)}>✕</button></span></span>`)}${proposal.right}</div>`
      : running
        ? html`<div class="paper" dir="auto" aria-busy="true" tabindex="0" role="region" aria-label="The text as it forms">${running.left}<span class="forming">${running.written || ""}${running.runs.length ? html`<${Runs} runs=${running.runs} />` : running.written ? "" : html`<span class="t9">${running.present || " … "}</span>`}</span>${running.right}</div>`
        : html`<textarea class="paper" ref=${area} aria-label="Text" dir="auto" spellcheck=${false} value=${doc.text} onInput=${(e) => { write(e.target.value, { typing: true }); select(); }}
            onSelect=${select} onKeyUp=${select} onClick=${select} onKeyDown=${onKey}></textarea>`}
    ${proposal && html`<div class="selection" role="toolbar" aria-label="The change">
      <span>${plural(open_, "change")} to decide</span>
      <button type="button" class="primary" onClick=${() => decide(null, true)}>Accept all</button>
      <button type="button" onClick=${() => decide(null, false)}>Reject all</button></div>`}
    ${!proposal && html`<div class="does">
      <div class="field"><label for="instruction">Rewrite ${first === final ? `line ${first}` : `lines ${first} to ${final}`}</label>
        <input id="instruction" value=${instruction} onInput=${(e) => setInstruction(e.target.value)} onKeyDown=${(e) => e.key === "Enter" && !running && rewrite()} /></div>
      <${Range} label="Strength" min=${10} max=${100} step=${10} value=${strength} said=${`${strength}%`} onInput=${setStrength} />
      <div class="buttons">
        ${running
          ? html`<button type="button" class="primary" onClick=${() => controller.current.abort()}>Stop</button><span class="hint" role="status">step ${running.step}</span>`
          : html`<button type="button" class="primary" onClick=${rewrite}>Rewrite</button>
            <button type="button" onClick=${infill}>${to > from ? "Fill the selection anew" : "Fill in at the cursor"}</button>
            <button type="button" onClick=${goOn}>Continue</button>`}
      </div>
      <details class="keys"><summary>What the model is told</summary>
        <label for="document-prompt" class="unseen">What the model is told</label>
        <textarea id="document-prompt" rows="2" placeholder="The instruction and the text, unless you write something here." value=${prompt} onInput=${(e) => setPrompt(e.target.value)}></textarea>
        <p><kbd>Ctrl</kbd>+<kbd>Enter</kbd> rewrites, <kbd>Ctrl</kbd>+<kbd>Z</kbd> and <kbd>Ctrl</kbd>+<kbd>Shift</kbd>+<kbd>Z</kbd> undo and redo, <kbd>Esc</kbd> stops.</p></details>
    </div>`}
    <${Fault} text=${fault} />
  </section>`;
}
