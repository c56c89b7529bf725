"""README and the pages under docs/ are code too: their commands parse, the files they name exist, their numbers are the
measured ones."""
import json
import re
import shlex
import statistics
from pathlib import Path
from xml.etree import ElementTree

import infer_cpu
import train
from bench import draw_pictures, measure_minilm, measure_tiny
from data.tasks import TASKS

ROOT = Path(train.__file__).resolve().parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FRONT, README = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
SPEED = json.loads((ROOT / "bench" / "speed.json").read_text())           # {CPU: {part: its rows}}


def lines_of(page):
    """Every line of a page's code blocks that runs one of our programs."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("#")[0].split("&&")
            if part.strip().startswith("python ")]


def test_commands_parse():
    lines = lines_of(README)
    assert len(lines) >= 8
    for line in lines:
        program, *arguments = shlex.split(line)[1:]
        if program == "train.py":
            typed = train.parse_settings(arguments)
            if typed.get("stage") not in ("all", "evaluate", None):
                train.resolve({name: value for name, value in typed.items() if name not in ("init", "precision")})
        elif program == "infer_cpu.py":
            infer_cpu.parse(arguments, "", ("auto", *infer_cpu.ENGINES))
        else:
            path = arguments[0].replace(".", "/") + ".py" if program == "-m" else program
            assert path == "pytest.py" or (ROOT / path).is_file(), line


def test_named_files_exist():
    for path, page in PAGES.items():
        for name in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (path.parent / name).exists(), (path, name)
    for name in re.findall(r"`([a-z_]+\.(?:py|txt|json))`", README):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"*/{name}")) or name in {
            "config.json", "run.json", "metrics.json", "table.txt"}, name


def test_tiny_numbers_are_the_measured_ones():
    """Each row of the tiny world's table against bench/tiny.json, to the printed digit."""
    summary = json.loads((ROOT / "bench" / "tiny.json").read_text())["mean_and_deviation"]
    rows = dict(re.findall(r"^\| <!-- (\w+) -->[^|]*\|(.*)\|$", PAGES[ROOT / "docs" / "tiny_world.md"], re.M))
    assert set(rows) == set(summary) - {"int8_fake"}
    for column, cells in rows.items():
        printed = [cell.strip() for cell in cells.split("|")]
        measured = [f"{mean:.1%}".rstrip("%") + f" ± {deviation:.1%}".rstrip("%")
                    for mean, deviation in summary[column].values()]
        assert printed == measured, column


def test_the_worst_of_the_tiny_world_is_the_measured_one():
    """The table of luck against bench/tiny.json and bench/spread.json."""
    five, many = (json.loads((ROOT / "bench" / name).read_text()) for name in ("tiny.json", "spread.json"))
    rows = dict(re.findall(r"^\| <!-- luck (\w+) -->[^|]*\| (.*) \|$", PAGES[ROOT / "docs" / "tiny_world.md"], re.M))
    assert set(rows) == {"dense", "sparse", "int8"}
    for kind, cells in rows.items():
        worst, summary = five["worst"][kind], many["summary"][kind]
        expected = [worst["mnli"], worst["mnli-mm"],
                    *(summary[name][value] for name in ("accuracy", "accuracy_mismatched") for value in ("worst", "mean"))]
        assert cells == " | ".join(f"{100 * value:.1f}" for value in expected), kind


def test_the_first_table_is_what_the_first_command_printed():
    runs = json.loads((ROOT / "bench" / "quick_start.json").read_text())
    rows = dict(re.findall(r"^\| <!-- seed (\w+) -->[^|]*\| (.*) \|$", FRONT, re.M))
    assert len(rows) == 3
    for kind, folder in (("dense", "teacher"), ("sparse", "sparse-unstructured-0.85"),
                         ("int8", "int8-unstructured-0.85")):
        found = {task: runs[f"{task}/{folder}"] for task in ("sst2", "mnli", "qqp", "qnli", "squad")}
        metrics = {task: (run["engine"] if kind == "int8" else run)["metrics"] for task, run in found.items()}
        assert rows[kind] == " | ".join(f"{100 * metrics[task][TASKS[task].metric]:.2f}" for task in metrics)
    worst = json.loads((ROOT / "bench" / "tiny.json").read_text())["worst"]
    lowest = min(worst[kind][task] for kind in ("dense", "sparse", "int8") for task in measure_tiny.TASKS)
    assert f"the lowest number of these rows is {100 * lowest:.1f}" in FRONT


