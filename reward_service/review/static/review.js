// The review page. What the server says is in `state`; `render` shows it. A judgement goes into the outbox, which is in
// the browser's storage, before it is sent, and leaves it when the server has answered; it carries an id, so that the
// server stores it once however often it arrives.

import { textBlock } from "./text.js";

const KINDS = { pair: "Pairs", flagged: "Flagged", audit: "Audits" };
const VERDICTS = {
  pair: [["left", "1", "Answer 1 is better"], ["tie", "t", "Tie"], ["right", "2", "Answer 2 is better"], ["skip", "s", "Skip"]],
  answer: [["bad", "b", "Bad"], ["fine", "f", "Fine"], ["skip", "s", "Skip"]],
};
const POLL_MS = 5000;
const ACTIVE_MS = 60000;
const TIMEOUT_MS = 20000;
const FADE_MS = 400;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

const at = (id) => document.getElementById(id);
const state = { who: null, item: null, progress: null, note: "", busy: false, fading: false };
let action = 0; // Counts what the person did: an answer to an earlier question is out of date.
let tries = 0;
let retryTimer = 0;
let lastActive = Date.now();

class Unreachable extends Error {}
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body) {
  const options = { credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "content-type": "application/json", "x-keel-review": "1" };
    options.body = JSON.stringify(body);
  }
  let reply, data;
  try {
    reply = await fetch("api/" + path, options);
    data = await reply.json();
  } catch (error) {
    throw new Unreachable("The page's server cannot be reached.");
  }
  if (reply.ok) return data;
  if (reply.status >= 500) throw new Unreachable(data.error);
  throw new Refused(reply.status, data.error);
}

// ---------------------------------------------------------------- what is kept in the browser

const outboxKey = () => "keel-review:outbox:" + state.who;
const outbox = () => JSON.parse(localStorage.getItem(outboxKey()) || "[]");
const keepOutbox = (entries) => localStorage.setItem(outboxKey(), JSON.stringify(entries));
const noteKey = (item) => "keel-review:note:" + item.item_id;
const chosenKinds = () => JSON.parse(localStorage.getItem("keel-review:kinds") || "null") || Object.keys(KINDS);

function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---------------------------------------------------------------- asking and telling

function take(answer) {
  state.progress = answer.progress;
  const unwanted = answer.item && !chosenKinds().includes(answer.item.kind);
  if (answer.item !== undefined) show(unwanted ? null : answer.item);
  if (unwanted) setTimeout(carryOn); // The kinds were changed while the answer was on its way.
  render();
}

function say(text) {
  at("banner").hidden = !text;
  at("banner").textContent = text || "";
}

function failed(error) {
  if (error instanceof Refused && error.status === 401) return showLogin("Your session has ended. Log in to go on.");
  if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
  say(error instanceof Unreachable ? `${error.message} Trying again…` : error.message);
  if (error instanceof Unreachable) retry();
}

function retry() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(carryOn, RETRY_MS[Math.min(tries++, RETRY_MS.length - 1)]);
}

// Sends what waits in the outbox, then asks for the next item if none is shown.
async function carryOn() {
  if (state.who === null || state.busy) return;
  state.busy = true;
  const asked = ++action;
  try {
    let answer = null;
    let notice = "";
    while (outbox().length) {
      const [entry] = outbox();
      try {
        answer = await ask("judge", { ...entry, kinds: chosenKinds() });
        if (!answer.stored) notice = "You had judged this item already; the first judgement stands.";
      } catch (error) {
        if (!(error instanceof Refused) || error.status === 401) throw error;
        answer = null;
        notice = error.message;
      }
      // Another tab may have added one meanwhile.
      keepOutbox(outbox().filter(({ judgement_id }) => judgement_id !== entry.judgement_id));
    }
    // An item that somebody reads stays before them.
    if (answer === null) answer = state.item === null ? await ask("next", { kinds: chosenKinds() }) : await ask("progress");
    tries = 0;
    say(notice);
    if (asked === action) take(answer);
  } catch (error) {
    failed(error);
  } finally {
    state.busy = false;
    render();
  }
}

