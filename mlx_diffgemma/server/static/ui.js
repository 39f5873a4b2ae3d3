// What all views share: rendering, state that survives a reload, small controls.

import { html, useCallback, useEffect, useRef, useState } from "./preact-htm.js";

export { html, render, useCallback, useEffect, useMemo, useRef, useState } from "./preact-htm.js";

const PREFIX = "mlx-diffgemma ";

export function load(name, initial) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? initial : JSON.parse(text);
  } catch {
    return initial;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {} // full, or not allowed: the page works on, and forgets
}

/** State that a reload does not lose. */
export function useStored(name, initial) {
  const [value, set] = useState(() => load(name, initial));
  const timer = useRef(0);
  const latest = useRef(value);
  latest.current = value;
  useEffect(() => {
    clearTimeout(timer.current);
    timer.current = setTimeout(() => save(name, latest.current), 200);
  }, [value]);
  useEffect(() => {
    const flush = () => save(name, latest.current);
    addEventListener("pagehide", flush);
    return () => {
      flush();
      removeEventListener("pagehide", flush);
    };
  }, []);
  return [value, set];
}

/** Render again, at most once a frame of the screen. */
export function useRedraw() {
  const [, set] = useState(0);
  const waiting = useRef(0);
  useEffect(() => () => cancelAnimationFrame(waiting.current), []);
  return useCallback(() => {
    if (waiting.current) return;
    waiting.current = requestAnimationFrame(() => {
      waiting.current = 0;
      set((n) => n + 1);
    });
  }, []);
}

const LEVELS = [1, 5, 10, 20, 40, 70, 110, 160, 220];

/** The tint of an uncertainty in hundredths of nats, 0 (settled) to 9; 9 too where there is none. */
export function tint(nats) {
  if (nats < 0) return 9;
  let level = 0;
  while (level < 9 && nats >= LEVELS[level]) level++;
  return level;
}

/** Text that forms: [text, tint, kind] each. */
export function Runs({ runs }) {
  return runs.map(([text, level]) => html`<span class=${`t${level}`}>${text}</span>`);
}

export function Range({ label, value, min = 0, max, step = 1, onInput, said, ...rest }) {
  return html`<label class="range">
    <span class="range-label">${label}</span>
    <input type="range" min=${min} max=${max} step=${step} value=${value}
      aria-valuetext=${said} onInput=${(event) => onInput(Number(event.target.value))} ...${rest} />
    <span class="said-value" aria-hidden="true">${said}</span>
  </label>`;
}

/** A line for what went wrong. */
export function Fault({ text }) {
  return text ? html`<p class="fault" role="alert">${text}</p>` : null;
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
