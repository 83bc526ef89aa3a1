// Draws a timeline: a lane for each request, events from left to right. Only what is seen is drawn.
// Text from the data goes into the page as text (textContent, fillText), never as markup.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { events, requests, ops, verdict, cause } = data;
const count = events.length;
const id = (name) => document.getElementById(name);
const canvas = id("canvas"), ctx = canvas.getContext("2d"), tip = id("tip");

// ---- words ----
const hex = (n) => "0x" + n.toString(16);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const nameOf = (r) => r.name;
const titleOf = (r) => `${nameOf(r)}: ${r.what}`;
const whoOf = (r) => r.guest !== null ? "asked by the guest"
  : r.parent !== null ? `part of ${nameOf(requests[r.parent])}` : "nobody asked";
const opName = (o) => `op #${requests[o.request].number}.${o.ordinal}`;
const opWhat = (o) => {
  if (o.flush) return `flush of ${o.file}`;
  if (o.kind === "truncate") return `set the length of ${o.file} to ${hex(o.offset)}`;
  if (!o.file) return o.kind;
  return `${o.kind} ${hex(o.offset)}+${hex(o.len)} of ${o.file}`;
};
// The same for a bar: the longest first.
const short = (n) => n && n % 1048576 === 0 ? `${n / 1048576}M` : n && n % 1024 === 0 ? `${n / 1024}K` : hex(n);
const opShort = (o) => o.flush ? [`flush ${o.file}`, "flush"]
  : o.kind === "truncate" ? [`${o.file} to length ${hex(o.offset)}`, `length ${hex(o.offset)}`, "length"]
  : o.file ? [`${o.kind} ${o.file} ${hex(o.offset)}+${short(o.len)}`, `${o.kind} ${hex(o.offset)}+${short(o.len)}`, `${o.kind} ${hex(o.offset)}`, o.kind]
  : [o.kind];
const hows = { ok: "done", early: "done, with older bytes", short: "half of it done", eio: "failed (EIO), nothing done",
  "eio-part": "failed (EIO), half of it done", "eio-all": "failed (EIO), but all of it done", enospc: "failed (ENOSPC)",
  eopnotsupp: "refused, not supported", crash: "cut off by the crash" };
const howOf = (o) => o.to === null ? "never came back" : (hows[o.how] || o.how || "done");
// What the crash has left of an op, by its place.
const fates = new Map(verdict && verdict.left ? verdict.left.map((l) => [ops[l.op], l]) : []);
const leftMark = (l) => !l.lost.length ? "✔ kept" : !l.kept.length ? "✘ lost" : "◐ a part kept";
const leftOf = (o) => {
  const l = fates.get(o), spans = (list) => list.map(([from, to]) => `${hex(from)}+${hex(to - from)}`).join(" ");
  if (!l) return "";
  return `\nthe crash ${[l.kept.length ? `kept ${spans(l.kept)}` : "", l.lost.length ? `lost ${spans(l.lost)}` : ""].filter(Boolean).join(" and ")}`;
};
const safeOf = (o) => o.unsafe == null ? "" : o.safe ? `; a crash could take it away until event ${o.unsafe}`
  : "; not flushed: a crash could take it away";
const endOf = (r) => r.end === null ? "has not ended" : r.result === "ok" ? "ended well"
  : r.result === "crash" ? "cut off by the crash" : r.result === "" ? "ended" : `ended with: ${r.result}`;
const meaningOf = (state) => data.states && data.states[state] ? ` (${data.states[state]})` : "";
const isBad = (r) => r.end !== null && r.result !== "ok" && r.result !== "" && r.result !== "crash";
const timeOf = (ns) => `${(ns / 1e6).toLocaleString("en", { maximumFractionDigits: 3 })} ms`;
const waitOf = (s) => {
  let text = `waits for ${s.wait}`;
  if (s.keeper !== null) text += `; ${nameOf(requests[s.keeper])} has to go on first`;
  if (s.ahead !== null) text += `; in line behind ${nameOf(requests[s.ahead])}`;
  return text;
};

// ---- what belongs to each event ----
const at = Array.from({ length: count }, () => null);
const put = (when, kind, what) => { (at[when] ??= []).push([kind, what]); };
requests.forEach((r, i) => {
  put(r.begin, "begin", i);
  r.stays.forEach((s) => { if (s.from < s.to || r.end === null) put(s.from, "stay", [i, s]); if (s.by !== null) put(s.to, "by", [i, s]); });
  if (r.end !== null) put(r.end, "end", i);
});
ops.forEach((o) => { put(o.from, "from", o); if (o.to !== null) put(o.to, "to", o); if (o.safe) put(o.unsafe, "safe", o); o.tries.forEach(([when, how]) => put(when, "try", [o, how])); });

