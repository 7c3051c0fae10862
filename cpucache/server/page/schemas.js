// Schemas: uploaded, encoded, and drawn as trees with what of them is cached.
import { $, count, fail, fill, get, h, number, say, send, share } from "/page/base.js";
import { begin } from "/page/playground.js";

const path = (name) => `/v1/schemas/${encodeURIComponent(name)}`;
const active = (encoding) => ["waiting", "running"].includes(encoding.state);
let chosen = "";
let shown = ""; // what is drawn, as JSON: it is drawn again only when it differs
let encoding = false;

export async function refresh() {
  const { data } = await get("/v1/schemas");
  if (!data.some((schema) => schema.name === chosen)) chosen = data[0]?.name ?? "";
  const whole = chosen ? await get(path(chosen)) : null;
  const next = data.some((schema) => active(schema.encoding)) ? 500 : undefined;
  const told = JSON.stringify([data, whole]);
  if (told === shown) return next;
  shown = told;
  const items = data.map((schema) => {
    const { done, total } = schema.encoding;
    const choose = () => { chosen = schema.name; run(async () => {}); };
    const said = active(schema.encoding) ? `encoding, ${share(done, total)}` : `${share(done, total)} cached`;
    return h("li", {}, h("button", { id: `choose-${schema.name}`, className: "plain", ariaCurrent: String(schema.name === chosen), onclick: choose },
      h("b", {}, schema.name), h("span", {}, `${count(schema.tokens, "token")}, ${said}`)));
  });
  fill($("schema-list"), ...(items.length ? items : [h("li", { className: "note" }, "None yet.")]));
  $("schema").hidden = !whole;
  if (whole) draw(whole);
  return next;
}

function draw(schema) {
  const { state, done, total, error } = schema.encoding;
  $("schema-name").textContent = schema.name;
  $("schema-facts").textContent = `${count(schema.tokens, "token")} at ${count(schema.tree.end, "position")}; ${number(done)} of ${number(total)} tokens cached, ${schema.segments.encoded} of ${count(schema.segments.total, "slice")}${error ? `. Encoding failed: ${error}` : active(schema.encoding) ? `; ${state === "waiting" ? "waits to be encoded" : "encoding"} …` : ""}`;
  Object.assign($("encoding"), { max: Math.max(1, total), value: done });
  $("encode").disabled = active(schema.encoding) || done === total;
  if (encoding && !active(schema.encoding)) say(`${schema.name}: ${state === "done" ? "encoded" : state}`);
  encoding = active(schema.encoding);
  fill($("tree"), node(schema.tree, Math.max(1, schema.tree.end)));
}

function node(part, length) {
  const label = { union: `one of ${part.children.length}`, parameter: `{${part.name}}` }[part.kind] ?? part.name;
  const own = ["schema", "module"].includes(part.kind) && part.tokens > 0;
  const cached = !own ? "" : !part.cache ? "never" : share(part.encoded, part.tokens);
  const place = h("i", { className: cached === "100%" ? "exact" : "" });
  place.style.marginLeft = `${(100 * part.start) / length}%`;
  place.style.width = `${(100 * (part.end - part.start)) / length}%`;
  const said = part.kind === "parameter" ? "parameter of " : "";
  const row = h("div", { className: "node" }, h("span", { className: part.kind }, label),
    h("span", {}, part.tokens ? number(part.tokens) : "", h("span", { className: "unseen" }, part.tokens ? ` tokens, ${said}` : "")),
    h("span", { className: cached === "100%" ? "whole" : "" }, cached, h("span", { className: "unseen" }, cached ? " cached, " : "")),
    h("span", { className: "wide place", title: `positions ${number(part.start)} to ${number(part.end)}` }, place));
  return h("li", {}, row, part.children.length ? h("ul", {}, ...part.children.map((child) => node(child, length))) : null);
}

/** Do something, and show what came of it. */
async function run(work) {
  try {
    fail(null);
    await work();
    dispatchEvent(new Event("changed"));
  } catch (error) {
    fail(error);
  }
}

$("upload").onsubmit = (event) => {
  event.preventDefault();
  run(async () => {
    const { name } = await (await send("/v1/schemas", { method: "POST", json: { text: $("schema-text").value } })).json();
    chosen = name;
    say(`${name}: uploaded`);
  });
};
$("schema-file").onchange = () => run(async () => {
  const [file] = $("schema-file").files;
  if (file) $("schema-text").value = await file.text();
});
$("encode").onclick = () => run(() => send(`${path(chosen)}/encode`, { method: "POST", json: {} }));
$("delete").onclick = () => run(async () => {
  await send(path(chosen), { method: "DELETE" });
  say(`${chosen}: deleted`);
  $("schema-text").focus();
});
$("use").onclick = () => run(() => begin(chosen));
