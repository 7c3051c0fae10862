// What every view needs: elements, requests to this server, and how numbers are written.

export const $ = (id) => document.getElementById(id);
const KEY = "cpucache.key";

/** An element. Strings among its children become text, never markup. */
export function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Put children in the place of those that were there; what had the focus has it again. */
export function fill(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
  element.replaceChildren(...children);
  if (focused) $(focused)?.focus();
}

/** Announce a text to screen readers. */
export const say = (text) => { $("said").textContent = text; };
export const fail = (error) => { $("failure").textContent = error ? error.message : ""; };

// -- requests ---------------------------------------------------------------------------------------------------------
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null; // one question for a key, however many requests wait for it

function askKey(wrong) {
  asking ??= new Promise((resolve, reject) => {
    $("key-wrong").textContent = wrong ? "The server does not have this key." : "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key-text").value);
      $("forget").hidden = false;
      resolve();
      $("key").close();
    };
    $("key-cancel").onclick = () => $("key").close();
    $("key").onclose = () => reject(new Failure(401, "The server needs a key; load the page again to enter one."));
    $("key-text").value = "";
    $("key").showModal();
  }).then(() => { asking = null; });
  return asking; // once refused it stays so: nobody is asked twice
}

$("forget").hidden = !sessionStorage.getItem(KEY);
$("forget").onclick = () => { sessionStorage.removeItem(KEY); location.reload(); };

/** The server's reply to a request. Throws a Failure that says what to do, or what ``signal`` aborts with. */
export async function send(path, { method = "GET", json, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = json === undefined ? {} : { "Content-Type": "application/json" };
  // A header holds bytes, one a character: those of the key in UTF-8.
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  let reply;
  try {
    reply = await fetch(path, { method, headers, signal, body: json === undefined ? undefined : JSON.stringify(json) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure(0, "The server can't be reached.");
  }
  if (reply.status === 401) {
    if (key === sessionStorage.getItem(KEY)) await askKey(Boolean(key));
    return send(path, { method, json, signal });
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Failure(reply.status, told?.error?.message ?? `The server answers ${reply.status}.`);
}

export const get = async (path, options) => (await send(path, options)).json();

/** The data of server-sent events, as they come. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(500, event.error.message);
      yield event;
    }
  }
}

// -- how it is written ------------------------------------------------------------------------------------------------
export const number = (value) => Math.round(value).toLocaleString("en");
export const share = (part, whole) => (!whole ? "–" : part && part < whole / 100 ? "below 1%" : `${Math.floor((100 * part) / whole)}%`);
export const count = (value, one) => `${number(value)} ${one}${value === 1 ? "" : "s"}`;

export function time(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms < 100000 ? `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s` : `${number(ms / 1000)} s`;
}

export function size(bytes) {
  const unit = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.max(1, bytes)) / 3)));
  return `${(bytes / 1000 ** unit).toFixed(unit ? 1 : 0)} ${["bytes", "kB", "MB", "GB", "TB"][unit]}`;
}

// -- where the state of a prompt's tokens came from --------------------------------------------------------------------
export const KINDS = ["exact", "clean", "related", "foreign", "evaluated"];

/** A bar of tokens by kind, and what it says in words. */
export function kinds(counts) {
  const there = KINDS.filter((kind) => counts[kind] > 0);
  const bar = h("div", { className: "bar", ariaHidden: "true" });
  for (const kind of there) {
    const part = h("i", { className: kind });
    part.style.flexGrow = counts[kind];
    bar.append(part);
  }
  const words = there.map((kind) => h("li", {}, h("i", { className: kind, ariaHidden: "true" }), `${number(counts[kind])} ${kind}`));
  return [bar, h("ul", { className: "kinds" }, ...words)];
}