// ---- lanes ----
// One for each request, pieces below what they are pieces of. Where there are very many, requests that follow
// each other share a lane.
const LANES_OWN = 400, BAR = 18, OP = 14, GAP = 9, AXIS = 40;
const endAt = (r) => r.end === null ? count : Math.max(r.end, r.begin);
const lanes = [], laneOf = new Int32Array(requests.length);
if (requests.length <= LANES_OWN) {
  const pieces = requests.map(() => []), tops = [];
  requests.forEach((r, i) => (r.parent === null ? tops : pieces[r.parent]).push(i));
  const walk = (i, depth) => {
    laneOf[i] = lanes.length;
    lanes.push({ requests: [i], depth });
    pieces[i].forEach((piece) => walk(piece, depth + 1));
  };
  tops.forEach((i) => walk(i, 0));
} else {
  const free = [];
  requests.forEach((r, i) => {
    let lane = free.findIndex((until) => until < r.begin);
    if (lane < 0) { lane = lanes.length; lanes.push({ requests: [], depth: 0 }); free.push(-1); }
    free[lane] = endAt(r);
    laneOf[i] = lane;
    lanes[lane].requests.push(i);
  });
}
lanes.forEach((lane) => { lane.stays = []; lane.rows = []; lane.ends = []; });
requests.forEach((r, i) => {
  const { stays } = lanes[laneOf[i]];
  const live = r.stays.filter((s) => s.to > s.from || r.end === null);
  // What begins and ends in one event is shown as a short bar.
  if (!live.length) live.push({ state: r.stays.length ? r.stays[0].state : "at once", wait: "nothing", others: false, keeper: null, ahead: null, by: null, from: r.begin, to: endAt(r) });
  live.forEach((s, n) => {
    const open = r.end === null && n === live.length - 1;
    stays.push({ from: s.from, to: open ? count : Math.max(s.to, s.from + 0.5), s, r: i, open });
  });
});
// What is done and may still be lost has a tail, up to where it is safe; where there are very many, there is no room for them.
const ROWS = 12, hasTails = ops.length <= 1500;
ops.forEach((o) => {
  const lane = lanes[laneOf[o.request]];
  const to = o.to === null ? count : Math.max(o.to, o.from + 0.5);
  const end = hasTails && o.unsafe != null ? Math.max(to, o.unsafe) : to;
  let row = lane.ends.findIndex((until) => until <= o.from);
  if (row < 0) {
    row = lane.rows.length < ROWS ? lane.rows.length : ROWS - 1;
    lane.rows[row] ??= [];
  }
  lane.ends[row] = Math.max(lane.ends[row] ?? 0, end);
  lane.rows[row].push({ from: o.from, to, end, o });
});
let height = 0;
lanes.forEach((lane) => { lane.y = height; lane.h = BAR + lane.rows.length * OP + GAP; height += lane.h; });
const flushes = ops.filter((o) => o.flush);
// Arrows: who waits for whom, who lets whom go on, pieces. By moment.
const arrows = [];
requests.forEach((r, i) => {
  if (r.parent !== null) arrows.push({ x: r.begin, a: r.parent, b: i, kind: "piece" });
  r.stays.forEach((s) => {
    if (s.keeper !== null && s.to > s.from) arrows.push({ x: s.from, a: i, b: s.keeper, kind: "wait" });
    if (s.by !== null) arrows.push({ x: s.to, a: s.by, b: i, kind: "go" });
  });
});
arrows.sort((a, b) => a.x - b.x);

// The first in a list, sorted by `key`, of at least `value`.
const lower = (list, value, key) => {
  let low = 0, high = list.length;
  while (low < high) { const mid = (low + high) >> 1; if (key(list[mid]) < value) low = mid + 1; else high = mid; }
  return low;
};

// ---- colours ----
let look = {};
const states = new Map();
requests.forEach((r) => r.stays.forEach((s) => { if (!states.has(s.state)) states.set(s.state, states.size); }));
const readLook = () => {
  const css = getComputedStyle(document.documentElement);
  for (const name of ["back", "lane", "text", "dim", "line", "accent", "bad", "good", "read", "write", "discard", "flush", "other", "wait", "bar-l", "bar-s", "bar-text", "op-text"]) {
    look[name] = css.getPropertyValue("--" + name).trim();
  }
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.strokeStyle = look.wait;
  pen.globalAlpha = 0.75;
  pen.lineWidth = 1.6;
  pen.beginPath();
  for (const d of [-8, 0, 8]) { pen.moveTo(d, 8); pen.lineTo(d + 8, 0); }
  pen.stroke();
  look.hatch = ctx.createPattern(tile, "repeat");
};
// All hues but red, which means that something failed.
const fillOf = (state) => {
  const n = states.get(state) ?? 0;
  return `hsl(${Math.round(35 + ((n * 0.618034 + 0.55) % 1) * 290)} ${look["bar-s"]} ${look["bar-l"]})`;
};
const sortOf = (o) => o.flush ? "flush" : o.kind === "read" ? "read" : o.kind === "discard" ? "discard"
  : /write|zero|unmap/.test(o.kind) ? "write" : "other";
const opColour = (o) => look[sortOf(o)];
const eventMark = { submit: "▼", complete: "●", fault: "✖", deadline: "◷", crash: "⚡", life: "■", other: "·" };
const eventColour = (kind) => kind === "fault" || kind === "crash" ? look.bad : kind === "submit" ? look.accent
  : kind === "complete" ? look.good : look.text;

// ---- the view ----
const view = { from: 0, scale: 10, top: 0, w: 0, h: 0 };
let gutter = 240, now = 0, chosen = -1, mouse = null, pending = false;
const X = (when) => gutter + (when - view.from) * view.scale;
const whenAt = (x) => view.from + (x - gutter) / view.scale;
const redraw = () => { if (!pending) { pending = true; requestAnimationFrame(draw); } };
// Below the lanes, for what is said of a moment.
const band = () => (verdict ? 22 : 0) + (cause || data.calm != null ? 22 : 0);
const leastScale = () => Math.max(1e-4, (view.w - gutter - 30) / (count + 0.5));
const clamp = () => {
  view.scale = Math.min(Math.max(view.scale, leastScale()), 400);
  const shown = (view.w - gutter) / view.scale;
  view.from = Math.min(Math.max(view.from, -0.6), Math.max(-0.6, count + 0.9 - shown));
  view.top = Math.min(Math.max(view.top, 0), Math.max(0, height + AXIS + 20 + band() - view.h));
};
const zoom = (factor, x) => {
  const when = whenAt(x);
  view.scale *= factor;
  clamp();
  view.from = when - (x - gutter) / view.scale;
  clamp();
  redraw();
};
const fit = () => { view.scale = leastScale(); view.from = -0.6; clamp(); redraw(); };
const show = (when) => {
  const x = X(when);
  if (x < gutter + 20 || x > view.w - 40) { view.from = when - (view.w - gutter) / view.scale / 2; clamp(); }
};
const isSeen = (i) => {
  const lane = lanes[laneOf[i]], y = lane.y - view.top;
  return y >= 0 && y + lane.h <= view.h - AXIS - band();
};
const showLane = (i) => {
  const lane = lanes[laneOf[i]];
  if (!isSeen(i)) { view.top = lane.y - (view.h - AXIS - band()) / 2 + lane.h / 2; clamp(); }
};

