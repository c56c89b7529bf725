"""prune.py: exact masks against brute force and the paper's reference code, the schedules step by step, the lock."""
import base64
import itertools
import math
import random
import re

import numpy as np
import pytest
import torch

from formats.model_directory import load, save
from formats.report import format_report
from model import InputError, ModelConfig, build, linears
from prune import (Pattern, Ramp, burn_in, check_pattern, learning_rate_factor, lock, magnitude_mask,
                   measured_sparsity, parse_pattern, prunable, report, resolve_sparsity, sparsity_at, update_masks,
                   updates_at)

REFERENCE_RUN = Ramp(0.9, 0, 50_000, 80_000, 1000)           # of the 100,000 steps of the paper's MLM run


def make(kind="pretraining", model_type="bert", seed=0):
    torch.manual_seed(seed)
    sizes = {} if model_type == "bert" else {"model_type": "distilbert", "type_vocab_size": 0}
    return build(ModelConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=12, initializer_range=0.2, **sizes), kind)


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (4, 8), generator=generator)
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def error_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns and what people type

def test_parse_pattern():
    for text, pattern in {"unstructured": Pattern(), "1x1": Pattern(), "1x4": Pattern(1, 4), "4x1": Pattern(4, 1),
                          "16x32": Pattern(16, 32), "2:4": Pattern(keep=2, group=4), "1:8": Pattern(keep=1, group=8),
                          "4:4": Pattern(keep=4, group=4)}.items():
        assert parse_pattern(text) == pattern
        assert parse_pattern(str(pattern)) == pattern
    assert [str(parse_pattern(text)) for text in ("1x1", "1x4", "2:4")] == ["unstructured", "1x4", "2:4"]
    for text in ("", "4", "1x", "x4", "0x4", "4x0", "-1x4", "1x4x4", "1X4", "0:4", "5:4", "2:", ":4", "2:0", "1x4 ",
                 "block", "2/4", "1x99999"):
        message = error_of(parse_pattern, text)
        assert "--pattern" in message and repr(text) in message and "1x4" in message


def test_resolve_sparsity():
    assert resolve_sparsity(None, Pattern()) == 0.85
    assert resolve_sparsity(None, Pattern(1, 4)) == 0.85
    assert resolve_sparsity(0.0, Pattern()) == 0.0 and resolve_sparsity(0.9, Pattern(1, 4)) == 0.9
    assert resolve_sparsity(None, Pattern(keep=2, group=4)) == 0.5
    assert resolve_sparsity(0.75, Pattern(keep=1, group=4)) == 0.75
    assert resolve_sparsity(2 / 3, Pattern(keep=1, group=3)) == pytest.approx(2 / 3)
    assert resolve_sparsity(float(f"{2 / 3:g}"), Pattern(keep=1, group=3)) == 1 - 1 / 3         # as we print it
    for sparsity in (1.0, 1.5, -0.1, 85, float("nan"), float("inf")):
        assert "--sparsity" in error_of(resolve_sparsity, sparsity, Pattern())
    message = error_of(resolve_sparsity, 0.85, Pattern(keep=2, group=4))
    assert "--sparsity" in message and "--pattern 2:4" in message and "0.5" in message


def test_check_pattern_names_the_layer():
    model = make()                                              # 16 and 32 features; a head has 2, and is left out
    for text in ("unstructured", "1x4", "4x1", "16x16", "2:4", "1:16"):
        check_pattern(model, parse_pattern(text))
    for text in ("1x5", "5x1", "3x3", "2:5", "1x32", "32x1"):
        message = error_of(check_pattern, model, parse_pattern(text))
        assert f"--pattern {text}" in message and "encoder.layers.0." in message and "16" in message


# ---------------------------------------------------------------------------------------------------------------------
# Masks

def brute_force(weight, sparsity, rows, columns):
    """Rank the blocks by mean |w|, row after row, in plain Python; of equal ones the first goes."""
    height, width = weight.shape[0] // rows, weight.shape[1] // columns
    scores = []
    for i, j in itertools.product(range(height), range(width)):
        block = weight[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns]
        scores.append((float(np.abs(block).mean()), i, j))
    mask = np.ones(weight.shape, bool)
    for _, i, j in sorted(scores)[:int(sparsity * height * width + 1e-6)]:
        mask[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns] = False
    return mask


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4), (4, 1), (2, 2), (4, 4), (3, 8)])
@pytest.mark.parametrize("values", ["distinct", "ties", "all equal", "halves of zeros"])
def test_blocks_equal_brute_force(rows, columns, values):
    generator = np.random.default_rng(1)
    weight = {"distinct": generator.standard_normal((12, 16)),
              "ties": generator.integers(-2, 3, (12, 16)) / 4,   # few values, exact in binary: block means tie exactly
              "all equal": np.full((12, 16), 0.5),
              "halves of zeros": generator.standard_normal((12, 16)) * (generator.random((12, 16)) > 0.5)}[values]
    for sparsity in (0, 0.1, 0.29, 1 / 3, 0.5, 0.75, 0.85, 0.97, 0.999):
        mask = magnitude_mask(torch.tensor(weight, dtype=torch.float32), sparsity, Pattern(rows, columns))
        units = weight.size // (rows * columns)
        assert mask.dtype == torch.bool and mask.shape == weight.shape
        assert int((~mask).sum()) == math.floor(sparsity * units + 1e-6) * rows * columns
        assert np.array_equal(mask.numpy(), brute_force(weight.astype(np.float32), sparsity, rows, columns))


