// As much of a browser as a form needs: node form_browser.js FORM.html CHOICE prints what it saves.
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf8");
const made = {};
class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.handlers = {}; this.textContent = ""; }
  append(child) { this.children.push(child); }
  replaceChildren() { this.children = []; }
  addEventListener(kind, handler) { this.handlers[kind] = handler; }
  click() {}
  all(tag) {
    return this.children.flatMap(child =>
      child instanceof Element ? [...(child.tag === tag ? [child] : []), ...child.all(tag)] : []);
  }
}
global.document = {
  getElementById: id => made[id] ||= new Element(id),
  createElement: name => new Element(name),
};
global.localStorage = { getItem: () => null, setItem() {} };
global.Blob = class { constructor(parts) { this.text = parts.join(""); } };
global.URL.createObjectURL = blob => { console.log(blob.text); return "blob:"; };
document.getElementById("data").textContent = page.match(/id="data">(.*)<\/script>/)[1];
eval(page.split("<script>")[1].split("</script>")[0].replace('"use strict";', ""));
for (;;) {
  const inputs = made.item.all("input").filter(input => input.value === process.argv[3]);
  inputs[0].checked = true;
  inputs[0].handlers.change();
  if (made.next.disabled) break;
  made.next.onclick();
}
made.save.onclick();