function bar(x1, x2, y, h) { ctx.fillRect(x1, y, Math.max(1, x2 - x1), h); }
function label(text, x, y, room) {
  if (room < 18) return;
  const width = ctx.measureText(text).width;
  if (width > room) {
    const fits = Math.floor(text.length * room / width) - 1;
    if (fits < 3) return;
    text = text.slice(0, fits) + "…";
  }
  ctx.fillText(text, x, y);
}

function draw() {
  pending = false;
  const { w, h } = view;
  const dpr = window.devicePixelRatio || 1;
  ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
  ctx.fillStyle = look.back;
  ctx.fillRect(0, 0, w, h);
  ctx.textBaseline = "middle";
  ctx.font = "12px system-ui, sans-serif";
  const first = Math.max(0, whenAt(gutter) - 1), final = Math.min(count, whenAt(w) + 1);
  const firstLane = Math.max(0, lower(lanes, view.top, (lane) => lane.y + lane.h));
  const Y = (lane) => AXIS + lane.y - view.top;

  const within = (x, y, width, height) => { ctx.save(); ctx.beginPath(); ctx.rect(x, y, width, height); ctx.clip(); };
  const room = h - AXIS - band();
  within(0, AXIS, w, room);
  for (let l = firstLane; l < lanes.length && Y(lanes[l]) < h; l++) {
    if (l % 2 === 0) { ctx.fillStyle = look.lane; ctx.fillRect(0, Y(lanes[l]) - 4, w, lanes[l].h); }
  }
  ctx.restore();
  within(gutter, AXIS, w - gutter, h - AXIS);
  drawFences(first, final, h);
  // The event that is looked at.
  ctx.globalAlpha = 0.14;
  ctx.fillStyle = look.accent;
  const half = Math.max(2, Math.min(view.scale * 0.3, 14));
  ctx.fillRect(X(now) - half, AXIS, 2 * half, h);
  ctx.globalAlpha = 1;
  ctx.restore();
  within(gutter, AXIS, w - gutter, room);
  for (let l = firstLane; l < lanes.length && Y(lanes[l]) < h; l++) drawLane(lanes[l], Y(lanes[l]), first, final);
  drawArrows(first, final, Y);
  ctx.restore();
  within(gutter, AXIS, w - gutter, h - AXIS);
  drawCrashes(h);
  ctx.restore();
  within(gutter, AXIS, w - gutter, room);
  drawLeft();
  ctx.restore();
  drawGutter(firstLane, Y, h);
  drawAxis(first, final, w, h);
}

function drawLane(lane, y, first, final) {
  let drawn = -1;
  for (let n = lower(lane.stays, first, (b) => b.to); n < lane.stays.length; n++) {
    const { from, to, s, r, open } = lane.stays[n];
    if (from > final) break;
    const x1 = X(from), x2 = X(to);
    if (x2 < drawn + 0.7 && !open) continue;
    drawn = x2;
    ctx.fillStyle = fillOf(s.state);
    bar(x1, x2, y, BAR);
    if (s.others) { ctx.fillStyle = look.hatch; bar(x1, x2, y, BAR); }
    if (x2 - x1 > 4) {
      ctx.strokeStyle = s.others ? look.wait : look.dim;
      ctx.lineWidth = 1;
      ctx.strokeRect(x1 + 0.5, y + 0.5, x2 - x1 - 1, BAR - 1);
      const left = Math.max(x1, gutter), words = s.others ? `${s.state}: waits` : s.state;
      if (s.others) {
        const room = Math.min(ctx.measureText(words).width + 6, x2 - left - 2);
        ctx.fillStyle = look.back;
        ctx.globalAlpha = 0.75;
        ctx.fillRect(left + 2, y + 2, room, BAR - 4);
        ctx.globalAlpha = 1;
        ctx.fillStyle = look.text;
      } else ctx.fillStyle = look["bar-text"];
      label(words, left + 5, y + BAR / 2 + 0.5, x2 - left - 8);
    }
    if (r === chosen) { ctx.strokeStyle = look.accent; ctx.lineWidth = 2; ctx.strokeRect(x1, y, Math.max(2, x2 - x1), BAR); }
    const whole = requests[r];
    if (isBad(whole) && whole.end === s.to) { ctx.fillStyle = look.bad; ctx.fillRect(x2 - 4, y, 4, BAR); }
    if (open) { ctx.fillStyle = look.bad; label("…", x2 - 14, y + BAR / 2, 30); }
  }
  lane.rows.forEach((row, k) => {
    const top = y + BAR + 2 + k * OP;
    let last = -1;
    for (let n = lower(row, first, (b) => b.end); n < row.length; n++) {
      const { from, to, end, o } = row[n];
      if (from > final) break;
      const x1 = X(from), x2 = X(to);
      if (end > to) drawTail(x2, X(end), top, o);
      if (fates.has(o)) marks.push([o, top]);
      if (x2 < last + 0.7) continue;
      last = x2;
      ctx.fillStyle = opColour(o);
      bar(x1 + 1, x2 - 1, top, OP - 2);
      if (view.scale < 5) continue;
      // Down to the disk, and back.
      ctx.fillRect(x1, top - 2 - k * OP, 1.5, OP * (k + 1) - 2);
      const left = Math.max(x1, gutter), room = x2 - left - 10;
      if (room > 24) {
        ctx.font = "10.5px system-ui, sans-serif";
        ctx.fillStyle = look["op-text"];
        const words = opShort(o);
        label(words.find((text) => ctx.measureText(text).width <= room) ?? words[words.length - 1], left + 4, top + OP / 2 - 0.5, room);
        ctx.font = "12px system-ui, sans-serif";
      }
      if (o.to !== null) {
        const bad = failed(o);
        ctx.fillStyle = bad ? look.bad : opColour(o);
        ctx.beginPath();
        ctx.moveTo(x2, top - 3);
        ctx.lineTo(x2 - 3.5, top + 4);
        ctx.lineTo(x2 + 3.5, top + 4);
        ctx.fill();
        if (bad) { ctx.font = "bold 13px system-ui, sans-serif"; ctx.fillText("✖", x2 + 3, top + 6); ctx.font = "12px system-ui, sans-serif"; }
      }
      ctx.fillStyle = look.bad;
      o.tries.forEach(([when]) => ctx.fillRect(X(when) - 1, top, 3, OP - 2));
    }
  });
}
// What the failing crash has kept and lost, at its line.
let marks = [];
function drawLeft() {
  ctx.font = "bold 11px system-ui, sans-serif";
  for (const [o, top] of marks) {
    const l = fates.get(o), words = leftMark(l), width = ctx.measureText(words).width + 8;
    const x = Math.min(X(verdict.at + 0.5) - width / 2, view.w - width - 2);
    ctx.fillStyle = look.back;
    ctx.fillRect(x - 1, top - 1, width + 2, OP);
    ctx.fillStyle = !l.lost.length ? look.good : !l.kept.length ? look.bad : look.wait;
    ctx.fillRect(x, top, width, OP - 2);
    ctx.fillStyle = look.back;
    ctx.fillText(words, x + 4, top + OP / 2 - 0.5);
  }
  marks = [];
  ctx.font = "12px system-ui, sans-serif";
}
// Done, and a crash may still take it away.
function drawTail(x1, x2, top, o) {
  ctx.fillStyle = ctx.strokeStyle = opColour(o);
  ctx.globalAlpha = 0.25;
  ctx.fillRect(x1, top + 2, x2 - x1, OP - 6);
  ctx.globalAlpha = 0.9;
  ctx.lineWidth = 1;
  ctx.setLineDash([3, 3]);
  ctx.strokeRect(x1 + 0.5, top + 2.5, Math.max(1, x2 - x1 - 1), OP - 7);
  ctx.setLineDash([]);
  ctx.globalAlpha = 1;
  if (o.safe) { ctx.fillStyle = look.flush; ctx.fillRect(x2 - 2, top, 3, OP - 2); }
}
const failed = (o) => o.to !== null && o.bad;

