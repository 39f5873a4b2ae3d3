// What changed between two texts, by words.

const MOST = 2_000_000; // cells of the table; larger texts differ as a whole

const words = (text) => text.match(/\p{L}[\p{L}\p{M}\p{N}_'’-]*|\p{N}+|\s+|[^\s\p{L}\p{N}]/gu) || [];

/** Pieces in order: {kind: "same", text} or {kind: "change", before, after}. */
export function diff(before, after) {
  const a = words(before), b = words(after);
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const x = a.slice(head, a.length - tail), y = b.slice(head, b.length - tail);
  const pieces = [];
  const same = (text) => {
    if (!text) return;
    const last = pieces[pieces.length - 1];
    if (last?.kind === "same") last.text += text;
    else pieces.push({ kind: "same", text });
  };
  const change = (removed, added) => {
    if (!removed && !added) return;
    const last = pieces[pieces.length - 1];
    if (last?.kind === "change") {
      last.before += removed;
      last.after += added;
    } else pieces.push({ kind: "change", before: removed, after: added });
  };
  same(a.slice(0, head).join(""));
  if (x.length * y.length > MOST) change(x.join(""), y.join(""));
  else {
    const width = y.length + 1, table = new Uint32Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        table[i * width + j] = x[i] === y[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    let i = 0, j = 0;
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) {
        same(x[i++]);
        j++;
      } else if (j < y.length && (i === x.length || table[i * width + j + 1] >= table[(i + 1) * width + j])) change("", y[j++]);
      else change(x[i++], "");
    }
  }
  same(a.slice(a.length - tail).join(""));
  return pieces;
}
