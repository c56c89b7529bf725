// A layer's weights, levels of activations, and the product of the two in five forms. Third of four files; the layouts
// are drawn in vectors.h and tiles.h.
#pragma once
#include "tiles.h"

// ---------------------------------------------------------------------------------------------------------------------
// A layer as weights.py packs it. `outputs` and `inputs` are multiples of four.

enum Form { WORDS, STRIPES, SCATTERED, WHOLE_TILES, GATHERED_TILES };

struct Weights {
    int64_t outputs, inputs, chunks;    // the inputs are taken in `chunks` ranges: one range of a tile stays in cache
    int32_t form, portable;             // portable: use the plain C++
    const int32_t *starts;              // (chunks * rows + 1,): first block of a row in a range; a row is an output, or
                                        // for STRIPES four outputs, whose blocks come in fours. Tiles: (2, rows + 1):
                                        // first step, and first survivor, of SIDE outputs
    const uint16_t *columns;            // SCATTERED: the four inputs of each block; STRIPES: of each four blocks;
                                        // GATHERED_TILES: (steps, SIDE) rows of `words`
    const void *blocks;                 // int32, four int8 each; WORDS: uint64, these above the place of the block's
                                        // row in a tile, in bytes; tiles: int8 survivors
    const uint64_t *alive;              // tiles: (steps, SIDE), the survivors' places in a row of A
    const int32_t *sums;                // (outputs,) sum of the output's weights
    const float *scales, *bias;         // (outputs,) of the product, input scale included
    float reciprocal;                   // 1 / scale of the input
    int32_t zero_point, highest;        // of the input's levels
};

static inline bool on_tiles(const Weights &w) { return w.form >= WHOLE_TILES; }

// 1.5 * 2^23: a float of that size has no bits for a fraction, so that adding it rounds, half to even.
constexpr float ROUNDING = 12582912.0f;

// Nearest level.
static inline ints level(floats x, const Weights &next) {
    const floats rounding = broadcast(ROUNDING);
    floats low = broadcast((float)-next.zero_point), high = broadcast((float)(next.highest - next.zero_point));
    x = least(most(x * next.reciprocal, low), high);
    return (ints)(x + rounding) - (ints)rounding + next.zero_point;
}

// Four features of a tile, from `feature` on, into the layout that the layer `next` reads.
template <class M>
static inline void store_levels(uint8_t *q, int64_t feature, const ints value[4][4], const Weights &next) {
    bytes row[4];
    for (int i = 0; i < 4; i++) row[i] = M::narrow(value[i]);
    if (next.form == WORDS || on_tiles(next)) {
        const bytes *const four[4] = {row, row + 1, row + 2, row + 3};
        M::interleave(four, (ints *)(q + feature * T));
    } else
        for (int i = 0; i < 4; i++) ((bytes *)(q + feature * T))[i] = row[i];
}

static inline int64_t tiles_of(int64_t tokens) { return (tokens + T - 1) / T; }

// How many of a tile's four vectors hold tokens: fewer only in the last one.
static inline int used_vectors(int64_t tokens, int64_t tile) {
    return (int)std::min<int64_t>(4, (tokens - tile * T + LANES - 1) / LANES);
}