function drawFences(first, final, h) {
  let last = -10;
  for (const o of flushes) {
    const to = o.to ?? count;
    if (to < first || o.from > final) continue;
    const x1 = X(o.from), x2 = X(to);
    if (x2 - last < 3) continue;
    last = x2;
    ctx.fillStyle = ctx.strokeStyle = failed(o) ? look.bad : look.flush;
    ctx.globalAlpha = 0.07;
    ctx.fillRect(x1, AXIS, x2 - x1, h);
    ctx.globalAlpha = 0.55;
    if (o.to !== null) {
      ctx.fillRect(x2 - 2, AXIS, 1, h);
      ctx.fillRect(x2 + 1, AXIS, 1, h);
    }
    ctx.globalAlpha = 1;
  }
}

function drawArrows(first, final, Y) {
  const from = lower(arrows, first, (a) => a.x), to = lower(arrows, final, (a) => a.x);
  const few = to - from <= 300;
  for (let n = from; n < to; n++) {
    const { x: when, a, b, kind } = arrows[n];
    const mine = a === chosen || b === chosen;
    if (!few && !mine) continue;
    const x = X(when) + (kind === "wait" ? 3 : kind === "go" ? -1 : 1);
    let y1 = Y(lanes[laneOf[a]]) + BAR / 2, y2 = Y(lanes[laneOf[b]]) + BAR / 2;
    if (y1 === y2) continue;
    const down = y2 > y1 ? 1 : -1;
    y1 += down * BAR / 2;
    y2 -= down * BAR / 2;
    ctx.globalAlpha = chosen < 0 || mine ? 1 : 0.3;
    ctx.strokeStyle = ctx.fillStyle = kind === "go" ? look.good : kind === "wait" ? look.wait : look.dim;
    ctx.lineWidth = kind === "piece" ? 1 : 2;
    ctx.setLineDash(kind === "go" ? [] : kind === "wait" ? [5, 3] : [1, 3]);
    ctx.beginPath();
    ctx.moveTo(x, y1);
    ctx.lineTo(x, y2);
    ctx.stroke();
    ctx.setLineDash([]);
    if (kind !== "piece") {
      ctx.beginPath();
      ctx.moveTo(x, y2);
      ctx.lineTo(x - 4, y2 - down * 7);
      ctx.lineTo(x + 4, y2 - down * 7);
      ctx.fill();
    }
    ctx.globalAlpha = 1;
  }
}

const crashes = events.flatMap((e, n) => e.kind === "crash" ? [n] : []);
function drawCrashes(h) {
  ctx.fillStyle = look.bad;
  for (const when of crashes) ctx.fillRect(X(when) - 1, AXIS, 2, h);
  if (cause) drawCause(h);
  if (data.calm != null) drawLine(data.calm, h, "● from here on nothing more goes wrong", look.accent);
  if (!verdict) return;
  const x = X(verdict.at + (verdict.crash ? 0.5 : 0));
  ctx.strokeStyle = look.bad;
  ctx.lineWidth = 2.5;
  ctx.setLineDash(verdict.crash ? [7, 4] : []);
  ctx.beginPath();
  ctx.moveTo(x, AXIS);
  ctx.lineTo(x, h);
  ctx.stroke();
  ctx.setLineDash([]);
  const words = verdict.crash ? "✖ a crash here leaves it wrong" : "✖ here it goes wrong";
  ctx.font = "bold 12px system-ui, sans-serif";
  const width = ctx.measureText(words).width + 12;
  if (x < gutter - 5 || x > view.w + 5) return;
  const left = Math.max(gutter, Math.min(x + 4, view.w - width - 2));
  ctx.fillRect(left, h - 20, width, 18);
  ctx.fillStyle = look.back;
  ctx.fillText(words, left + 6, h - 10.5);
}

