"""What mkdocs needs to read pages that are written for a code host too (see mkdocs.yml).

- Links out of docs/ (`../examples/…`): these files become part of the site, under repo/, so that links stay checked.
- A list or table right below a paragraph: mkdocs wants an empty line between them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINKED = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/*.*", "benchmarks/*.md", "benchmarks/results/*")
_LIST, _TABLE, _FENCE = re.compile(r"([-*]|\d+\.) "), re.compile(r"\|"), re.compile(r"\s*(```|~~~)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside of docs/."""
    for pattern in LINKED:
        for path in sorted(ROOT.glob(pattern)):
            name = f"repo/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page's text as mkdocs wants it."""
    if page.file.src_uri.startswith("repo/"):
        return spaced(markdown)
    return spaced(re.sub(r"(\]\()\.\./", r"\1repo/", markdown))


def spaced(markdown: str) -> str:
    """With an empty line between a paragraph and a list or table below it.

    >>> spaced("three:\\n- one\\n- two")
    'three:\\n\\n- one\\n- two'
    """
    lines: list[str] = []
    fenced = False
    for line in markdown.split("\n"):
        before = lines[-1] if lines else ""
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and before.strip() and not before.startswith((" ", "#")):
            for kind in (_LIST, _TABLE):
                if kind.match(line) and not kind.match(before):
                    lines.append("")
        lines.append(line)
    return "\n".join(lines)
