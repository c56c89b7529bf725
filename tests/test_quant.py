"""quant.py, held against torch's own quantizers, brute-force integers, and numbers printed by the paper's reference."""
import functools
import itertools
import json

import pytest
import torch

import model as network
import quant
from formats import int8, machine, model_directory, safetensors
from model import InputError, ModelConfig

# A layer of the paper's reference code (IntelLabs/Model-Compression-Research-Package, 0dbbb2d) over four batches.
WEIGHT = [[-0.00794, 0.56898, -0.87297, -0.78058, -0.40852, 0.28442, -0.02102, 0.84099],
          [-0.09413, 0.28066, -0.32055, -0.20849, -1.0133, -0.70246, -0.43723, 0.03929],
          [0.41932, 0.63642, -0.71907, -0.46188, 0.38525, 0.88076, -0.21828, 0.7937],
          [-0.17096, 0.11223, 0.9604, -0.98394, -0.66773, -0.26852, -0.41345, 0.91641]]
BIAS = [-0.22917, -0.16275, -0.24701, -0.33112]
INPUTS = [[[1.5091, 2.082, 1.7067, 2.3804, -1.1256, -0.317, -1.0925, -0.0852],
           [1.6459, -1.3602, 0.3446, 0.5199, -2.6133, -1.6965, -0.2282, 0.28],
           [0.2469, 0.0769, 0.338, 0.4544, 0.4569, -0.8654, 0.7813, -0.9268]],
          [[-0.2188, -2.4351, -0.0729, -0.034, 0.9625, 0.3492, -0.9215, -0.0562],
           [1.1404, -0.0899, 0.7298, -1.8453, -0.025, 1.3694, 2.657, 0.9851],
           [0.3772, 1.1012, -1.1428, 0.0376, 2.6963, 1.2358, 0.5428, 0.5255]],
          [[-0.8294, -1.4073, 1.6268, 0.1723, -1.6115, -0.4794, -0.1434, -0.3173],
           [-0.0661, -0.3584, -1.5616, -0.3546, 1.0811, 0.1315, 1.5735, 0.7814],
           [-1.0787, -0.7209, 1.4708, 0.2756, 0.6668, -0.9944, -1.1894, -1.1959]],
          [[-0.5596, 0.5335, 0.4069, 0.3946, 0.1715, 0.876, -0.2871, 1.0216],
           [0.4386, -0.0107, 1.3384, -0.2794, -0.5518, -2.8891, -1.51, 1.0241],
           [0.1954, -0.7371, 1.7001, 0.3462, 0.9711, 1.4503, -0.0519, -0.6284]]]
OUTPUTS = [[[-2.080616, 1.066463, -1.141139, 0.131586], [-0.930622, 3.037905, -3.137326, 1.595654],
            [-2.051357, -0.598686, -2.023595, -1.72344]],
           [[-1.834064, -1.607762, -0.979947, -1.009724], [1.674628, -2.093013, 1.967367, 1.520993],
            [1.17521, -3.052929, 3.704744, -3.077452]],
           [[-2.322824, 1.009888, -3.993124, 2.025171], [1.433063, -1.533646, 1.595176, -2.208831],
            [-3.655092, -0.288872, -3.647335, 0.144513]],
           [[0.456131, -0.797363, 1.086854, 0.529343], [-0.827355, 2.500484, -2.285552, 3.791226],
            [-2.918445, -3.000215, -0.849845, -0.749183]]]
INPUT_SCALE, INPUT_ZERO_POINT, WEIGHT_SCALE = 0.01950441673398018, 134, 0.007947450503706932


def seeded_layer(out, columns, mask=None, bits=8, scales="row", seed=0):
    """A Linear with random weights, a mask, a range, and its fake_quant slot set, in evaluation mode."""
    torch.manual_seed(seed)
    layer = network.Linear(columns, out)
    torch.nn.init.normal_(layer.bias)
    layer.act_range.copy_(torch.tensor([-2.7, 3.1]))
    if mask is not None:
        layer.mask.copy_(mask)
    layer.fake_quant = functools.partial(quant.fake_quant, bits=bits, scales=scales)
    return layer.eval()