// From this event on it could only go wrong.
function drawCause(h) {
  const x = X(cause.at);
  ctx.globalAlpha = 0.08;
  ctx.fillRect(Math.max(x, gutter), AXIS, Math.max(0, Math.min(X(verdict ? verdict.at : count), view.w) - Math.max(x, gutter)), h);
  ctx.globalAlpha = 1;
  drawLine(cause.at, h, "● from here on it could only go wrong", look.bad);
}
function drawLine(when, h, words, colour) {
  const x = X(when);
  if (x < gutter - 5 || x > view.w + 5) return;
  ctx.fillStyle = colour;
  ctx.fillRect(x - 1.25, AXIS, 2.5, h);
  ctx.font = "bold 12px system-ui, sans-serif";
  const width = ctx.measureText(words).width + 12;
  const left = Math.max(gutter, Math.min(x + 4, view.w - width - 2));
  ctx.fillRect(left, h - 42, width, 18);
  ctx.fillStyle = look.back;
  ctx.fillText(words, left + 6, h - 32.5);
  ctx.fillStyle = look.bad;
}

function drawGutter(firstLane, Y, h) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(0, AXIS, gutter - 6, h - AXIS - band());
  ctx.clip();
  for (let l = firstLane; l < lanes.length && Y(lanes[l]) < h; l++) {
    const lane = lanes[l], y = Y(lane);
    const mine = lane.requests.includes(chosen);
    const r = mine ? requests[chosen] : requests[lane.requests[0]];
    const shared = lane.requests.length > 1 && !mine;
    ctx.fillStyle = mine ? look.accent : look.text;
    const x = 10 + Math.min(lane.depth, 4) * 12;
    const words = shared ? plural(lane.requests.length, "request") : (lane.depth ? "└ " : "") + titleOf(r);
    ctx.font = (mine ? "bold " : "") + "12px system-ui, sans-serif";
    label(words, x, y + BAR / 2, gutter - x - 10);
    if (lane.rows.length && !shared) {
      ctx.font = "10.5px system-ui, sans-serif";
      ctx.fillStyle = look.dim;
      label(`${whoOf(r)}; ${endOf(r)}`, x, y + BAR + 6, gutter - x - 10);
    }
  }
  ctx.restore();
  ctx.fillStyle = look.line;
  ctx.fillRect(gutter - 1, 0, 1, h);
}

function drawAxis(first, final, w, h) {
  ctx.fillStyle = look.back;
  ctx.fillRect(0, 0, w, AXIS - 4);
  ctx.fillStyle = look.line;
  ctx.fillRect(0, AXIS - 4, w, 1);
  ctx.fillStyle = look.dim;
  ctx.font = "12px system-ui, sans-serif";
  ctx.fillText("events →   requests ↓", 10, AXIS / 2 - 2);
  ctx.save();
  ctx.beginPath();
  ctx.rect(gutter, 0, w - gutter, AXIS);
  ctx.clip();
  ctx.textAlign = "center";
  const least = 44 / view.scale;
  let step = 1;
  for (const f of [2, 2.5, 2]) if (step < least) step *= f;
  while (step < least) step *= 10;
  step = Math.ceil(step);
  for (let n = Math.ceil(first / step) * step; n < Math.min(final, count); n += step) {
    ctx.fillStyle = look.dim;
    ctx.fillText(String(n), X(n), 9);
  }
  // Where there is no room for all, what is rare is what is shown.
  const rank = { crash: 4, fault: 3, deadline: 2, life: 2, submit: 1 };
  const end = Math.min(Math.ceil(final), count);
  if (view.scale >= 9) {
    for (let n = Math.floor(first); n < end; n++) mark(n);
  } else {
    const per = 9 / view.scale;
    for (let cell = Math.floor(first / per); cell * per < end; cell++) {
      const a = Math.max(0, Math.ceil(cell * per)), b = Math.min(count, Math.ceil((cell + 1) * per));
      let best = -1;
      for (let n = a; n < b; n++) if (best < 0 || (rank[events[n].kind] || 0) > (rank[events[best].kind] || 0)) best = n;
      if (best >= 0) mark(best);
    }
  }
  function mark(n) {
    const { kind } = events[n];
    ctx.fillStyle = eventColour(kind);
    ctx.fillText(eventMark[kind] || "·", X(n), 26);
  }
  ctx.fillStyle = look.accent;
  ctx.fillRect(X(now) - 8, AXIS - 6, 16, 3);
  ctx.restore();
}

// ---- what is under the mouse ----
function under(x, y) {
  if (x < gutter && y > AXIS) {
    const lane = laneUnder(y);
    return lane && { request: lane.requests.includes(chosen) ? chosen : lane.requests[0] };
  }
  const when = whenAt(x);
  if (y <= AXIS) {
    const n = Math.round(when);
    return n >= 0 && n < count ? { event: n } : null;
  }
  const lane = laneUnder(y);
  if (!lane) return null;
  const inside = y - AXIS + view.top - lane.y;
  const slack = 2 / view.scale;
  const find = (list) => {
    const n = lower(list, when - slack, (b) => b.end ?? b.to);
    return n < list.length && list[n].from <= when + slack ? list[n] : null;
  };
  if (inside < BAR) {
    const found = find(lane.stays);
    return found && { request: found.r, stay: found.s };
  }
  const row = lane.rows[Math.floor((inside - BAR - 1) / OP)];
  const found = row && find(row);
  return found ? { op: found.o, request: found.o.request } : null;
}
function laneUnder(y) {
  const n = lower(lanes, y - AXIS + view.top + 1e-9, (lane) => lane.y + lane.h);
  return n < lanes.length ? lanes[n] : null;
}
const whenWords = (from, to) => `from event ${from} ${to === null ? "on, to no end" : `to event ${to}`}` +
  (data.timed && to !== null && to < count ? ` (${timeOf(events[to].time - events[from].time)})` : "");