@pytest.mark.parametrize("keep, group", [(2, 4), (1, 4), (3, 4), (4, 4), (1, 8), (2, 3)])
def test_groups_keep_n_of_m(keep, group):
    generator = np.random.default_rng(2)
    for weight in (generator.standard_normal((6, 24)), generator.integers(-1, 2, (6, 24)) / 2, np.ones((6, 24))):
        pattern = Pattern(keep=keep, group=group)
        mask = magnitude_mask(torch.tensor(weight, dtype=torch.float32), 1 - keep / group, pattern)
        assert (mask.view(-1, group).sum(1) == keep).all()
        for row, kept in zip(weight.reshape(-1, group), mask.view(-1, group).tolist()):
            ranked = sorted(range(group), key=lambda i: (np.float32(abs(row[i])), i))
            assert kept == [i in ranked[group - keep:] for i in range(group)]
    # on the way to 2:4, a sparsity of 0.3 takes one of four
    part = magnitude_mask(torch.randn(6, 24), 0.3, Pattern(keep=2, group=4))
    assert (part.view(-1, 4).sum(1) == 3).all()


def test_blocks_are_scored_by_the_mean_not_the_maximum():
    weight = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.3, -0.3, 0.3, -0.3]])
    assert magnitude_mask(weight, 0.5, Pattern(1, 4)).tolist() == [[False] * 4 + [True] * 4]


def test_a_share_that_is_whole_only_on_paper():
    """0.29 * 100 is 28.999999999999996 in floating point; 29 zeros were asked for."""
    for percent in range(100):
        assert int((~magnitude_mask(torch.randn(10, 10), percent / 100)).sum()) == percent