def block_mask(out, columns, rows, width, sparsity, seed=0):
    """bool (out, columns) of blocks of `rows` x `width`, about `sparsity` of them False."""
    keep = torch.rand(out // rows, columns // width, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return keep.repeat_interleave(rows, 0).repeat_interleave(width, 1)


def lone(layer):
    """A model of one layer."""
    return torch.nn.Sequential(layer)


def rounded_weight(layer):
    """The weight of a layer with one scale a row, by torch's own quantizer."""
    weight = (layer.weight * layer.mask).detach()
    return torch.fake_quantize_per_channel_affine(weight, weight.abs().amax(1) / 127,
                                                  torch.zeros(len(weight), dtype=torch.int32), 0, -127, 127)


def small_model(kind="classification", model_type="bert", patterns=((1, 4),), sparsity=0.8, bits=8):
    """A real two-layer model, prepared, with one training batch seen; its layers pruned by the patterns in turn."""
    torch.manual_seed(0)
    config = ModelConfig(model_type=model_type, vocab_size=60, hidden_size=16, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=32, max_position_embeddings=24,
                         initializer_range=0.3, type_vocab_size=2 if model_type == "bert" else 0)
    model = network.build(config, kind, 3)
    blocks = itertools.cycle(patterns)
    for number, (_, layer) in enumerate(network.linears(model)):
        if layer.prunable:
            layer.mask.copy_(block_mask(layer.out_features, layer.in_features, *next(blocks), sparsity, number))
    quant.prepare(model, bits)
    model.train()(*batch())
    quant.update_ranges(model)
    return model.eval()


def batch():
    ids = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask, (torch.arange(12) > 5).long().expand(4, 12)


# ---------------------------------------------------------------- the arithmetic

def test_same_numbers_as_the_papers_reference():
    layer = network.Linear(8, 4)
    layer.weight.data, layer.bias.data = torch.tensor(WEIGHT), torch.tensor(BIAS)
    layer.fake_quant = functools.partial(quant.fake_quant, bits=8, scales="tensor")
    # The reference moves the range in the forward pass, by what it is about to round; we move it once a step, whose
    # micro-batches are all rounded alike. So here its forward pass is our second one of a step.
    model = lone(layer)
    for x, y in zip(INPUTS, OUTPUTS):
        layer(torch.tensor(x))
        quant.update_ranges(model)
        assert torch.allclose(layer(torch.tensor(x)), torch.tensor(y), atol=3e-6)
        layer.seen.copy_(torch.tensor(network.NO_RANGE))
    scale, zero_point = quant.activation_parameters(layer.act_range, 8)
    assert float(scale) == pytest.approx(INPUT_SCALE, rel=1e-6) and int(zero_point) == INPUT_ZERO_POINT
    weight_scale, low, high = quant.weight_parameters(layer.weight.detach(), "tensor")
    assert float(weight_scale[0]) == pytest.approx(WEIGHT_SCALE, rel=1e-6) and (low, high) == (-128, 127)


@pytest.mark.parametrize("low, high, width, zero_point", [(0.5, 3.0, 3.0, 0), (-4.0, -1.0, 4.0, 255), (-1.0, 2.0, 3.0, 85),
                                                          (-3.0, 0.0, 3.0, 255), (0.0, 0.0, 255 * 2 ** -23, 0)])
def test_a_range_is_widened_to_hold_zero(low, high, width, zero_point):
    scale, found = quant.activation_parameters(torch.tensor([low, high]), 8)
    assert float(scale) == pytest.approx(width / 255, rel=1e-6) and int(found) == zero_point


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("low, high", [(-2.7, 3.1), (0.5, 3.0), (-4.0, -1.0), (-1e-3, 5.0), (-1e4, 1e4)])
def test_activations_equal_torch_fake_quantize(bits, low, high):
    scale, zero_point = quant.activation_parameters(torch.tensor([low, high]), bits)
    top = 2 ** bits - 1
    assert 0 <= int(zero_point) <= top and zero_point.dtype == torch.int32
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * (high - low)
    x[0, 0] = 0.0
    ours = quant.FakeQuantize.apply(x, scale, zero_point, 0, top)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, top))
    assert ours[0, 0] == 0
    q = quant.quantize_activation(x, scale, zero_point, bits)
    assert q.dtype == torch.uint8 and int(q.max()) <= top
    assert torch.equal((q.float() - zero_point) * scale, ours)          # the integer path is the fake path
    inside = (x >= min(low, 0)) & (x <= max(high, 0))
    assert (ours - x)[inside].abs().max() <= 0.5001 * scale              # round trip: half a step


