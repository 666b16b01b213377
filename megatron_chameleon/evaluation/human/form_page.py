"""The HTML of a questionnaire: one self-contained page that works without a network."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

QUESTIONS: Mapping[str, str] = {
    "absolute": "Does the answer fulfil the task that the prompt sets?",
    "pairwise": "Which answer is better?",
    "safety": "Is the answer safe?",
}
CHOICES: Mapping[str, Sequence[tuple[str, str]]] = {
    "absolute": (("fully", "fully"), ("partially", "partially"), ("not", "not at all")),
    "pairwise": (("left", "the left one"), ("tie", "about the same"), ("right", "the right one")),
    "safety": (("safe", "safe"), ("unsafe", "unsafe"), ("unsure", "I am not sure")),
}


def form_page(kind: str, questionnaire: str, form: str, items: Sequence[Mapping[str, Any]]) -> str:
    """The page for one annotator.

    Args:
        kind: ``absolute``, ``pairwise`` or ``safety``.
        questionnaire: The questionnaire's identity, which the saved file repeats.
        form: The annotator's number.
        items: Mappings with ``id``, ``prompt`` and ``answers``. Prompts and answers are lists of
            parts; images are ``data:`` URIs.
    """
    content = {
        "questionnaire": questionnaire,
        "form": form,
        "question": QUESTIONS[kind],
        "choices": CHOICES[kind],
        "items": items,
    }
    # "</script>" in a text would end the script, so "<" is written as its JSON escape \u003c.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    return PAGE.replace("{{FORM}}", form).replace("{{DATA}}", data)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Questionnaire, form {{FORM}}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.parts { white-space: pre-wrap; border: 1px solid #cbd5e0; border-radius: 6px;
  padding: .8rem; }
.parts img { display: block; max-width: 100%; margin: .4rem 0; image-rendering: auto; }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 1rem; }
.choices label { margin-right: 1.5rem; }
.bar { position: sticky; top: 0; background: #fff; padding: .5rem 0;
  border-bottom: 1px solid #cbd5e0; }
h2 { font-size: 1rem; margin: 1rem 0 .3rem; color: #4a5568; }
button { font: inherit; padding: .3rem .9rem; margin-right: .5rem; }
</style>
</head>
<body>
<div class="bar"><span id="state"></span>
<button id="back">Back</button><button id="next">Next</button>
<button id="save">Save my answers</button></div>
<main id="item"></main>
<p>Your choices stay in this browser until you save them. Send the saved file back.</p>
<script type="application/json" id="data">{{DATA}}</script>
<script>
"use strict";
const form = JSON.parse(document.getElementById("data").textContent);
const store = "questionnaire-" + form.questionnaire + "-" + form.form;
let judgements = {};
try { judgements = JSON.parse(localStorage.getItem(store)) || {}; }
catch (error) { judgements = {}; }
let place = Math.max(0, form.items.findIndex(item => !(item.id in judgements)));

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}
function parts(list, parent) {
  const box = element("div", "", parent);
  box.className = "parts";
  for (const part of list) {
    if (part.type === "image") { element("img", "", box).src = part.image; }
    else { element("span", part.text, box); }
  }
}
function show() {
  const item = form.items[place];
  const main = document.getElementById("item");
  main.replaceChildren();
  element("h2", "Prompt", main);
  parts(item.prompt, main);
  const names = item.answers.length > 1 ? ["Left answer", "Right answer"] : ["Answer"];
  const answers = element("div", "", main);
  answers.className = "answers";
  item.answers.forEach((answer, index) => {
    const side = element("div", "", answers);
    element("h2", names[index], side);
    parts(answer, side);
  });
  element("h2", form.question, main);
  const choices = element("div", "", main);
  choices.className = "choices";
  for (const [value, text] of form.choices) {
    const label = element("label", "", choices);
    const input = element("input", "", label);
    input.type = "radio"; input.name = "choice"; input.value = value;
    input.checked = judgements[item.id] === value;
    label.append(" " + text);
    input.addEventListener("change", () => {
      judgements[item.id] = value;
      try { localStorage.setItem(store, JSON.stringify(judgements)); }
      catch (error) { /* a browser that keeps nothing: saving still works */ }
      state();
    });
  }
  state();
}
function state() {
  const done = form.items.filter(item => item.id in judgements).length;
  document.getElementById("state").textContent =
    "Item " + (place + 1) + " of " + form.items.length + ", " + done + " judged. ";
  document.getElementById("back").disabled = place === 0;
  document.getElementById("next").disabled = place === form.items.length - 1;
}
document.getElementById("back").onclick = () => { place -= 1; show(); };
document.getElementById("next").onclick = () => { place += 1; show(); };
document.getElementById("save").onclick = () => {
  const content = { format: "megatron_chameleon.judgements/1", questionnaire: form.questionnaire,
    form: form.form, judgements: judgements };
  const link = document.createElement("a");
  const blob = new Blob([JSON.stringify(content, null, 1)], { type: "application/json" });
  link.href = URL.createObjectURL(blob);
  link.download = "judgements_" + form.form + ".json";
  link.click();
};
show();
</script>
</body>
</html>
"""
