"""The pictures of README, as SVG for light and dark pages, from what is committed.

    python -m bench.draw_pictures          writes docs/method.svg; from bench/speed.json docs/speed.svg, all of it, and
                                           docs/latency.svg, a few; from bench/exercises.json docs/masks.svg; from
                                           bench/size.json docs/bytes.svg
"""
import json
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from bench.size import ENCODER
from formats.page import squares

ROOT = Path(__file__).resolve().parent.parent
STYLE = """<style>
text { fill: #1f2328; font: 13px sans-serif } .small { font-size: 11px; fill: #59636e } .bold { font-weight: bold }
.box { fill: #f6f8fa; stroke: #59636e } .once { fill: #ddf4ff; stroke: #0969da } .line { stroke: #59636e; fill: none }
.teach { stroke: #8250df; fill: none; stroke-dasharray: 4 3 } .purple { fill: #8250df; font-size: 11px }
.living { stroke: #0969da } .ours { fill: #0969da } .others { fill: #afb8c1 }
.values { fill: #0969da } .masks { fill: #54aeff } .embeddings { fill: #bf8700 } .rest { fill: #8c959f }
.share { fill: #ffffff; font-size: 11px }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9198a1 }
.box { fill: #161b22; stroke: #9198a1 } .once { fill: #0c2d6b; stroke: #58a6ff } .line { stroke: #9198a1 }
.teach { stroke: #bc8cff } .purple { fill: #bc8cff } .living { stroke: #58a6ff }
.ours { fill: #58a6ff } .others { fill: #484f58 } }
</style>"""
ARROW = ('<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
         '<path d="M0 0L8 4L0 8z" fill="#808890"/></marker></defs>')
BOX_WIDTH, BOX_HEIGHT, BAR_HEIGHT, BAR_LEFT, BAR_WIDTH = 176, 62, 20, 250, 380           # pixels
BYTES_WIDTH = 520
# Of the contenders of bench/speed.json, those of the front page, and how it calls them.
KNOWN = {"DeepSparse fp32, 1x4-0.8": "DeepSparse, fp32, 1x4 80 %", "OpenVINO int8": "OpenVINO, INT8",
         "DeepSparse fp32, unstructured-0.9": "DeepSparse, fp32, unstructured 90 %",
         "OpenVINO int8, unstructured 90 %": "OpenVINO, INT8, unstructured 90 %",
         "ONNX Runtime dynamic int8": "ONNX Runtime, INT8", "torch eager bf16 (transformers)": "transformers, bf16",
         "torch eager fp32 (transformers)": "transformers, fp32"}
SQUARE = 5                                                                               # of a weight in a mask

# The stages: place (x, y), what it is called, what it does, what it writes below out/PRESET/.
BOXES = {
    "pretrain": (20, 30, "dense teacher", "--stage pretrain", "pretrain/"),
    "prune": (20, 160, "sparse, 85 % zeros", "--stage prune", "prune-…/"),
    "teacher": (276, 30, "dense task teacher", "finetune --sparsity 0", "TASK/teacher/"),
    "finetune": (276, 160, "sparse, for a task", "--stage finetune", "TASK/sparse-…/"),
    "quantize": (532, 160, "sparse INT8", "--stage quantize", "TASK/int8-…/"),
}
ARROWS = (("pretrain", "prune"), ("pretrain", "teacher"), ("prune", "finetune"), ("finetune", "quantize"))
LESSONS = (("pretrain", "prune", 34), ("teacher", "finetune", 0), ("teacher", "quantize", 0))      # x beside the arrow


def svg(width, height, parts):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">', STYLE,
                      ARROW, *parts, "</svg>", ""])


def text(x, y, words, kind="", anchor="start"):
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(begin, end, kind, shift=0):
    """From the box `begin` to the box `end`: sideways where they stand in one row, else downwards."""
    (x, y, *_), (to_x, to_y, *_) = BOXES[begin], BOXES[end]
    if y == to_y:
        path = f"M{x + BOX_WIDTH} {y + BOX_HEIGHT / 2}H{to_x}"
    elif x == to_x:
        path = f"M{x + BOX_WIDTH / 2 + shift} {y + BOX_HEIGHT}V{to_y}"
    else:
        path = f"M{x + BOX_WIDTH} {y + BOX_HEIGHT / 2}H{to_x + BOX_WIDTH / 2}V{to_y}"
    return f'<path d="{path}" class="{kind}" marker-end="url(#end)"/>'


def draw_method():
    """The stages as boxes with their files, arrows for weights, dashed ones for what is distilled."""
    parts = [text(20, 18, "once, on raw text", "bold"), text(276, 18, "for every task", "bold")]
    for name, (x, y, title, stage, folder) in BOXES.items():
        kind = "once" if x < 200 else "box"
        parts += [f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" class="{kind}"/>',
                  text(x + 10, y + 20, title, "bold"), text(x + 10, y + 37, stage, "small"),
                  text(x + 10, y + 53, folder, "small")]
    parts += [arrow(begin, end, "line") for begin, end in ARROWS]
    parts += [arrow(begin, end, "teach", shift) for begin, end, shift in LESSONS]
    parts += [text(149, 130, "distils", "purple"), text(370, 130, "distils", "purple"),
              text(626, 130, "distils", "purple"), text(100, 130, "copy", "small", "end"),
              text(204, 184, "zeros stay", "small"), text(470, 184, "8 bits", "small"),
              text(204, 54, "fine-tune", "small"), text(708, 245, "infer_cpu.py runs it on a CPU", "small", "end")]
    return svg(720, 265, parts)


