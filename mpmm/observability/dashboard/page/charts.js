"use strict";
/* The canvases: memory of each device, the timeline, and the small lines of the tiles. They share one time axis and
   one cursor, which the pointer or the arrow keys move. */

const AXIS_HEIGHT = 22;
const FIRST_LANES = 24;
const MORE_LANES = 100;
const LANES_CHOSEN_FOR_S = 10;
const STEPS_OF_CURSOR = 120;

/** ago: how many seconds before now the cursor is, null for none. lane: row of the timeline that it is on. */
const cursor = { ago: null, lane: null, on: null };

/* ---- the axis of time ---- */

function timeScale(left, right, now, window_s) {
  return (time_s) => right - ((now - time_s) / window_s) * (right - left);
}

function drawTimeAxis(context, left, right, top, window_s) {
  const steps = { 120: [30, 60], 600: [120, 300], 3600: [600, 1200] }[window_s][right - left < 420 ? 1 : 0];
  context.fillStyle = colours.muted;
  for (let ago = 0; ago <= window_s; ago += steps) {
    const x = right - (ago / window_s) * (right - left);
    context.textAlign = ago === 0 ? "right" : x - left < 30 ? "left" : "center";
    const text = ago === 0 ? "now" : ago % 60 === 0 ? `−${ago / 60} min` : `−${ago} s`;
    context.fillText(text, x, top + AXIS_HEIGHT / 2 + 1);
  }
  context.textAlign = "left";
}

function drawCursor(context, left, right, top, bottom, window_s) {
  if (cursor.ago === null) return;
  const x = right - (cursor.ago / window_s) * (right - left);
  if (x < left) return;
  context.strokeStyle = colours.text;
  context.globalAlpha = 0.55;
  context.beginPath();
  context.moveTo(Math.round(x) + 0.5, top);
  context.lineTo(Math.round(x) + 0.5, bottom);
  context.stroke();
  context.globalAlpha = 1;
}

/* ---- memory ---- */

/** Draw one device. points: [time, used, committed] each, oldest first. */
function drawMemory(canvas, device, points, now, window_s) {
  const on = surface(canvas);
  if (!on) return;
  const { context, width, height } = on;
  const [left, right, top, bottom] = [64, width - 4, 8, height - AXIS_HEIGHT];
  canvas.plot = { left, right };
  const most = Math.max(device.total, 1);
  const x = timeScale(left, right, now, window_s);
  const y = (mb) => bottom - (Math.min(mb, most * 1.02) / most) * (bottom - top);
  drawMemoryGrid(context, device, left, right, top, bottom, y);
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, bottom + 1);
  context.clip();
  drawSteps(context, points, x, y, bottom, now);
  context.restore();
  context.strokeStyle = colours.bad;
  context.setLineDash([5, 4]);
  context.lineWidth = 1.25;
  context.beginPath();
  context.moveTo(left, y(device.limit));
  context.lineTo(right, y(device.limit));
  context.stroke();
  context.setLineDash([]);
  context.lineWidth = 1;
  drawTimeAxis(context, left, right, bottom, window_s);
  drawCursor(context, left, right, top, bottom, window_s);
}

function drawMemoryGrid(context, device, left, right, top, bottom, y) {
  context.strokeStyle = colours.line;
  context.fillStyle = colours.muted;
  context.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    const at = Math.round(y(device.total * share)) + 0.5;
    context.beginPath();
    context.moveTo(left, at);
    context.lineTo(right, at);
    context.stroke();
    context.fillText(share ? memory(device.total * share).replace(".0 ", " ") : "0", left - 7, Math.min(Math.max(at, top + 2), bottom - 2));
  }
  context.textAlign = "left";
}

function drawSteps(context, points, x, y, bottom, now) {
  if (!points.length) return;
  const line = (figure) => {
    context.beginPath();
    points.forEach((point, index) => context[index ? "lineTo" : "moveTo"](x(point[0]), y(figure(point))));
    context.lineTo(x(now), y(figure(points[points.length - 1])));
  };
  const accounted = (point) => Math.max(point[1], point[2]);
  const close = () => {
    context.lineTo(x(now), bottom);
    context.lineTo(x(points[0][0]), bottom);
    context.closePath();
  };
  line(accounted);
  close();
  context.globalAlpha = 0.22;
  context.fillStyle = colours.load;
  context.fill();
  line((point) => point[1]);
  close();
  context.globalAlpha = 1;
  context.fillStyle = colours.card;
  context.fill();
  context.globalAlpha = 0.28;
  context.fillStyle = colours.hold;
  context.fill();
  context.globalAlpha = 1;
  line((point) => point[1]);
  context.strokeStyle = colours.hold;
  context.lineWidth = 1.75;
  context.lineJoin = "round";
  context.stroke();
  context.lineWidth = 1;
}