def test_speeds_of_encoders_are_the_measured_ones():
    """The table of sentence_encoders.md against bench/encoder_speed.json."""
    found = json.loads((ROOT / "bench" / "encoder_speed.json").read_text())
    page = PAGES[ROOT / "docs" / "sentence_encoders.md"]
    contenders = found["speeds"]["contenders"]
    package, runtime = ([f"{ours / theirs:.1f}" for ours, theirs in zip(*(
        contenders[each]["texts_a_second"] for each in ("native, 1x4-0.8", name)), strict=True)]
        for name in ("sentence-transformers, fp32", "ONNX Runtime, dynamic INT8"))
    assert f"{' and '.join(package)} times" in page and f"{' and '.join(runtime)} times" in page
    assert f"{package[0]} times as many questions" in FRONT and f"{package[1]} times as many paragraphs" in FRONT
    for name, row in contenders.items():
        assert f"| {name} | " + " | ".join(f"{speed:,.0f}" for speed in row["texts_a_second"]) + " |" in page
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"]) and found["processor"] in page
    for package, version in found["speeds"]["peers"].items():
        assert f"{package} {version}" in page
    for memory in found["memory"]:
        assert f"{memory['lines']:,} lines {memory['peak_mb']:.0f} MB" in page


def test_what_a_pruned_encoder_finds_is_the_measured():
    """The other table of sentence_encoders.md, its command and README's sentence, against bench/encoder.json."""
    found = json.loads((ROOT / "bench" / "encoder.json").read_text())
    page, (model,) = PAGES[ROOT / "docs" / "sentence_encoders.md"], found["models"].values()
    metrics, runs = model["retrieval"], model["runs"]
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"]) and found["processor"] in page
    assert f"in {sum(run['training_seconds'] for run in runs.values()) / 60:.0f} minutes of training" in page
    dense, ours = ([f"{100 * metrics[prefix + name]:.1f}" for name in ("recall_at_1", "recall_at_10")]
                   for prefix in ("against_", ""))
    assert f"| dense, fp32 | {' | '.join(dense)} | | |" in page
    assert (f"| 1x4 80 %, INT8 | {' | '.join(ours)} | {metrics['cosine_mean']:.3f} | "
            f"{metrics['cosine_worst_percentile']:.3f} |") in page
    assert found["command"].replace(" --out OUT", "").replace(" --json FILE", "") in page
    assert (f"for {100 * metrics['recall_at_1']:.0f} % of the questions, the dense model for "
            f"{100 * metrics['against_recall_at_1']:.0f} %") in FRONT


def test_the_front_page_is_short_and_every_page_is_linked():
    assert len(FRONT.splitlines()) < 200
    for path in PAGES:
        assert path.name == "README.md" or f"docs/{path.name})" in FRONT, path


def test_pictures_are_drawn_from_what_is_committed():
    for name, draw in draw_pictures.PICTURES.items():
        assert (ROOT / "docs" / name).read_text() == draw()
        ElementTree.fromstring(draw())


