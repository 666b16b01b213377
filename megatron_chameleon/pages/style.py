"""The style sheet of all pages. Colours are variables, which follow light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #4a5568; --pale: #718096;
  --line: #e2e8f0; --panel: #f7fafc; --back: #fff; --warn: #c05621; --bad: #c53030;
  --c0: #2b6cb0; --c1: #c05621; --c2: #2f855a; --c3: #6b46c1; --c4: #b83280; --c5: #4a5568; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --soft: #a9b6c9; --pale: #8a99af;
  --line: #2d3748; --panel: #1a2130; --back: #11161f; --warn: #ed8936; --bad: #fc8181;
  --c0: #63b3ed; --c1: #f6ad55; --c2: #68d391; --c3: #b794f4; --c4: #f687b3; --c5: #a0aec0; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 64rem; margin: 2.5rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { margin: 3rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; }
a { color: var(--c0); } p { margin: .5rem 0; }
p.how { color: var(--soft); max-width: 46rem; } small, .pale { color: var(--pale); }
ul.notes { list-style: none; margin: 1rem 0; padding: 0; display: grid; gap: .5rem; }
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
.choice > input { accent-color: var(--c0); margin: 0 .3rem 0 0; }
.choice > label { white-space: nowrap; font-size: .85rem; color: var(--soft); margin-right: 1rem; }
.choice > .view { display: none; }
.choice > input:nth-of-type(1):checked ~ .view:nth-of-type(1),
.choice > input:nth-of-type(2):checked ~ .view:nth-of-type(2),
.choice > input:nth-of-type(3):checked ~ .view:nth-of-type(3) { display: block; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .85rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.code { font-family: ui-monospace, monospace; font-size: .8rem; }
td.long { min-width: 14rem; overflow-wrap: anywhere; }
.share { display: block; height: .5rem; border-radius: 2px; background: var(--c0); min-width: 1px; }
.samples { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
.samples figure { margin: 0; padding: .6rem .75rem; border: 1px solid var(--line);
  border-radius: .5rem; break-inside: avoid; }
.samples img { width: 100%; max-width: 160px; height: auto; image-rendering: pixelated;
  border-radius: 3px; display: block; margin: .25rem 0; }
.samples p { margin: .25rem 0; white-space: pre-wrap; font-size: .85rem; }
.samples figcaption { color: var(--pale); font-size: .8rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  overflow-x: auto; font-size: .8rem; }
details { margin: .75rem 0; } details summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; font-size: .8rem; color: var(--pale); }
@media (max-width: 36rem) { body { margin: 1.25rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } .plot.tall { height: 14rem; } .plot, .axis, .legend
  { margin-left: 2.8rem; } }
@media print { :root { color-scheme: light; } body { max-width: none; margin: 0; }
  .scroll { max-height: none; overflow: visible; } .choice > input, .choice > label
  { display: none; } h2 { break-after: avoid; } }
"""
