// The store against its budgets, and what the server has done with it.
import { $, KINDS, count, get, h, kinds, number, send, share, size, time } from "/page/base.js";

export async function refresh() {
  const [cache, text] = await Promise.all([get("/v1/cache"), send("/metrics").then((reply) => reply.text())]);
  $("tiers").replaceChildren(
    tier("In memory", cache.ram_slices, cache.ram_bytes, cache.ram_budget),
    tier("On disk", cache.slices, cache.bytes, cache.budget),
  );
  facts("asked", {
    "Hits": number(cache.hits),
    "Misses": number(cache.misses),
    "Hit rate": share(cache.hits, cache.hits + cache.misses),
    "Evicted from disk": count(cache.evicted, "slice"),
    "Evaluation saved": time(cache.seconds_saved * 1000),
  });
  const value = (name) => Number(text.match(new RegExp(`^${name} (\\S+)$`, "m"))?.[1] ?? 0);
  const tokens = Object.fromEntries(KINDS.map((kind) => [kind, value(`cpucache_prompt_tokens_total{state="${kind}"}`)]));
  const any = KINDS.some((kind) => tokens[kind]);
  $("tokens").replaceChildren(...(any ? kinds(tokens) : [h("p", { className: "note" }, "No requests yet.")]));
  const answers = value("cpucache_ttft_seconds_count");
  facts("load", {
    "Answers": number(answers),
    "Mean TTFT": answers ? time((1000 * value("cpucache_ttft_seconds_sum")) / answers) : "–",
    "Tokens of answers": number(value("cpucache_completion_tokens_total")),
    "Running": number(value("cpucache_requests_running")),
    "Waiting": number(value("cpucache_requests_waiting")),
  });
  return 2000;
}

function tier(name, slices, bytes, budget) {
  const said = budget ? `${size(bytes)} of ${size(budget)}, ${share(bytes, budget)}` : "no budget";
  const bar = h("progress", { max: Math.max(1, budget), value: bytes, ariaLabel: `${name}: ${said}` });
  return h("div", {}, h("p", { className: "line" }, h("b", {}, name), h("span", {}, count(slices, "slice"))), bar,
    h("p", { className: "note" }, said));
}

function facts(id, told) {
  $(id).replaceChildren(...Object.entries(told).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