def test_the_magnitude_of_short_floats_and_signs():
    weight = torch.tensor([[-3.0, 2.0, -1.0, 0.5]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert magnitude_mask(weight.to(dtype), 0.5).tolist() == [[True, True, False, False]]


REFERENCE_WEIGHTS = {          # 12 x 24, int32, in millionths
    "a":
        "lrz0/0MT8P+glxQApTD///1QCAB04eT/MqPx/9hH6v8DOv7/P+X4/5un6//LXPr/risLANGQBQA7ng4Au9fz/4NcEAAkuuv/rLwMAAJcCADN"
        "OAMAFr8YADfH+f8cz+z/gwoAAFfk9v9l/BoAReECAE5OBwCDohcAnwYEAJ0EBgCtlQwAXbjo/3S48P8MswUAY0///7Y6CgBZFvL/RTYBALuD"
        "9f/iQuj/0PgLAJ4d9//uaev/7ZQKAHQqAwBwNev/0sLf/7I6EgAMNPD/km0LABg7FwB+NfP/fwMCADB0AABqShIA0Yjr/1TEBQCiOt7/L3AI"
        "AC5dCAAdBO//WfsHAJoH6v/hrf7/kkD8/1839/9T4vn/mJIGAKk+/f948wwAYLjy/zc+FgDhTOj/+Sj9/2Ct5f9jjvD/JtwCAOzT+P/uJhEA"
        "53Ty/6ms5P91MgMA3WcQAHIz/P8NzAQA6nnl/3hQHQCRigUAk+Py/6mEBgBVeev/LVwCAEH6CQDMaRIAqNgQADSK+P9YQxUAGxn8/2e0/v8i"
        "zQEAvSAFAHRN/P/HCAsAWAXh/+u57P8ctPn/PrX8/2dF9f+5Gw8Afhjt/5RhAgAvNPX/rxsIAM+38P9EfeD/Xd4KAOYbEgA0gRwApKns/xYB"
        "CgDGBgsAK+cEAPeVAQBlQfn/nPgHAM2oBgC8E/v/dIYEAD9a7P9jnB4A4eIDAEVY+f8AEPD/A1r+/xTvBQDAdQIAd9wKAP4XJQBTOwwABDcZ"
        "AJ7F9/+u6Pn/DksAABz3AACNuAEAOy0KAM7pBQBLyxUAcmPx/6HAIABwDxwAhZnw/2GD8P/ntf//dccGAEYJGACBaRgAZBMOALjo+P89Vf//"
        "J1D3//it6/84Au//RLURAEVy9v94PxwA3Fvx/5gVBgDHEPH/ihv1/33vDQAgtwoA8w0RAORm9v9l8hMA+Af6/9IuAQAZDA4Ax/jx/yHMEgAd"
        "aRcA7kDj/yUiEgDUj/P/N6AKAEAl9v+FXPf/YhkMAGnR8P9b3f//K1vz/+Ks+f9uVw0AP3MAALK9/v/h7fz/h6/v/wFb8v/tRvr/opnx/zu/"
        "DgAK5Pn/y/EMAM0ZFwBAZPb/gMkPADakIACfqBcAXc/i/x/p4P8rfhIA9W3l/8MuBAC0Yu3/5jAGAG1I///S/vf/BET9/wTV8v8K+uj/+T4L"
        "AGhm6f+AkA0AN4gGAGPzHQCz5v7/Rdfu/2215P9ta/n/Glz4/ySC8P+4swIAHUX//9biEwDAUQoA36Dy//2n/f9tOAEAZdcWADKD///fO/3/"
        "LUbx/0hIGQDDrvb/GSTl/32YAADNpAMAJ0zz/74GGAAi1vD/HWoLADOeAQDumQEAvRj7/6GYBwBlfgYA48EIAAnMFQAeg97/mtMiAIwIFADW"
        "v+7/6HgAAIZw7/9k7gQAaMX5/+XKBgAXMer/P3fr/07k///KkPn/eWIbANFnCgAf6BYAcALi/7ViFwAq1RMAG3MGAM29/f/uNu3/oZri/1zL"
        "EAB/ogoAlMgLAAoo8//vgPr/",
    "b":
        "Ezzj/5Cw7f/IWAMAZe8FANa0+f8e9vz/lBP3/0tACQDP0Q0A2rz2/9ZtBAAukuH/2mUCAKuZ6f8LABMAneH6/1Zy/v9djuj/I3sJAL9ZEwAn"
        "JCEA7Yz3/0KHGgBuCeb/u6QRALBF+v+YxwsAyzIeADfS+P/i1fj/CFsSABxQ6/9a+QgA2s4oAAvL+/8qTwMAeHUDAG8M/v9g1/3/mvIEAF2Y"
        "6P9iU/D/mPno/8AJ9f+jjOn/0SXw/6OpDABrRw4Aw4cIAFrr5v+dUAQATmMQAGH6+P8Jx/7/E0Hw/z3Z/v+yUQEA+58LACiXCwBD6u//3ykC"
        "AFAv+v99SBcA3pcRAJD1+f9qpvj/1l4eADkVBQAIJu3/0zgCAHpjEACf0gEAj+cZAMAlBAD/rP7/Tjj3/2rk+P+0OhAAA50IAIGwJAAAR/j/"
        "w8Hl/6V6GQDBS/7/xCQQAHw59v/EWwgAQpL5//5/DwAd3xEA9eXx/1Qu+v+Jge3/akbw/1lB6f9bCwYAcsYGADAuBAD9cur/S0P7/0JZ+P8F"
        "jwEAofP6/5U5+f9UIhMAymcAAKe/EQDdCff/StL//4xxAwBPKOT/7vL1/ynu7v+2J/P/2NL4/+cO8f9O9f3/esUKAKeDAwDD+vX/VL3v/4im"
        "7v9RUOz/kWrk/7djEQDL/vb/p6z5/06/5/+x1AkADr7x/2ryAABeZe//IZoIAN2KHAAPXwIAhx/k/4FD//+//AsAMNUWAE0L9v/+SwcAXWH4"
        "/1Zq+P9PBQ4AQh8KAHWsDwDBbfX/Xxfo/yYJ4P8QY+b/pC4RAB2SAQBCBAQAs1rq/6YV7v867O//gRsNAGHaDACe1e3/WwsGADip8v/jsQEA"
        "Tf0IAEO+BADW/g0A3g71//UdCwB9AQoAFlQIADj6BQC+5wIAvJ7+/4RtBQCiSvT/zMv2/2rRDACrr/L/eYcLAB2ICwB90wEAAk8LAJmBAgA3"
        "zQEA06kaAJNiFABpQNv/v1rz/4SP5P+6LAIAHo0KAFIJ/P+y3uX//tvb/9+l///y3OH/om4hAHHP4v/NajEA4Q3x//2rFgCEWgsA/zMVAHXM"
        "7v+zYAEAylfi/x6oBABxqxAA0bQJAPN2BABFkRYATYgCAHjSNwAGxf//jRL0/0fWFgDgFev/qD8SAD6U5v99pQsASrwTAOL/JQAafwoAmTn5"
        "/wfaCgBH0hEASa4eAF4N/P8mOBIAeiMXAK5XFgDH7fj/NXkCADEs+P8urg0AYZ0HAK457f8dkgEAOxH5/yHR/f/gc/L/zgv6/2p0FABcQAgA"
        "hhL6/4OmFwAbawoArD8MANgJ8//HeAYA/Dfu/7G0BQBLo///J9MJABYuCABhk/T/DiQJAOcqDQBTH+n/aXv7/2UX+/9MGfn/aPIAAPkuBwCk"
        "5AcA0ALY/9XL/f/ZuP//N6sBAM0mBQBuAvH/8HXs/wjN6f+oXwoAI1Ph/83hBQCqvuD/gu0LAH5kIQCTFPj/idb9/xV1BACqoAYAKNoTAP/U"
        "5/8Ivvr/N/oOAFiI9//tHfD/",
    "c":
        "E7AXAAy03v+Br+f/8THj/32a3v9VlOP/WaoRACHADQBVH+r/fHP1/8859P/4Qff/t5kWADj0DAD1eQ4AqzX0//g68/8xmAIAtV8CACI/FABD"
        "PwQAfmoQAP1W/P94AggAamkPAPY16v9gkQIAKQ8WAHy39P/zEQsAh7YMAJgZ+P+3YyEALcgFAJiA9//kKer/7FsDALd01P8A8ff/Xg/i/8WK"
        "AwALGvX/WpP//9cJAADam/7/gbTm/25Q///+HhkABL/3/8JA+f+3hgYAlgL7/68aDgBq4AMAGyEIAMJ47v8FFe7/pQYMAHxC/v+poi8AY5rx"
        "/zML8/8UHO//5RMGABJF7P+xePn/SHgAAEljCwBIEf3/DokJAG/pCACXHQYAF/YSAFH89P/XshIAaE3o/5AuAAAq2AwA3lf7/7jSDADedf7/"
        "pWwMAKQzDQAq7QcAIKrl/6lnBADVbQYA51jg/4zDCgCmjv//Td4KAEdK9/+JuBcAQYT+/33B6P93PRAA9QXy/yAJ9f8syQIA82kCAJlY9f/o"
        "iA4AvacAAL64GQBjaQkA0iz6/zXQ9/+SFff/BjX9/98o+/8gLAEA54X0/3QfEwCpHvX/OEb9/0p38v+FpOr/k8vv/wVaGABlDQkA5Zz2/zVb"
        "//+Jm+D/hwDj/3S8DQBekvD/28v6/9cS8P+TYP7/He/u/8o3BwCdL/r/FxYGAIuJDgACDej/JEUXABMk9v/fMRgAJUgPAM/p8f9R5/b/vSMY"
        "AJeU5//5z///e4Hz/4n7+P899QcAvJb9/1+y9//WUScANVsQAKUNCQBNtfr/2LTp/4DSDADlrQ8AL7wYAKJkHQBX+/f/C5D4/yVG4v8IP+3/"
        "IfsHANtUBgAwWwsAlA0AACT/CAAwygwAqsrm/7Y6CwD+tgQAxOj7/+FLAQAidgkA/xHs/4BJBgDq19z/QyQKADWR/v/afP7/4Lvm/1yJAwAx"
        "+RAAGeIHAB618f/IAPv/pwQDAB9r+/87awMAVPn4/2QvBABsaCEAx0AAAJv0IAC/hfD/O1kRAD2AAAAnZfr/iL3+//ZCGQDI0fz/qvrt/0ZJ"
        "CADHKwIASu7m/82N+f+TpiEATln7///A/P8n8ub/IioDAPOG7P8eMwoA3HMIAKRy6f+e6un/SNX8/wZXBACZ0gAAQ+YCACFlBwDuFfj/S136"
        "/6SYEwAVxRsAA1P0/7osDAAmVhQACcX1/x6uDQCD9PX/CB3d/8XQ/P9/9CUAfNb7/wIk8/+/iPn/uFj5/wLY/P88Re7/omT2/xMd6f9rV/v/"
        "zjn6//xbAgCjyvX/trjx/zelCQAYIQcAhT3q/y1xBwAcYAAAgG/p/5ui7v8ONQgAu//0/4JpCABvgAkAoVbf/2LJ7v+fMff/bMISAPD/FADN"
        "pgsAPgAHALriAgDAZOj/d2P9/6TzBQDSnAYAqXACAI/sGwAnjwkAcOYJABpy+v925gwAPWsAAL/z9v9eDQ4Ap136/8d3DwBzGfb/s1fp/19B"
        "BwC3kQQAZ6r1/28CDAA8CRkA",
}
REFERENCE_MASKS = [            # pattern, sparsity, weights, rows of 24 bits
    ("unstructured", 0.85, "a",
     "040004 244040 881000 282180 004009 001014 018601 000300 0004f4 002400 0a200c 004c20"),
    ("1x4", 0.8, "b",
     "00000f f000f0 000000 0f0000 000000 f00f00 0f0000 0000f0 ff00f0 fff000 000000 00f000"),
    ("4x1", 0.8, "c",
     "d09d00 d09d00 d09d00 d09d00 040080 040080 040080 040080 410241 410241 410241 410241"),
    ("2x2", 0.75, "b",
     "c0c0cf c0c0cf 000000 000000 300300 300300 0c00c0 0c00c0 fccc30 fccc30 c3c000 c3c000"),
]


@pytest.mark.parametrize("pattern, sparsity, weights, rows", REFERENCE_MASKS)
def test_masks_equal_the_papers_reference_code(pattern, sparsity, weights, rows):
    """Printed by IntelLabs/Model-Compression-Research-Package at 0dbbb2d; no two scores tie."""
    weight = np.frombuffer(base64.b64decode(REFERENCE_WEIGHTS[weights]), "<i4").reshape(12, 24) / 1e6
    expected = [[bit == "1" for bit in f"{int(row, 16):024b}"] for row in rows.split()]
    assert magnitude_mask(torch.tensor(weight).float(), sparsity, parse_pattern(pattern)).tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# The ramp

@pytest.mark.parametrize("ramp, zeros", [
    (Ramp(0.9, 0, 50, 80, 10), {0: 0, 10: 224, 20: 361, 30: 431, 40: 457, 50: 460}),
    (Ramp(0.85, 14, 60, 90, 5),
     {0: 0, 19: 127, 24: 226, 29: 302, 34: 356, 39: 393, 44: 416, 49: 429, 54: 434, 59: 435}),
])
def test_ramp_equals_the_papers_reference_code(ramp, zeros):
    """`zeros`: zeros in its 16 x 32 mask after the first optimizer step that shows them, for 100 steps."""
    model = make()
    layer = model.encoder.layers[0].output                      # 16 outputs x 32 inputs, like the reference's layer
    expected = 0
    for step in range(100):
        update_masks(model, step, ramp, Pattern())
        expected = zeros.get(step, expected)
        assert int((~layer.mask).sum()) == expected, step


def test_sparsity_is_the_closed_form_at_every_step():
    """s(t) = s_f - s_f (1 - (t - t_s) / (t_e - t_s))^3, and the values that the method's description works out."""
    for ramp in (REFERENCE_RUN, Ramp(0.85, 1400, 10_000, 12_000, 100)):
        steps = np.arange(100_001)
        share = np.clip((steps - ramp.begin) / (ramp.end - ramp.begin), 0, 1)
        ours = np.array([sparsity_at(int(step), ramp) for step in steps])
        assert np.abs(ours - ramp.target * (1 - (1 - share) ** 3)).max() < 1e-12
        assert (np.diff(ours) >= 0).all()
        assert sparsity_at(ramp.begin, ramp) == 0 and sparsity_at(ramp.end, ramp) == ramp.target
        assert sparsity_at(ramp.end - 1, ramp) < ramp.target
    for step, percent in ((1000, 5.3), (10_000, 43.9), (25_000, 78.75), (40_000, 89.3), (50_000, 90), (99_999, 90)):
        assert 100 * sparsity_at(step, REFERENCE_RUN) == pytest.approx(percent, abs=0.05)
    at_once = Ramp(0.5, 5, 5, 5, 1)
    assert sparsity_at(5, at_once) == 0 and sparsity_at(6, at_once) == 0.5


def reference_rule(weight, sparsity, rows, columns):
    """The mask of the paper's code where no scores tie: the floor(s n)-th smallest mean |w| is a threshold, and what is
    strictly above it lives."""
    height, width = weight.shape[0] // rows, weight.shape[1] // columns
    scores = np.abs(weight).reshape(height, rows, width, columns).mean((1, 3))
    ranked = np.sort(scores, axis=None)
    assert (np.diff(ranked) > 0).all()                          # no ties
    count = int(sparsity * scores.size + 1e-6)
    threshold = ranked[count - 1] if count else -1
    return np.kron(scores > threshold, np.ones((rows, columns), bool))


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4), (4, 1)])
def test_masks_follow_the_reference_rule_at_every_step_of_the_papers_run(rows, columns):
    """100,000 steps with latent weights that move all the time: after each step the mask is the one of the last
    selection, at the ramp's share in closed form, and from step 80,000 on it is frozen."""
    model, layers = make(), []
    for _, layer in prunable(model)[4:7]:                       # square, wide, high
        start, speed = (np.random.default_rng(len(layers) + k).normal(size=layer.weight.shape) for k in (0, 9))
        layers.append((layer, start, speed))
    expected, selections, seen = [None] * len(layers), 0, set()
    for step in range(100_000):
        if step % 500 == 0:
            latent = [(start + speed * step / 50_000).astype(np.float32) for _, start, speed in layers]
            for (layer, _, _), weight in zip(layers, latent):
                layer.weight.data.copy_(torch.from_numpy(weight))
        update_masks(model, step, REFERENCE_RUN, Pattern(rows, columns))
        if step % 1000 == 0 and step <= 80_000:
            share = 0.9 * (1 - (1 - min(step, 50_000) / 50_000) ** 3)
            expected = [torch.from_numpy(reference_rule(weight, share, rows, columns)) for weight in latent]
            selections += 1
            seen.add(tuple(map(int, map(torch.count_nonzero, expected))))
        assert all(torch.equal(layer.mask, mask) for (layer, _, _), mask in zip(layers, expected)), step
    assert selections == 81 and len(seen) > 20


