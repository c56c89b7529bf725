"""Training curves as SVG, from the log.csv that a stage leaves in its directory.

Three panels over the optimizer steps: the terms of the loss, the share of zeros, and the learning rate.
"""
import csv
from xml.sax.saxutils import escape

PANELS = {"loss": ("loss", "mlm", "kd", "hard"), "sparsity": ("sparsity",), "learning rate": ("learning_rate",)}
COLORS = {"loss": "#222222", "mlm": "#1f77b4", "hard": "#1f77b4", "kd": "#d62728", "sparsity": "#2ca02c",
          "learning_rate": "#9467bd"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 720, 130, 70, 140, 24, 46          # pixels; HEIGHT is one panel's


def read_log(path):
    """{column: [number of each row]} of a log.csv."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: [float(row[name]) for row in rows] for name in reader.fieldnames or ()}


def panel(title, log, names, top):
    """The SVG elements of one panel, a line for each name, from 0 to the largest value; top: its y in pixels."""
    largest, last = max(max(log[name]) for name in names) or 1.0, log["step"][-1]
    right, bottom = WIDTH - RIGHT, top + HEIGHT
    parts = [f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(title)}</text>',
             f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#999"/>']
    for share in (0, 0.5, 1):
        y = bottom - share * HEIGHT
        parts += [f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * largest:.3g}</text>',
                  f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eee"/>',
                  f'<text x="{LEFT + share * (right - LEFT):.1f}" y="{bottom + 15}" text-anchor="middle">'
                  f'{share * last:,.0f}</text>']
    ends = sorted((bottom - log[name][-1] / largest * HEIGHT, name) for name in names)
    for place, (end, name) in enumerate(ends):
        points = " ".join(f"{LEFT + step / last * (right - LEFT):.1f},{bottom - value / largest * HEIGHT:.1f}"
                          for step, value in zip(log["step"], log[name]))
        y = max(end, ends[0][0] + 14 * place)                       # labels below one another where lines end close
        parts += [f'<polyline points="{points}" fill="none" stroke="{COLORS[name]}" stroke-width="1.5"/>',
                  f'<text x="{right + 6}" y="{y + 4:.1f}" fill="{COLORS[name]}">{name} {log[name][-1]:.3g}</text>']
    return parts


def draw(log):
    """The whole picture as text."""
    shown = {title: [name for name in names if name in log] for title, names in PANELS.items()}
    height = TOP + len(shown) * (HEIGHT + GAP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
             f'font-size="12">', f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for place, (title, names) in enumerate(shown.items()):
        parts += panel(title, log, names, TOP + place * (HEIGHT + GAP))
    return "\n".join([*parts, "</svg>", ""])
