"use strict";
/* What the other scripts share: elements, texts for figures, colours. */

const byId = (id) => document.getElementById(id);

/** Make an element; children are elements or texts. Texts never become markup. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** Set a text, and touch the page only if it has changed. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/* How many last characters of a name stay if it must be cut. */
const TAIL = 24;

/** Make an element for a text that loses its middle if it is too long; `setEnds` sets it. */
function makeEnds() {
  return make("div", { class: "ends" }, make("span"), make("span"));
}

function setEnds(element, text) {
  const head = text.length > 2 * TAIL ? text.length - TAIL : text.length;
  setText(element.firstChild, text.slice(0, head));
  setText(element.lastChild, text.slice(head));
}

function setClass(element, name) {
  if (element.className !== name) element.className = name;
}

/* ---- words ---- */

/** A duration in seconds: 0.34 s, 4.2 s, 42 s, 12 min, 5.2 h, 3 d. */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const time = Math.max(0, seconds);
  if (time < 0.995) return `${time.toFixed(2)} s`;
  if (time < 9.95) return `${Number.isInteger(time) ? time : time.toFixed(1)} s`;
  if (time < 99.5) return `${Math.round(time)} s`;
  if (time < 5400) return `${Math.round(time / 60)} min`;
  if (time < 172800) return `${(time / 3600).toFixed(1)} h`;
  return `${Math.round(time / 86400)} d`;
}

/** How long ago something was, in whole seconds: fractions would not interest anyone. */
function ago(seconds) {
  return seconds < 1 ? "just now" : `${duration(Math.floor(seconds))} ago`;
}

/** Memory, given in MiB. */
function memory(mb) {
  if (mb === null || mb === undefined) return "–";
  if (Math.abs(mb) < 1000) return `${Math.round(mb)} MiB`;
  return `${(mb / 1024).toFixed(mb < 102400 ? 1 : 0)} GiB`;
}

function count(number) {
  return number.toLocaleString("en-US").replaceAll(",", "\u202f");
}

function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/* ---- names: everything is identified by tags, and users see the name of a model that has one ---- */

const tagNames = new Map();

function shownTag(tag) {
  return tagNames.get(tag) ?? tag;
}

/** The text of a title, which has the whole tag, too. */
function fullTag(tag) {
  return tagNames.has(tag) ? `${tagNames.get(tag)}\n${tag}` : tag;
}

function setTitle(element, text) {
  if (element.title !== text) element.title = text;
}

/* ---- the filter, which all parts of the page share ---- */

const filter = { words: [] };

/** Tell whether some texts together contain each word of the filter. */
function passes(...texts) {
  if (!filter.words.length) return true;
  const all = texts.join(" ").toLowerCase();
  return filter.words.every((word) => all.includes(word));
}

/* ---- colours of the theme ---- */

const colours = {};

function readColours() {
  const probe = make("span");
  document.body.append(probe);
  const names = ["card", "line", "faint", "text", "muted", "hold", "stay", "load", "unload", "lease", "wait", "move", "sleep", "bad", "other"];
  for (const name of names) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
}

/** Prepare a canvas for drawing in CSS pixels; null while it is not laid out. */
function surface(canvas, height) {
  const width = canvas.clientWidth;
  const tall = height ?? canvas.clientHeight;
  if (!width || !tall) return null;
  const ratio = window.devicePixelRatio || 1;
  if (height !== undefined) canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(tall * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, tall);
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  return { context, width, height: tall };
}

/** Cut a text in its middle so that it is not wider than that. */
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let kept = Math.max(2, Math.floor((text.length * width) / context.measureText(text).width));
  for (; kept > 2; kept -= 1) {
    const head = Math.ceil(kept / 2);
    const cut = `${text.slice(0, head)}…${text.slice(text.length - (kept - head))}`;
    if (context.measureText(cut).width <= width) return cut;
  }
  return text.slice(0, 1);
}
