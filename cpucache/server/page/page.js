// The tabs, and which view is kept up to date.
import { $, fail, get } from "/page/base.js";
import * as playground from "/page/playground.js";
import * as requests from "/page/requests.js";
import * as schemas from "/page/schemas.js";
import * as store from "/page/store.js";

const views = { playground, schemas, store, requests };
const tabs = [...document.querySelectorAll("[role=tab]")];
let current = "";
let timer = 0;
let turn = Promise.resolve(); // ends when the view has been brought up to date as often as was asked

/** Bring the view up to date; it says after how many milliseconds it wants to be again, if at all. */
async function update() {
  clearTimeout(timer);
  let next = 3000;
  try {
    next = await views[current].refresh();
    fail(null);
  } catch (error) {
    if (error.status === 401) next = undefined;
    fail(error);
  }
  if (next) timer = setTimeout(refresh, next);
}

function refresh() {
  if (!document.hidden) turn = turn.then(update);
}

function open() {
  const [name, rest = ""] = location.hash.slice(2).split("/");
  current = name in views ? name : "playground";
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${current}`;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.id.slice(4)).hidden = !chosen;
  }
  views[current].open?.(decodeURIComponent(rest));
  refresh();
}

for (const [index, tab] of tabs.entries()) {
  // The hash is the name of no element: going to an element would take the focus away.
  tab.onclick = () => { location.hash = `/${tab.id.slice(4)}`; };
  tab.onkeydown = (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    next.focus();
    next.click();
  };
}

addEventListener("hashchange", open);
addEventListener("changed", refresh); // by something that a view has done
document.addEventListener("visibilitychange", refresh);
open();
get("/v1/models").then(({ data: [model] }) => {
  $("model").textContent = `${model.id}, ${model.context_length.toLocaleString("en")} tokens`;
  document.title = `cpucache: ${model.id}`;
}, fail);
