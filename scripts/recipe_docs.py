"""Write what follows from the recipe's schema: docs/recipe.schema.json and the tables of docs/recipes.md.

python scripts/recipe_docs.py
"""

import json
from pathlib import Path
from typing import Any

from slipstream.train.recipe import Recipe, Source
from slipstream.train.recipe_names import ALIASES, keys_of

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA, PAGE = DOCS / "recipe.schema.json", DOCS / "recipes.md"
BEGIN, END = "<!-- keys: written by scripts/recipe_docs.py -->\n", "<!-- end of keys -->\n"


def schema() -> str:
    """The JSON schema of a recipe, for editors. A section without values (`lora:`) is one with all defaults."""
    described = Recipe.model_json_schema()
    described["title"] = "Slipstream recipe"
    for section in ("lora", "eval", "checkpoint", "log"):
        branches = [described["properties"][section]]
        branches = branches[0].get("anyOf", branches)
        given = [branch for branch in branches if "$ref" in branch]
        described["properties"][section] = {"anyOf": [*given, {"type": "null"}]}
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def tables() -> str:
    parts = []
    for name, section in Recipe.model_fields.items():
        parts.append(f"## `{name}`\n")
        fields = {key: field for key, field in keys_of((name,)).items() if field is not None}
        parts.append(table(fields) if fields else f"{section.description}\n")
        if name == "data":
            parts.append("A source is a path, or a mapping of these:\n")
            parts.append(table(dict(Source.model_fields)))
    names = [f"`{alias}` → `{target}`" for alias, target in ALIASES.items()]
    parts.append("## Names of other tools\n")
    parts.append("Read with a note, at the top level or in any section; so are our own names in another section.\n")
    parts.append(", ".join(names) + ".\n")
    return "\n".join(parts)


def table(fields: dict[str, Any]) -> str:
    lines = ["| key | default | |", "|---|---|---|"]
    for key, field in fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        shown = "required" if field.is_required() else "" if default is None else f"`{default}`"
        lines.append(f"| `{key}` | {shown} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The text of docs/recipes.md with its tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    SCHEMA.write_text(schema(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
