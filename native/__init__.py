"""The compiled engine: sparse INT8 products and the whole encoder in C++, in the order to read them.

    vectors.h       the vector types, and what differs from CPU to CPU
    functions.h     2^x and GELU of a vector
    tiles.h         tile registers (AMX), where there are any
    products.h      a layer's weights, and its product in five forms
    attention.h     attention on vectors, and on tile registers
    encoder.cpp     embeddings, layer norm, and the encoder made of them; the C interface
    weights.py      a quant.PackedLinear laid out as products.h reads it; one product
    engine.py       a whole encoder as a function: the slot model.Encoder.kernel
    build.py        how the C++ is compiled, cached, opened and checked against PyTorch
"""
