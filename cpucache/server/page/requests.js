// The last requests, and why what was evaluated was not in the cache.
import { $, Failure, count, get, h, kinds, number, time } from "/page/base.js";

const rows = new Map(); // what is shown, by the requests' ids
let wanted = ""; // a request to be opened when it is there
let missing = false; // whether the server does not record requests

export function open(id) {
  wanted = id;
}

export async function refresh() {
  if (missing) return undefined;
  let data;
  try {
    ({ data } = await get("/v1/requests"));
  } catch (error) {
    if (!(error instanceof Failure) || error.status !== 404) throw error;
    missing = true;
    $("no-requests").textContent = "Not available: this server does not record its requests.";
    return undefined;
  }
  $("no-requests").hidden = data.length > 0;
  const ids = new Set(data.map((request) => request.id));
  for (const [id, row] of rows) {
    if (!ids.has(id)) {
      row.item.remove();
      rows.delete(id);
    }
  }
  for (const request of [...data].reverse()) {
    const told = JSON.stringify(request);
    const before = rows.get(request.id);
    if (before?.told === told) continue;
    const item = row(request);
    rows.set(request.id, { item, told });
    if (!before) $("request-list").prepend(item);
    else {
      item.firstChild.open = before.item.firstChild.open;
      before.item.replaceWith(item);
    }
  }
  if (wanted && rows.has(wanted)) {
    const details = rows.get(wanted).item.firstChild;
    wanted = "";
    details.open = true;
    details.firstChild.focus();
  }
  return 2000;
}

function row(request) {
  const when = new Date(request.created * 1000);
  const failed = request.status >= 400; // null while it is being answered
  const details = h("details", {},
    h("summary", {},
      h("time", { dateTime: when.toISOString() }, when.toLocaleTimeString("en-GB")),
      h("span", { className: "path" }, request.path),
      h("span", {}, count(request.prompt_tokens, "token")),
      h("span", {}, request.ttft_ms ? `first after ${time(request.ttft_ms)}` : ""),
      h("span", { className: failed ? "error" : "" }, failed ? `failed (${request.status})` : request.finish),
      kinds(request)[0]),
    h("div", { className: "why" }, "…"));
  details.ontoggle = () => { if (details.open) explain(request, details.lastChild); };
  return h("li", {}, details);
}

async function explain(request, place) {
  try {
    const told = await get(`/v1/requests/${encodeURIComponent(request.id)}`);
    const said = `${count(told.completion_tokens, "token")} answered in ${time(told.total_ms)}`;
    place.replaceChildren(kinds(told)[1], ...why(told.why), h("p", { className: "note" }, said, " · ", h("code", {}, told.id)));
  } catch (error) {
    place.replaceChildren(h("p", { className: "error" }, error.message));
  }
}

function why(found) {
  if (!found) return [h("p", {}, "No reuse was missed: all known text of this prompt came from the cache.")];
  const { cause, says, advice, position, known, sent, evaluated, seconds } = found;
  const text = (name, shown, other) => h("figure", {}, h("figcaption", {}, name), h("pre", {}, ...differing(shown, other)));
  return [
    h("p", {}, h("b", {}, says), advice ? ` ${advice}` : ""),
    known ? h("div", { className: "texts" }, text(`Known, around token ${number(position)}`, known, sent), text("Sent instead", sent, known)) : "",
    h("p", { className: "note" }, `cause: ${cause} · ${count(evaluated, "token")} evaluated for it in ${time(seconds * 1000)}`),
  ];
}

/** A text, with a mark on the part that differs from another text. */
function differing(text, other) {
  const most = Math.min(text.length, other.length);
  let [begin, end] = [0, 0];
  while (begin < most && text[begin] === other[begin]) begin += 1;
  while (end < most - begin && text.at(-1 - end) === other.at(-1 - end)) end += 1;
  return [text.slice(0, begin), h("mark", {}, text.slice(begin, text.length - end)), text.slice(text.length - end)];
}
