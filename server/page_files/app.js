// The page: loads what the server has, keeps the conversation, asks one plan or two, and stops them.

import { json, key } from "./api.js";
import { EnginePanel } from "./engine.js";
import { whole } from "./format.js";
import { HeatPanel } from "./heat.js";
import { Lane } from "./lane.js";
import { Source } from "./source.js";

const find = (selector) => document.querySelector(selector);

const page = {
  model: null,
  plans: [],
  turns: [], // {question, lanes}
  running: null, // AbortController of the question that is being answered
};

const source = new Source(find("#source"), () => messages(0, find("#question").value));
const heat = new HeatPanel(find("#heat"));
const engine = new EnginePanel(find("#engine"), showState, askForKey);

function showState(words, kind) {
  const state = find("#state");
  if (state.dataset.kind === kind && state.textContent === words) return;
  state.dataset.kind = kind;
  state.textContent = words;
}

async function load() {
  try {
    [page.model] = (await json("v1/models")).data;
    page.plans = (await json("v1/plans")).data;
  } catch (trouble) {
    if (!trouble.kind) throw trouble;
    showState(trouble.words || trouble.title, "bad");
    if (trouble.kind === "key") askForKey();
    else setTimeout(load, 3000);
    return;
  }
  find("#model").textContent = page.model.id;
  source.limit = page.model.max_model_len;
  fillPlans();
  source.changed();
  engine.start();
}

// --- plans ---

function fillPlans() {
  const [first, second] = [find("#plan"), find("#other-plan")];
  for (const select of [first, second]) {
    select.replaceChildren(...page.plans.map((plan) => new Option(plan.id, plan.id)));
  }
  const only = page.plans.length === 1;
  find("#compare").disabled = only;
  second.value = page.plans.at(only ? 0 : 1).id;
  describePlans();
}

function describePlans() {
  const comparing = find("#compare").checked;
  find("#other-plan").disabled = !comparing;
  find("#order").hidden = !comparing;
  find("#plan-words").replaceChildren(
    ...chosenPlans().map((name) => {
      const line = document.createElement("p");
      const strong = document.createElement("b");
      strong.textContent = name;
      line.append(strong, ` ${planWords(page.plans.find((plan) => plan.id === name))}`);
      return line;
    }),
  );
}

function planWords(plan) {
  const dense = plan.dense_below && plan.prefill !== "dense" ? ` (everything below ${whole(plan.dense_below)} tokens)` : "";
  const kept = plan.budget === null ? `keeps by ${plan.policy}` : `keeps ${whole(plan.budget)} tokens per head by ${plan.policy}`;
  return `reads by ${plan.prefill}${dense}; ${plan.policy === "keep_all" ? "keeps everything" : kept}`;
}

function chosenPlans() {
  return [find("#plan").value, ...(find("#compare").checked ? [find("#other-plan").value] : [])];
}

// --- asking ---

/** What a lane is sent: the text, its own earlier answers, and the question. */
function messages(index, question) {
  const turns = page.turns
    .map((turn) => ({ question: turn.question, answer: (turn.lanes[index] ?? turn.lanes[0]).text }))
    .filter((turn) => turn.answer);
  const sent = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  sent.push({ role: "user", content: question });
  if (source.text) sent[0].content = `${source.text}\n\n${sent[0].content}`;
  return sent;
}

async function ask() {
  const question = find("#question").value.trim();
  if (!question || page.running || !page.model) return find("#question").focus();
  const bodies = chosenPlans().map((_, index) => body(index, question));
  const lanes = chosenPlans().map(
    (plan) => new Lane(plan, { onHeads: (...cost) => heat.add(...cost), onTrouble, onAgain: (lane) => run([lane]) }),
  );
  lanes.forEach((lane, index) => (lane.body = bodies[index]));
  page.turns.push({ question, lanes });
  showTurn(question, lanes);
  find("#question").value = "";
  heat.clear();
  await run(lanes);
}

function body(index, question) {
  const limit = Number(find("#max-tokens").value);
  return {
    model: page.model.id,
    messages: messages(index, question),
    temperature: Number(find("#temperature").value),
    ...(limit > 0 ? { max_tokens: limit } : {}),
    // Plans that read a prompt alike would share it, and the second would seem to cost nothing.
    ...(index ? { cache_salt: "the second plan of a comparison" } : {}),
    stream_options: { include_usage: true },
    farspan: { progress: true, per_head: true },
  };
}

async function run(lanes) {
  if (page.running) return;
  page.running = new AbortController();
  setRunning(true);
  const { signal } = page.running;
  const together = find("#order select").value === "together";
  if (together) await Promise.all(lanes.map((lane) => lane.ask(lane.body, signal)));
  else for (const lane of lanes) await lane.ask(lane.body, signal);
  page.running = null;
  setRunning(false);
  source.changed();
}

function setRunning(running) {
  document.body.classList.toggle("asking", running);
  find("#stop").disabled = !running;
  find("#ask .primary").setAttribute("aria-disabled", running);
}

function stop() {
  page.running?.abort();
}

function onTrouble(trouble) {
  if (trouble.kind === "key") askForKey();
}

function showTurn(question, lanes) {
  const turn = find("#turn").content.firstElementChild.cloneNode(true);
  turn.querySelector("h2").textContent = question;
  turn.querySelector(".lanes").append(...lanes.map((lane) => lane.element));
  find("#turns").append(turn);
  find("#new").disabled = false;
  document.body.classList.add("has-turns");
  turn.scrollIntoView({ block: "nearest" });
}

function startAnew() {
  stop();
  page.turns = [];
  find("#turns").replaceChildren();
  find("#new").disabled = true;
  document.body.classList.remove("has-turns");
  heat.clear();
  source.changed();
  find("#question").focus();
}

// --- the key ---

function askForKey() {
  openKeyDialog(key.get() ? "The key was not accepted. Enter another one." : "This server wants an API key.");
}

function openKeyDialog(words) {
  const dialog = find("#key-dialog");
  if (dialog.open) return;
  find("#key-words").textContent = words;
  dialog.showModal();
}

function takeKey(event) {
  event.preventDefault();
  const value = find("#key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    find("#key-words").textContent = "A key is made of letters, digits and signs, without spaces.";
    return;
  }
  key.set(value);
  find("#key").value = "";
  find("#key-dialog").close();
  engine.hasKey = true;
  if (page.model) source.changed();
  else load();
}

// --- what people do ---

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("#question").addEventListener("input", () => source.changed());
find("#question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("#stop").addEventListener("click", stop);
find("#new").addEventListener("click", startAnew);
find("#key-form").addEventListener("submit", takeKey);
find("#key-button").addEventListener("click", () => openKeyDialog("It is sent with every request of this page."));
find("#key-cancel").addEventListener("click", () => find("#key-dialog").close());
for (const selector of ["#plan", "#other-plan", "#compare"]) {
  find(selector).addEventListener("change", describePlans);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !find("#key-dialog").open) stop();
});

load();
