// Slots in a text, filled together or one by one.

import { lines } from "./api.js";
import { Fault, Runs, html, plural, useEffect, useRedraw, useRef, useState, useStored } from "./ui.js";

const DEMO = { template: "532461\n{row:/[1-6]{6}/}\n146253\n253146\n31{cell:1|4|6}625\n625314", prompt: "sudoku" };
const REAL = { template: "Dear {name:word},\nyour order {id:/[A-Z]{2}-[0-9]+/} is {state:late|on time}.\n{closing}\n", prompt: "" };

export function Template({ about }) {
  const redraw = useRedraw();
  const first = about.demo ? DEMO : REAL;
  const [template, setTemplate] = useStored("template", first.template);
  const [prompt, setPrompt] = useStored("template prompt", first.prompt);
  const [filled, setFilled] = useStored("template filled", null);
  const [fault, setFault] = useState("");
  const forming = useRef(null), controller = useRef(null);
  useEffect(() => () => controller.current?.abort(), []);

  async function fill(keep = {}, only = null) {
    const own = (controller.current = new AbortController());
    forming.current = { runs: [], step: 0, only };
    setFault("");
    redraw();
    try {
      let found = null;
      const body = { template, keep, ...(prompt.trim() ? { prompt } : {}) };
      for await (const line of lines("/v1/page/template", body, own.signal)) {
        if (line.runs) Object.assign(forming.current, { runs: line.runs, step: line.step });
        if (line.values) found = line;
        redraw();
      }
      if (!found) throw new Error("The connection was cut; nothing was filled.");
      setFilled({ template, literals: found.literals, slots: found.slots, values: found.values, passes: found.passes, seed: found.seed });
    } catch (error) {
      if (error.name !== "AbortError") setFault(error.message);
    }
    forming.current = null;
    redraw();
  }

  const names = filled ? [...new Set(filled.slots)] : [];
  const refill = (name) => fill(Object.fromEntries(names.filter((each) => each !== name).map((each) => [each, filled.values[each]])), name);
  const stale = filled && filled.template !== template;
  const running = forming.current;
  return html`<section class="view" aria-labelledby="title">
    <header class="intro"><h1 id="title">Template</h1>
      <p>Slots are filled together, each in sight of all the others: <code>{name}</code>, <code>{name:word}</code>, <code>{state:late|on time}</code>, <code>{id:/[A-Z]{2}-[0-9]+/}</code>.</p></header>
    <form class="ask" onSubmit=${(e) => { e.preventDefault(); fill(); }}>
      <label for="template">Template</label>
      <textarea id="template" class="mono" rows=${Math.min(16, Math.max(4, template.split("\n").length + 1))} spellcheck=${false} value=${template} onInput=${(e) => setTemplate(e.target.value)}
        onKeyDown=${(e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); fill(); } }}></textarea>
      <details class="keys"><summary>What the model is told</summary>
        <label for="template-prompt" class="unseen">What the model is told</label>
        <textarea id="template-prompt" rows="2" placeholder="To fill in the template, unless you write something here." value=${prompt} onInput=${(e) => setPrompt(e.target.value)}></textarea></details>
      <div class="buttons">
        ${running ? html`<button type="button" class="primary" onClick=${() => controller.current.abort()}>Stop</button><span class="hint" role="status">step ${running.step}</span>`
          : html`<button type="submit" class="primary">Fill</button>`}
      </div>
    </form>
    <${Fault} text=${fault} />
    ${running && html`<p class="paper short" aria-busy="true" dir="auto"><${Runs} runs=${running.runs} /></p>`}
    ${filled && !running && html`<div class="filled">
      <div class="paper short" dir="auto" data-filled>${filled.literals.map((literal, at) => html`${literal}${at < filled.slots.length && html`<mark title=${filled.slots[at]}>${filled.values[filled.slots[at]]}</mark>`}`)}</div>
      ${stale && html`<p class="hint">The template has changed since; fill it again to see the slots anew.</p>`}
      ${!stale && html`<ul class="slots">${names.map((name) => html`<li>
        <label for=${`slot-${name}`}>${name}</label>
        <input id=${`slot-${name}`} value=${filled.values[name]} onInput=${(e) => setFilled({ ...filled, values: { ...filled.values, [name]: e.target.value } })} />
        <button type="button" onClick=${() => refill(name)} aria-label=${`Fill ${name} again`}>Fill again</button></li>`)}</ul>`}
      <p class="hint">${plural(filled.passes, "pass").replace("passs", "passes")}, seed ${filled.seed}</p>
    </div>`}
  </section>`;
}