def test_masks_are_selected_every_so_often_and_then_frozen():
    updates = [step for step in range(100_000) if updates_at(step, REFERENCE_RUN)]
    assert updates == list(range(0, 80_001, 1000))
    assert [step for step in range(100) if updates_at(step, Ramp(0.85, 14, 60, 90, 5))] == list(range(14, 91, 5))
    model, ramp = make(), Ramp(0.5, 0, 4, 8, 2)
    for step in range(9):
        update_masks(model, step, ramp, Pattern())
    frozen = [layer.mask.clone() for _, layer in prunable(model)]
    with torch.no_grad():
        for _, layer in prunable(model):
            layer.weight.normal_()
    for step in (7, 9, 10, 12):                                 # between two updates, and after the last
        update_masks(model, step, ramp, Pattern())
    assert all(torch.equal(layer.mask, mask) for (_, layer), mask in zip(prunable(model), frozen))
    update_masks(model, 8, ramp, Pattern())
    assert not any(torch.equal(layer.mask, mask) for (_, layer), mask in zip(prunable(model), frozen))


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "4x1", "2:4"])
def test_every_layer_gets_the_same_share(pattern):
    model, pattern = make("classification"), parse_pattern(pattern)
    target = resolve_sparsity(None if pattern.group else 0.75, pattern)
    for step in range(11):
        update_masks(model, step, Ramp(target, 0, 10, 10, 5), pattern)
    for name, layer in prunable(model):
        assert int((~layer.mask).sum()) == target * layer.mask.numel(), name


