// One canvas that forms on the server and is changed from here. Every step is kept.

import { Lost, back, json, lines } from "./api.js";
import { load, save } from "./ui.js";

const REMEMBERED = 80; // steps that a reload does not lose
const AGAIN = 0.5; // strength with which a canvas goes on that the server has forgotten

export class Live {
  /** `changed` is called after every change; `store` is where its steps are kept over a reload. */
  constructor(changed, store) {
    this.changed = changed;
    this.store = store;
    this.reset();
    const kept = load(store, null);
    if (kept) Object.assign(this, kept);
    this.leaving = () => this.remember();
    addEventListener("pagehide", this.leaving);
  }

  /** The view is left; what is here is kept. */
  close() {
    this.stop();
    this.remember();
    removeEventListener("pagehide", this.leaving);
  }

  reset() {
    this.name = null; // of the canvas on the server
    this.request = null; // what it was started with
    this.frames = []; // all steps
    this.offset = 0; // the first step that the server's canvas of this name has
    this.words = {}; // spelling of tokens
    this.shown = -1; // the step that is looked at
    this.end = null; // what was said of the end of the last run
    this.seed = null;
    this.running = false;
    this.lost = false;
    this.fault = "";
    this.pending = [];
    this.controller = null;
  }

  get frame() {
    return this.frames[this.shown] || null;
  }

  get last() {
    return this.frames[this.frames.length - 1] || null;
  }

  remember() {
    const { name, request, words, end, seed, shown, fault } = this;
    const skipped = Math.max(0, this.frames.length - REMEMBERED);
    save(this.store, {
      name, request, words, end, seed, fault, frames: this.frames.slice(skipped),
      shown: shown - skipped, offset: this.offset - skipped,
    });
  }

  show(at) {
    this.shown = Math.max(0, Math.min(at, this.frames.length - 1));
    this.changed();
  }

  /** Begin a new canvas; with `pace`, so many milliseconds pass between two steps. */
  async start(request, pace = 0) {
    this.stop();
    this.reset();
    this.request = request;
    await this.drive("/v1/page/canvases", request, pace);
  }

  /** Change the canvas and let it form; `at` goes back to that step first. */
  async order({ changes = [], at = null, strength = 0 }, pace = 0) {
    if (this.running && pace) {
      this.pending.push(...changes);
      return;
    }
    if (at !== null && at < this.offset) {
      await this.anew(this.frames[at], pace, changes);
      return;
    }
    const body = { changes, strength };
    if (at !== null) body.at = at - this.offset;
    const path = `/v1/page/canvases/${this.name}`;
    if (this.running) {
      try {
        for await (const line of lines(path, body)) {
          if (line.queued) return;
          this.take(line); // the run was over by then, and this is a new one
        }
      } catch (error) {
        this.fault = error.message;
      }
      this.changed();
      return;
    }
    await this.drive(path, body, pace);
  }

  stop() {
    if (this.controller) this.controller.abort();
  }

  /** What else might stand at a place of the step that is looked at. */
  async alternatives(place) {
    const at = this.shown - this.offset;
    if (!this.name || at < 0) return [];
    return (await json(`/v1/page/canvases/${this.name}/alternatives`, { at, place })).alternatives;
  }

  async drive(path, body, pace) {
    const controller = new AbortController();
    this.controller = controller;
    this.running = true;
    this.fault = "";
    this.end = null;
    this.changed();
    let first = path === "/v1/page/canvases";
    try {
      while (true) {
        try {
          const run = pace ? { run: first ? 0 : 1 } : {};
          await this.follow(path, { ...body, ...run }, controller.signal);
          if (!pace || (this.last && this.last.done && !this.pending.length)) break;
          await pause(pace, controller.signal);
          path = `/v1/page/canvases/${this.name}`;
          body = { changes: this.pending.splice(0) };
          first = false;
        } catch (error) {
          if (!(error instanceof Lost)) throw error;
          this.lost = true;
          this.changed();
          await back(controller.signal);
          this.lost = false;
          if (controller.signal.aborted) break;
          [path, body] = await this.resumed();
          first = false;
        }
      }
    } catch (error) {
      if (error.status === 404 && this.last && !controller.signal.aborted) {
        this.running = false;
        await this.anew(this.last, pace, body.changes || []);
        return;
      }
      if (error.name !== "AbortError") this.fault = error.message;
    }
    if (this.controller === controller) {
      this.running = false;
      this.lost = false;
      this.controller = null;
      this.remember();
      this.changed();
    }
  }

  async follow(path, body, signal) {
    let ended = false;
    for await (const line of lines(path, body, signal)) {
      if (line.queued) return;
      this.take(line);
      ended = ended || "end" in line;
    }
    if (!ended) throw new Lost("The connection was cut.");
  }

  /** How to go on after the server was away: by name, or anew where it has forgotten. */
  async resumed() {
    const changes = this.pending.splice(0);
    if (!this.last) return ["/v1/page/canvases", this.request];
    if (this.name) {
      try {
        await json(`/v1/page/canvases/${this.name}/alternatives`, { at: 0, place: 0 });
        return [`/v1/page/canvases/${this.name}`, { changes }];
      } catch (error) {
        if (error.status !== 404) throw error;
      }
    }
    return ["/v1/page/canvases", this.again(this.last)];
  }

  again(frame) {
    this.offset = this.frames.length;
    const pins = Object.fromEntries(frame.pins.map((place) => [place, frame.ids[place]]));
    return { ...this.request, seed: undefined, ids: frame.ids, pins, strength: AGAIN };
  }

  async anew(frame, pace, changes) {
    const at = this.frames.indexOf(frame);
    this.frames.length = at + 1;
    await this.drive("/v1/page/canvases", this.again(frame), pace);
    if (changes.length) await this.order({ changes, strength: AGAIN }, pace);
  }

  take(line) {
    if (line.canvas) {
      this.name = line.canvas;
      this.seed = line.seed;
    }
    if (line.back !== undefined) this.frames.length = line.back + this.offset + 1;
    if (line.ids) {
      const at = line.at + this.offset;
      Object.assign(this.words, line.words);
      this.frames[at] = { ids: line.ids, nats: line.nats, pins: line.pins, done: line.done, step: line.step, total: line.total };
      if (!line.late) this.shown = at;
    }
    if ("end" in line) this.end = line;
    this.changed();
  }
}

function pause(milliseconds, signal) {
  return new Promise((done, failed) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      failed(new DOMException("stopped", "AbortError"));
    });
  });
}
