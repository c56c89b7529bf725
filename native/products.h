// A layer's weights, levels of activations, and the product of the two in five forms. Fourth of six files; the layouts
// are drawn in vectors.h and tiles.h.
#pragma once
#include "functions.h"
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

// Nearest level.
static inline ints level(floats x, const Weights &next) {
    const floats rounding = broadcast(ROUNDING);
    floats low = broadcast((float)-next.zero_point), high = broadcast((float)(next.highest - next.zero_point));
    x = least(most(x * next.reciprocal, low), high);
    return (ints)(x + rounding) + (next.zero_point - (ints)rounding);
}

// Four features of a tile, from `feature` on, into the layout that the layer `next` reads.
template <class M>
static inline void store_rows(uint8_t *q, int64_t feature, const bytes row[4], const Weights &next) {
    if (next.form == WORDS || on_tiles(next)) {
        const bytes *const four[4] = {row, row + 1, row + 2, row + 3};
        M::interleave(four, (ints *)(q + feature * T));
    } else
        for (int i = 0; i < 4; i++) ((bytes *)(q + feature * T))[i] = row[i];
}
template <class M>
static inline void store_levels(uint8_t *q, int64_t feature, const ints value[4][4], const Weights &next) {
    bytes row[4];
    for (int i = 0; i < 4; i++) row[i] = M::narrow(value[i]);
    store_rows<M>(q, feature, row, next);
}

static inline int64_t tiles_of(int64_t tokens) { return (tokens + T - 1) / T; }

