"""Colours and style sheet of all pages. Colours are variables, which follow light and dark."""

COLOURS = {
    "ink": ("#1a202c", "#e2e8f0"),
    "soft": ("#4a5568", "#a9b6c9"),
    "pale": ("#5d6a7e", "#93a1b5"),
    "line": ("#e2e8f0", "#2d3748"),
    "edge": ("#8895a7", "#66758c"),
    "panel": ("#f4f7fa", "#1a2130"),
    "back": ("#fff", "#11161f"),
    "hover": ("#ffe08a", "#6b5310"),
    "warn": ("#b7521d", "#ed8936"),
    "bad": ("#c53030", "#fc8181"),
    "good": ("#276749", "#68d391"),
    "on": ("#fff", "#0d1726"),
    "stripe": ("#e8f1fb", "#1b3049"),
    "c0": ("#2b6cb0", "#63b3ed"),
    "c1": ("#b7521d", "#f6ad55"),
    "c2": ("#2f855a", "#68d391"),
    "c3": ("#6b46c1", "#b794f4"),
    "c4": ("#b83280", "#f687b3"),
    "c5": ("#4a5568", "#a0aec0"),
}
"""The name of each variable, and its value in light and in dark."""


def _colours(dark: bool) -> str:
    return " ".join(f"--{name}: {values[dark]};" for name, values in COLOURS.items())


CHOSEN_COLOURS = "\n  ".join(
    [
        ":root { color-scheme: light dark;",
        *(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in COLOURS.items()),
    ]
)
CHOSEN_COLOURS += """ }
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }
"""
"""The colours for a page on which people choose between light and dark, by ``data-theme``."""

