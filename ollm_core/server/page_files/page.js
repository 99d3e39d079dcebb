"use strict";

const find = (id) => document.getElementById(id);
const sizes = ["B", "kB", "MB", "GB", "TB"];
let key = "";
let text = "";
let tokens = 0;
let title = "";
let planned = null;
let state = null;
let stopping = null;
let took = "";

function size(bytes) {
  let unit = 0;
  while (bytes >= 1000 && unit < sizes.length - 1) { bytes /= 1000; unit += 1; }
  return `${bytes < 10 && unit ? bytes.toFixed(1) : Math.round(bytes)} ${sizes[unit]}`;
}

function time(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function say(id, words, bad = false) {
  const place = find(id);
  if (place.textContent !== words) place.textContent = words;
  place.classList.toggle("bad", bad);
}

async function ask(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  if (answer.status === 401) {
    find("key-form").hidden = false;
    throw new Error("The server asks for its API key.");
  }
  if (!answer.ok) {
    let words = `The server answered ${answer.status}.`;
    try { words = (await answer.json()).error.message; } catch { /* no JSON */ }
    if (answer.status === 429) words += ` Try again in ${answer.headers.get("retry-after")} s.`;
    throw new Error(words);
  }
  return answer;
}

// What the server is doing.

async function look() {
  try {
    state = await (await ask("/page/state")).json();
    find("key-form").hidden = true;
    find("model").textContent = state.model;
    for (const name of ["device", "host"]) {
      const { used, limit } = state.memory[name];
      find(`${name}-meter`).value = limit ? used / limit : 0;
      find(`${name}-text`).textContent = `${size(used)} of ${size(limit)}`;
    }
    draw();
    list();
  } catch (error) {
    if (find("key-form").hidden) say("state", "The server does not answer.", true);
  }
}

// Memory over time, and what is cached.

const SHOWN = 8;
let shownCached = "";

function draw() {
  const { samples } = state.history;
  const seconds = Math.min(state.history.seconds, Math.max(60, ...samples.map((one) => one[0])));
  document.querySelector(".frame .past").textContent = `${time(seconds)} ago`;
  ["device", "host"].forEach((name, place) => {
    const { used, limit } = state.memory[name];
    const all = [...samples.map((one) => [one[0], one[place + 1]]), [0, used]];
    // Time goes to the right, and what was used stays so until the next sample.
    const points = all.flatMap(([ago, bytes], index) => {
      const x = 600 * (1 - Math.min(ago / seconds, 1));
      const y = 99 - 97 * Math.min(limit ? bytes / limit : 0, 1);
      const before = index ? 99 - 97 * Math.min(limit ? all[index - 1][1] / limit : 0, 1) : y;
      return [`${x.toFixed(1)},${before.toFixed(1)}`, `${x.toFixed(1)},${y.toFixed(1)}`];
    });
    find(`${name}-line`).setAttribute("points", points.join(" "));
    const most = Math.max(...all.map((one) => one[1]));
    const title = name === "device" ? "Device memory" : "Host memory";
    const told = `${title}: ${size(used)} of ${size(limit)}, at most ${size(most)} in the last ${time(seconds)}`;
    if (find(`${name}-told`).textContent !== told) find(`${name}-told`).textContent = told;
  });
}

function list() {
  const known = JSON.stringify(state.cached);
  if (known === shownCached) return;
  shownCached = known;
  const rows = state.cached.slice(0, SHOWN).map((one) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = one.name;
    row.append(name);
    for (const words of [one.tokens.toLocaleString(), size(one.bytes), one.place]) {
      const cell = document.createElement("td");
      cell.textContent = words;
      row.append(cell);
    }
    return row;
  });
  find("cached").hidden = !rows.length;
  find("cached").tBodies[0].replaceChildren(...rows);
  const number = state.cached.length;
  const more = number > SHOWN ? ` The ${SHOWN} newest of ${number}.` : "";
  find("cached-told").textContent = number
    ? `What a question begins with alike is not read again.${more}`
    : "Nothing is cached yet. What a later question begins with alike is not read again.";
}

// The document.

function plan() {
  if (!text) return;
  let words = `${title}: ${tokens.toLocaleString()} tokens`;
  if (state && state.positions && tokens > state.positions) {
    say("file-told", `${words}, more than the model's ${state.positions.toLocaleString()}. Use a shorter document.`, true);
    return;
  }
  if (state && state.positions) words += ` of the model's ${state.positions.toLocaleString()}`;
  if (planned && !planned.fits) {
    say("file-told", `${words}. It does not fit in the memory limits.`, true);
    return;
  }
  if (planned) words += `; by the plan it takes about ${time(planned.seconds)} to read, once for all questions`;
  say("file-told", `${words}.`);
}

async function take(file) {
  say("file-told", `Reading ${file.name} …`);
  try {
    const path = `/page/document/${encodeURIComponent(file.name.replaceAll("/", "_"))}`;
    const found = await (await ask(path, { method: "POST", body: file })).json();
    [text, tokens, title, planned] = [found.text, found.tokens, file.name, found.plan];
    find("remove").hidden = false;
    await look();
    plan();
    if (found.remarks.length) find("file-told").textContent += ` ${found.remarks.join(" ")}`;
  } catch (error) {
    [text, tokens] = ["", 0];
    find("remove").hidden = true;
    say("file-told", error.message, true);
  }
}

// Answers.