/* ---- the small lines of the tiles ---- */

function drawSpark(canvas, points, column, colour, now, window_s) {
  const on = surface(canvas);
  if (!on || points.length < 2) return;
  const { context, width, height } = on;
  const most = Math.max(1, ...points.map((point) => point[column]));
  const x = timeScale(0, width, now, window_s);
  const y = (figure) => height - 2 - (figure / most) * (height - 8);
  context.beginPath();
  points.forEach((point, index) => context[index ? "lineTo" : "moveTo"](x(point[0]), y(point[column])));
  context.lineTo(width, y(points[points.length - 1][column]));
  context.strokeStyle = colours[colour];
  context.lineWidth = 1.5;
  context.globalAlpha = 0.8;
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(x(points[0][0]), height);
  context.globalAlpha = 0.13;
  context.fillStyle = colours[colour];
  context.fill();
  context.globalAlpha = 1;
}

/* ---- the timeline ---- */

/* A span as the server sends it: see `Span.row` in timeline.py. */
const SPAN = { number: 0, tag: 1, lane: 2, kind: 3, begin: 4, end: 5, busy: 6, resumed: 7, uses: 8, pid: 9, devices: 10, note: 11 };
const LAYERS = ["stay", "sleep", "load", "suspend", "resume", "unload", "lease", "hold"];
const COLOUR_OF = { stay: "stay", sleep: "sleep", load: "load", suspend: "move", resume: "move", unload: "unload", lease: "lease", hold: "hold" };

/** The tag that a lane belongs to. */
const tagOf = (lane) => lane.split("\n")[0];

