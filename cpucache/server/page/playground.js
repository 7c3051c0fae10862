// A prompt, answered with the cache and without it, one after the other.
import { $, KINDS, count, events, get, h, kinds, number, send, time } from "/page/base.js";

const form = $("ask");
let running = null; // stops the running answers
let names = "";

export async function refresh() {
  const found = (await get("/v1/schemas")).data.map((schema) => schema.name);
  $("no-schemas").hidden = found.length > 0;
  if (String(found) === names) return;
  names = String(found);
  $("on").replaceChildren(...found.map((name) => h("option", {}, name)));
  if (found.length && !$("pml").value) await write(found[0]);
}

/** Write a prompt on a schema, with all of its modules, to be cut down. */
async function write(name) {
  const { tree } = await get(`/v1/schemas/${encodeURIComponent(name)}`);
  $("pml").value = `<prompt schema="${name}"${parameters(tree)}>\n${modules(tree, "  ")}</prompt>`;
  $("on").value = name;
}

/** Write a prompt on a schema, and show it. */
export async function begin(name) {
  await write(name);
  form.kind.value = "pml";
  location.hash = "/playground";
}

const parameters = (node) => node.children.filter((child) => child.kind === "parameter").map((child) => ` ${child.name}=""`).join("");

function modules(node, indent) {
  return node.children.map((child) => {
    if (child.kind === "union") return child.children.length ? modules({ children: child.children.slice(0, 1) }, indent) : "";
    if (child.kind !== "module") return "";
    const inside = modules(child, `${indent}  `);
    const head = `${indent}<${child.name}${parameters(child)}`;
    return inside ? `${head}>\n${inside}${indent}</${child.name}>\n` : `${head}/>\n`;
  }).join("");
}

function asked() {
  const pml = form.kind.value === "pml";
  const [system, user] = [$("system").value, $("user").value];
  const messages = [];
  if (!pml && system.trim()) messages.push({ role: "system", content: system });
  if (user.trim()) messages.push({ role: "user", content: user });
  const cpucache = {};
  if (pml) cpucache.prompt = $("pml").value;
  for (const name of ["fidelity", "reuse"]) if (form[name].value) cpucache[name] = form[name].value;
  return {
    messages, cpucache, stream: true, stream_options: { include_usage: true },
    max_tokens: form.tokens.valueAsNumber, temperature: form.temperature.valueAsNumber,
  };
}

/** Where an answer is shown. */
class Column {
  constructor(id) {
    this.article = $(id);
    this.ttft = h("output", { className: "ttft" });
    this.facts = h("div", { className: "made" });
    this.text = h("div", { className: "text", tabIndex: 0, role: "region", ariaLabel: "Answer" });
    this.rate = h("p", { className: "note" });
    this.article.append(h("p", { className: "first" }, this.ttft, h("span", {}, " to the first token")), this.facts, this.text, this.rate);
    this.clear();
  }

  clear() {
    this.ttft.textContent = "–";
    this.facts.replaceChildren();
    this.text.textContent = this.rate.textContent = "";
    this.text.classList.remove("error");
    this.result = null;
  }

  async answer(body, signal) {
    const begun = performance.now();
    const clock = setInterval(() => { this.ttft.textContent = time(performance.now() - begun); }, 100);
    this.article.ariaBusy = "true";
    try {
      const reply = await send("/v1/chat/completions", { method: "POST", json: body, signal });
      clearInterval(clock);
      const made = Object.fromEntries(reply.headers.get("x-cpucache").split(", ").map((each) => each.split("=")).map(([name, value]) => [name, Number(value)]));
      this.ttft.textContent = time(made.ttft_ms);
      this.facts.replaceChildren(...kinds(made));
      await this.#read(reply);
      this.result = { ...made, text: this.text.textContent };
      const id = reply.headers.get("x-request-id");
      this.rate.append(" · ", h("a", { href: `#/requests/${id}` }, "see the request"));
    } catch (error) {
      if (error.name === "AbortError") {
        this.rate.textContent = "stopped";
        return;
      }
      this.text.textContent = error.message;
      this.text.classList.add("error");
    } finally {
      clearInterval(clock);
      this.article.ariaBusy = "false";
    }
  }

  async #read(reply) {
    const first = performance.now();
    let [last, tokens, finish] = [first, 0, ""];
    for await (const event of events(reply)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        this.text.append(choice.delta.content);
        last = performance.now();
      }
      finish = choice?.finish_reason ?? finish;
      tokens = event.usage?.completion_tokens ?? tokens;
    }
    const speed = tokens > 1 && last > first ? `, ${number((tokens - 1) / ((last - first) / 1000))} a second` : "";
    this.rate.textContent = count(tokens, "token") + speed + (finish === "length" ? ", cut off" : "");
  }
}

const columns = { cached: new Column("cached"), uncached: new Column("uncached") };

form.onsubmit = async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  $("stop").disabled = false;
  form.querySelector("[type=submit]").disabled = true;
  $("verdict").textContent = "";
  const order = { cached: ["cached", "uncached"], uncached: ["uncached", "cached"], one: ["cached"] }[form.order.value];
  for (const column of Object.values(columns)) column.clear();
  try {
    const body = asked();
    for (const name of order) {
      $("verdict").textContent = name === "cached" ? "Answering with the cache …" : "Evaluating everything …";
      await columns[name].answer({ ...body, cache_prompt: name === "cached" }, running.signal);
      if (running.signal.aborted || !columns[name].result) break;
    }
  } finally {
    running = null;
    $("stop").disabled = true;
    form.querySelector("[type=submit]").disabled = false;
    $("verdict").textContent = verdict(columns.cached.result, columns.uncached.result);
  }
};

function verdict(cached, uncached) {
  if (!cached) return "";
  const size = KINDS.reduce((sum, kind) => sum + cached[kind], 0);
  const again = cached.evaluated > size / 2 ? "Most of this prompt was new to the cache: ask again, or change only the question. " : "";
  if (!uncached) return again;
  const times = uncached.ttft_ms / Math.max(1, cached.ttft_ms);
  const sooner = times > 1.1 ? `The first token came ${times < 10 ? times.toFixed(1) : number(times)} times sooner. ` : "";
  return `${again || sooner}${cached.text === uncached.text ? "The answers are the same." : "The answers differ."}`;
}

$("stop").onclick = () => running?.abort();
$("on").onchange = () => write($("on").value);
form.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
};