def test_weights_round_to_within_half_a_step_of_their_row():
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 9)[:, None]
    weight[4], weight[:, 3] = 0.0, 0.0
    q, scale = quant.quantize_weight(weight)
    assert q.dtype == torch.int8 and int(q.abs().max()) == 127
    assert scale[4] == 1 and not q[4].any() and not q[:, 3].any()
    assert torch.equal(scale[0], weight[0].abs().max() / 127)
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert all(int(row.abs().max()) == 127 for number, row in enumerate(q) if number != 4)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(9, dtype=torch.int32), 0, -127, 127)
    assert torch.equal(q * scale[:, None], theirs)


def test_an_empty_range_and_tiny_weights_stay_finite():
    scale, zero_point = quant.activation_parameters(torch.zeros(2), 8)
    assert float(scale) > 0 and int(zero_point) == 0
    assert quant.quantize_activation(torch.zeros(3), scale, zero_point, 8).tolist() == [0, 0, 0]
    q, scale = quant.quantize_weight(torch.full((2, 4), 1e-42))
    assert torch.isfinite(scale).all() and not q.any()


def test_gradient_is_one_inside_the_range_and_zero_outside():
    scale, zero_point = quant.activation_parameters(torch.tensor([-1.0, 2.0]), 8)
    x = torch.tensor([-5.0, -1.2, -1.0, -0.9, 0.0, 1.9, 2.0, 2.2, 7.0], requires_grad=True)     # with both ends
    y = quant.FakeQuantize.apply(x, scale, zero_point, 0, 255)
    y.backward(torch.arange(1.0, 10.0))
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]
    theirs = x.detach().clone().requires_grad_()
    rounded = torch.fake_quantize_per_tensor_affine(theirs, float(scale), int(zero_point), 0, 255)
    rounded.backward(torch.arange(1.0, 10.0))
    assert torch.equal(x.grad, theirs.grad)


def test_weights_and_inputs_both_get_gradients():
    layer = seeded_layer(5, 8, block_mask(5, 8, 1, 1, 0.5))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad[layer.mask].abs().sum() > 0 and not layer.weight.grad[~layer.mask].any()
    assert x.grad.abs().sum() > 0


def test_range_is_the_first_batch_then_an_exponential_average_and_frozen_in_evaluation():
    layer = seeded_layer(2, 4).train()
    layer.act_range.copy_(torch.tensor(network.NO_RANGE))
    first = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    assert torch.equal(layer(first), torch.nn.functional.linear(first, rounded_weight(layer), layer.bias))
    quant.update_ranges(lone(layer))
    assert layer.act_range.tolist() == [-2, 3]
    layer(torch.tensor([[11.0, 0.0, 3.0, 0.0]]))              # two micro-batches of one step
    layer(torch.tensor([[2.0, -1.0, 0.0, 0.0]]))
    assert layer.act_range.tolist() == [-2, 3]
    quant.update_ranges(lone(layer))
    assert layer.act_range.tolist() == pytest.approx([-2 + 0.01 * 1, 3 + 0.01 * 8])
    before = layer.act_range.clone()
    quant.update_ranges(lone(layer))                          # nothing was seen meanwhile
    layer.eval()(torch.full((1, 4), 100.0))
    quant.update_ranges(lone(layer))
    assert torch.equal(layer.act_range, before)
    layer.act_range.copy_(torch.tensor(network.NO_RANGE))
    with pytest.raises(InputError, match="quantize"):
        layer(torch.ones(1, 4))


@pytest.mark.parametrize("place", range(4))
def test_every_feature_of_every_token_counts_in_the_range(place):
    layer = seeded_layer(2, 4).train()
    for extreme in (9.0, -9.0):
        layer.seen.copy_(torch.tensor(network.NO_RANGE))
        x = torch.full((2, 3, 4), 0.5)
        x[1, 2, place] = extreme
        layer(x)
        assert layer.seen.tolist() == ([0.5, 9.0] if extreme > 0 else [-9.0, 0.5])


def test_zeros_survive_steps_of_training():
    model = small_model(sparsity=0.7).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(*batch()), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.9                                        # it does learn
    for _, layer in network.linears(model):
        _, rounded = layer.fake_quant(torch.ones(1, layer.in_features), layer.weight * layer.mask, layer)
        assert not rounded[~layer.mask].any()
        assert not quant.unpack(quant.pack(layer))[~layer.mask].any()