function tipFor(found) {
  if (found.event !== undefined) {
    const e = events[found.event];
    return `event ${found.event}: ${e.what}` + (e.images ? `\nwhat a crash would leave after it was looked at: ${plural(e.images, "image")}, none wrong` : "");
  }
  if (found.op) {
    const { op: o } = found;
    return `${opName(o)}: ${opWhat(o)}\n${whenWords(o.from, o.to)}\n${howOf(o)}${safeOf(o)}${leftOf(o)}` +
      o.tries.map(([when, how]) => `\nat event ${when}: ${hows[how] || how}; it went on`).join("") +
      `\nfor ${titleOf(requests[o.request])}`;
  }
  const r = requests[found.request], { stay: s } = found;
  let text = `${titleOf(r)}\n${whoOf(r)}${r.node ? `; disk or layer ${r.node}` : ""}\n${whenWords(r.begin, r.end)}; ${endOf(r)}`;
  if (s) {
    text += `\n\nstate “${s.state}”${meaningOf(s.state)}, ${whenWords(s.from, s.to)}\n${waitOf(s)}`;
    if (s.by !== null) text += `\nlet go on by ${nameOf(requests[s.by])}`;
  }
  return text;
}

// ---- the panel ----
function item(list, text, how, go) {
  const li = document.createElement("li");
  li.textContent = text;
  if (how) li.classList.add(how);
  if (go !== undefined) { li.classList.add("go"); li.onclick = () => { choose(go); }; }
  list.append(li);
}
const SHOWN = 60;
function tell() {
  const e = events[now];
  id("event").textContent = `Event ${now} of ${count - 1}: ${e.what}`;
  const changes = id("changes"), flying = id("flying");
  changes.replaceChildren();
  flying.replaceChildren();
  if (verdict && verdict.at === now) item(changes, `WRONG: ${verdict.text.split("\n")[0]}`, "bad");
  if (cause && cause.at === now) item(changes, cause.text, "bad");
  (at[now] || []).slice(0, SHOWN).forEach(([kind, what]) => {
    if (kind === "begin") item(changes, `${titleOf(requests[what])} begins (${whoOf(requests[what])})`, "", what);
    if (kind === "stay") item(changes, `${nameOf(requests[what[0]])} is in state “${what[1].state}”: ${waitOf(what[1])}`, "", what[0]);
    if (kind === "by") item(changes, `${nameOf(requests[what[1].by])} lets ${nameOf(requests[what[0]])} go on`, "", what[0]);
    if (kind === "end") item(changes, `${titleOf(requests[what])}: ${endOf(requests[what])}`, isBad(requests[what]) ? "bad" : "", what);
    if (kind === "from") item(changes, `${opName(what)} is submitted: ${opWhat(what)}`, "", what.request);
    if (kind === "from") inTheWayOf(what).forEach((other) =>
      item(changes, `${opName(what)} overlaps ${opName(other)} (${opWhat(other)}), which is in flight`, "bad", other.request));
    if (kind === "to") item(changes, `${opName(what)} (${opWhat(what)}): ${howOf(what)}`, failed(what) ? "bad" : "", what.request);
    if (kind === "safe") item(changes, `${opName(what)} (${opWhat(what)}) is safe now: no crash takes it away`, "", what.request);
    if (kind === "try") item(changes, `${opName(what[0])}: ${hows[what[1]] || what[1]}; it goes on`, "bad", what[0].request);
  });
  const more = (at[now] || []).length - SHOWN;
  if (more > 0) item(changes, `and ${more} more`);
  if (e.unseen) item(changes, `${plural(e.unseen, "piece")} of work of the engine's own began and ended at once`);
  if (e.images) item(changes, `what a crash would leave now was looked at: ${plural(e.images, "image")}, none wrong`);
  if (data.timed) item(changes, `at ${timeOf(e.time - events[0].time)} of the run`);
  else if (e.deadline !== null) item(changes, `time ${timeOf(e.time)}; the engine wants to be woken at ${timeOf(e.deadline)}`);
  let alive = 0;
  requests.forEach((r, i) => {
    if (r.begin > now || (r.end !== null && r.end <= now)) return;
    if (++alive > SHOWN) return;
    const s = r.stays.findLast((stay) => stay.from <= now);
    item(flying, s ? `${titleOf(r)}, in “${s.state}”: ${waitOf(s)}` : titleOf(r), "", i);
  });
  if (alive > SHOWN) item(flying, `and ${alive - SHOWN} more`);
  const inFlight = ops.reduce((n, o) => n + (o.from <= now && (o.to === null || o.to > now)), 0);
  const loose = ops.filter((o) => o.unsafe != null && o.to <= now && o.unsafe > now);
  loose.slice(0, SHOWN).forEach((o) => item(flying, `${opName(o)} (${opWhat(o)}): done, and a crash may still take it away`, "", o.request));
  if (loose.length > SHOWN) item(flying, `and ${loose.length - SHOWN} more`);
  id("moment").textContent = `After it: ${plural(alive, "request")} and ${plural(inFlight, "op")} in flight` +
    (loose.length ? `, ${plural(loose.length, "op")} done and not flushed` : "");
}
let told = 0;
const go = (when, far) => {
  now = Math.min(Math.max(when, 0), count - 1);
  show(now);
  const touched = (at[now] || []).map(([kind, what]) => typeof what === "number" ? what : Array.isArray(what) ? what[0].request ?? what[0] : what.request);
  if (touched.length && !touched.some(isSeen)) showLane(touched[0]);
  redraw();
  // Stepping fast over a long run: what is passed is not told.
  clearTimeout(told);
  if (count < 5000) tell(); else told = setTimeout(tell, 60);
  if (far !== false) history.replaceState(null, "", `#${now}`);
};
const choose = (i) => { chosen = i; if (i >= 0) showLane(i); redraw(); };

// ---- search ----
let hay = null, hits = [], hit = -1;
function search(text) {
  hay ??= [
    ...events.map((e, n) => ({ n, r: -1, text: `event ${n} ${e.kind} ${e.what}`.toLowerCase() })),
    ...requests.map((r, i) => ({ n: r.begin, r: i, text: `${titleOf(r)} ${endOf(r)} ${whoOf(r)} ${r.stays.map((s) => `${s.state} ${s.wait}`).join(" ")}`.toLowerCase() })),
    ...ops.map((o) => ({ n: o.from, r: o.request, text: `${opName(o)} ${opWhat(o)} ${o.how} ${howOf(o)}`.toLowerCase() })),
  ].sort((a, b) => a.n - b.n);
  const words = text.toLowerCase().trim();
  hits = words ? hay.filter((h) => h.text.includes(words)) : [];
  hit = -1;
  id("hits").textContent = words ? plural(hits.length, "hit") : "";
}
function nextHit(step) {
  if (!hits.length) return;
  hit = hit < 0 && step > 0 ? Math.max(0, hits.findIndex((h) => h.n >= now)) : (hit + step + hits.length) % hits.length;
  id("hits").textContent = `${hit + 1} of ${hits.length}`;
  go(hits[hit].n);
  choose(hits[hit].r);
}

