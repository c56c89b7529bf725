"""The report of `--stage all`: one HTML file with the table, a mask and the curves, which needs no network to open."""
from html import escape

from formats.curves import draw, read_log
from formats.files import write_file
from formats.safetensors import read_safetensors

CORNER, PIXELS = 96, 5                  # weights a side that are shown of a mask, and pixels for each
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 760px; margin: 24px auto; padding: 0 12px; color: #1f2328;
background: white } pre { overflow-x: auto; background: #f6f8fa; padding: 12px; font-size: 12px }
svg { max-width: 100% } .living { stroke: #0969da } .frame { fill: none; stroke: #999; stroke-width: 0.2 }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } pre { background: #161b22 }
.living { stroke: #58a6ff } }"""


def squares(living):
    """bool (rows, columns) -> the `d` of an SVG path: a square of side 1 for each True, if drawn with a line of width
    1."""
    return "".join(f"M{column} {row + 0.5}h1" for row, column in living.nonzero().tolist())


def draw_mask(living):
    """bool (rows, columns), True where a weight lives -> an SVG element with a square for each of these."""
    rows, columns = living.shape
    return (f'<svg viewBox="0 0 {columns} {rows}" width="{columns * PIXELS}" xmlns="http://www.w3.org/2000/svg">'
            f'<path class="living" d="{squares(living)}"/>'
            f'<rect class="frame" width="{columns}" height="{rows}"/></svg>')


def first_query(directory):
    """(name, weight) of a model directory's first query layer, by its published name."""
    tensors, _ = read_safetensors(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith((".query.weight", ".q_lin.weight")))
    return name, tensors[name]


def curves_of(folder, title, is_open):
    """A stage's curves, folded away under its title; nothing where its log has no rows (a run of a few steps)."""
    log = read_log(folder / "log.csv") if (folder / "log.csv").is_file() else {}
    if not log.get("step"):
        return ""
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{draw(log)}</details>"


def write_results(out, table, pruned, directories):
    """Write table.txt and report.html to the directory `out`; returns the path of the second.

    table: text; pruned: the sparse upstream model's directory, whose mask is shown; directories: of all stages, in
    order, all below `out`.
    """
    write_file(out / "table.txt", table + "\n")
    name, weight = first_query(pruned)
    living = (weight != 0)[:CORNER, :CORNER]
    title = escape(str(out))
    write_file(out / "report.html", "\n".join([
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f"<h1>Prune once for all: {title}</h1><pre>{escape(table)}</pre>",
        f"<h2>The weights that live</h2><p>The first {living.shape[0]} rows and {living.shape[1]} columns of "
        f"<code>{escape(name)}</code> in <code>{escape(pruned.name)}</code>: {living.float().mean():.1%} are not zero. "
        f"A row holds the weights of one output.</p>{draw_mask(living)}",
        "<h2>The runs</h2><p>Loss, share of zeros and learning rate over the optimizer steps.</p>",
        *(curves_of(folder, str(folder.relative_to(out)), folder == pruned) for folder in directories), "</html>", ""]))
    return out / "report.html"
