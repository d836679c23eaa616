"""`slipstream preview`: a recipe's data, before anything is trained on it."""

from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.finetune import Overrides, RecipeFile

if TYPE_CHECKING:
    from rich.console import Console

    from slipstream.train.preview import Preview

STYLES = {"trained": "green", "masked": "dim", "special": "cyan"}
BAR = 40  # characters of the longest bar


def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Rows to show whole.", min=0)] = 2,
    rows: Annotated[int | None, typer.Option(help="Rows of each source to look at; all if left out.", min=1)] = None,
) -> None:
    """Show what a recipe's data is like: what is trained, lengths, packing, duplicates. Loads no weights."""
    from slipstream.train.recipe_file import load_recipe

    resolved, notes = load_recipe(recipe, overrides or ())
    import sys

    import datasets
    from rich.console import Console

    from slipstream.train.preview import preview as look

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    found = look(resolved, rows)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for note in [*notes, *found.notes]:
        console.print(f"note: {note}")
    show_samples(found, samples, console)
    show_figures(found, console)


def show_samples(found: "Preview", samples: int, console: "Console") -> None:
    """Rows in colour; without colour, ⟦…⟧ is around what is trained and ✂ where `max_length` cuts."""
    from rich.text import Text

    from slipstream.train.preview import token_segments

    if samples:
        legend = [(" trained ", "trained"), (" masked ", "masked"), (" special", "special")]
        console.print(Text.assemble(*((text, STYLES[kind]) for text, kind in legend)))
    for index in range(min(samples, len(found.rows))):
        text = Text(f"row {index + 1}, {found.lengths[index]:,} tokens\n", style="bold")
        was_cut = False
        for piece, kind, cut in token_segments(found.rows[index], found.tokenizer, found.max_length):
            if cut and not was_cut:
                text.append("✂", style="bold red")
            was_cut = cut
            plain = f"⟦{piece}⟧" if kind == "trained" and not console.color_system else piece
            text.append(plain, style=f"not bold {'strike ' * cut}{STYLES[kind]}")
        console.print(text)


def show_figures(found: "Preview", console: "Console") -> None:
    from slipstream.train.preview import histogram

    counts, lengths, limit = found.counts, found.lengths, found.max_length
    bins = histogram(lengths)
    most = max(number for _, _, number in bins)
    console.print("tokens a row")
    for low, high, number in bins:
        mark = "  > max_length" if low > limit else ""
        console.print(f"  {low:>7,} to {high:<7,} {number:>7,} {'█' * round(BAR * number / most)}{mark}")
    longer = int((lengths > limit).sum())
    lost = int((lengths - limit).clip(min=0).sum())
    how = {"truncate": "cut", "split": "split", "drop": "dropped"}[found.recipe.data.excess_length]
    what = f"{lost:,} tokens ({lost / lengths.sum():.1%})"
    lines = [
        f"rows: {len(lengths):,} to train on, {found.held_out:,} held out; {lengths.sum():,} tokens, median "
        f"{int(sorted(lengths)[len(lengths) // 2]):,}, longest {lengths.max():,}",
        f"trained: {counts.trained_tokens / counts.tokens:.1%} of the tokens",
        f"max_length {limit}: {longer:,} rows are longer and get {how}{f', {what} lost' if how == 'cut' else ''}",
        f"packing: {found.packed_rows:,} rows of {limit}, {found.packing:.1%} filled; without it batches of "
        f"{found.recipe.train.rows_together} are {found.padding:.1%} filled"
        f"{'' if found.recipe.data.packing else ' (data.packing is off)'}",
        f"duplicates: {found.duplicates:,} rows; {found.leaked:,} held-out rows are trained on as well",
    ]
    if counts.masked_rows:
        lines.append(f"left out: {counts.masked_rows:,} rows without a token to train on")
    if counts.bad_rows:
        lines.append(f"bad rows: {counts.bad_rows:,}")
    console.print("\n".join(lines))