// 2^x for x <= 0, relative error 2e-7: 2^whole by its exponent bits, 2^fraction by a polynomial on [-1/2, 1/2].
static inline floats exp2(floats x) {
    const floats rounding = broadcast(ROUNDING);
    x = most(x, broadcast(-126.0f));
    floats whole = (x + rounding) - rounding, f = x - whole, p = broadcast(1.54035304e-4f);
    for (float k : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = p * f + k;
    return (floats)((ints)p + (__builtin_convertvector(whole, ints) << 23));
}

// x Phi(x). Phi(c) - 1/2 is c times a polynomial in c^2, which interpolates it at Chebyshev's points of |c| <= 5.
// Absolute error 2e-6, and 3e-7 |x| beyond 5.
static inline floats gelu(floats x) {
    floats c = least(most(x, broadcast(-5.0f)), broadcast(5.0f)), s = c * c * 0.08f - 1.0f;
    floats p = broadcast(7.05952991e-4f);
    for (float k : {-1.67403098e-3f, 1.46263157e-3f, -2.53432234e-3f, 6.66780895e-3f, -1.12997434e-2f, 1.62870702e-2f,
                    -2.32163442e-2f, 3.14648720e-2f, -4.04507113e-2f, 5.15189416e-2f, -7.02959372e-2f, 1.41363805e-1f})
        p = p * s + k;
    return x * (c * p + 0.5f);
}

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers. One thread takes a tile and OUTPUTS outputs, four at a time: their sums lie in registers, and at once
// come scale, bias and what follows. Where the inputs are taken in ranges, sums wait between them.
// N = used vectors. `starts` are those of the outputs at hand.

constexpr int OUTPUTS = 96;
// Of `words`, in blocks: how far ahead of their use weights are fetched, and how many, eight to a line of the cache.
constexpr int AHEAD = 1024, FETCHED = 48;

template <class M, int N>
static inline void words(const Weights &w, const int32_t *starts, const uint8_t *q, ints *s) {
    const uint64_t *block = (const uint64_t *)w.blocks;
    for (int ahead = 0; ahead < FETCHED; ahead += 8) __builtin_prefetch(block + starts[0] + AHEAD + ahead);
    for (int32_t b = starts[0]; b < starts[1]; b++) {
        uint64_t place_and_weights = block[b];              // one load: loads are what bounds this loop
        const ints *x = (const ints *)(q + (uint32_t)place_and_weights);
        ints four = broadcast((int32_t)(place_and_weights >> 32));
        for (int v = 0; v < N; v++) s[v] = M::dot(s[v], x[v], four);
    }
}

template <class M> static inline void interleaved(const uint16_t *columns, const uint8_t *q, ints x[4]) {
    const bytes *const row[4] = {(const bytes *)(q + columns[0] * T), (const bytes *)(q + columns[1] * T),
                                 (const bytes *)(q + columns[2] * T), (const bytes *)(q + columns[3] * T)};
    M::interleave(row, x);
}

template <class M, int N>
static inline void scattered(const Weights &w, const int32_t *starts, const uint8_t *q, ints *s) {
    const int32_t *block = (const int32_t *)w.blocks;
    for (int32_t b = starts[0]; b < starts[1]; b++) {
        ints x[4];
        interleaved<M>(w.columns + 4 * b, q, x);
        for (int v = 0; v < N; v++) s[v] = M::dot(s[v], x[v], broadcast(block[b]));
    }
}

template <class M, int N>
static inline void stripes(const Weights &w, const int32_t *starts, const uint8_t *q, ints s[4][N]) {
    const int32_t *block = (const int32_t *)w.blocks;
    for (int32_t b = starts[0]; b < starts[1]; b++) {
        ints x[4];
        interleaved<M>(w.columns + 4 * b, q, x);
        for (int o = 0; o < 4; o++)
            for (int v = 0; v < N; v++) s[o][v] = M::dot(s[o][v], x[v], broadcast(block[4 * b + o]));
    }
}

// A complete sum, times scale, plus bias.
static inline floats scaled(const Weights &w, int64_t output, ints sum) {
    return __builtin_convertvector(sum, floats) * w.scales[output] + w.bias[output];
}

// Four outputs of a tile, from `output` on, whose sums are complete: into y, float32; or with y null through GELU into
// the `levels` of `next`, which begin at output 0.
template <class M, int N>
static inline void finish(const Weights &w, const Weights &next, int64_t output, const ints s[4][N], float *y,
                          uint8_t *levels) {
    if (y) {
        for (int o = 0; o < 4; o++)
            for (int v = 0; v < N; v++) *(floats *)(y + o * T + v * LANES) = scaled(w, output + o, s[o][v]);
    } else {
        ints value[4][4];
        if (N < 4) std::memset(value, 0, sizeof(value));
        for (int o = 0; o < 4; o++)
            for (int v = 0; v < N; v++) value[o][v] = level(gelu(scaled(w, output + o, s[o][v])), next);
        store_levels<M>(levels, output, value, next);
    }
}

// The outputs first to last of one tile, into y, which begins at output `first`, or into `levels`, as `finish` has it.
// The two Weights are copies, so that the compiler knows that no store changes them.
template <class M, int N, int FORM>
static void part_of_tile(const Weights w, const Weights next, int64_t first, int64_t last, const uint8_t *q, float *y,
                         uint8_t *levels) {
    ints waiting[OUTPUTS][N];
    for (int64_t chunk = 0; chunk < w.chunks; chunk++)
        for (int64_t output = first; output < last; output += 4) {
            ints s[4][N], (*kept)[N] = waiting + (output - first);
            const int32_t *starts = w.starts + (chunk * w.outputs + output) / (FORM == STRIPES ? 4 : 1);
            for (int o = 0; o < 4; o++)
                for (int v = 0; v < N; v++)
                    s[o][v] = chunk ? kept[o][v] : broadcast((M::OFFSET - w.zero_point) * w.sums[output + o]);
            if constexpr (FORM == STRIPES) stripes<M, N>(w, starts, q, s);
            else
#pragma GCC unroll 4
                for (int o = 0; o < 4; o++)
                    if constexpr (FORM == WORDS) words<M, N>(w, starts + o, q, s[o]);
                    else scattered<M, N>(w, starts + o, q, s[o]);
            if (chunk < w.chunks - 1) {
                for (int o = 0; o < 4; o++)
                    for (int v = 0; v < N; v++) kept[o][v] = s[o][v];
            } else
                finish<M, N>(w, next, output, s, y ? y + (output - first) * T : nullptr, levels);
        }
}

// The outputs first to last, at most OUTPUTS, of one tile, as part_of_tile has them.
template <class M>
static void on_tile(const Weights &w, const Weights *next, int64_t tokens, int64_t tile, int64_t first, int64_t last,
                    const uint8_t *q, float *y, uint8_t *levels) {
    typedef decltype(&part_of_tile<M, 4, WORDS>) Function;
    static const Function chosen[3][4] = {
        {part_of_tile<M, 1, WORDS>, part_of_tile<M, 2, WORDS>, part_of_tile<M, 3, WORDS>, part_of_tile<M, 4, WORDS>},
        {part_of_tile<M, 1, STRIPES>, part_of_tile<M, 2, STRIPES>, part_of_tile<M, 3, STRIPES>,
         part_of_tile<M, 4, STRIPES>},
        {part_of_tile<M, 1, SCATTERED>, part_of_tile<M, 2, SCATTERED>, part_of_tile<M, 3, SCATTERED>,
         part_of_tile<M, 4, SCATTERED>}};
    auto *function = chosen[w.form][used_vectors(tokens, tile) - 1];
    function(w, next ? *next : w, first, last, q + tile * w.inputs * T, y, levels);
}

#if defined(TILES)
// The outputs first to last of all tiles, on tile registers: into y, whose tiles are `pitch` apart and begin at output
// `first`, or into `levels`. Their weights are expanded once.
template <class M>
static void on_registers(const Weights &w, const Weights *next, int64_t tokens, int64_t first, int64_t last,
                         const uint8_t *q, float *y, int64_t pitch, uint8_t *levels) {
    constexpr int GATHERED = 4;                                     // steps: 16 KB of B
    thread_local std::vector<A> expanded;
    alignas(64) int32_t sums[2 * SIDE * T];
    alignas(64) uint8_t b[GATHERED * SIDE * ROW];
    const int64_t begin = first / SIDE, end = (last + SIDE - 1) / SIDE, whole = w.inputs / STEP, rest = w.inputs % STEP;
    const int32_t *starts = w.starts, *survivors = w.starts + (w.outputs + SIDE - 1) / SIDE + 1;
    const int8_t *survivor = (const int8_t *)w.blocks + survivors[begin];
    const int64_t needed = starts[end] - starts[begin];
    if ((int64_t)expanded.size() < needed) expanded.resize(needed);
    for (int64_t step = 0; step < needed; step++)
        for (int64_t row = 0; row < SIDE; row++) {
            uint64_t alive = w.alive[(starts[begin] + step) * SIDE + row];
            expand(alive, survivor, expanded[step].row[row]);
            survivor += __builtin_popcountll(alive);
        }
    if (rest) std::memset(b, 0, SIDE * ROW);
    Registers registers;
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++) {
        const uint8_t *x = q + tile * w.inputs * T;
        if (rest) std::memcpy(b, x + whole * SIDE * ROW, rest / 4 * ROW);       // the remaining rows of b meet zeros
        for (int64_t block = begin, blocks; block < end; block += blocks) {
            const A *a = expanded.data() + (starts[block] - starts[begin]);
            const int64_t steps = starts[block + 1] - starts[block];
            blocks = w.form == WHOLE_TILES && block + 1 < end ? 2 : 1;
            written();
            if (w.form == GATHERED_TILES) {
                clear();
                for (int64_t step = 0, count; step < steps; step += count) {
                    count = std::min<int64_t>(GATHERED, steps - step);
                    gather(x, w.columns + (starts[block] + step) * SIDE, count, b);
                    one_by_four(a + step, count, b);
                }
                store_one_by_four(sums);
            } else if (blocks == 1) {
                clear();
                one_by_four(a, whole, x);
                if (rest) one_by_four(a + whole, 1, b);
                store_one_by_four(sums);
            } else
                for (int half = 0; half < (used_vectors(tokens, tile) > 2 ? 2 : 1); half++) {
                    clear();
                    two_by_two(a, a + steps, whole, x + half * ROW / 2);
                    if (rest) two_by_two(a + whole, a + steps + whole, 1, b + half * ROW / 2);
                    store_two_by_two(sums + half * T / 2);
                }
            for (int64_t output = std::max(first, block * SIDE); output < std::min(last, (block + blocks) * SIDE);
                 output += 4) {
                ints s[4][4];
                for (int o = 0; o < 4; o++)
                    for (int v = 0; v < 4; v++)
                        s[o][v] = ((const ints *)(sums + (output - block * SIDE + o) * T))[v]
                                  - w.zero_point * w.sums[output + o];
                finish<M, 4>(w, next ? *next : w, output, s, y ? y + tile * pitch + (output - first) * T : nullptr,
                             levels ? levels + tile * w.outputs * T : nullptr);
            }
        }
    }
}
#endif

template <class M>
static void linear_on(const Weights &w, int64_t tokens, const uint8_t *q, float *y, uint8_t *levels,
                      const Weights *next) {
#if defined(TILES)
    if (on_tiles(w)) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t first = 0; first < w.outputs; first += 2 * SIDE)
            on_registers<M>(w, next, tokens, first, std::min<int64_t>(w.outputs, first + 2 * SIDE), q,
                            y ? y + first * T : nullptr, w.outputs * T, levels);
        return;
    }
#endif
    int64_t parts = (w.outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t part = 0; part < parts; part++) {
            int64_t first = part * OUTPUTS, last = std::min(w.outputs, first + OUTPUTS), place = tile * w.outputs * T;
            on_tile<M>(w, next, tokens, tile, first, last, q, y ? y + place + first * T : nullptr,
                       levels ? levels + place : nullptr);
        }
}

// y: float tiles of w's outputs. Or, with y null, these through GELU into `levels`, as the layer `next` reads them.
extern "C" void linear(const Weights *w, int64_t tokens, const uint8_t *q, float *y, uint8_t *levels,
                       const Weights *next) {
    auto *on = w->portable ? linear_on<Portable> : linear_on<Machine>;
    on(*w, tokens, q, y, levels, next);
}