STYLE = f"""
:root {{ color-scheme: light dark; {_colours(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(dark=True)} }} }}"""
STYLE += """
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 64rem; margin: 2.5rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { margin: 3rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; }
a { color: var(--c0); } p { margin: .5rem 0; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
p.how { color: var(--soft); max-width: 46rem; } small, .pale { color: var(--pale); }
code { font-family: ui-monospace, monospace; font-size: .95em; }
.origin { margin: .5rem 0 1.5rem; padding: 0; font-size: .8rem; color: var(--pale); display: grid;
  gap: .1rem; }
.origin div { display: flex; gap: .6rem; } .origin dt { flex: none; width: 5.2rem; }
.origin dd { margin: 0; min-width: 0; }
footer { margin-top: 3rem; font-size: .8rem; color: var(--pale); }

ul.notes { list-style: none; margin: .75rem 0; padding: 0; display: grid; gap: .5rem; }
ul.notes li { border-left: .25rem solid var(--c0); background: var(--panel); padding: .5rem .75rem;
  border-radius: 0 .4rem .4rem 0; }
ul.notes li.warn { border-color: var(--warn); } ul.notes li.bad { border-color: var(--bad); }
.numbers { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.numbers div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; }
.numbers b { display: block; font-size: 1.35rem; line-height: 1.3; }
.numbers span { color: var(--pale); font-size: .85rem; }

.charts { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.chart { margin: 1rem 0; break-inside: avoid; min-width: 0; }
.charts .chart { margin: 0; }
.chart figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .35rem; }
.chart .unit { font-weight: 400; color: var(--pale); }
.plot { position: relative; margin-left: 3.4rem; height: 11rem; }
.plot.tall { height: 18rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot svg * { vector-effect: non-scaling-stroke; fill: none; }
.plot .y, .plot .x { position: absolute; font-size: .72rem; line-height: 1; color: var(--pale);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + .45rem); transform: translateY(50%); }
.plot .x { top: calc(100% + .4rem); transform: translateX(-50%); }
.plot .x.first { transform: none; } .plot .x.end { transform: translateX(-100%); }
.axis { text-align: right; font-size: .72rem; color: var(--pale); margin: 1.25rem 0 0 3.4rem; }
.grid { stroke: var(--line); stroke-width: 1; } .raw { opacity: .3; stroke-width: 1; }
.curve { stroke-width: 1.75; stroke-linejoin: round; } .dot { stroke-linecap: round;
  stroke-width: 7; } .dash { stroke-dasharray: 5 3; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.mark { stroke: var(--pale); stroke-width: 1.25; } .mark.alarm { stroke: var(--bad); }
.mark.restart { stroke-dasharray: 2 3; } .mark.stage { stroke-dasharray: 7 4; }
.mark.lowest { stroke: var(--c2); } .mark.checkpoint { stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .8rem; color: var(--soft);
  margin: .3rem 0 0 3.4rem; }
.legend svg { width: 1.4rem; height: .6rem; margin-right: .35rem; vertical-align: middle; }
.legend svg * { fill: none; }
.choice { border: 0; margin: 0; padding: 0; min-width: 0; }
.choice > input { accent-color: var(--c0); margin: 0 .3rem 0 0; }
.choice > label { white-space: nowrap; font-size: .85rem; color: var(--soft); margin-right: 1rem; }
.choice > .view { display: none; }
.choice > input:nth-of-type(1):checked ~ .view:nth-of-type(1),
.choice > input:nth-of-type(2):checked ~ .view:nth-of-type(2),
.choice > input:nth-of-type(3):checked ~ .view:nth-of-type(3) { display: block; }

.scroll { overflow: auto; max-height: 32rem; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .85rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.code { font-family: ui-monospace, monospace; font-size: .8rem; }
td.long { min-width: 14rem; overflow-wrap: anywhere; } td.bar { min-width: 6rem; }
.share { display: block; height: .5rem; margin-top: .4rem; border-radius: 2px;
  background: var(--c0); }

.samples { display: grid; gap: .75rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
.samples.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.samples figure { margin: 0; padding: .6rem .75rem; border: 1px solid var(--line); min-width: 0;
  border-radius: .5rem; break-inside: avoid; }
.samples img { width: 100%; max-width: 160px; height: auto; image-rendering: pixelated;
  max-height: 192px; object-fit: contain; display: block; margin: .25rem 0; }
.samples.wide img { width: auto; min-width: min(100%, 4rem); max-width: 100%; }
.samples .row { display: flex; flex-wrap: wrap; gap: .35rem; }
.samples p { margin: .25rem 0; white-space: pre-wrap; font-size: .85rem; }
.samples b, .samples strong { font-size: .85rem; }
.samples figcaption { color: var(--pale); font-size: .8rem; }
.samples .right { border-left: .25rem solid var(--good); }
.samples .wrong { border-left: .25rem solid var(--bad); }
.parts img { display: block; max-width: 100%; min-width: min(100%, 10rem); height: auto;
  min-height: 1rem; max-height: 24rem; margin: .4rem 0; object-fit: contain; }
.turn img { display: block; min-width: 4rem; max-width: 100%; object-fit: contain; height: auto;
  max-height: 192px; image-rendering: pixelated; margin: .25rem 0; } .turn small { display: block; }
.parts, .turn p { white-space: pre-wrap; } .turn { margin: .5rem 0; }
.turn.prompt { color: var(--pale); border-left: .25rem solid var(--line); padding-left: .6rem; }

.document { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem 1rem;
  margin: 1rem 0; }
.document h2, .document h3 { font-size: .85rem; font-weight: 400; color: var(--pale); margin: 0; }
.document section { border-left: .3rem solid var(--line); margin: .6rem 0; padding-left: .6rem; }
.tokens { white-space: pre-wrap; margin-top: .4rem; }
.tokens span:nth-of-type(even) { background: var(--stripe); }
.tokens .control { color: var(--c4); font-size: .75rem; text-decoration: none; }
.tokens span.byte { background: none; box-shadow: inset 0 -2px var(--c2); }
.tokens [title]:hover { background: var(--hover); }
.tokens [title]:focus { background: var(--hover); outline: none; }
.tokens [title]:focus::after { content: attr(title); position: fixed; z-index: 9; left: 1rem;
  right: 1rem; bottom: 1rem; padding: .6rem .8rem; border-radius: .5rem; background: var(--ink);
  color: var(--back); font: 14px/1.4 system-ui, sans-serif; white-space: normal; max-height: 40vh;
  overflow: hidden; }
.tokens figure { display: inline-block; margin: .3rem; vertical-align: middle; max-width: 100%;
  text-align: center; }
.tokens figcaption { font-size: .75rem; color: var(--pale); white-space: normal; }
.tokens img { min-width: 96px; max-width: 100%; height: auto; image-rendering: pixelated;
  display: block; }
.untrained { border-left: .3rem solid var(--line); padding-left: .5rem; color: var(--pale); }
.untrained img { opacity: .6; }
.stripes { display: flex; height: 1.1rem; margin: .4rem 0; border-radius: 3px; overflow: hidden; }
.stripes i { border-right: 1px solid var(--back); min-width: 0; }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c3); }
.k3 { background: var(--line); }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .85rem; color: var(--soft); }
.key i { display: inline-block; width: .9rem; height: .9rem; margin-right: .35rem;
  vertical-align: -.1rem; border-radius: 2px; }

.answers { display: grid; gap: 0 1rem; }
.answers.two { grid-template-columns: repeat(2, minmax(0, 1fr)); } .if-narrow { display: none; }
.box { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; min-width: 0; }
.form .box { max-height: 70vh; overflow: auto; }
.form h2 { margin: 1.25rem 0 0; font-size: 1.1rem; } .form h2:focus { outline: none; }
.form h3 { margin: 1rem 0 .3rem; color: var(--soft); }
fieldset.options { border: 0; margin: 1.25rem 0; padding: 0; display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr)); }
fieldset.options legend { font-weight: 600; padding: 0; margin-bottom: .4rem; }
.options label { display: flex; gap: .6rem; align-items: center; border: 1px solid var(--edge);
  border-radius: .5rem; padding: .5rem .8rem; min-height: 2.75rem; cursor: pointer; }
.options label:has(:checked) { border-color: var(--c0); background: var(--stripe); }
.options label:has(:focus-visible) { outline: 2px solid var(--c0); outline-offset: 2px; }
.options input { accent-color: var(--c0); margin: 0; outline: none; }
.toolbar { position: sticky; top: 0; z-index: 2; background: var(--back); padding: .5rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem;
  align-items: center; }
.toolbar .state { flex: 1 1 14rem; } .toolbar p { margin: 0; font-size: .9rem; }
.toolbar progress { display: block; width: 100%; height: .5rem; accent-color: var(--c0); }
[hidden] { display: none !important; }
button { font: inherit; font-size: .9rem; color: inherit; background: var(--panel); cursor: pointer;
  border: 1px solid var(--edge); border-radius: .5rem; padding: .4rem .9rem; min-height: 2.5rem; }
button.main { background: var(--c0); border-color: var(--c0); color: var(--on); }
button:disabled { opacity: .5; cursor: default; }
kbd { font-family: ui-monospace, monospace; font-size: .85em; border: 1px solid var(--edge);
  border-radius: .25rem; padding: 0 .3rem; }
@media (max-width: 44rem) { .answers.two { grid-template-columns: minmax(0, 1fr); }
  .if-narrow { display: inline; } .if-wide { display: none; }
  .toolbar .state { flex-basis: 100%; } }

pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  overflow-x: auto; overflow-wrap: normal; font-size: .8rem; }
details { margin: .75rem 0; } details summary { cursor: pointer; color: var(--soft); }
@media (max-width: 36rem) { body { margin: 1.25rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } .plot.tall { height: 14rem; } .plot, .axis, .legend
  { margin-left: 2.8rem; } .document { padding-inline: .6rem; }
  .origin dt { width: 4.7rem; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #333; --pale: #444;
    --line: #ccc; --panel: #fff; --back: #fff; --stripe: #eee; --c0: #2b6cb0; --c1: #b7521d;
    --c2: #2f855a; --c3: #6b46c1; --c4: #b83280; --c5: #4a5568; --good: #276749; --bad: #c53030; }
  body { max-width: none; margin: 0; } .scroll { max-height: none; overflow: visible; }
  pre { white-space: pre-wrap; } td { overflow-wrap: anywhere; }
  .choice > input, .choice > label, .toolbar button { display: none; }
  .toolbar { position: static; }
  h2, h3 { break-after: avoid; } .document { break-inside: auto; }
  .stripes i, .key i, .share { print-color-adjust: exact; } }
"""
