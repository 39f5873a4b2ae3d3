// A state, questions about it, and how likely each answer is.

import { json } from "./api.js";
import { Fault, html, plural, useState, useStored } from "./ui.js";

const KINDS = { noul: "true or false", choice: "one of", score: "on a scale" };
const DEMO = { state: "sudoku", frame: "53{cell}461\n461532\n", questions: [{ name: "cell", type: "choice", instructions: "", criteria: "1\n2\n6" }] };
const REAL = {
  state: "Subject: Twice charged\n\nI was charged twice for the same order. Please help, today.", frame: "",
  questions: [
    { name: "billing", type: "noul", instructions: "The message is about billing.", criteria: "" },
    { name: "tone", type: "choice", instructions: "How does it sound?", criteria: "angry: It is hostile.\ncalm\nglad" },
    { name: "urgency", type: "score", instructions: "How soon is help needed?", criteria: "can wait\nthis week\ntoday" },
  ],
};

const entries = (text) => text.split("\n").filter((line) => line.trim()).map((line) => {
  const at = line.indexOf(":");
  return at < 0 ? [line.trim(), null] : [line.slice(0, at).trim(), line.slice(at + 1).trim() || null];
});

function asked({ type, instructions, criteria }) {
  const question = { type };
  if (instructions.trim()) question.instructions = instructions;
  const given = entries(criteria);
  if (type === "score") question.criteria = given.map(([name, more]) => (more ? `${name}: ${more}` : name));
  else if (given.length) question.criteria = Object.fromEntries(given);
  return question;
}

export function Decide({ about }) {
  const first = about.demo ? DEMO : REAL;
  const [state, setState] = useStored("decide state", first.state);
  const [questions, setQuestions] = useStored("decide questions", first.questions);
  const [frame, setFrame] = useStored("decide frame", first.frame);
  const [draws, setDraws] = useStored("decide draws", 4);
  const [found, setFound] = useStored("decide found", null);
  const [fault, setFault] = useState("");
  const [running, setRunning] = useState(false);
  const change = (at, part) => setQuestions(questions.map((each, n) => (n === at ? { ...each, ...part } : each)));

  async function decide() {
    setFault("");
    const names = questions.map((question) => question.name.trim());
    if (names.some((name, at) => !name || names.indexOf(name) !== at)) {
      setFault("Give every question a name of its own.");
      return;
    }
    setRunning(true);
    try {
      const body = { model: about.name, state, draws, questions: Object.fromEntries(questions.map((each) => [each.name.trim(), asked(each)])) };
      if (frame.trim()) body.frame = frame;
      setFound(await json("/v1/decisions", body));
    } catch (error) {
      setFault(error.message);
    }
    setRunning(false);
  }

  return html`<section class="view" aria-labelledby="title">
    <header class="intro"><h1 id="title">Decide</h1>
      <p>Questions about a state, all answered in one look, with how likely each answer is.</p></header>
    <form class="ask" onSubmit=${(e) => { e.preventDefault(); decide(); }}>
      <label for="state">State</label>
      <textarea id="state" rows=${Math.min(12, Math.max(3, state.split("\n").length))} value=${state} onInput=${(e) => setState(e.target.value)}></textarea>
      ${questions.map((each, at) => html`<fieldset class="question"><legend>Question ${at + 1}</legend>
        <div class="row">
          <div class="field"><label for=${`name-${at}`}>Name</label><input id=${`name-${at}`} value=${each.name} onInput=${(e) => change(at, { name: e.target.value })} /></div>
          <div class="field"><label for=${`type-${at}`}>Answer</label><select id=${`type-${at}`} value=${each.type} onChange=${(e) => change(at, { type: e.target.value })}>
            ${Object.entries(KINDS).map(([kind, title]) => html`<option value=${kind} selected=${kind === each.type}>${title}</option>`)}</select></div>
          <button type="button" class="quiet" aria-label=${`Remove question ${at + 1}`} onClick=${() => setQuestions(questions.filter((_, n) => n !== at))}>Remove</button>
        </div>
        <div class="field"><label for=${`instructions-${at}`}>${each.type === "noul" ? "Statement" : "Question"}</label><input id=${`instructions-${at}`} value=${each.instructions} onInput=${(e) => change(at, { instructions: e.target.value })} /></div>
        ${each.type !== "noul" && html`<div class="field"><label for=${`criteria-${at}`}>${each.type === "score" ? "Levels, lowest first, a line each" : "Options, a line each"}</label>
          <textarea id=${`criteria-${at}`} rows=${Math.max(3, each.criteria.split("\n").length)} value=${each.criteria} onInput=${(e) => change(at, { criteria: e.target.value })}></textarea></div>`}
      </fieldset>`)}
      <div class="buttons">
        <button type="submit" class="primary" disabled=${running || !questions.length}>${running ? "Deciding…" : "Decide"}</button>
        <button type="button" onClick=${() => setQuestions([...questions, { name: `question ${questions.length + 1}`, type: "noul", instructions: "", criteria: "" }])}>Add a question</button>
        <label class="check">Draws <input type="number" min="1" max="64" value=${draws} onInput=${(e) => setDraws(Math.max(1, Math.min(64, Number(e.target.value) || 1)))} /></label>
      </div>
      <details class="keys" open=${Boolean(frame)}><summary>A form of one's own</summary>
        <label for="frame">The whole answer, with {name} in the place of each</label>
        <textarea id="frame" class="mono" rows="3" value=${frame} onInput=${(e) => setFrame(e.target.value)}></textarea></details>
    </form>
    <${Fault} text=${fault} />
    ${found && html`<div class="answers" aria-live="polite">
      ${Object.entries(found.answers).map(([name, answer]) => html`<${Bars} name=${name} answer=${answer} />`)}
      <p class="hint">${plural(found.passes, "pass").replace("passs", "passes")}, seed ${found.seed}</p></div>`}
  </section>`;
}

function Bars({ name, answer }) {
  const spread = answer.spread;
  const of = (option) => (spread && typeof spread === "object" ? spread[option] : spread);
  const options = answer.probabilities
    ? Object.entries(answer.probabilities).map(([option, chance]) => [option, chance, of(option)])
    : [["true", answer.noul, of("true") ?? null], ["false", 1 - answer.noul, of("false") ?? of("true") ?? null]];
  const best = Math.max(...options.map(([, chance]) => chance));
  return html`<section class="answer" aria-label=${name}>
    <h2>${name}</h2>
    ${answer.score !== undefined && html`<p class="hint">expected level ${answer.score.toFixed(2)}</p>`}
    <dl>${options.map(([option, chance, deviation]) => html`<div class=${chance === best ? "bar best" : "bar"}>
      <dt>${option}</dt>
      <dd><meter min="0" max="1" value=${chance} aria-label=${`${option}: ${(chance * 100).toFixed(1)} percent`}></meter>
        <span>${(chance * 100).toFixed(1)}%${typeof deviation === "number" ? ` ± ${(deviation * 100).toFixed(1)}` : ""}</span></dd></div>`)}</dl>
  </section>`;
}