// Ops in flight when this one is submitted that touch the same bytes, where one of the two changes them.
function inTheWayOf(op) {
  const changes = (it) => !["read", "flush", "compute", "hole"].includes(it.kind);
  return ops.filter((it) => it !== op && it.file && it.file === op.file && !it.flush && !op.flush &&
    it.from < op.from && (it.to === null || it.to > op.from) && (changes(it) || changes(op)) &&
    it.offset < op.offset + op.len && op.offset < it.offset + it.len);
}

// ---- the frame ----
id("sentence").textContent = `${data.title}. From left to right ${plural(count - 1, "event")}, ` +
  `${plural(requests.filter((r) => r.guest !== null).length, "request")} of guests, ` +
  `${requests.filter((r) => r.guest === null).length} of the engine's own, ${plural(ops.length, "op")}.`;
const box = id("verdict");
box.hidden = false;
const say = (text) => { const line = document.createElement("p"); line.textContent = text; box.append(line); };
const fold = (name, text) => {
  const details = document.createElement("details"), summary = document.createElement("summary"), pre = document.createElement("pre");
  summary.textContent = name;
  pre.textContent = text;
  details.append(summary, pre);
  box.append(details);
};
if (verdict) {
  const where = verdict.crash ? `What a crash after event ${verdict.at} may leave is wrong: ` : `It went wrong in event ${verdict.at}: `;
  const [first, ...rest] = verdict.text.replace(/^after a crash: /, "").split("\n");
  say(where + first);
  verdict.more.forEach(say);
  if (cause) say(`Event ${cause.at} made that certain (${events[cause.at].what}). ${cause.text}`);
  // What the engine prints of itself is for who knows it.
  if (rest.length) fold("the engine, as it prints itself", rest.join("\n"));
} else if (data.focus) {
  box.classList.add("good");
  data.focus.lines.forEach(say);
} else {
  box.classList.add("good");
  say(data.recorded
    ? `Nothing went wrong. When this trace was recorded, it did: “${data.recorded}”. Run again now, it does not.`
    : "Nothing went wrong.");
}
if (data.missed) id("notes").textContent = `${plural(data.missed, "choice")} of the trace could not be made and were left out. Where the trace ends, the oldest op ends well.`;
// What the states mean that occur here.
for (const [name, words] of Object.entries(data.states || {})) {
  const term = document.createElement("dt"), meaning = document.createElement("dd");
  term.textContent = name;
  meaning.textContent = words;
  id("states").append(term, meaning);
}
data.about.forEach((line) => item(id("about"), line));
document.title = `cowbell: ${data.title}`;

function legend() {
  const entry = (text, paint) => {
    const span = document.createElement("span"), c = document.createElement("canvas"), dpr = window.devicePixelRatio || 1;
    c.width = 26 * dpr;
    c.height = 14 * dpr;
    const pen = c.getContext("2d");
    pen.scale(dpr, dpr);
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    paint(pen);
    span.append(c, text);
    id("legend").append(span);
  };
  id("legend").replaceChildren();
  const symbol = (kind) => (pen) => { pen.fillStyle = eventColour(kind); pen.font = "13px system-ui"; pen.fillText(eventMark[kind], 13, 7); };
  const has = (kind) => events.some((e) => e.kind === kind);
  entry("a request is submitted", symbol("submit"));
  entry("an op comes back", symbol("complete"));
  if (has("fault")) entry("something fails", symbol("fault"));
  if (has("deadline")) entry("a deadline passes", symbol("deadline"));
  if (has("crash")) entry("the machine crashes", symbol("crash"));
  if (has("life")) entry("a disk is drained, closed, paused, copied …", symbol("life"));
  entry("a request; its colour and name: the state it is in", (pen) => { pen.fillStyle = `hsl(200 ${look["bar-s"]} ${look["bar-l"]})`; pen.fillRect(0, 1, 26, 12); pen.strokeStyle = look.dim; pen.strokeRect(0.5, 1.5, 25, 11); });
  entry("request 2 (#4): the guest’s number 2, the engine’s #4; op #4.1: the second op of #4", (pen) => { pen.fillStyle = look.text; pen.font = "bold 12px system-ui"; pen.fillText("#", 13, 7); });
  if (requests.some((r) => r.stays.some((s) => s.others))) entry("it waits for others", (pen) => { pen.fillStyle = look.hatch; pen.fillRect(0, 1, 26, 12); pen.strokeStyle = look.wait; pen.strokeRect(0.5, 1.5, 25, 11); });
  for (const [text, colour] of [["op: read", "read"], ["op: write, zero", "write"], ["op: discard", "discard"], ["op: flush", "flush"], ["op: other", "other"]]) {
    if (ops.some((o) => sortOf(o) === colour)) entry(text, (pen) => { pen.fillStyle = look[colour]; pen.fillRect(2, 3, 22, 8); });
  }
  if (hasTails && ops.some((o) => o.unsafe != null)) entry("its tail: done, not flushed yet, so that a crash may take it away", (pen) => {
    pen.fillStyle = pen.strokeStyle = look.write; pen.fillRect(0, 2, 8, 10); pen.globalAlpha = 0.25; pen.fillRect(8, 4, 16, 6);
    pen.globalAlpha = 1; pen.setLineDash([3, 3]); pen.strokeRect(8.5, 4.5, 15, 5); pen.fillStyle = look.flush; pen.fillRect(23, 2, 3, 10);
  });
  if (flushes.length) entry("a flush, over all: what had been written before is safe at its double line", (pen) => { pen.fillStyle = look.flush; pen.globalAlpha = 0.15; pen.fillRect(0, 0, 18, 14); pen.globalAlpha = 1; pen.fillRect(17, 0, 1, 14); pen.fillRect(20, 0, 1, 14); });
  const arrow = (colour, dash) => (pen) => {
    pen.strokeStyle = pen.fillStyle = look[colour]; pen.lineWidth = 2; pen.setLineDash(dash);
    pen.beginPath(); pen.moveTo(2, 7); pen.lineTo(18, 7); pen.stroke();
    pen.beginPath(); pen.moveTo(24, 7); pen.lineTo(17, 3); pen.lineTo(17, 11); pen.fill();
  };
  if (arrows.some((a) => a.kind === "wait")) entry("waits for that request", arrow("wait", [4, 3]));
  if (arrows.some((a) => a.kind === "go")) entry("lets that request go on", arrow("good", []));
  const is = new Set([...fates.values()].map(leftMark));
  for (const [text, colour] of [["✔ the crash kept it", "good"], ["✘ the crash lost it", "bad"], ["◐ a part of it was kept", "wait"]]) {
    if ([...is].some((mark) => mark[0] === text[0])) entry(text.slice(2), (pen) => { pen.fillStyle = look[colour]; pen.fillRect(4, 0, 18, 14); pen.fillStyle = look.back; pen.font = "bold 11px system-ui"; pen.fillText(text[0], 13, 7.5); });
  }
  if (verdict) entry("here it goes wrong", (pen) => { pen.strokeStyle = look.bad; pen.lineWidth = 2.5; pen.setLineDash(verdict.crash ? [4, 3] : []); pen.beginPath(); pen.moveTo(13, 0); pen.lineTo(13, 14); pen.stroke(); });
  if (arrows.some((a) => a.kind === "piece")) entry("a piece of it", (pen) => { pen.strokeStyle = look.dim; pen.setLineDash([1, 3]); pen.beginPath(); pen.moveTo(2, 7); pen.lineTo(24, 7); pen.stroke(); });
}