def draw_bars(panels):
    """{title: {name: value}} as bars, smallest first, the greatest of each panel filling its width."""
    parts, top = [], 30
    for title, values in panels.items():
        parts.append(text(10, top - 12, title, "bold"))
        for name, value in sorted(values.items(), key=lambda pair: pair[1]):
            width = max(1.0, BAR_WIDTH * value / max(values.values()))
            kind = "ours" if name.startswith(("native", "tiles", "ours")) else "others"
            parts += [text(BAR_LEFT - 8, top + 14, name, "small", "end"),
                      f'<rect x="{BAR_LEFT}" y="{top + 3}" width="{width:.1f}" height="{BAR_HEIGHT - 6}" '
                      f'class="{kind}"/>',
                      text(BAR_LEFT + width + 6, top + 14, f"{value:,.0f}", "small")]
            top += BAR_HEIGHT
        top += 40
    return svg(720, top - 30, parts)


def base_rows():
    """Yields (CPU, batch size, {contender: milliseconds}) of BERT-Base, 128 tokens."""
    for cpu, figures in json.loads((ROOT / "bench" / "speed.json").read_text()).items():
        for row in figures["base"]["rows"]:
            yield cpu, row["batch"], row["ms"]


def draw_speed():
    """Milliseconds of all contenders, a panel per CPU and batch size."""
    return draw_bars({f"{cpu}: BERT-Base, 128 tokens, batch {batch}, 2 threads: milliseconds": times
                      for cpu, batch, times in base_rows()})


def draw_latency():
    """Milliseconds of one row for those whom a reader knows, by the engine that `auto` takes, a panel per CPU."""
    panels = {}
    for cpu, batch, times in base_rows():
        if batch == 1:
            engine = "tiles" if "tiles, 1x4 80 %" in times else "native"
            names = {f"{engine}, {zeros}": f"ours, {zeros}" for zeros in ("1x4 80 %", "unstructured 90 %")} | KNOWN
            panels[f"{cpu}: milliseconds"] = {title: times[name] for name, title in names.items() if name in times}
    return draw_bars(panels)


def draw_masks():
    """The same corner of one layer, pruned weight by weight and in blocks: a square for each weight that lives."""
    masks = json.loads((ROOT / "bench" / "exercises.json").read_text())["masks"]
    parts = []
    for left, name, title in ((20, "as it is", "unstructured: weight by weight"),
                              (380, "blocks", "1x4: four inputs of one output")):
        living = torch.tensor([[bit == "1" for bit in row] for row in masks[name]])
        side = SQUARE * len(living)
        parts += [text(left, 18, title, "bold"),
                  f'<path d="{squares(living)}" class="living" transform="translate({left} 30) scale({SQUARE})"/>',
                  f'<rect x="{left}" y="30" width="{side}" height="{side}" class="line"/>',
                  text(left, 30 + side + 16, "columns: inputs, rows: outputs", "small")]
    return svg(720, 60 + side, parts)


def parts_of(report, dense):
    """{part of a file: its bytes}, in the order they are drawn. report: of bench/size.json; dense: the float32 file,
    all of whose weights are values."""
    kinds = report["kinds"]
    column = "dense_bytes" if dense else "stored_bytes"
    inner = [kinds[kind] for kind in (*ENCODER, "pooler")]
    values = sum(row["dense_bytes" if dense else "value_bytes"] for row in inner)
    masks = 0 if dense else sum(row["mask_bytes"] for row in inner)
    file = report["dense_file_bytes" if dense else "file_bytes"]
    embeddings = kinds["embeddings"][column]
    return {"values": values, "masks": masks, "embeddings": embeddings, "rest": file - values - masks - embeddings}


def draw_bytes():
    """A panel per model: the dense file, the sparse INT8 file in the same scale, and the latter again, stretched."""
    parts, top = [], 44
    for left, kind, title in ((10, "values", "weights of the layers"), (190, "masks", "where they stand"),
                              (340, "embeddings", "embeddings"), (460, "rest", "scales, norms, heads, header")):
        parts += [f'<rect x="{left}" y="8" width="12" height="12" class="{kind}"/>',
                  text(left + 18, 18, title, "small")]
    for name, report in json.loads((ROOT / "bench" / "size.json").read_text())["models"].items():
        dense, stored = parts_of(report, True), parts_of(report, False)
        full, small = report["dense_file_bytes"], report["file_bytes"]
        preset, sparsity, pattern = name.split()
        parts.append(text(10, top + 12, f"{preset}, {sparsity.rstrip('%')} % zeros, {pattern}", "bold"))
        for row, (title, shares, whole) in enumerate(((f"dense, {full / 1e6:,.0f} MB", dense, full),
                                                      (f"sparse INT8, {small / 1e6:.1f} MB", stored, full),
                                                      (f"the same, {full / small:.1f} x larger", stored, small))):
            y, x = top + 20 + row * (BAR_HEIGHT + 2), 180.0
            parts.append(text(172, y + 14, title, "small", "end"))
            for kind, size in shares.items():
                width = BYTES_WIDTH * size / whole
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{BAR_HEIGHT - 2}" '
                             f'class="{kind}"/>')
                if row == 2 and width > 34:
                    parts.append(text(round(x + width / 2, 1), y + 13, f"{size / whole:.0%}", "share", "middle"))
                x += width
        top += 20 + 3 * (BAR_HEIGHT + 2) + 18
    return svg(720, top - 8, parts)


PICTURES = {"method.svg": draw_method, "speed.svg": draw_speed, "latency.svg": draw_latency,
            "masks.svg": draw_masks, "bytes.svg": draw_bytes}


if __name__ == "__main__":
    for file, draw in PICTURES.items():
        (ROOT / "docs" / file).write_text(draw())
        print(f"wrote docs/{file}")