def test_sizes_are_the_measured_ones():
    """The table of BERT-Large against bench/size.json; and that file against the arithmetic that needs no measuring."""
    found = json.loads((ROOT / "bench" / "size.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"]) and found["torch"]
    large = found["models"]["bert-large 90% unstructured"]
    encoder, dense = large["encoder"], large["dense_file_bytes"]
    assert encoder["weights"] == 24 * (4 * 1024 ** 2 + 2 * 1024 * 4096)
    for title, before, after in (
            ("encoder, values only (the paper's count)", encoder["dense_bytes"], encoder["value_bytes"]),
            ("encoder, values and masks", encoder["dense_bytes"], encoder["stored_bytes"] - encoder["scale_bytes"]),
            ("whole file", dense, large["file_bytes"]), ("whole file after zip (the dense one as it is)", dense, large["zip_bytes"])):
        assert f"| {title} | {before:,} | {after:,} | {before / after:.1f} |" in README, title
    for report in found["models"].values():
        for column in (True, False):
            parts = draw_pictures.parts_of(report, column)
            assert min(parts.values()) >= 0
            assert sum(parts.values()) == report["dense_file_bytes" if column else "file_bytes"]


def test_the_tiny_world_tells_the_papers_story():
    """What the project promises of the embedded default, on the committed measurement."""
    average = {name: row["average"][0] for name, row in
               json.loads((ROOT / "bench" / "tiny.json").read_text())["mean_and_deviation"].items()}
    assert average["dense"] > 0.90
    assert average["no_pretraining"] <= average["dense"] - 0.05
    assert average["guessing"] < 0.60
    assert average["sparse"] >= average["dense"] - 0.02
    assert average["gradual"] < average["sparse"]
    assert average["int8"] >= average["sparse"] - 0.01
    assert average["agreement"] >= 0.995


def test_real_numbers_are_the_measured_ones():
    """The table of MiniLM-L6 and what is said beside it, against bench/minilm.json."""
    found = json.loads((ROOT / "bench" / "minilm.json").read_text())
    runs, page = found["runs"], PAGES[ROOT / "docs" / "real_data.md"]
    assert "\n".join(measure_minilm.table(runs)) in FRONT
    upstream, text = runs["hidden 1x4"], " ".join(page.split())
    minutes, tokens = upstream["training_seconds"] / 60, upstream["tokens"] / 1e6
    assert f"in {minutes:.0f} minutes of training" in FRONT and f"pruning saw {tokens:.0f} million tokens" in FRONT
    assert (f"{minutes:.0f} minutes of training, {tokens:.1f} million tokens, {100 * upstream['sparsity']:.2f} % zeros "
            f"(pooler included)") in text
    names = [f"{ending} 1x4 seed 0{kind}" for ending in ("hidden", "both") for kind in ("", " int8")]
    for title, row in zip(("dense", "by hidden states", "the same, INT8", "these also on the task", "the same, INT8"),
                          ("dense", *names)):
        cells = (f"{runs[f'{task} {row}']['training_seconds'] / 60:.0f}" if f"{task} {row}" in runs else "" for task in (
            "sst2", "mnli"))
        assert f"| {title} | {' | '.join(cells)} |" in page, title
    rounded = [run for name, run in runs.items() if name.endswith("int8")]
    same = min(min(run["engines"]["native"]["agreement"]["equal_predictions"].values()) for run in rounded)
    assert f"give the same answer for {100 * same:.1f} % of a dev set at least" in text
    sizes = (max(run["file_bytes"]["int8.safetensors"] for run in rounded),
             runs["sst2 dense"]["file_bytes"]["model.safetensors"])
    assert "An INT8 file has {:.1f} MB, the dense float32 one {:.1f} MB".format(*(size / 1e6 for size in sizes)) in text
    assert found["command"].replace(" --out OUT", "").replace("--json FILE", "--json minilm.json") in page


AMX = "Intel(R) Xeon(R) Processor, AMX"
TABLES = [["AMD EPYC, AVX-512 VNNI", "AMD EPYC, AVX2"], [AMX]]                  # of the page on speed, by their columns


def times_on(cpu):
    """{batch size: {contender: ms}} of BERT-Base."""
    return {row["batch"]: row["ms"] for row in SPEED[cpu]["base"]["rows"]}


