"use strict";
// The form of one annotator. It works from a file, without a network and without a pointer.
const form = JSON.parse(document.getElementById("data").textContent);
const words = new Map(form.choices);
const known = new Set(form.items.map((item) => item.id));
const store = `questionnaire-${form.questionnaire}-${form.form}`;
const get = (id) => document.getElementById(id);
const judged = new Map(); // the choice of each item that has been judged
let place = 0;
let isKept = true; // whether this browser keeps the answers
let isSaved = true; // whether the file holds all of them

function element(name, parent, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

// What the browser has kept: anything may stand there, also what another program has written.
function stored() {
  const found = new Map();
  const value = JSON.parse(localStorage.getItem(store) || "{}");
  if (value === null || typeof value !== "object") return found;
  for (const [id, choice] of Object.entries(value)) {
    if (known.has(id) && words.has(choice)) found.set(id, choice);
  }
  return found;
}

function read() {
  try {
    for (const [id, choice] of stored()) judged.set(id, choice);
  } catch (error) {
    // forbidden, or not JSON: the next answer replaces it
  }
}

// A private window may refuse to keep anything, which the annotator must know at once.
function tryToKeep() {
  try {
    localStorage.setItem(`${store}-try`, "1");
    localStorage.removeItem(`${store}-try`);
  } catch (error) {
    isKept = false;
  }
  get("unkept").hidden = isKept;
}

// Another tab may have added answers meanwhile, so they are joined with those of this one.
function keep(item, choice) {
  judged.set(item.id, choice);
  isSaved = false;
  read();
  judged.set(item.id, choice);
  try {
    localStorage.setItem(store, JSON.stringify(Object.fromEntries(judged)));
    isKept = true;
  } catch (error) {
    isKept = false;
  }
  get("unkept").hidden = isKept;
}

function parts(list, parent, head, name) {
  const box = element("div", parent, "", "parts box");
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-labelledby", head.id);
  box.dir = "auto";
  let images = 0;
  for (const part of list) {
    if (part.type === "image") {
      const image = element("img", box);
      images += 1;
      image.alt = `image ${images} of ${name}`;
      image.src = part.image;
    } else if (part.text) {
      element("span", box, part.text);
    }
  }
  if (!box.childNodes.length) element("span", box, "(nothing)", "pale");
}

// "Left" on a wide screen is "upper" on a narrow one; the style sheet shows one of the words.
function sideWords(parent, sides) {
  if (typeof sides === "string") {
    parent.append(sides);
    return;
  }
  element("span", parent, sides[0], "if-wide");
  element("span", parent, sides[1], "if-narrow");
}

function show(hasMoved) {
  const item = form.items[place];
  const main = get("item");
  main.replaceChildren();
  const title = element("h2", main, `Item ${place + 1} of ${form.items.length}`);
  title.tabIndex = -1;
  const prompt = element("h3", main, "Prompt");
  prompt.id = "prompt";
  parts(item.prompt, main, prompt, "the prompt");
  const isPair = item.answers.length > 1;
  const answers = element("div", main, "", isPair ? "answers two" : "answers");
  const sides = [["Left answer", "Upper answer"], ["Right answer", "Lower answer"]];
  item.answers.forEach((answer, index) => {
    const side = element("section", answers);
    const head = element("h3", side);
    head.id = `answer-${index}`;
    sideWords(head, isPair ? sides[index] : "Answer");
    parts(answer, side, head, "this answer");
  });
  const box = element("fieldset", main, "", "options");
  element("legend", box, form.question);
  form.choices.forEach(([value, text], index) => {
    const label = element("label", box);
    const input = element("input", label);
    Object.assign(input, { type: "radio", name: "choice", value, autocomplete: "off" });
    input.checked = judged.get(item.id) === value;
    input.addEventListener("change", () => choose(value));
    element("kbd", label, String(index + 1)).setAttribute("aria-hidden", "true");
    sideWords(element("span", label), text);
  });
  state();
  if (hasMoved) {
    title.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function choose(value) {
  keep(form.items[place], value);
  get("saved").textContent = "";
  for (const input of document.querySelectorAll("#item input")) {
    input.checked = input.value === value;
  }
  state();
}

function state() {
  const done = judged.size;
  const all = form.items.length;
  const ready = done === all ? " All are judged: save your answers and send the file back." : "";
  get("state").textContent = `Item ${place + 1} of ${all}, ${done} judged.${ready}`;
  get("progress").value = done;
  get("back").disabled = place === 0;
  get("next").disabled = place === all - 1;
}

function move(by) {
  const next = Math.min(Math.max(place + by, 0), form.items.length - 1);
  if (next === place) return;
  place = next;
  read();
  show(true);
}

function save() {
  read();
  const content = { format: "megatron_chameleon.judgements/1", questionnaire: form.questionnaire,
    form: form.form, judgements: Object.fromEntries(judged) };
  const link = document.createElement("a");
  const blob = new Blob([JSON.stringify(content, null, 1)], { type: "application/json" });
  link.href = URL.createObjectURL(blob);
  link.download = `judgements_${form.form}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  isSaved = true;
  const missing = form.items.length - judged.size;
  const rest = missing ? ` ${missing} of ${form.items.length} items are not judged yet.` : "";
  get("saved").textContent = `Saved as ${link.download}. Send this file back.${rest}`;
  get("forget").hidden = false;
}

function forget() {
  if (!confirm("Delete your answers from this browser? The saved file stays.")) return;
  try {
    localStorage.removeItem(store);
  } catch (error) {
    // nothing is kept there
  }
  judged.clear();
  isSaved = true;
  place = 0;
  get("saved").textContent = "Your answers were deleted from this browser.";
  get("forget").hidden = true;
  show(true);
}

function press(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const number = Number(event.key);
  if (number >= 1 && number <= form.choices.length) choose(form.choices[number - 1][0]);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else return;
  event.preventDefault(); // an arrow would otherwise change the choice
}

if (form.items.length) {
  tryToKeep();
  read();
  place = Math.max(0, form.items.findIndex((item) => !judged.has(item.id)));
  get("instructions").open = judged.size === 0;
  get("progress").max = form.items.length;
  get("back").addEventListener("click", () => move(-1));
  get("next").addEventListener("click", () => move(1));
  get("save").addEventListener("click", save);
  get("forget").addEventListener("click", forget);
  document.addEventListener("keydown", press);
  addEventListener("storage", (event) => { // of another tab
    if (event.key !== store) return;
    if (event.newValue === null) judged.clear();
    read();
    show(false);
  });
  addEventListener("beforeunload", (event) => {
    if (!isKept && !isSaved) event.preventDefault();
  });
  show(false);
} else {
  get("state").textContent = "This form has no items.";
}