function card(question) {
  const item = document.createElement("li");
  const title = document.createElement("h3");
  title.textContent = question;
  const place = document.createElement("p");
  const took = document.createElement("p");
  took.className = "took";
  item.append(title, place, took);
  find("answers").append(item);
  return { place, took, ended: false };
}

// What the model thinks before it answers, open as long as it does.
function think(shown, more) {
  if (!shown.thoughts) {
    const box = document.createElement("details");
    const name = document.createElement("summary");
    name.textContent = "Thoughts";
    shown.thoughts = document.createElement("p");
    box.append(name, shown.thoughts);
    box.open = true;
    shown.place.before(box);
  }
  shown.thoughts.textContent += more;
}

function tell(progress) {
  const bar = find("progress");
  if (progress.state === "decoding") return;
  bar.hidden = false;
  if (progress.state === "reading") {
    const left = progress.seconds_left === undefined ? "" : `, about ${time(progress.seconds_left)} left`;
    if (progress.pass === undefined) bar.removeAttribute("value"); else bar.value = progress.pass;
    say("state", `Reading ${progress.prompt_tokens.toLocaleString()} tokens${left} …`);
  } else {
    bar.removeAttribute("value");
    say("state", progress.state === "waiting" ? "Waiting for its turn …" : "Preparing …");
  }
}

async function write(questions, cards, most, signal) {
  const body = JSON.stringify({ document: text, questions, max_tokens: most });
  const answer = await ask("/page/ask", {
    method: "POST", body, signal, headers: { "content-type": "application/json" },
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const began = performance.now();
  let held = "";
  let whole = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (event.startsWith(": ")) { tell(JSON.parse(event.slice(2))); continue; }
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") { whole = true; continue; }
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      for (const { index, delta, finish_reason: reason } of found.choices) {
        const shown = cards[index];
        if (delta.reasoning_content) {
          find("progress").hidden = true;
          say("state", "Thinking …");
          think(shown, delta.reasoning_content);
        }
        if (delta.content) {
          find("progress").hidden = true;
          say("state", "Answering …");
          if (shown.thoughts && !shown.place.textContent) shown.thoughts.parentNode.open = false;
          shown.place.textContent += delta.content;
        }
        if (reason) {
          shown.took.textContent = reason === "length" ? "Cut off at the most tokens." : "";
          shown.ended = true;
        }
      }
      if (found.usage) {
        const { completion_tokens: made, prompt_tokens: all, prompt_tokens_details: details } = found.usage;
        const seconds = (performance.now() - began) / 1000;
        took = `${made.toLocaleString()} tokens in ${time(seconds)}; ${details.cached_tokens.toLocaleString()} of ${all.toLocaleString()} prompt tokens were computed for another question or before.`;
      }
    }
  }
  if (!whole) throw new Error("The answer broke off.");
}

async function decide(questions, cards, signal) {
  say("state", "Deciding …");
  find("progress").hidden = false;
  find("progress").removeAttribute("value");
  const wanted = {};
  questions.forEach((one, place) => { wanted[`q${place}`] = { type: "noul", instructions: one }; });
  const body = JSON.stringify({ model: "any", state: text, questions: wanted });
  const answer = await ask("/v1/systemone", {
    method: "POST", body, signal, headers: { "content-type": "application/json" },
  });
  const { answers } = await answer.json();
  cards.forEach((shown, place) => {
    const yes = answers[`q${place}`].noul;
    shown.place.className = "likely";
    shown.place.replaceChildren();
    for (const [name, share] of [["Yes", yes], ["No", 1 - yes]]) {
      const word = document.createElement("span");
      word.textContent = name;
      const bar = document.createElement("meter");
      bar.value = share;
      bar.setAttribute("aria-label", `${name}: ${Math.round(share * 100)} percent`);
      const number = document.createElement("span");
      number.textContent = `${(share * 100).toFixed(1)} %`;
      shown.place.append(word, bar, number);
    }
  });
}

async function answer(event) {
  event.preventDefault();
  const questions = find("questions").value.split("\n").map((one) => one.trim()).filter(Boolean);
  if (!questions.length) return;
  find("answers").replaceChildren();
  const cards = questions.map(card);
  const how = new FormData(find("ask")).get("how");
  stopping = new AbortController();
  find("go").disabled = true;
  find("stop").hidden = false;
  say("state", "Sending …");
  let failed = "";
  took = "";
  try {
    if (how === "yes") await decide(questions, cards, stopping.signal);
    else await write(questions, cards, Number(find("most").value), stopping.signal);
  } catch (error) {
    if (!stopping.signal.aborted) failed = error.message;
    for (const shown of cards.filter((one) => !one.ended)) shown.took.textContent = failed ? "Not answered." : "Stopped.";
  }
  find("progress").hidden = true;
  find("go").disabled = false;
  find("stop").hidden = true;
  say("state", stopping.signal.aborted ? "Stopped." : failed || `Done. ${took}`, Boolean(failed));
  await look();
  plan();
}

// What people do.

find("file").addEventListener("change", (event) => { if (event.target.files[0]) take(event.target.files[0]); });
find("remove").addEventListener("click", () => {
  [text, tokens] = ["", 0];
  find("file").value = "";
  find("remove").hidden = true;
  say("file-told", "");
  find("file").focus();
});
find("ask").addEventListener("submit", answer);
find("ask").addEventListener("change", () => {
  find("most-row").hidden = new FormData(find("ask")).get("how") === "yes";
});
find("stop").addEventListener("click", () => stopping.abort());
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value;
  look();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
setInterval(() => { if (!document.hidden) look(); }, 2000);
look();