async function judge(verdict) {
  if (state.item === null || state.busy || at("help").open) return;
  const { item_id } = state.item;
  // A note that its greatest length cut in the middle of an emoji is no text to the server.
  const note = at("note").value.replace(/\p{Surrogate}/gu, "\ufffd");
  keepOutbox([...outbox(), { item_id, verdict, note, judgement_id: newId() }]);
  sessionStorage.removeItem(noteKey(state.item));
  // What was judged stays in sight for the moment that the next item usually takes.
  state.item = null;
  state.fading = true;
  setTimeout(() => { state.fading = false; render(); }, FADE_MS);
  render();
  await carryOn();
}

async function undo() {
  if (state.busy) return;
  if (outbox().length) return say("Your last judgement is not sent yet. Wait for the connection, then undo.");
  state.busy = true;
  action++;
  try {
    const answer = await ask("undo", { kinds: chosenKinds() });
    say(answer.undone ? "" : "There is nothing to take back.");
    take(answer);
    at("status").textContent = answer.undone ? "Taken back" : "Nothing to take back";
  } catch (error) {
    show(null); // It may have been taken back: the server says which item is next.
    failed(error);
  } finally {
    state.busy = false;
    render();
  }
}

// Keeps the lease of an item that somebody looks at, counts up to date, and finds new items.
async function poll() {
  if (state.who === null || state.busy || document.hidden || outbox().length) return;
  const asked = action;
  const active = Date.now() - lastActive < ACTIVE_MS;
  try {
    const answer = state.item === null || active ? await ask("next", { kinds: chosenKinds() }) : await ask("progress");
    if (asked !== action) return;
    // What somebody reads stays before them, even if its lease was lost: a late judgement counts.
    if (state.item !== null) delete answer.item;
    if (tries) say("");
    tries = 0;
    take(answer);
  } catch (error) {
    failed(error);
  }
}

// ---------------------------------------------------------------- showing

function show(item) {
  const same = item !== null && state.item !== null && item.item_id === state.item.item_id;
  state.item = item;
  state.fading = false;
  if (same) return;
  at("note").value = item === null ? "" : sessionStorage.getItem(noteKey(item)) || "";
  at("prompt").replaceChildren();
  at("answers").replaceChildren();
  at("verdicts").replaceChildren();
  if (item === null) return;
  for (const message of item.prompt) {
    if (message.role) at("prompt").append(element("div", "role", message.role));
    at("prompt").append(textBlock(message.content, "asked"));
  }
  item.answers.forEach((answer, index) => at("answers").append(card(answer, item, index)));
  at("answers").className = item.kind === "pair" ? "answers two" : "answers";
  at("reason").hidden = item.kind === "pair";
  at("reason-label").textContent = item.kind === "flagged" ? "Flagged" : "Audit";
  at("reason-label").className = "tag " + item.kind;
  at("reason-text").replaceChildren(textBlock(item.reason || "drawn at random", "why"));
  for (const [verdict, key, label] of VERDICTS[item.kind === "pair" ? "pair" : "answer"]) {
    const button = element("button", verdict === "skip" ? "plain" : "verdict " + verdict, label + " ");
    button.type = "button";
    button.append(element("kbd", "", key));
    button.addEventListener("click", () => judge(verdict));
    at("verdicts").append(button);
  }
  window.scrollTo(0, 0);
}