def test_speeds_are_the_measured_ones():
    """Each row of the speed tables against bench/speed.json; and ours is the fastest of all, on every CPU."""
    assert sorted(SPEED) == sorted(cpu for table in TABLES for cpu in table)
    for table in TABLES:
        bases = [times_on(cpu) for cpu in table]
        for name in dict.fromkeys(name for base in bases for name in base[1]):
            cells = []
            for base in bases:
                eager = {batch: times["torch eager fp32 (transformers)"] for batch, times in base.items()}
                one, many = base[1].get(name), base[16].get(name)
                cells += ([f"{one:.1f}", f"{eager[1] / one:.1f}x", f"{many:.0f}", f"{eager[16] / many:.1f}x"] if one else
                          [""] * 4)
            assert f"| {name} | {' | '.join(cells)} |".replace("  ", " ") in README
        for times in (times for base in bases for times in base.values()):
            kind = "tiles" if any(name.startswith("tiles") for name in times) else "native"
            ours = [value for name, value in times.items() if name.startswith(kind)]
            assert max(ours) < min(value for name, value in times.items() if not name.startswith(("native", "tiles")))
    vnni, avx2 = (" and ".join(f"{times['ONNX Runtime dynamic int8'] / times['native, 1x4 80 %']:.1f}"
                               for times in times_on(cpu).values()) for cpu in TABLES[0])
    text = " ".join(README.split())
    assert f"our engine is {avx2} times as fast as ONNX" in text and f"with AVX-512 VNNI {vnni} times" in text
    assert all(f"on an {cpu.split(', ')[0]} with {cpu.split(', ')[1]}" in " ".join(README.split()) for cpu in TABLES[0])


def test_the_front_pages_speeds_are_the_measured_ones():
    """Each contender's time by that of our 1x4 blocks, in the engine that `auto` takes: one row / 16 rows."""
    rows = {title: [cell.strip() for cell in cells.split("|")] for title, cells in
            re.findall(r"^\| ([^|]*) \| (.* / .*) \|$", FRONT, re.M)}
    assert len(rows) == 4
    for title, name in (("PyTorch (`transformers`, fp32)", "torch eager fp32 (transformers)"),
                        ("ONNX Runtime, INT8", "ONNX Runtime dynamic int8"), ("OpenVINO, INT8", "OpenVINO int8"),
                        ("DeepSparse, fp32, 1x4 80 %", "DeepSparse fp32, 1x4-0.8")):
        for cell, cpu in zip(rows[title], ("AMD EPYC, AVX2", "AMD EPYC, AVX-512 VNNI", AMX), strict=True):
            ratios = [times[name] / times["tiles, 1x4 80 %" if cpu == AMX else "native, 1x4 80 %"]
                      for times in times_on(cpu).values() if name in times]
            assert cell == (" / ".join(f"{ratio:.1f}" for ratio in ratios) or "not measured"), (title, cpu)
    assert "`unstructured` zeros at 90 % are at least as fast as 1x4 blocks at 80 %" in " ".join(FRONT.split())
    for cpu, engine in (("AMD EPYC, AVX2", "native"), ("AMD EPYC, AVX-512 VNNI", "native"), (AMX, "tiles")):
        assert all(times[f"{engine}, unstructured 90 %"] <= times[f"{engine}, 1x4 80 %"] for times in times_on(cpu).values())


