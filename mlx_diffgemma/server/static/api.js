// What the page asks of its server, and whether the server is there.

const KEY = "mlx-diffgemma key";
const RETRY = 1000; // milliseconds between two looks for a server that has gone

/** Whether the server answers: "ok", "lost" or "locked". Listeners are told of each change. */
export const connection = { state: "ok", listeners: new Set() };

function set(state) {
  if (connection.state === state) return;
  connection.state = state;
  connection.listeners.forEach((listener) => listener(state));
}

/** An answer of the server that is a refusal. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server has gone, or the way to it. */
export class Lost extends Error {}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
  set("ok");
}

async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    set("lost");
    throw new Lost("The server does not answer.");
  }
  if (response.status === 401) set("locked");
  if (!response.ok) {
    let message = `The server answered ${response.status}.`;
    try {
      const said = (await response.json()).error;
      message = typeof said === "string" ? said : said.message;
    } catch {}
    throw new Refused(response.status, message);
  }
  set("ok");
  return response;
}

/** A JSON answer; without `body` it is a GET. */
export async function json(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

/** The lines of an answer that comes bit by bit, each a JSON object. A whole JSON answer is one line. */
export async function* lines(path, body, signal) {
  const response = await ask(path, body, signal);
  if (response.headers.get("content-type").startsWith("application/json")) {
    yield await response.json();
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        set("lost");
        throw new Lost("The connection was cut.");
      }
      if (read.done) break;
      const parts = (rest + read.value).split("\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part) continue;
        const line = JSON.parse(part);
        if (line.error) throw new Refused(line.error.status || 500, line.error.message);
        yield line;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Wait until the server answers again. */
export async function back(signal) {
  set("lost");
  while (!signal?.aborted) {
    await new Promise((done) => setTimeout(done, RETRY));
    try {
      const response = await fetch("/health", { signal });
      if (response.ok) {
        set("ok");
        return;
      }
    } catch {}
  }
}