function card(answer, item, index) {
  const section = element("section", "answer", "");
  const label = item.kind === "pair" ? `Answer ${index + 1}` : "Answer";
  section.setAttribute("aria-label", label);
  section.append(element("div", "answer-head", label), textBlock(answer, "said"));
  return section;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function render() {
  const { item, progress } = state;
  const sending = outbox().length > 0;
  const shown = item !== null || state.fading;
  at("item").hidden = !shown;
  at("item").classList.toggle("judged", item === null);
  at("empty").hidden = shown;
  at("foot").classList.toggle("idle", !shown);
  at("undo").disabled = sending || state.busy;
  at("verdicts").hidden = !shown;
  for (const button of at("verdicts").children) button.disabled = state.busy || item === null;
  if (item === null) renderEmpty(sending);
  if (progress === null) return;
  const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
  const waiting = sum(progress.waiting), judged = sum(progress.judged);
  at("progress").value = waiting + judged ? judged / (waiting + judged) : 0;
  at("progress").title = `${judged} judged, ${waiting} waiting`;
  const people = new Map(Object.entries(progress.by_annotator));
  at("mine").textContent = `${people.get(state.who) || 0} by you, ${judged} in all`;
  at("mine").title = [...people].map(([name, count]) => `${name}: ${count}`).join("\n");
  at("agreement").textContent = progress.agreement === null ? ""
    : `agreement ${Math.round(100 * progress.agreement)} % (${progress.compared} compared)`;
  renderKinds();
}

function renderEmpty(sending) {
  const waiting = state.progress && Object.values(state.progress.waiting).some((count) => count > 0);
  const [title, text] = sending
    ? ["Sending your judgement…", "It is kept in this browser until it is stored. You may close the page."]
    : state.progress === null ? ["Loading…", ""]
    : waiting ? ["Nothing for you now", "What waits is not among the kinds you chose, is before somebody else, or was judged by you."]
    : ["Nothing to review", state.note || "New items appear here by themselves."];
  at("empty-title").textContent = title;
  at("empty-text").textContent = text;
}

function renderKinds() {
  const chosen = chosenKinds();
  for (const [kind, label] of Object.entries(KINDS)) {
    let button = at("kind-" + kind);
    if (button === null) {
      button = element("button", "kind", "");
      button.id = "kind-" + kind;
      button.type = "button";
      button.addEventListener("click", () => toggle(kind));
      at("kinds").append(button);
    }
    button.textContent = `${label} ${state.progress.waiting[kind]}`;
    button.setAttribute("aria-pressed", String(chosen.includes(kind)));
  }
}

function toggle(kind) {
  const chosen = chosenKinds();
  const now = Object.keys(KINDS).filter((other) => (other === kind) !== chosen.includes(other));
  localStorage.setItem("keel-review:kinds", JSON.stringify(now));
  if (state.item !== null && !now.includes(state.item.kind)) show(null);
  carryOn();
}

// ---------------------------------------------------------------- logging in and out

function showLogin(message) {
  at("work").hidden = true;
  at("login").hidden = false;
  at("login-error").textContent = message || "";
  if (state.who) at("annotator").value = state.who;
  (at("annotator").value ? at("token") : at("annotator")).focus();
  state.who = null;
  state.progress = null;
  show(null);
}

function showWork(session) {
  state.who = session.annotator;
  state.note = session.note;
  at("login").hidden = true;
  at("work").hidden = false;
  at("who").textContent = session.annotator;
  at("run").textContent = session.name;
  localStorage.setItem("keel-review:annotator", session.annotator);
  say("");
  render();
  carryOn();
}

at("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    showWork(await ask("login", { token: at("token").value, annotator: at("annotator").value }));
    at("token").value = "";
  } catch (error) {
    at("login-error").textContent = error.message;
    at("token").select();
  }
});

at("logout").addEventListener("click", async () => {
  try {
    await ask("logout", {});
    showLogin("");
  } catch (error) {
    failed(error);
  }
});

async function start() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given !== null) history.replaceState(null, "", location.pathname);
  try {
    showWork(await ask("session"));
  } catch (error) {
    if (error instanceof Unreachable) return setTimeout(start, 2000);
    at("annotator").value = localStorage.getItem("keel-review:annotator") || "";
    if (given !== null) at("token").value = given;
    showLogin("");
  }
}

// ---------------------------------------------------------------- keys

const openHelp = () => at("help").open || at("help").showModal();
at("undo").addEventListener("click", undo);
at("help-button").addEventListener("click", openHelp);
at("note").addEventListener("input", () => state.item && sessionStorage.setItem(noteKey(state.item), at("note").value));
at("note").addEventListener("keydown", (event) => (event.key === "Escape" || event.key === "Enter") && at("note").blur());

document.addEventListener("keydown", (event) => {
  lastActive = Date.now();
  const typing = event.target.closest("input, textarea") !== null;
  if (state.who === null || typing || at("help").open || event.repeat) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const verdicts = state.item === null ? [] : VERDICTS[state.item.kind === "pair" ? "pair" : "answer"];
  const verdict = verdicts.find(([, wanted]) => wanted === key);
  if (verdict) judge(verdict[0]);
  else if (key === "u") undo();
  else if (key === "?") openHelp();
  else if (key === "n" && state.item !== null) at("note").focus();
  else return;
  event.preventDefault();
});
for (const kind of ["pointermove", "wheel", "touchstart"]) {
  document.addEventListener(kind, () => (lastActive = Date.now()), { passive: true });
}
window.addEventListener("online", carryOn);
setInterval(poll, POLL_MS);
start();