function resize() {
  const rect = canvas.parentElement.getBoundingClientRect(), dpr = window.devicePixelRatio || 1;
  const all = view.w === 0 || view.scale <= leastScale() * 1.001;
  view.w = rect.width;
  view.h = rect.height;
  gutter = Math.min(300, Math.max(120, view.w * 0.22));
  canvas.width = Math.round(rect.width * dpr);
  canvas.height = Math.round(rect.height * dpr);
  if (all) fit(); else { clamp(); redraw(); }
}
new ResizeObserver(resize).observe(canvas.parentElement);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readLook(); legend(); redraw(); });

id("first").onclick = () => go(0);
id("back").onclick = () => go(now - 1);
id("on").onclick = () => go(now + 1);
id("last").onclick = () => go(count - 1);
id("in").onclick = () => zoom(1.5, X(now));
id("out").onclick = () => zoom(1 / 1.5, X(now));
id("all").onclick = fit;
id("cause").hidden = !cause;
id("cause").onclick = () => go(cause.at);
id("wrong").hidden = !verdict;
id("wrong").onclick = () => go(verdict.at);
const input = id("search");
input.oninput = () => search(input.value);
input.onkeydown = (e) => {
  e.stopPropagation();
  if (e.key === "Enter") { e.preventDefault(); nextHit(e.shiftKey ? -1 : 1); }
  if (e.key === "Escape") { input.blur(); canvas.focus(); }
};
addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const keys = {
    ArrowRight: () => go(now + 1), ArrowLeft: () => go(now - 1), Home: () => go(0), End: () => go(count - 1),
    "+": () => zoom(1.5, X(now)), "=": () => zoom(1.5, X(now)), "-": () => zoom(1 / 1.5, X(now)), "0": fit,
    "/": () => input.focus(), Escape: () => choose(-1),
    ArrowDown: () => choose(Math.min(chosen + 1, requests.length - 1)), ArrowUp: () => choose(Math.max(chosen - 1, 0)),
  };
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
canvas.addEventListener("wheel", (e) => {
  e.preventDefault();
  if (e.ctrlKey || e.metaKey) return zoom(Math.exp(-e.deltaY / 300), e.offsetX);
  view.top += e.shiftKey ? 0 : e.deltaY;
  view.from += (e.deltaX + (e.shiftKey ? e.deltaY : 0)) / view.scale;
  clamp();
  redraw();
}, { passive: false });
let drag = null;
canvas.addEventListener("pointerdown", (e) => { drag = { x: e.offsetX, y: e.offsetY, from: view.from, top: view.top, moved: false }; canvas.setPointerCapture(e.pointerId); });
canvas.addEventListener("pointermove", (e) => {
  if (drag) {
    const dx = e.offsetX - drag.x, dy = e.offsetY - drag.y;
    drag.moved ||= Math.abs(dx) + Math.abs(dy) > 4;
    if (drag.moved) { view.from = drag.from - dx / view.scale; view.top = drag.top - dy; clamp(); redraw(); tip.hidden = true; }
    return;
  }
  const found = under(e.offsetX, e.offsetY);
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = tipFor(found);
  const room = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(e.clientX + 14, innerWidth - room.width - 8)}px`;
  tip.style.top = `${Math.min(e.clientY + 16, innerHeight - room.height - 8)}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("pointerup", (e) => {
  const was = drag;
  drag = null;
  if (!was || was.moved) return;
  const found = under(e.offsetX, e.offsetY);
  if (e.offsetX > gutter) go(Math.round(whenAt(e.offsetX)));
  choose(found && found.request !== undefined ? found.request : -1);
});

readLook();
legend();
resize();
const asked = parseInt(location.hash.slice(1), 10);
go(Number.isNaN(asked) ? (verdict ? verdict.at : data.focus ? requests[data.focus.request].begin : 0) : asked, false);
if (data.focus) choose(data.focus.request);
// For who checks the page without looking at it.
Object.assign(document.body.dataset, { ready: "yes", events: count, requests: requests.length, ops: ops.length, lanes: lanes.length });
})();