def test_what_is_said_of_tile_registers_is_measured():
    """Batch 1 and 16 of 1x4 blocks against each contender, and rows of other lengths against the vectors."""
    text, times = " ".join(README.split()), times_on(AMX)
    for name, words in (("OpenVINO int8", "OpenVINO's INT8"), ("ONNX Runtime dynamic int8", "ONNX Runtime's INT8"),
                        ("torch eager bf16 (transformers)", "PyTorch's bfloat16"),
                        ("native, 1x4 80 %", "the engine `native`")):
        one, many = (times[batch][name] / times[batch]["tiles, 1x4 80 %"] for batch in (1, 16))
        assert f"{one:.1f} and {many:.1f} times as fast as {words}" in text, (name, one, many)
    coarse = [times[batch]["tiles, 1x4 80 %"] / times[batch]["tiles, 16x4 80 %"] for batch in (1, 16)]
    assert f"Blocks of 16x4 are {coarse[0]:.2f} and {coarse[1]:.2f} times as fast as 1x4" in text, coarse
    lengths = {(row["batch"], row["length"]): row["ms"]["native"] / row["ms"]["tiles"]
               for row in SPEED[AMX]["lengths"]["rows"]}
    assert (f"a single row of 32 tokens takes {1 / lengths[1, 32]:.2f} times as long as in `native`, one of 384 "
            f"{1 / lengths[1, 384]:.2f} times") in text, lengths


def test_the_other_speeds_are_the_measured_ones():
    """What the text below the speed table says, against bench/speed.json."""
    parts = {name: part["rows"] for name, part in SPEED["AMD EPYC, AVX-512 VNNI"].items()}
    text = " ".join(README.split())

    def span(ratios, digits=1):
        return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f} times as fast"

    assert f"single layers, {span([row['ms']['FBGEMM'] / row['ms']['native'] for row in parts['layers']])}" in text
    threads = [[row["ms"][f"native, {count} threads"] for count in (1, 2)] for row in parts["threads"]]
    assert f"two threads, {span([one / two for one, two in threads])} as one" in text
    sizes = [row["ms"][f"{preset}, fp32"] / value for row in parts["models"] for name, value in row["ms"].items()
             for preset in [name.partition(",")[0]] if "native" in name]
    assert f"DistilBERT and BERT-Large, {span(sizes, 0)} as dense float32" in text
    packed = parts["packed"][0]["sequences_per_second"]
    assert f"without padding, {packed['packed'] / packed['padded to 128']:.1f} times as many sentences" in text
    first = {engine: statistics.median(row["seconds"] for row in parts["startup"] if row["engine"] == engine)
             for engine in ("native", "fp32")}
    assert f"{first['native']:.1f} s (dense float32: {first['fp32']:.1f} s)" in text


def test_training_speeds_are_the_measured_ones():
    """Each row of the training table against bench/training.json, medians over its rounds."""
    found = json.loads((ROOT / "bench" / "training.json").read_text())
    pairs = dict.fromkeys(name.rpartition("|")[0] for name in found if "|" in name)
    assert len(pairs) == 8
    for pair in pairs:
        cells = [f"{statistics.median(run[key] for run in found[f'{pair}|{precision}']):.{digits}f}"
                 for precision in ("fp32", "bf16") for key, digits in (("per_second", 0), ("peak_gb", 2))]
        assert f"| {pair.partition('|')[2]} | " + " | ".join(cells) + " |" in README

    def ratios(key, what, ours, theirs, precision, digits):
        """Of ours in bf16 to theirs."""
        ours, theirs = (statistics.median(run[key] for run in found[f"{what}|{name}|{kind}"])
                        for name, kind in ((ours, "bf16"), (theirs, precision)))
        return f"{ours / theirs:.{digits}f}"

    pretraining = [(size, "ours, all positions", "transformers, all positions") for size in ("minilm-l6", "bert-base")]
    fast, lean, same = ([ratios(key, *names, precision, digits) for names in pretraining]
                        for key, precision, digits in (("per_second", "fp32", 1), ("peak_gb", "fp32", 2),
                                                       ("per_second", "bf16", 1)))
    task = [ratios("per_second", "sst2", "ours", "transformers Trainer", precision, 1) for precision in ("fp32", "bf16")]
    text = " ".join(README.split())
    assert (f"MiniLM-L6 {fast[0]} times as fast in {lean[0]} of the memory, BERT-Base {fast[1]} times in {lean[1]}; both "
            f"in bf16: {same[0]} and {same[1]} times. SST-2: {task[0]} times, both in bf16 {task[1]} times, because") in text