def test_a_latent_weight_returns_when_it_has_grown():
    """A pruned weight keeps its value; when the others have fallen below it, the next selection takes it back."""
    model, ramp = make(), Ramp(0.5, 0, 1, 10, 1)
    layer = model.encoder.layers[1].query
    latent = layer.weight.detach().clone()
    update_masks(model, 1, ramp, Pattern())
    pruned = ~layer.mask.clone()
    assert torch.equal(layer.weight, latent) and int(pruned.sum()) == 128
    with torch.no_grad():
        layer.weight[~pruned] *= 1e-4
    update_masks(model, 2, ramp, Pattern())
    assert torch.equal(layer.mask, pruned)                      # the two halves have changed places
    assert torch.equal(layer.weight[pruned], latent[pruned])    # and those that are back have their old values


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate

REFERENCE_RATES = [            # (steps, warm-up, ramp begin, ramp end, every), {step: factor on the peak rate}
    ((100000, 1000, 0, 50000, 1000),
     {0: 0, 1: 0.001, 2: 0.002, 999: 0.999, 1000: 1.020408163, 1001: 1.020387755, 2702: 1.006081633,
      10810: 1.003877551, 18918: 1.001673469, 27027: 1.019857143, 35135: 1.017653061, 43243: 1.01544898,
      49999: 1.000020408, 50000: 1.020408163, 50001: 1.020387755, 51351: 0.9928367347, 59459: 0.8273673469,
      67567: 0.6618979592, 75675: 0.4964285714, 83783: 0.3309591837, 91891: 0.1654897959, 99999: 2.04082e-05,
      100000: 0}),
    ((1000, 50, 100, 600, 20),
     {0: 0, 1: 0.02, 2: 0.04, 25: 0.5, 45: 0.9, 49: 0.98, 50: 1, 51: 0.9977777778, 59: 0.98, 81: 0.9311111111,
      100: 0.8888888889, 119: 0.8466666667, 162: 0.8844444444, 243: 0.8822222222, 324: 0.88, 405: 0.8777777778,
      486: 0.8755555556, 567: 0.8733333333, 599: 0.8466666667, 600: 0.8888888889, 601: 0.8866666667,
      648: 0.7822222222, 729: 0.6022222222, 810: 0.4222222222, 891: 0.2422222222, 972: 0.0622222222,
      999: 0.0022222222, 1000: 0}),
    ((777, 30, 20, 400, 13),
     {0: 0, 1: 0.0333333333, 2: 0.0666666667, 19: 0.6333333333, 20: 0.6666666667, 21: 0.7, 25: 0.8333333333,
      29: 0.9666666667, 30: 1, 31: 0.9972752044, 45: 0.9945504087, 59: 1.027247956, 63: 1.016348774,
      126: 1.021798365, 189: 1.027247956, 252: 0.9972752044, 315: 1.002724796, 378: 1.008174387, 399: 1.021798365,
      400: 1.027247956, 401: 1.024523161, 462: 0.8583106267, 525: 0.6866485014, 588: 0.514986376,
      651: 0.3433242507, 714: 0.1716621253, 776: 0.0027247956, 777: 0}),
    ((200, 2, 0, 100, 2),
     {0: 0, 1: 0.5, 2: 1.020408163, 3: 1.010204082, 25: 1.010204082, 45: 1.010204082, 59: 1.010204082,
      64: 1.020408163, 81: 1.010204082, 97: 1.010204082, 99: 1.010204082, 100: 1.020408163, 101: 1.010204082,
      113: 0.887755102, 129: 0.7244897959, 145: 0.5612244898, 162: 0.387755102, 178: 0.2244897959,
      194: 0.0612244898, 199: 0.0102040816, 200: 0}),
]


