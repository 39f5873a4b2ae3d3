// The page: its views, and what stands around them.

import { connection, json, setKey } from "./api.js";
import { Canvas } from "./canvas.js";
import { Chat } from "./chat.js";
import { Decide } from "./decide.js";
import { Document } from "./document.js";
import { Sudoku } from "./sudoku.js";
import { Template } from "./template.js";
import { html, load, render, save, useEffect, useState } from "./ui.js";

const VIEWS = [
  ["sudoku", "Sudoku", Sudoku],
  ["canvas", "Canvas", Canvas],
  ["chat", "Chat", Chat],
  ["document", "Document", Document],
  ["template", "Template", Template],
  ["decide", "Decide", Decide],
];
const THEMES = ["auto", "light", "dark"];

function useHash() {
  const [hash, set] = useState(location.hash.slice(1));
  useEffect(() => {
    const changed = () => set(location.hash.slice(1));
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return hash;
}

function dress(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function App() {
  const [about, setAbout] = useState(null);
  const [state, setState] = useState(connection.state);
  const [theme, setTheme] = useState(load("theme", "auto"));
  const [tries, setTries] = useState(0);
  const hash = useHash();
  useEffect(() => {
    connection.listeners.add(setState);
    return () => connection.listeners.delete(setState);
  }, []);
  useEffect(() => {
    let timer = 0;
    json("/v1/page/about").then(setAbout, () => (timer = setTimeout(() => setTries(tries + 1), 1500)));
    return () => clearTimeout(timer);
  }, [tries]);
  useEffect(() => {
    dress(theme);
    save("theme", theme);
  }, [theme]);

  const views = VIEWS.filter(([name]) => name !== "sudoku" || (about && about.demo));
  const [name, , View] = views.find(([each]) => each === hash) || views.find(([each]) => each === load("view", "")) || views[0];
  useEffect(() => {
    if (!about) return;
    save("view", name);
    document.title = `${views.find(([each]) => each === name)[1]} · mlx-diffgemma`;
  }, [name, about]);

  return html`
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>Skip to the view</a>
    <header class="top">
      <span class="mark"><img src="/page/icon.svg" alt="" width="22" height="22" /> diffgemma</span>
      <nav aria-label="Views">${views.map(([each, title]) => html`<a href=${`#${each}`} aria-current=${each === name ? "page" : undefined}>${title}</a>`)}</nav>
      <button type="button" class="quiet theme" aria-label=${`Colours: ${theme}`} title=${`Colours: ${theme}`}
        onClick=${() => setTheme((now) => THEMES[(THEMES.indexOf(now) + 1) % 3])}>${{ auto: "◐", light: "○", dark: "●" }[theme]}</button>
    </header>
    ${state === "lost" && html`<div class="banner" role="alert">The server does not answer. Nothing is lost; this page goes on when it is back.</div>`}
    ${state === "locked" && html`<${Lock} />`}
    <main id="main" tabindex="-1">${about ? html`<${View} key=${name} about=${about} />` : state === "ok" && html`<p class="waiting" role="status">The model is being loaded…</p>`}</main>
    ${about && html`<footer class="foot"><span>${about.name}</span><span>${about.context.toLocaleString("en")} tokens of context</span><span>version ${about.version}</span>
      <span class="legend" aria-label="Tints: from settled to noise">settled <i class="t0"></i><i class="t2"></i><i class="t4"></i><i class="t6"></i><i class="t8"></i><i class="t9"></i> noise</span></footer>`}
  `;
}

function Lock() {
  const [key, set] = useState("");
  return html`<form class="banner" onSubmit=${(e) => { e.preventDefault(); setKey(key); location.reload(); }}>
    <label for="key">This server asks for its key</label>
    <input id="key" type="password" value=${key} onInput=${(e) => set(e.target.value)} autocomplete="off" />
    <button type="submit" class="primary">Enter</button>
  </form>`;
}

dress(load("theme", "auto"));
render(html`<${App} />`, document.getElementById("app"));
