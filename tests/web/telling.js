// Takes the place of the server for one canvas: tells FRAMES at 30 a second, and notes what is drawn.
(() => {
  const own = window.fetch, frames = FRAMES, coder = new TextEncoder();
  window.fetch = async (path, options) => {
    if (!String(path).endsWith("/v1/page/canvases")) return own(path, options);
    const body = new ReadableStream({
      async start(to) {
        const say = (line) => to.enqueue(coder.encode(JSON.stringify(line) + "\n"));
        const began = performance.now();
        say({ canvas: "x", seed: 1, length: 256 });
        for (const frame of frames) {
          const wait = began + (frame.at * 1000) / 30 - performance.now();
          await new Promise((go) => setTimeout(go, Math.max(0, wait)));
          say(frame);
        }
        say({ end: 89, done: true, converged: true, seconds: 3 });
        to.close();
        window.told = performance.now();
      },
    });
    return new Response(body, { headers: { "content-type": "application/x-ndjson" } });
  };
  window.seen = [];
  new MutationObserver(() => {
    const value = document.querySelector(".travel .said-value");
    const at = value && Number(value.textContent.split(" ")[0]);
    if (value === null || window.seen.at(-1) === at) return;
    window.seen.push(at);
    window.drawn = performance.now();
  }).observe(document, { subtree: true, childList: true, characterData: true });
})();
