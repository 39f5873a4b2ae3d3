// Markdown as elements, never as HTML: what a model writes cannot become markup of the page.

import { html } from "./ui.js";

const WORDS = new Set(("and as async await break case catch class const continue def default del do elif else enum except export extends "
  + "false finally fn for from func function if impl import in interface is lambda let match mut new nil None not null or package pass pub "
  + "raise return self static struct super switch this throw trait True False true try type use var void while with yield").split(" "));
const CODE = /(\/\/[^\n]*|#[^\n]*|\/\*[\s\S]*?\*\/)|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`)|(\b\d[\w.]*\b)|([A-Za-z_$][\w$]*)/g;

function highlighted(code) {
  const parts = [];
  let end = 0;
  for (const found of code.matchAll(CODE)) {
    const [text, comment, string, number, word] = found;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : WORDS.has(word) ? "word" : null;
    if (!kind) continue;
    parts.push(code.slice(end, found.index), html`<span class=${`code-${kind}`}>${text}</span>`);
    end = found.index + text.length;
  }
  return [...parts, code.slice(end)];
}

const INLINE = /(`+)([\s\S]+?)\1|\*\*([^*\n]+)\*\*|\*([^*\n]+)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text) {
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, bold, slanted, name, address] = found;
    parts.push(text.slice(end, found.index));
    if (code !== undefined) parts.push(html`<code>${code}</code>`);
    else if (bold !== undefined) parts.push(html`<strong>${bold}</strong>`);
    else if (slanted !== undefined) parts.push(html`<em>${slanted}</em>`);
    else parts.push(html`<a href=${address} rel="noopener noreferrer nofollow" target="_blank">${name}</a>`);
    end = found.index + whole.length;
  }
  return [...parts, text.slice(end)];
}

export function Markdown({ text }) {
  const blocks = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; at++) {
    const fence = lines[at].match(/^\s*(```+|~~~+)(.*)$/);
    if (fence) {
      const body = [];
      while (++at < lines.length && !lines[at].trim().startsWith(fence[1])) body.push(lines[at]);
      blocks.push(html`<pre tabindex="0"><code>${highlighted(body.join("\n"))}</code></pre>`);
      continue;
    }
    const heading = lines[at].match(/^(#{1,4})\s+(.*)$/);
    if (heading) {
      blocks.push(html`<p class="heading">${inline(heading[2])}</p>`);
      continue;
    }
    const item = /^\s*([-*+]|\d+[.)])\s+/;
    if (item.test(lines[at])) {
      const items = [], numbered = /^\s*\d/.test(lines[at]);
      while (at < lines.length && item.test(lines[at])) items.push(lines[at++].replace(item, ""));
      at--;
      const all = items.map((each) => html`<li>${inline(each)}</li>`);
      blocks.push(numbered ? html`<ol>${all}</ol>` : html`<ul>${all}</ul>`);
      continue;
    }
    if (!lines[at].trim()) continue;
    const body = [lines[at]];
    while (at + 1 < lines.length && lines[at + 1].trim() && !/^\s*(```|~~~|#{1,4}\s|[-*+]\s|\d+[.)]\s)/.test(lines[at + 1])) body.push(lines[++at]);
    blocks.push(html`<p dir="auto">${inline(body.join("\n"))}</p>`);
  }
  return html`<div class="markdown">${blocks}</div>`;
}