@pytest.mark.parametrize("setting, factors", REFERENCE_RATES)
def test_learning_rate_equals_the_papers_reference_code(setting, factors):
    steps, warmup, begin, end, every = setting
    for step, factor in factors.items():
        ours = learning_rate_factor(step, steps, warmup, Ramp(0.9, begin, end, end, every))
        assert ours == pytest.approx(factor, abs=1e-9), step


def closed_form(t, steps, warmup, begin, end, every):
    """The reference's multiplier for all steps at once: N total, W warm-up, ramp P0 to P1 of length I, T = N - I."""
    rest = steps - (end - begin)
    rewound = (rest - t + every * np.floor((t - begin) / every)) / (rest - warmup)
    factor = np.where(t < begin, rest - t, steps - t) / (rest - warmup)
    factor = np.where((begin <= t) & (t < end), rewound, factor)
    return np.where(t < warmup, t / max(1, warmup), np.maximum(0, factor))


@pytest.mark.parametrize("setting", [(100_000, 1000, 0, 50_000, 1000), (20_000, 300, 1000, 12_000, 170),
                                     (5000, 400, 100, 3000, 50), (3000, 0, 0, 1500, 30), (999, 10, 500, 500, 7)])
def test_learning_rate_is_the_closed_form_at_every_step(setting):
    steps, warmup, begin, end, every = setting
    ramp = Ramp(0.9, begin, end, end, every)
    ours = np.array([learning_rate_factor(t, steps, warmup, ramp) for t in range(steps + 1)])
    assert np.abs(ours - closed_form(np.arange(steps + 1), *setting)).max() < 1e-12
    assert ours[-1] == 0 and (ours >= 0).all()
    teeth = [ours[step] for step in range(begin, end, every) if step >= warmup]
    assert len(set(teeth)) <= 1                                 # rewound to one and the same value
    assert (np.diff(ours[end:]) < 0).all()                      # and after the ramp nothing but decay


