"""The whole page: one HTML file with nothing outside it, for wide and narrow, light and dark screens."""

from pathlib import Path

from slipstream.report import sections
from slipstream.report.findings import findings
from slipstream.report.markup import escape, section
from slipstream.report.prediction import predict
from slipstream.report.records import Records, read_records

REPORT_FILE = "report.html"

_LIGHT = """--bg:#fff;--soft:#f5f7fa;--edge:#d8dee6;--text:#1c2128;--muted:#57606a;--grid:#e6eaf0;--link:#0b57c2;
--s1:#1d5fd0;--s2:#b84a00;--s3:#6b3fb5;--level:#157347;--warn:#fff6df;--warn-edge:#c98a00;
--h0:#e6eefb;--h1:#c2d8f8;--h2:#93bbf2;--h3:#5c95e6;--h4:#2f6dcc;--h5:#1c4c9c;--h6:#0d2c66"""
_DARK = """--bg:#0f141a;--soft:#171e27;--edge:#303a47;--text:#e7ebf0;--muted:#a3adb9;--grid:#27303b;--link:#8ab8ff;
--s1:#7db0ff;--s2:#ff9d5c;--s3:#c3a2ff;--level:#5fd094;--warn:#2b2410;--warn-edge:#d9a32b;
--h0:#17222f;--h1:#1a3555;--h2:#1f5185;--h3:#2b73bd;--h4:#4f9ae5;--h5:#90c3f7;--h6:#d6e8ff"""
_STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%;overflow-wrap:anywhere}}
main,header{{max-width:1128px;margin:0 auto;padding:0 24px}}
header{{padding-top:28px}}
h1{{font-size:1.7rem;line-height:1.25;margin:0}}
h2{{font-size:1.2rem;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--edge)}}
h3{{font-size:.8rem;font-weight:600;color:var(--muted);margin:0 0 4px}}
p{{margin:8px 0}}
small,.lead,figcaption small{{color:var(--muted)}}
nav{{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 4px}}
a{{color:var(--link)}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:18px 0}}
.tiles div{{background:var(--soft);border:1px solid var(--edge);border-radius:8px;padding:10px}}
dt{{font-size:.8rem;color:var(--muted)}}
dd{{margin:0;font-size:1rem;font-weight:600;font-variant-numeric:tabular-nums}}
.warnings{{background:var(--warn);border-left:4px solid var(--warn-edge);border-radius:4px;margin:0;
padding:10px 16px 10px 34px}}
.warnings li{{margin:4px 0}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:20px}}
figure{{margin:14px 0}}
figcaption{{font-weight:600;font-size:.92rem;margin-bottom:4px}}
figcaption small{{font-weight:400}}
.keys{{float:right;font-weight:400;font-size:.85rem;color:var(--muted)}}
.key{{margin-left:14px;white-space:nowrap;display:inline-block}}
.key::before{{content:"";display:inline-block;width:16px;height:3px;margin-right:6px;vertical-align:middle;
background:currentColor}}
.key.s1::before{{background:var(--s1)}}.key.s2::before{{background:var(--s2)}}.key.s3::before{{background:var(--s3)}}
.key.level::before{{background:repeating-linear-gradient(90deg,var(--level) 0 5px,transparent 5px 8px)}}
.key.block::before{{width:14px;height:14px;border:1px solid var(--edge);border-radius:3px}}
svg{{display:block;width:100%;height:auto}}
svg text{{font:12px system-ui,sans-serif;fill:var(--muted)}}
path.grid{{stroke:var(--grid);stroke-width:1}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}
.line.s1,.dot.s1{{stroke:var(--s1)}}.line.s2,.dot.s2{{stroke:var(--s2)}}.line.s3,.dot.s3{{stroke:var(--s3)}}
.dot{{fill:var(--bg);stroke-width:2}}
.band{{opacity:.2}}.band.s1{{fill:var(--s1)}}.band.s2{{fill:var(--s2)}}.band.s3{{fill:var(--s3)}}
path.level{{stroke:var(--level);stroke-width:1.5;stroke-dasharray:6 4;fill:none}}
.hint{{fill:transparent}}
.unknown{{fill:var(--bg)}}
{"".join(f"path.h{n}{{fill:var(--h{n})}}.key.h{n}::before{{background:var(--h{n})}}" for n in range(7))}
.narrow{{display:none}}
.scroll{{overflow-x:auto;margin:10px 0}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem}}
th,td{{text-align:left;vertical-align:top;padding:6px 18px 6px 0;border-bottom:1px solid var(--grid)}}
th{{font-weight:500;color:var(--muted);min-width:7em;overflow-wrap:normal}}
thead th{{font-size:.82rem}}
code,pre{{font:.85em/1.5 ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace}}
pre{{background:var(--soft);border:1px solid var(--edge);border-radius:8px;padding:14px;overflow:auto;max-height:70vh;
overflow-wrap:normal}}
details{{margin:10px 0}}
summary{{cursor:pointer;color:var(--link)}}
.sample{{margin:16px 0}}
.prompt{{font-weight:600;white-space:pre-wrap}}
.answers{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:12px}}
.answer{{background:var(--soft);border:1px solid var(--edge);border-radius:8px;padding:10px 14px;margin:8px 0}}
.answers .answer{{margin:0}}
.answer p{{margin:0;white-space:pre-wrap}}
footer{{color:var(--muted);font-size:.85rem;margin:44px 0 28px}}
@media(max-width:720px){{
main,header{{padding:0 16px}}header{{padding-top:20px}}.wide{{display:none}}.narrow{{display:block}}
.tiles{{grid-template-columns:repeat(2,1fr)}}.keys{{float:none;display:block}}.key{{margin:0 14px 0 0}}
th{{min-width:6em}}th,td{{padding-right:12px}}}}
@media print{{details>*{{display:block}}pre{{max-height:none;white-space:pre-wrap}}}}
"""


def write_report(output: Path) -> Path:
    """Write `report.html` beside a run's records, in place of an earlier one; where it is.

    Args:
        output: the run's `train.output_dir`.

    Raises:
        ValueError: no run has written there.
        OSError: the file cannot be written.
    """
    records = read_records(output)
    path = records.folder / REPORT_FILE
    path.write_text(page(records), encoding="utf-8")
    return path


def page(records: Records) -> str:
    """The HTML of a run's report."""
    prediction = predict(records)
    name = escape(sections.title(records))
    parts = [
        _warnings(findings(records, prediction)),
        sections.loss(records),
        sections.speed(records, prediction),
        sections.experts(records),
        sections.data(records),
        sections.samples(records),
        sections.recipe(records),
        sections.environment(records),
    ]
    parts = [part for part in parts if part]
    links = "".join(f'<a href="#{_between(part, "id=", ">")}">{_between(part, "<h2>", "</h2>")}</a>' for part in parts)
    how = "full fine-tune" if records.recipe.get("lora") is None else "LoRA fine-tune"
    if records.section("model").get("config") is not None:
        how = "training from random weights"
    state = "finished" if records.finished else "not finished"
    lead = f"{how}, {state}; <code>{escape(records.folder)}</code>"
    inside = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name} · Slipstream report</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{name}</h1><p class="lead">{lead}</p>{sections.tiles(records)}<nav aria-label="sections">{links}</nav>
</header>
<main>
{inside}
<footer>Made by slipstream report from the records in the folder; it holds no script and loads nothing.</footer>
</main>
</body>
</html>
"""


def _warnings(found: list[str]) -> str:
    if not found:
        return ""
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    return section("warnings", "Worth a look", f'<ul class="warnings">{listed}</ul>')


def _between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition(end)[0].strip('"')
