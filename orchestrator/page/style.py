"""The report page's looks: one sheet, light and dark, nothing fetched."""

# A bucket's colour: what trains is green, what brings hosts up is violet to blue, what is lost is amber to red.
COLOURS = {
    "step": ("#2f9e6e", "#fff"),
    "replay": ("#e0b02e", "#2b2205"),
    "reserve": ("#94a3b8", "#111827"),
    "start": ("#8188dd", "#fff"),
    "data": ("#b9a3e3", "#1f1440"),
    "compile": ("#8d5cc4", "#fff"),
    "restore": ("#3d8fd6", "#fff"),
    "eval": ("#2fb1b8", "#04292b"),
    "save": ("#2b6cb0", "#fff"),
    "snapshot": ("#8cc5ea", "#08263a"),
    "detect": ("#ea8a52", "#331703"),
    "down": ("#d14a4a", "#fff"),
    "other": ("#b3b3ad", "#1c1c1a"),
}

LIGHT = """--paper:#f6f6f3;--card:#fff;--ink:#1d1d1b;--soft:#62625d;--edge:#e3e3de;--grid:#ededE8;--axis:#b9b9b2;
--kept:#2563c4;--replaced:#d09a10;--again:#f3d98a66;--turn:#9a9a94;--bad:#cc3838;--eval:#0f8f76;--gap:#f0f0ec;"""
DARK = """--paper:#141413;--card:#1e1e1c;--ink:#ecece8;--soft:#a2a29b;--edge:#33332f;--grid:#2b2b28;--axis:#55554f;
--kept:#6aa5f7;--replaced:#e6b93c;--again:#8a6a1255;--turn:#77776f;--bad:#f06a6a;--eval:#3cc9ab;--gap:#262623;"""

SHEET = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 56px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 4px}h3{font-size:14px;margin:18px 0 2px;font-weight:600}
p{margin:0 0 8px}.soft,.note{color:var(--soft)}.note{font-size:13px}
header{margin-bottom:20px}.top{display:flex;gap:12px;align-items:center;flex-wrap:wrap;margin-bottom:4px}
.badge{padding:2px 11px;border-radius:99px;font-size:13px;font-weight:600;border:1px solid currentColor}
.good{color:var(--eval)}.busy{color:var(--kept)}.poor{color:var(--bad)}.rest{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:18px 0}
.tile,section{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tile{padding:10px 14px}.tile b{display:block;font-size:19px;font-weight:600;line-height:1.3;white-space:nowrap;
font-variant-numeric:tabular-nums}.tile span{font-size:12.5px;color:var(--soft)}
section{padding:18px 20px;margin-bottom:16px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 20px;margin:8px 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.wide{overflow-x:auto}.wide svg{min-width:700px}svg{display:block;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;margin-top:8px}
th{font-weight:500;color:var(--soft);text-align:left;white-space:nowrap}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--edge);vertical-align:top}
td:last-child,th:last-child{padding-right:0}tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.nw{white-space:nowrap}
tfoot td{font-weight:600;border-top:1px solid var(--axis)}.faint td{color:var(--soft)}
tr:target td{background:var(--again)}
details summary{cursor:pointer}details[open] summary{margin-bottom:4px}
.fill{width:100%}.what{min-width:240px;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--soft);margin:2px 0 6px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;flex:none}
.key.line{height:0;border-top:2px solid;border-radius:0;width:16px}.key.stroke{width:0;height:13px;border-radius:0;
border-left:1.5px dashed var(--turn)}.key.turned{transform:rotate(45deg) scale(.8);border-radius:0}
.key.down{width:0;height:0;border-radius:0;border:5.5px solid transparent;
border-top:8px solid var(--bad);border-bottom:0}
td .key{margin-right:8px;vertical-align:-1px}
svg text{font:11px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
svg .empty{font-size:13px}svg .turned{fill:var(--soft);font-size:10px}svg .away{font-size:10.5px}
svg .number{fill:var(--bad);font-weight:600}
svg .on{font-size:12px}
.grid{stroke:var(--grid)}.axis{stroke:var(--axis)}
.kept,.replaced{fill:none;stroke-width:1.5;stroke-linejoin:round}
.kept{stroke:var(--kept)}.replaced{stroke:var(--replaced)}
.kept.dot{fill:var(--kept);stroke:none}.replaced.dot{fill:var(--replaced);stroke:none}
.kept.spread{fill:var(--kept);fill-opacity:.2;stroke:none}.replaced.spread{fill:var(--replaced);fill-opacity:.2;stroke:none}
.again{fill:var(--again)}.turn{stroke:var(--turn);stroke-dasharray:3 3}
.bad{stroke:var(--bad);stroke-opacity:.55}.wrong{fill:var(--bad)}.odd{fill:var(--replaced)}.above{fill:var(--kept)}
.eval{fill:var(--eval);stroke:var(--card);stroke-width:1.2}
.strip{fill:transparent}.strip:hover{fill:var(--ink);fill-opacity:.12}
.gap{fill:var(--gap)}.piece{stroke:var(--card);stroke-width:1.5}
footer{font-size:12.5px;color:var(--soft);text-align:center}
@media(max-width:600px){dl{grid-template-columns:1fr}dt{margin-top:6px}section{padding:14px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def sheet() -> str:
    """The whole style sheet."""
    rules = [
        f":root{{color-scheme:light dark;{LIGHT}}}",
        f"@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}",
        SHEET,
    ]
    for name, (colour, ink) in COLOURS.items():
        rules.append(
            f"svg .b-{name}{{fill:{colour}}}.key.b-{name}{{background:{colour}}}svg .b-{name}-ink{{fill:{ink}}}"
        )
    return "\n".join(rules)