const timeline = {
  lanes: new Map(), // "tag lane" -> Map of spans by number
  chosen: [],
  chosenAt: -Infinity,
  most: FIRST_LANES,

  clear() {
    this.lanes.clear();
    this.chosenAt = -Infinity;
  },

  add(spans) {
    for (const span of spans) {
      const name = `${span[SPAN.tag]}\n${String(span[SPAN.lane]).padStart(5, "0")}`;
      let lane = this.lanes.get(name);
      if (!lane) this.lanes.set(name, (lane = new Map()));
      lane.set(span[SPAN.number], span);
    }
  },

  /** Forget what the window no longer shows. */
  prune(from_s) {
    for (const [name, lane] of this.lanes) {
      for (const [number, span] of lane) if (span[SPAN.end] !== null && span[SPAN.end] < from_s) lane.delete(number);
      if (!lane.size) this.lanes.delete(name);
    }
  },

  /** Choose the lanes to show, sorted by name: all if they are few, else those on which something happened last. */
  choose(now, anew) {
    if (!anew && now - this.chosenAt < LANES_CHOSEN_FOR_S && this.chosen.every((name) => this.lanes.has(name)) && this.chosen.length >= Math.min(this.most, this.total)) return;
    this.chosenAt = now;
    const names = [...this.lanes.keys()].filter((name) => passes(name, shownTag(tagOf(name)), ...this.pids(name)));
    this.total = names.length;
    if (names.length > this.most) {
      const last = new Map(names.map((name) => [name, this.lastDone(name)]));
      names.sort((one, other) => last.get(other) - last.get(one));
    }
    const key = (name) => `${shownTag(tagOf(name))}\n${name}`;
    this.chosen = names.slice(0, this.most).sort((one, other) => (key(one) < key(other) ? -1 : 1));
  },

  total: 0,

  pids(name) {
    return filter.words.length ? [...this.lanes.get(name).values()].map((span) => span[SPAN.pid]) : [];
  },

  lastDone(name) {
    let last = 0;
    for (const span of this.lanes.get(name).values()) {
      if (span[SPAN.kind] !== "stay" && span[SPAN.kind] !== "sleep") last = Math.max(last, span[SPAN.end] ?? Infinity);
    }
    return last;
  },

  geometry(width) {
    const narrow = width < 560;
    return { left: narrow ? 104 : Math.min(250, Math.round(width * 0.2)), right: width - 4, lane: narrow ? 24 : 21, narrow };
  },

  draw(canvas, now, window_s) {
    const { left, right, lane, narrow } = this.geometry(canvas.clientWidth);
    const bottom = Math.max(1, this.chosen.length) * lane;
    const on = surface(canvas, bottom + AXIS_HEIGHT);
    if (!on) return;
    canvas.plot = { left, right, lane };
    const { context } = on;
    const x = timeScale(left, right, now, window_s);
    this.drawLanes(context, left, right, lane, narrow);
    context.save();
    context.beginPath();
    context.rect(left, 0, right - left, bottom);
    context.clip();
    this.chosen.forEach((name, row) => this.drawSpans(context, this.lanes.get(name), row * lane, lane, x, now, now - window_s));
    context.restore();
    drawTimeAxis(context, left, right, bottom, window_s);
    drawCursor(context, left, right, 0, bottom, window_s);
  },

  drawLanes(context, left, right, lane, narrow) {
    const lone = new Set();
    const seen = new Set();
    for (const name of this.lanes.keys()) {
      const tag = tagOf(name);
      (seen.has(tag) ? lone.delete(tag) : lone.add(tag), seen.add(tag));
    }
    this.chosen.forEach((name, row) => {
      const [tag, number] = name.split("\n");
      const middle = row * lane + lane / 2;
      context.fillStyle = cursor.lane === row && cursor.on === "timeline" ? colours.text : colours.muted;
      const suffix = lone.has(tag) ? "" : ` ${Number(number)}`;
      const room = left - 10 - context.measureText(suffix).width;
      context.fillText(fitted(context, shownTag(tag), room) + suffix, narrow ? 0 : 2, middle);
      context.strokeStyle = colours.faint;
      context.beginPath();
      context.moveTo(0, Math.round((row + 1) * lane) + 0.5);
      context.lineTo(right, Math.round((row + 1) * lane) + 0.5);
      context.stroke();
    });
    if (!this.chosen.length) context.fillText("nothing in this time", left + 8, lane / 2);
  },

  drawSpans(context, lane, top, height, x, now, from_s) {
    const spans = [...lane.values()];
    for (const kind of LAYERS) {
      for (const span of spans) {
        if (span[SPAN.kind] !== kind || (span[SPAN.end] ?? now) < from_s) continue;
        this.drawSpan(context, span, top, height, x(span[SPAN.begin]), x(span[SPAN.end] ?? now), now);
      }
    }
  },

  drawSpan(context, span, top, height, begin, end, now) {
    const kind = span[SPAN.kind];
    const rests = kind === "stay" || kind === "sleep";
    const inset = rests ? 3 : 4;
    const failed = span[SPAN.note] === "failed" || span[SPAN.note].startsWith("lost");
    context.fillStyle = failed && !rests ? colours.bad : colours[COLOUR_OF[kind]];
    context.globalAlpha = kind === "hold" ? 0.35 + 0.65 * busyShare(span, now) : 1;
    const wide = Math.max(end - begin - (rests ? 0 : 0.5), 1.5);
    context.beginPath();
    context.roundRect(begin, top + inset, wide, height - 2 * inset, Math.min(3, wide / 2));
    context.fill();
    context.globalAlpha = 1;
  },

  /** Return the spans of a lane at a moment, those drawn on top first. */
  at(row, time_s, now, slack_s) {
    const lane = this.lanes.get(this.chosen[row]);
    if (!lane) return [];
    const here = [...lane.values()].filter((span) => span[SPAN.begin] - slack_s <= time_s && time_s <= (span[SPAN.end] ?? now) + slack_s);
    return here.sort((one, other) => LAYERS.indexOf(other[SPAN.kind]) - LAYERS.indexOf(one[SPAN.kind]));
  },
};

/** The share of a hold's time in which its copy was in use: less than all if short uses were merged. */
function busyShare(span, now) {
  const open = span[SPAN.end] === null;
  const busy = span[SPAN.busy] + (open ? Math.max(0, now - span[SPAN.resumed]) : 0);
  const lasted = Math.max(1e-3, (span[SPAN.end] ?? now) - span[SPAN.begin]);
  return Math.min(1, busy / lasted);
}

const DOING = { hold: "in use", stay: "loaded, idle", load: "loading", unload: "unloading", lease: "lease", suspend: "moves to host memory", sleep: "suspended in host memory", resume: "comes back from host memory" };

/** Describe a span, for the tip. */
function spanSaid(span, now) {
  const lasted = (span[SPAN.end] ?? now) - span[SPAN.begin];
  const parts = [`${DOING[span[SPAN.kind]]} for ${duration(lasted)}`];
  if (span[SPAN.kind] === "hold" && span[SPAN.uses] > 1) {
    parts[0] = `${plural(span[SPAN.uses], "use")} within ${duration(lasted)}, in use for ${Math.round(busyShare(span, now) * 100)} % of it`;
  }
  if (span[SPAN.pid] !== null) parts.push(`pid ${span[SPAN.pid]}`);
  if (span[SPAN.devices].length) parts.push(`device ${span[SPAN.devices].join(" and ")}`);
  return parts.join(" · ") + (span[SPAN.note] ? ` — ${span[SPAN.note]}` : "");
}