def test_prepare_sets_every_linear():
    model = small_model()
    layers = dict(network.linears(model))
    assert "classifier" in layers and "encoder.pooler" in layers and len(layers) == 14
    assert all(layer.fake_quant.keywords["bits"] == 8 and layer.fake_quant.keywords["scales"] == "row"
               for layer in layers.values())
    quantized = model(*batch())
    for layer in layers.values():
        layer.fake_quant = None
    assert not torch.equal(model(*batch()), quantized)
    with pytest.raises(InputError, match="9"):
        quant.prepare(model, 9)
    with pytest.raises(InputError, match="column"):
        quant.weight_parameters(torch.ones(2, 2), "column")


@pytest.mark.parametrize("kind, capabilities, bits", [
    ("x86_64", {"avx512_vnni": True}, 8), ("AMD64", {"avx_vnni": True, "avx512_vnni": False}, 8),
    ("x86_64", {"avx2": True, "avx512_vnni": False}, 7), ("x86_64", {}, 7), ("x86_64", None, 7), ("aarch64", {}, 8),
    ("arm64", None, 8)])
def test_bits_follow_the_cpu(kind, capabilities, bits, monkeypatch):
    """capabilities: as torch tells them, or None for a torch that cannot tell."""
    def told():
        if capabilities is None:
            raise AttributeError("get_capabilities")
        return capabilities
    monkeypatch.setattr("platform.machine", lambda: kind)
    monkeypatch.setattr(torch.cpu, "get_capabilities", told, raising=False)
    assert machine.default_activation_bits() == bits and machine.saturates() == (bits == 7)


# ---------------------------------------------------------------- integers