def test_learning_rate_without_a_ramp_is_linear_up_and_down():
    ours = np.array([learning_rate_factor(t, 1000, 100) for t in range(1101)])
    expected = np.minimum(np.arange(1101) / 100, np.maximum(0, (1000 - np.arange(1101)) / 900))
    assert np.abs(ours - expected).max() < 1e-12
    assert [learning_rate_factor(t, 1000, 100) for t in (0, 50, 100, 550, 1000, 2000)] == [0, 0.5, 1, 0.5, 0, 0]
    assert learning_rate_factor(0, 10, 0) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Training with masks

def random_masks(model, share=0.6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in prunable(model):
        layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) > share)


def classification_loss(model, seed=0):
    return torch.nn.functional.cross_entropy(model(*make_batch(seed)), torch.tensor([0, 1, 1, 0]))


def test_no_gradient_reaches_a_masked_weight():
    model = make("classification").eval()
    random_masks(model)
    classification_loss(model).backward()
    for name, layer in prunable(model):
        assert not layer.weight.grad[~layer.mask].any(), name
        assert layer.weight.grad[layer.mask].abs().mean() > 0, name


def test_locked_zeros_survive_momentum_and_weight_decay():
    """A zero that gets no gradient stays exactly zero under AdamW, whatever the others do."""
    model = make("classification")
    random_masks(model)
    lock(model)
    masks = {name: layer.mask.clone() for name, layer in prunable(model)}
    before = {name: layer.weight.detach().clone() for name, layer in prunable(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(50):
        optimizer.zero_grad()
        classification_loss(model, step % 5).backward()
        optimizer.step()
    for name, layer in prunable(model):
        assert torch.equal(layer.mask, masks[name])
        assert not layer.weight[~layer.mask].any(), name
        assert (layer.weight != before[name])[layer.mask].float().mean() > 0.9, name


def test_momentum_moves_a_latent_weight_but_never_the_product():
    """While masks still change nothing is forced to zero; what the forward pass uses is."""
    model = make("classification")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        classification_loss(model, step).backward()
        optimizer.step()
    random_masks(model)
    layer = model.encoder.layers[0].key
    latent = layer.weight.detach().clone()
    optimizer.zero_grad()
    classification_loss(model).backward()
    optimizer.step()
    assert (layer.weight != latent)[~layer.mask].all()
    assert int((layer.weight * layer.mask == 0).sum()) == int((~layer.mask).sum()) == dict(
        (name, zeros) for name, _, zeros in report(model))["encoder.layers.0.key"]


def everything_but_prunable(model):
    skip = {name + ".weight" for name, _ in prunable(model)}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name not in skip}


@pytest.mark.parametrize("kind", ["pretraining", "classification", "span"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_what_is_pruned_and_what_is_left_alone(kind, model_type):
    """Encoder and pooler weights; not heads (DistilBERT's pre_classifier is one), embeddings, LayerNorm or biases."""
    model = make(kind, model_type)
    names = {f"encoder.layers.{i}.{part}" for i in range(2) for part in
             ("query", "key", "value", "attention_output", "intermediate", "output")}
    if model_type == "bert" and kind != "span":
        names.add("encoder.pooler")
    assert {name for name, _ in prunable(model)} == names
    rest = everything_but_prunable(model)
    update_masks(model, 10, Ramp(0.75, 0, 10, 10, 5), Pattern())
    burn_in(model)
    lock(model)
    for name, layer in linears(model):
        assert int((~layer.mask).sum()) == (0.75 * layer.mask.numel() if name in names else 0), name
        assert int((layer.weight == 0).sum()) == (0.75 * layer.mask.numel() if name in names else 0), name
    after = everything_but_prunable(model)
    assert rest.keys() == after.keys() and all(torch.equal(rest[name], after[name]) for name in rest)


def test_burn_in_makes_the_zeros_real():
    model = make()
    random_masks(model)
    before = {name: layer.weight.detach().clone() for name, layer in prunable(model)}
    burn_in(model)
    for name, layer in prunable(model):
        assert not layer.weight[~layer.mask].any() and torch.equal(layer.weight[layer.mask], before[name][layer.mask])
        assert layer.weight.requires_grad and layer.weight.is_leaf


def test_lock_takes_the_mask_from_the_zeros_of_a_foreign_model():
    model, generator = make("classification"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in prunable(model):
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.7] = 0
    lock(model)
    for name, layer in prunable(model):
        assert torch.equal(layer.mask, layer.weight != 0) and 0.5 < float((~layer.mask).float().mean()) < 0.9, name


def test_lock_keeps_a_stored_mask_even_where_a_kept_weight_is_zero(tmp_path):
    """A weight that training (or a short float) left at exactly 0 is not pruned: it must still be able to move."""
    model = make("classification")
    random_masks(model)
    layer = model.encoder.layers[0].value
    row, column = layer.mask.nonzero()[0].tolist()
    with torch.no_grad():
        layer.weight[row, column] = 0.0
    masks = {name: layer.mask.clone() for name, layer in prunable(model)}
    save(model, tmp_path)
    model = load(tmp_path, "classification")
    lock(model)
    assert all(torch.equal(layer.mask, masks[name]) for name, layer in prunable(model))
    layer = model.encoder.layers[0].value
    assert layer.weight[row, column] == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classification_loss(model.eval()).backward()
    optimizer.step()
    assert layer.weight[row, column] != 0 and not layer.weight[~layer.mask].any()


def test_lock_burns_latent_weights_away():
    model = make()
    random_masks(model)
    lock(model)
    assert all(not layer.weight[~layer.mask].any() for _, layer in prunable(model))


# ---------------------------------------------------------------------------------------------------------------------
# Counting

def test_report_equals_a_recount():
    """Zeros under the mask and zeros that no mask asks for, counted by numpy from the tensors."""
    model = make("classification")
    random_masks(model)
    with torch.no_grad():
        model.encoder.pooler.weight[3] = 0
        model.classifier.weight.zero_()                         # a head: not in the report
    rows = report(model)
    expected = []
    for name, layer in prunable(model):
        dead = (layer.weight.detach().numpy() == 0) | ~layer.mask.numpy()
        expected.append((name, dead.size, int(dead.sum())))
    assert rows == expected and len(rows) == 13
    weights, zeros = sum(row[1] for row in rows), sum(row[2] for row in rows)
    assert measured_sparsity(model) == pytest.approx(zeros / weights) and measured_sparsity(make()) == 0
    burn_in(model)
    assert report(model) == expected
    lines = format_report(rows).splitlines()
    assert len(lines) == 15 and len({len(line) for line in lines}) == 1
    assert re.sub(r"[ ,]+", " ", lines[-1]).split(" ")[-1] == f"{zeros / weights:.4%}"
    for (name, count, zeros), line in zip(rows, lines[1:]):
        assert line.split() == [name, f"{count:,}", f"{zeros:,}", f"{zeros / count:.4%}"]


def test_the_same_weights_give_the_same_mask():
    """Ties included: a resumed run must select what the uninterrupted one did."""
    generator = random.Random(0)
    for pattern in (Pattern(), Pattern(1, 4), Pattern(keep=2, group=4)):
        weight = torch.tensor([[generator.choice([-1.0, 0.0, 1.0]) for _ in range(64)] for _ in range(32)])
        masks = [magnitude_mask(weight.clone(), 0.5, pattern) for _ in range(3)]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