// How many of a tile's four vectors hold tokens: fewer only in the last one.
static inline int used_vectors(int64_t tokens, int64_t tile) {
    return (int)std::min<int64_t>(4, (tokens - tile * T + LANES - 1) / LANES);
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

// An output of a tile whose sum is complete: into y, float32; or with y null through GELU into its row of levels.
template <class M, int N>
static inline void finish_one(const Weights &w, const Weights &next, int64_t output, const ints s[N], float *y,
                              bytes row[4]) {
    if (y) {
        for (int v = 0; v < N; v++) *(floats *)(y + v * LANES) = scaled(w, output, s[v]);
    } else {
        ints value[4] = {};
        for (int v = 0; v < N; v++) value[v] = level(gelu(scaled(w, output, s[v])), next);
        row[output % 4] = M::narrow(value);
    }
}

// Four outputs from `output` on: into y, or into the `levels` of `next`, which begin at output 0.
template <class M, int N>
static inline void finish(const Weights &w, const Weights &next, int64_t output, const ints s[4][N], float *y,
                          uint8_t *levels) {
    bytes row[4];
    for (int o = 0; o < 4; o++) finish_one<M, N>(w, next, output + o, s[o], y ? y + o * T : nullptr, row);
    if (!y) store_rows<M>(levels, output, row, next);
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
// One or two blocks of SIDE outputs, of which first to last are wanted; `row`: where the first of them is in y. Two
// share what they read of B; gathered ones have each their own.
struct Unit { int64_t block, blocks, first, last, row; };

// Units of `ranges` ranges of `size` outputs, `stride` apart from `first` on.
static void find_units(const Weights &w, int64_t first, int64_t size, int64_t ranges, int64_t stride,
                       std::vector<Unit> &units) {
    units.clear();
    for (int64_t range = 0; range < ranges; range++)
        for (int64_t begin = first + range * stride, at = begin, end = begin + size, last; at < end; at = last) {
            int64_t block = at / SIDE, blocks = w.form == WHOLE_TILES && (block + 1) * SIDE < end ? 2 : 1;
            last = std::min(end, (block + blocks) * SIDE);
            units.push_back({block, blocks, at, last, range * size + at - begin});
        }
}

// The sums of a unit and a tile on their way to y or levels, as `finish` has it, one output at a time.
template <class M> struct Finishing {
    const Weights &w, &next;
    const int32_t *sums = nullptr;                                  // of `output`, [T]
    int64_t output = 0, last = 0;
    float *y = nullptr;                                             // of `output`
    uint8_t *levels = nullptr;                                      // of the tile
    bytes row[4] = {};

    void one() {
        ints s[4];
        for (int v = 0; v < 4; v++) s[v] = ((const ints *)sums)[v] - w.zero_point * w.sums[output];
        finish_one<M, 4>(w, next, output, s, y, row);
        if (y) y += T;
        else if (output % 4 == 3) store_rows<M>(levels, output - 3, row, next);
        output++, sums += T;
    }
    void rest() {
        while (output < last) one();
    }
};

// The outputs that find_units has, of all tiles, on tile registers: into y, whose tiles are `pitch` apart and have the
// ranges one after the other, or into `levels`. A unit's weights are expanded once. While tile registers multiply it by
// one tile, vectors finish the one before: piece by piece, for they hold a CPU up that gets too many of them at once.
template <class M>
static void on_registers(const Weights w, const Weights next, int64_t tokens, int64_t first, int64_t size,
                         int64_t ranges, int64_t stride, const uint8_t *q, float *y, int64_t pitch, uint8_t *levels) {
    constexpr int GATHERED = 4;                                     // steps: 16 KB of B
    thread_local std::vector<Unit> units;
    thread_local std::vector<A> expanded;
    alignas(64) int32_t sums[2][2 * SIDE * T] = {};                 // of this tile and the one before
    alignas(64) uint8_t b[GATHERED * SIDE * ROW];
    const int64_t whole = w.inputs / STEP, tiles = tiles_of(tokens);
    const int64_t rest = w.form == WHOLE_TILES ? w.inputs % STEP : 0;
    const int32_t *starts = w.starts, *survivors = w.starts + (w.outputs + SIDE - 1) / SIDE + 1;
    find_units(w, first, size, ranges, stride, units);
    if ((int64_t)expanded.size() < 2 * (whole + 1)) expanded.resize(2 * (whole + 1));
    if (rest) std::memset(b, 0, SIDE * ROW);
    Finishing<M> before{w, next};
    Registers registers;
    int turn = 0;
    for (const Unit &unit : units) {
        const A *a = expanded.data();
        const int64_t begin = starts[unit.block], steps = starts[unit.block + 1] - begin;
        expand_all(w.alive + begin * SIDE, (const int8_t *)w.blocks + survivors[unit.block],
                   starts[unit.block + unit.blocks] - begin, expanded.data());
        for (int64_t tile = 0; tile < tiles; tile++, turn ^= 1) {
            const uint8_t *x = q + tile * w.inputs * T;
            const int halves = unit.blocks == 1 || used_vectors(tokens, tile) < 3 ? 1 : 2;
            const int64_t pieces = before.last - before.output, calls = steps * halves;
            int64_t due = 0;
            auto meanwhile = [&] {
                for (due += pieces; due >= calls; due -= calls) before.one();
                written();
            };
            if (rest) std::memcpy(b, x + whole * SIDE * ROW, rest / 4 * ROW);   // the remaining rows of b meet zeros
            written();                                                          // also what expand_all wrote
            for (int half = 0; half < halves; half++) {
                clear();
                if (unit.blocks == 2) {
                    two_by_two(a, a + steps, whole, x + half * ROW / 2, meanwhile);
                    if (rest) two_by_two(a + whole, a + steps + whole, 1, b + half * ROW / 2, meanwhile);
                    store_two_by_two(sums[turn] + half * T / 2);
                    continue;
                }
                if (w.form == WHOLE_TILES) {
                    one_by_four(a, whole, x, meanwhile);
                    if (rest) one_by_four(a + whole, 1, b, meanwhile);
                } else
                    for (int64_t step = 0, count; step < steps; step += count) {
                        count = std::min<int64_t>(GATHERED, steps - step);
                        gather(x, w.columns + (begin + step) * SIDE, count, b);
                        one_by_four(a + step, count, b, meanwhile);
                    }
                store_one_by_four(sums[turn]);
            }
            written();
            before.rest();
            before.sums = sums[turn] + (unit.first - unit.block * SIDE) * T;
            before.output = unit.first, before.last = unit.last;
            before.y = y ? y + tile * pitch + unit.row * T : nullptr;
            before.levels = levels ? levels + tile * w.outputs * T : nullptr;
        }
    }
    before.rest();
}
#endif

template <class M>
static void linear_on(const Weights &w, int64_t tokens, const uint8_t *q, float *y, uint8_t *levels,
                      const Weights *next) {
#if defined(TILES)
    if (on_tiles(w)) {
        const int64_t shares = omp_in_parallel() ? 1 : 4 * omp_get_max_threads();
        const int64_t units = (w.outputs + 2 * SIDE - 1) / (2 * SIDE);
        const int64_t size = (units + shares - 1) / shares * (2 * SIDE);
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t first = 0; first < w.outputs; first += size)
            on_registers<M>(w, next ? *next : w, tokens, first, std::min(size, w.outputs - first), 1, 0, q,
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