def test_integer_linear_is_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 3072), generator=generator).to(torch.uint8)
    w = torch.randint(-127, 128, (7, 3072), generator=generator).to(torch.int8)
    x[0], w[0] = 255, 127
    sums = quant.integer_linear(x, w, 3)
    brute = [[sum((int(a) - 3) * int(b) for a, b in zip(row, column)) for column in w.tolist()] for row in x.tolist()]
    assert sums.dtype == torch.int32 and sums.tolist() == brute


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_integer_forward_equals_the_fake_path(bits, scales):
    layer = seeded_layer(24, 48, block_mask(24, 48, 1, 4, 0.6), bits, scales)
    x = torch.randn(3, 10, 48) * 2
    fake, exact = layer(x), quant.integer_forward(x, quant.pack(layer))
    assert exact.shape == (3, 10, 24)
    assert torch.allclose(fake, exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(torch.nn.functional.linear(x, layer.weight * layer.mask, layer.bias), exact, atol=1e-3)


# ---------------------------------------------------------------- packing

@pytest.mark.parametrize("rows, columns, expected",
                         [(1, 4, "1x4"), (4, 1, "4x1"), (1, 1, "unstructured"), (4, 4, "4x4"), (2, 12, "2x12"),
                          (1, 36, "1x36"), (20, 1, "20x1")])
@pytest.mark.parametrize("sparsity", [0.1, 0.8])
def test_pack_finds_the_pattern_and_unpacks_to_the_same_integers(rows, columns, expected, sparsity):
    layer = seeded_layer(20, 36, block_mask(20, 36, rows, columns, sparsity, seed=3))
    if rows < 20:
        layer.mask[4:8] = False                              # empty rows
    packed = quant.pack(layer)
    assert packed.pattern == expected
    dense, scale = quant.quantize_weight((layer.weight * layer.mask).detach())
    assert torch.equal(quant.unpack(packed), dense) and torch.equal(packed.weight_scale, scale)
    assert packed.values.numel() == int(layer.mask.sum())
    keep = quant.unpack_mask(packed).repeat_interleave(packed.values.shape[1], 0)
    assert torch.equal(keep.repeat_interleave(packed.values.shape[2], 1), layer.mask)


@pytest.mark.parametrize("out, columns", [(1, 1), (3, 5), (7, 9), (5, 8), (8, 5)])
def test_odd_shapes_dense_and_all_pruned(out, columns):
    dense = quant.pack(seeded_layer(out, columns))
    assert dense.pattern == "dense" and dense.values.shape == (out, columns) and quant.unpack_mask(dense) is None
    layer = seeded_layer(out, columns, torch.zeros(out, columns))
    assert quant.pack(layer).values.numel() == 0 and not quant.unpack(quant.pack(layer)).any()
    layer.mask.fill_(True)
    layer.mask[0, 0] = False
    packed = quant.pack(layer)
    assert packed.values.numel() == int(layer.mask.sum()) or out == columns == 1
    assert torch.equal(quant.unpack(packed), quant.quantize_weight((layer.weight * layer.mask).detach())[0])


def test_zero_to_zero_is_a_range():
    """A layer that has only ever seen zeros is rounded, evaluated and packed like any other."""
    layer = seeded_layer(2, 4)
    layer.act_range.zero_()
    x = torch.zeros(3, 4)
    assert torch.equal(layer(x), layer.bias.expand(3, 2)) and torch.equal(quant.integer_forward(x, quant.pack(layer)),
                                                                          layer.bias.expand(3, 2))
    assert not torch.equal(layer.train()(x + 1), torch.nn.functional.linear(x + 1, rounded_weight(layer), layer.bias))


def test_the_largest_sum_that_float32_holds():
    """2^24 is an integer that it holds exactly; of the one beyond it, it does not."""
    for extra, exact, zero_point in ((8, True, 128), (9, False, 128), (8, True, 127), (9, False, 127)):
        values = torch.full((1, 1040), 0, dtype=torch.int8)
        values[0, :1032], values[0, 1032] = 127, extra                          # 131,072 in sum, times 128
        packed = quant.PackedLinear((1, 1040), values, None, torch.ones(1), torch.zeros(1), torch.tensor(1.0),
                                    torch.tensor(zero_point, dtype=torch.int32), 8)
        assert quant.exact_in_float32(packed) == exact


def test_pack_refuses_what_it_cannot_write():
    layer = seeded_layer(4, 8)
    layer.weight.data[1, 1] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        quant.pack(layer)
    layer = seeded_layer(4, 8)
    layer.act_range.copy_(torch.tensor(network.NO_RANGE))
    with pytest.raises(InputError, match="--stage quantize"):
        quant.pack(layer)


# ---------------------------------------------------------------- the file

def integer_logits(directory):
    """Logits of a packed model with the integer oracle in every kernel slot."""
    model, packed, metadata = int8.read_int8(directory)
    for name, layer in network.linears(model):
        layer.kernel = functools.partial(quant.integer_forward, packed=packed[name])
    with torch.inference_mode():
        return model(*batch()), packed, metadata


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("kind", ["classification", "span"])
def test_packed_model_gives_the_logits_of_the_fake_quantized_one(tmp_path, kind, model_type):
    model = small_model(kind, model_type, patterns=((1, 4), (4, 1), (1, 1)))
    model_directory.save(model, tmp_path, labels=["a", "b", "c"] if kind == "classification" else None)
    int8.write_int8(model, tmp_path, {"task": "sst2"})
    (tmp_path / "model.safetensors").unlink()               # the packed file is enough
    logits, packed, metadata = integer_logits(tmp_path)
    quant.round_embeddings(model)
    expected = model(*batch())
    for ours, theirs in zip([logits] if kind == "classification" else logits,
                            [expected] if kind == "classification" else expected):
        # A difference in the last float32 bit can move one input to the next level, hence a tolerance of a few steps.
        assert (ours - theirs).abs().max() < 0.02 * theirs.std() + 1e-5
    assert {layer.pattern for layer in packed.values()} == {"1x4", "4x1", "unstructured", "dense"}
    assert (metadata["format_version"], metadata["activation_bits"], metadata["weight_scales"]) == ("2", "8", "row")
    assert metadata["task"] == "sst2" and metadata["embeddings"] == "int8"
    assert metadata["pattern"] == "1x4 4x1 dense unstructured"


def test_reading_builds_no_dense_float_weights(tmp_path):
    model = small_model()
    model_directory.save(model, tmp_path, labels=["a", "b", "c"])
    int8.write_int8(model, tmp_path)
    read, packed, _ = int8.read_int8(tmp_path)
    assert all(layer.weight.is_meta and layer.bias.is_meta for _, layer in network.linears(read))
    assert read.encoder.word.values.dtype == torch.int8 and not read.encoder.layers[1].output_norm.weight.is_meta
    for name, layer in network.linears(model):
        exact = quant.pack(layer)
        for field in ("values", "weight_scale", "bias", "input_scale", "input_zero_point"):
            assert torch.equal(getattr(packed[name], field), getattr(exact, field))


def test_writing_needs_a_prepared_and_trained_model(tmp_path):
    model = small_model()
    dict(network.linears(model))["encoder.layers.0.query"].fake_quant = None
    with pytest.raises(InputError, match="bert.encoder.layer.0.attention.self.query"):
        int8.write_int8(model, tmp_path)
    assert not (tmp_path / "int8.safetensors").exists()


STEM = "bert.encoder.layer.0.attention.self.query."            # half of its blocks live: bits
GAPS = "bert.encoder.layer.0.intermediate.dense.mask_gaps"     # a fifth: distances


def longer(tensors, name):
    tensors[name] = torch.cat([tensors[name], torch.ones(1, dtype=torch.uint8)])


DAMAGE = {
    "missing": lambda t: t.pop(STEM + "weight_scale"),
    "surplus": lambda t: t.update(extra=torch.zeros(3)),
    "no values": lambda t: t.pop(STEM + "values"),
    "value dtype": lambda t: t.update({STEM + "values": t[STEM + "values"].to(torch.int32)}),
    "value count": lambda t: t.update({STEM + "values": t[STEM + "values"][:-1]}),
    "block": lambda t: t.update({STEM + "values": t[STEM + "values"].reshape(-1, 1, 1)[:3].reshape(1, 1, 3)}),
    "empty block": lambda t: t.update({STEM + "values": torch.zeros(2, 0, 4, dtype=torch.int8)}),
    "mask population": lambda t: t[STEM + "mask_bits"].bitwise_xor_(torch.tensor([1] + 7 * [0], dtype=torch.uint8)),
    "mask length": lambda t: longer(t, STEM + "mask_bits"),
    "no mask": lambda t: t.pop(STEM + "mask_bits"),
    "two masks": lambda t: t.update({STEM + "mask_gaps": torch.tensor([2, 255], dtype=torch.uint8)}),
    "gaps length": lambda t: longer(t, GAPS),
    "gaps width": lambda t: t[GAPS].__setitem__(0, 9),
    "gaps population": lambda t: t.update({GAPS: int8.write_gaps(torch.ones(128, dtype=torch.bool))}),
    "gaps dtype": lambda t: t.update({GAPS: t[GAPS].to(torch.int32)}),
    "gaps rank": lambda t: t.update({GAPS: t[GAPS][None]}),
    "embedding scale": lambda t: t["bert.embeddings.word_embeddings.weight_scale"].neg_(),
    "embedding values": lambda t: t.update({"bert.embeddings.word_embeddings.values": torch.zeros(60, 16)}),
    "bias shape": lambda t: t.update({STEM + "bias": torch.zeros(5)}),
    "scale sign": lambda t: t[STEM + "weight_scale"].neg_(),
    "scale infinite": lambda t: t[STEM + "weight_scale"].fill_(float("inf")),
    "input scale": lambda t: t[STEM + "input_scale"].zero_(),
    "zero point": lambda t: t[STEM + "input_zero_point"].fill_(256),
    "embeddings": lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(60, 15)}),
    "NaN": lambda t: t["bert.embeddings.LayerNorm.weight"].fill_(float("nan")),
    "labels": lambda t: t.update({"classifier.bias": torch.zeros(4)}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    model = small_model()
    model.encoder.layers[0].query.mask.copy_(block_mask(16, 16, 1, 4, 0.5))
    model_directory.save(model, directory, labels=["a", "b", "c"])
    int8.write_int8(model, directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused_by_name(written, tmp_path, damage):
    tensors, metadata = safetensors.read_safetensors(written / "int8.safetensors")
    DAMAGE[damage](tensors)
    safetensors.write_safetensors(tmp_path / "int8.safetensors", tensors, metadata)
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    with pytest.raises(InputError, match="int8.safetensors") as error:
        int8.read_int8(tmp_path)
    assert any(name in str(error.value) for name in (STEM[:-1], GAPS[:-10], "extra", "bert.embeddings", "classifier"))
    assert "marks" in str(error.value) or damage not in ("mask population", "value count", "gaps population")


def test_truncated_and_foreign_files_are_refused(written, tmp_path):
    content = (written / "int8.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "int8.safetensors").write_bytes(content[:length])
        with pytest.raises(InputError, match="int8.safetensors"):
            int8.read_int8(tmp_path)
    tensors, metadata = safetensors.read_safetensors(written / "int8.safetensors")
    for key, value in (("format_version", "1"), ("format_version", "3"), ("activation_bits", "9"),
                       ("activation_bits", "")):
        safetensors.write_safetensors(tmp_path / "int8.safetensors", tensors, {**metadata, key: value})
        with pytest.raises(InputError, match=key):
            int8.read_int8(tmp_path)
    (tmp_path / "int8.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        int8.read_int8(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2"]}))
    with pytest.raises(InputError, match="GPT2"):
        int8.read_int8(tmp_path)
