// A conversation whose answers form before one's eyes.

import { lines } from "./api.js";
import { Markdown } from "./markdown.js";
import { Fault, Runs, html, load, plural, save, useEffect, useRedraw, useRef, useState, useStored } from "./ui.js";

const IDEAS = ["count\n28 41", "sort\nlume\nkari\ntoke", "record\nname: toke\nage: 41"];

export function Chat({ about }) {
  const redraw = useRedraw();
  const [messages, setMessages] = useStored("chat messages", []);
  const [words, setWords] = useStored("chat words", "");
  const [editing, setEditing] = useState(null); // {at, text}
  const [fault, setFault] = useState("");
  const [copied, setCopied] = useState(-1);
  const forming = useRef(null); // the answer that forms
  const controller = useRef(null);
  const foot = useRef(null);
  const box = useRef(null);
  const [thinks, setThinks] = useStored("chat thinks", false);
  useEffect(() => {
    const partial = load("chat partial", null); // of an answer that a reload broke off
    if (partial && messages.at(-1)?.role === "user") setMessages([...messages, partial]);
    save("chat partial", null);
    return () => controller.current?.abort();
  }, []);
  useEffect(() => {
    if (forming.current) foot.current?.scrollIntoView({ block: "nearest" });
  });

  async function answer(asked) {
    controller.current?.abort();
    const own = (controller.current = new AbortController());
    const said = { role: "assistant", content: "", thought: "", runs: [], step: 0 };
    forming.current = said;
    setFault("");
    setMessages(asked);
    save("chat messages", asked);
    let cut = "";
    try {
      const body = { messages: asked.map(({ role, content }) => ({ role, content })), thinking: thinks };
      let ended = false;
      for await (const line of lines("/v1/page/chat", body, own.signal)) {
        if (line.runs) {
          said.runs = line.runs;
          said.step = line.step;
          said.block = line.block;
        }
        if (line.text || line.thought) {
          said.content += line.text || "";
          said.thought += line.thought || "";
          said.runs = [];
          save("chat partial", { role: "assistant", content: said.content, thought: said.thought, stopped: true });
        }
        if (line.end) {
          ended = true;
          said.statistics = line;
        }
        redraw();
      }
      if (!ended) cut = "The connection was cut before the answer ended.";
    } catch (error) {
      cut = error.name === "AbortError" ? "" : error.message;
    }
    if (controller.current !== own) return;
    save("chat partial", null);
    controller.current = null;
    forming.current = null;
    if (cut) setFault(`${cut} What was written stays; ask again for the rest.`);
    if (said.content || said.thought || said.statistics) {
      const { content, thought, statistics } = said;
      setMessages([...asked, { role: "assistant", content, thought, statistics, stopped: !statistics }]);
    } else setMessages(asked);
    box.current?.focus();
  }

  function send() {
    if (!words.trim() || forming.current) return;
    setWords("");
    answer([...messages, { role: "user", content: words }]);
  }

  async function copy(at) {
    try {
      await navigator.clipboard.writeText(messages[at].content);
      setCopied(at);
      setTimeout(() => setCopied(-1), 1500);
    } catch {
      setFault("The browser did not allow copying; select the text and copy it by hand.");
    }
  }

  const running = forming.current !== null;
  const shown = running ? [...messages, forming.current] : messages;
  return html`<section class="view chat" aria-labelledby="title">
    <header class="intro"><h1 id="title">Chat</h1>
      ${!shown.length && html`<p>Answers form a whole block at a time: what is settled is plain, what is not is tinted.</p>`}
    </header>
    ${!shown.length && about.demo && html`<div class="ideas"><span>This small model knows a few tasks:</span>
      ${IDEAS.map((idea) => html`<button type="button" onClick=${() => { setWords(idea); box.current.focus(); }}>${idea.split("\n")[0]}</button>`)}</div>`}
    <ol class="messages">${shown.map((message, at) => {
      const forms = running && at === shown.length - 1;
      const last = at === shown.length - 1;
      if (editing?.at === at)
        return html`<li class="message user"><form onSubmit=${(e) => { e.preventDefault(); const text = editing.text; setEditing(null); if (text.trim()) answer([...messages.slice(0, at), { role: "user", content: text }]); }}>
          <label class="unseen" for="editing">Your message</label>
          <textarea id="editing" rows=${Math.min(12, editing.text.split("\n").length + 1)} value=${editing.text} ref=${(e) => e && !e.dataset.seen && ((e.dataset.seen = 1), e.focus())}
            onInput=${(e) => setEditing({ at, text: e.target.value })} onKeyDown=${(e) => e.key === "Escape" && setEditing(null)}></textarea>
          <div class="buttons"><button type="submit" class="primary">Send again</button><button type="button" onClick=${() => setEditing(null)}>Cancel</button></div>
        </form></li>`;
      return html`<li class=${`message ${message.role}`} aria-busy=${forms}>
        <span class="who">${message.role === "user" ? "You" : about.name}</span>
        ${(message.thought || message.runs?.some((run) => run[2] === "thought")) && html`<details class="thought"><summary>Thought</summary>
          <div dir="auto">${message.thought}${forms && html`<${Runs} runs=${message.runs.filter((run) => run[2] === "thought")} />`}</div></details>`}
        ${message.role === "user" || forms
          ? html`<div class="said" dir="auto">${message.content}${forms && html`<${Runs} runs=${message.runs.filter((run) => run[2] !== "thought")} />`}${forms && !message.runs.length && !message.content && html`<span class="t9">  …  </span>`}</div>`
          : html`<div class="said"><${Markdown} text=${message.content} /></div>`}
        <div class="under">
          ${message.role === "assistant" && html`<span class="statistics">${forms ? `step ${message.step}${message.block ? `, canvas ${message.block + 1}` : ""}` : described(message)}</span>`}
          ${!running && html`<span class="acts">
            <button type="button" class="quiet" onClick=${() => copy(at)} aria-label=${`Copy message ${at + 1}`}>${copied === at ? "Copied" : "Copy"}</button>
            ${message.role === "user" && html`<button type="button" class="quiet" onClick=${() => setEditing({ at, text: message.content })} aria-label=${`Edit message ${at + 1}`}>Edit</button>`}
            ${message.role === "assistant" && last && html`<button type="button" class="quiet" onClick=${() => answer(messages.slice(0, at))}>Regenerate</button>`}
            ${message.role === "user" && last && html`<button type="button" class="quiet" onClick=${() => answer(messages)}>Ask again</button>`}
          </span>`}
        </div>
      </li>`;
    })}</ol>
    <div ref=${foot}></div>
    <${Fault} text=${fault} />
    <form class="composer" onSubmit=${(e) => { e.preventDefault(); send(); }}>
      <label class="unseen" for="words">Message</label>
      <textarea id="words" ref=${box} rows=${Math.min(10, Math.max(2, words.split("\n").length))} placeholder="Write a message" value=${words} onInput=${(e) => setWords(e.target.value)}
        onKeyDown=${(e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } if (e.key === "Escape") controller.current?.abort(); }}></textarea>
      <div class="buttons">
        ${running ? html`<button type="button" class="primary" onClick=${() => controller.current?.abort()}>Stop</button>` : html`<button type="submit" class="primary" disabled=${!words.trim()}>Send</button>`}
        ${messages.length > 0 && !running && html`<button type="button" onClick=${() => { setMessages([]); setFault(""); }}>New chat</button>`}
        ${about.thinks && html`<label class="check"><input type="checkbox" checked=${thinks} onChange=${(e) => setThinks(e.target.checked)} /> Think first</label>`}
        <span class="hint">Enter sends, Shift+Enter breaks the line, Esc stops</span>
      </div>
    </form>
  </section>`;
}

function described({ statistics, stopped }) {
  if (stopped || !statistics) return "stopped";
  const steps = statistics.steps.reduce((sum, each) => sum + each, 0);
  const why = statistics.end === "length" ? (statistics.full ? ", the context is full" : ", cut at its longest") : "";
  return `${plural(statistics.tokens, "token")} in ${plural(steps, "step")}, ${statistics.each} a step, ${statistics.rate} a second, seed ${statistics.seed}${why}`;
}
