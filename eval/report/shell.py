"""What the HTML pages share: their look in light and dark, and the script that filters and sorts them. Nothing is loaded."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5c6670;--line:#d9dee3;--page:#fff;--card:#f6f8fa;--good:#0b6b3a;
--good-bg:#d8f3e3;--bad:#a3130b;--bad-bg:#fde0dd;--key:#0b5cad}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#343b43;--page:#14171b;--card:#1d2228;
--good:#8be0b0;--good-bg:#123524;--bad:#ffab9f;--bad-bg:#4a1713;--key:#7db8f5}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1180px;margin:2rem auto;
padding:0 1rem}
body.wide{max-width:1560px}.bar+h2{border:0;margin-top:1rem;padding-top:0}
h1,h2,h3{line-height:1.25;text-wrap:balance}h2{margin-top:3rem;border-top:1px solid var(--line);padding-top:1.5rem}
small,.soft,caption{color:var(--soft)}caption{text-align:left;font-size:.9em;padding:.4rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9em;margin:1rem 0}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{font-weight:600;vertical-align:bottom}.text{text-align:left}td small{display:block}code{font-size:.95em}
th:first-child,td:first-child{position:sticky;left:0;background:var(--page);z-index:1}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit;white-space:pre-line}
th button:hover,th button:focus-visible{color:var(--key);text-decoration:underline}th[aria-sort] button{color:var(--key)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}
.bar{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;position:sticky;top:0;background:var(--page);padding:.6rem 0;
border-bottom:1px solid var(--line);z-index:2}.bar input[type=search],.bar select{font:inherit;padding:.25rem .5rem;
color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;min-width:0;max-width:100%}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem;align-items:start}
figure{margin:0}.figures svg{width:100%;height:auto;background:var(--card);border-radius:8px}
svg text{fill:var(--ink);font:11px system-ui,sans-serif;paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line)}
.board small{display:inline}.board svg{display:block;margin-left:auto}.board .text{white-space:normal;min-width:7em;
max-width:13em;overflow-wrap:anywhere}.verdicts{padding-left:1.2rem}
.sample{background:var(--card);border-radius:8px;padding:1rem;margin:1rem 0;break-inside:avoid}
.sample:has(img){display:grid;grid-template-columns:150px 1fr;gap:.5rem 1rem}.sample p:first-of-type{margin:0}
.sample img{grid-row:1/3;width:150px;border-radius:6px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:.8rem;align-content:start}
@media (max-width:640px){.sample img{grid-row:1}.sample:has(img) .answers{grid-column:1/3}
.sample:has(img){grid-template-columns:min(150px,35%) 1fr}.sample img{width:100%}th,td{padding:.25rem .4rem}
td:first-child code{white-space:normal;overflow-wrap:anywhere}td:first-child{max-width:34vw}}
.answers div{border-top:2px solid var(--line);padding-top:.3rem}.answers p{margin:.2rem 0;overflow-wrap:anywhere}
mark{border-radius:3px;padding:0 .15em}mark.good{color:var(--good);background:var(--good-bg)}
mark.bad{color:var(--bad);background:var(--bad-bg);text-decoration:underline wavy}[hidden]{display:none!important}
@media print{.bar{display:none}}
"""
SCRIPT = """
const all=(what,where=document)=>[...where.querySelectorAll(what)],bar=document.querySelector(".bar");
function show(){
 const words=bar.querySelector("[type=search]").value.toLowerCase().split(/[\\s,]+/).filter(Boolean);
 const only=bar.querySelector("[type=checkbox]").checked,chosen=all("select",bar).filter(s=>s.value);
 let rows=0;
 for(const e of all("[data-run]")){
  const name=e.dataset.run.toLowerCase(),row=e.tagName=="TR",base=name=="baseline";
  const fits=base||!words.length||words.some(w=>name.includes(w));
  const kept=chosen.every(s=>!row||e.dataset[s.name]===undefined||e.dataset[s.name]==s.value);
  e.toggleAttribute("hidden",!(fits&&kept&&(!only||!row||base||e.querySelector(".better,.worse"))));
  rows+=row&&!e.hasAttribute("hidden");
 }
 bar.querySelector("output").textContent=rows+" table rows";
}
function sort(button){
 const head=button.closest("th"),table=head.closest("table"),body=table.tBodies[0],at=head.cellIndex;
 const was=head.getAttribute("aria-sort"),now=was=="descending"?"ascending":was=="ascending"?null:"descending";
 for(const other of all("th",table))other.removeAttribute("aria-sort");
 if(now)head.setAttribute("aria-sort",now);
 const rows=all("tr",body);rows.forEach((r,i)=>r.dataset.at??=i);
 const key=r=>{const c=r.cells[at],v=c.dataset.v??c.textContent,n=parseFloat(v);return isNaN(n)?v.trim():n};
 rows.sort((a,b)=>{
  if(!now)return a.dataset.at-b.dataset.at;
  const x=key(a),y=key(b);
  if(x===""||y==="")return (x==="")-(y==="");
  const d=typeof x=="number"&&typeof y=="number"?x-y:String(x).localeCompare(String(y));
  return now=="ascending"?d:-d;
 });
 body.append(...rows);
}
all("th button").forEach(b=>b.addEventListener("click",()=>sort(b)));
bar.addEventListener("input",show);show();
"""


def bar(selects: str = "") -> str:
    """The line that filters: names, whatever `selects` adds, and significant rows alone."""
    return (
        '<div class="bar" role="search"><input type="search" aria-label="methods to show" placeholder="filter, as in: vcd pai">'
        f'{selects}<label><input type="checkbox"> significant only</label><output class="soft"></output></div>'
    )


def head(title: str, style: str = "") -> str:
    """The head of a self-contained page; `style` is what it has beside the common one."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{title}</title><style>{STYLE}{style}</style></head>'
    )


def whole(title: str, body: str, selects: str = "", kind: str = "") -> str:
    """A self-contained page. Without JavaScript it shows everything, in its first order."""
    return (
        f'{head(title)}<body class="{kind}">'
        f"<h1>{title}</h1>{bar(selects)}{body}<script>{SCRIPT}</script></body></html>\n"
    )
