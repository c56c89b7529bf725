"""Embeddings and layers of a packed model by the compiled library: the slot `Encoder.kernel`."""
import ctypes

import torch
import torch.nn.functional as F

import quant
from model import InputError, linears
from native.weights import (FORMS, INTEGER, POINTER, SMALL, WHOLE_TILES, NativeError, instructions, native_linear,
                            native_weights)

# The parts of `encode` that are timed, in the order of enum Part in encoder.cpp; the first, and the third to fifth,
# are the products of a layer.
PARTS = ("query, key, value", "attention", "attention output", "intermediate", "output", "embeddings", "quantize",
         "layer norm")


class Table(ctypes.Structure):
    """struct Table of encoder.cpp: an embedding, float32 or int8. It keeps alive what it points to."""
    _fields_ = [("values", POINTER), ("scales", POINTER), ("plain", POINTER)]

    def __init__(self, module):
        if isinstance(module, quant.Int8Embedding):
            super().__init__(module.values.data_ptr(), module.scale.data_ptr(), None)
        else:
            super().__init__(None, None, module.weight.data_ptr())
        self.module = module


class Norm(ctypes.Structure):
    """struct Norm of encoder.cpp."""
    _fields_ = [("gain", POINTER), ("bias", POINTER), ("epsilon", ctypes.c_float)]

    def __init__(self, gain, bias, epsilon):
        super().__init__(gain.data_ptr(), bias.data_ptr(), epsilon)
        self.tensors = gain, bias


class Layer(ctypes.Structure):
    """struct Layer of encoder.cpp."""
    _fields_ = [*((name, POINTER) for name in ("query_key_value", "attention_output", "intermediate", "output")),
                ("attention_norm", Norm), ("output_norm", Norm)]


class EncoderStructure(ctypes.Structure):
    """struct Encoder of encoder.cpp."""
    _fields_ = [*((name, INTEGER) for name in ("hidden", "heads", "tables", "layers")), ("table", POINTER),
                ("norm", Norm), ("layer", POINTER), ("first_only", SMALL)]


class NativeEncoder:
    """Embeddings and layers by encoder.cpp: the slot `Encoder.kernel`. Several threads may call it at once.

    Called with int64 (B, T) input_ids, attention_mask and token_type_ids it returns hidden states (B, T, H), zeros at
    padding, which is never computed. A classifier reads only the first token of a row: for one they are (B, 1, H), and
    the last layer is computed for those tokens alone. InputError for an id that an embedding does not have.
    """

    def __init__(self, library, model, packed):
        config, encoder = model.config, model.encoder
        if (config.hidden_size % (4 * config.num_attention_heads) or config.intermediate_size % 4
                or not config.num_hidden_layers):
            raise NativeError("engine native takes layers whose heads and inner sizes are multiples of four")
        self.library, self.config = library, config
        self.first_token_only = model.kind == "classification"
        self.tables = [Table(table) for table in (encoder.word, encoder.position, encoder.token_type)
                       if table is not None]
        self.rows = [len(table.module.values if table.values else table.module.weight) for table in self.tables]
        self.weights, self.norms, layers = [], [], []
        for number, layer in enumerate(encoder.layers):
            groups = [[packed.pop(f"encoder.layers.{number}.{name}") for name in names] for names in
                      (("query", "key", "value"), ("attention_output",), ("intermediate",), ("output",))]
            self.weights.append([native_weights(library, group) for group in groups])
            self.norms.append([Norm(module.weight, module.bias, module.eps) for module in
                               (layer.attention_norm, layer.output_norm)])
            layers.append(Layer(*map(ctypes.addressof, self.weights[-1]), *self.norms[-1]))
        self.arrays = (Table * len(self.tables))(*self.tables), (Layer * len(layers))(*layers)
        self.norm = Norm(encoder.norm.weight, encoder.norm.bias, encoder.norm.eps)

    def __call__(self, input_ids, attention_mask, token_type_ids, times=None):
        """times: a dict to which the seconds of each of PARTS are added."""
        real = attention_mask.bool()
        if not real.shape[1]:
            raise InputError("a batch whose rows have no tokens")
        if self.first_token_only and not bool(real[:, 0].all()):
            raise InputError("a row of the batch begins with padding, and the classifier reads its first token")
        ids = torch.stack([input_ids[real], real.nonzero()[:, 1], token_type_ids[real]][:len(self.tables)])
        for count, column in zip(self.rows, ids):
            if column.numel() and not 0 <= int(column.min()) <= int(column.max()) < count:
                raise InputError(f"the ids of a batch, {int(column.min())} to {int(column.max())}, are not all in an "
                                 f"embedding of {count} rows")
        starts, (table, layer) = F.pad(real.sum(1).cumsum(0), (1, 0)), self.arrays
        encoder = EncoderStructure(self.config.hidden_size, self.config.num_attention_heads, len(table), len(layer),
                                   ctypes.addressof(table), self.norm, ctypes.addressof(layer), self.first_token_only)
        hidden = torch.empty(len(real) if self.first_token_only else ids.shape[1], self.config.hidden_size,
                             dtype=torch.float32, device="cpu")                 # whatever torch's defaults are
        seconds = (ctypes.c_double * len(PARTS))()
        self.library.encode(ctypes.addressof(encoder), len(real), starts.data_ptr(), ids.data_ptr(),
                            torch.get_num_threads(), hidden.data_ptr(), seconds)
        if times is not None:
            times.update({part: times.get(part, 0.0) + value for part, value in zip(PARTS, seconds)})
        if self.first_token_only:
            return hidden[:, None]
        padded = hidden.new_zeros(*real.shape, hidden.shape[1])
        padded[real] = hidden
        return padded


def take_over(model, packed, library):
    """Set the kernels of a packed model, of its encoder and its heads. Returns (how it lies in words, bytes of weights
    held). packed: {name of Linear: PackedLinear}, of which the encoder's are removed. NativeError if the model has
    sizes that the library does not take."""
    model.encoder.kernel = encoder = NativeEncoder(library, model, packed)
    weights, size = [each for layer in encoder.weights for each in layer], 0
    for name, layer in linears(model):
        if name in packed:                          # the heads: the encoder has taken its own
            layer.kernel, layer_bytes = native_linear(library, packed[name])
            size += layer_bytes
    size += sum(array.nbytes for each in weights for array in each.arrays)
    numbers = ((sum(each.form == form for each in weights), FORMS[form]) for form in range(len(FORMS)))
    layout = ", ".join(f"{number} products in {form}" for number, form in numbers if number)
    layout += f" by {instructions(library)}"
    if any(each.form == WHOLE_TILES for each in weights):
        layout += "; there zeros save bytes, not multiplications"
    return layout, size
