// Attention: softmax(Q K^T / sqrt(D)) V of every sequence and head. Sequences lie one after another without padding.
// Fifth of six files.
#pragma once
#include "products.h"

constexpr int QUERIES = 2 * LANES;      // taken together: two vectors
constexpr int ROWS = T == 64 ? 8 : 4;   // of a product at once: as many sums as there are registers for
struct alignas(T) Line { float x[LANES]; };         // a vector in memory that grows aligned

// The runs of floats that the tokens begin to begin + count have in tiles, D features from `first` on of `features`,
// and in query[D][QUERIES]: copy(place in the tiles, place in query, bytes).
template <class Copy>
static inline void each_run(int64_t features, int64_t first, int64_t D, int64_t begin, int64_t count, Copy copy) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t t = 0; t < count;) {
            int64_t token = begin + t, run = std::min(count - t, T - token % T);
            copy((token / T * features + first + d) * T + token % T, d * QUERIES + t, run * sizeof(float));
            t += run;
        }
}

// out[r] + the sum over k of row r at k times columns[k], which are QUERIES floats; R rows, row_stride apart, their
// entries `step` apart.
template <int R>
static inline void multiply(int64_t depth, const float *rows, int64_t row_stride, int64_t step, const float *columns,
                            floats out[R][2]) {
    floats sum[R][2];
    std::memcpy(sum, out, sizeof(sum));
    for (int64_t k = 0; k < depth; k++) {
        const floats *c = (const floats *)(columns + k * QUERIES);
        floats left = c[0], right = c[1];
        for (int r = 0; r < R; r++) {
            floats value = broadcast(rows[r * row_stride + k * step]);
            sum[r][0] += value * left, sum[r][1] += value * right;
        }
    }
    std::memcpy(out, sum, sizeof(sum));
}

// R features of what QUERIES queries get, `value` being the first of them: probabilities times values, over the tokens
// begin to end, divided by the probabilities' total.
template <int R>
static inline void weigh(const float *value, int64_t features, int64_t begin, int64_t end, const float *probability,
                         const floats reciprocal[2], float *result) {
    floats out[R][2] = {};
    for (int64_t t = begin, next; t < end; t = next) {              // tile by tile
        next = std::min(end, (t / T + 1) * T);
        multiply<R>(next - t, value + t / T * features * T + t % T, T, 1, probability + (t - begin) * QUERIES, out);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) *(floats *)(result + r * QUERIES + v * LANES) = out[r][v] * reciprocal[v];
}

// QUERIES queries of one head, query[D][QUERIES] (already divided by sqrt(D) ln 2), on the tokens begin to end. key and
// value: D features in float tiles of `features`. score: a scratch [end - begin + 2 ROWS][QUERIES]. The result
// replaces the query.
static void attend(int64_t begin, int64_t end, int64_t D, int64_t features, const float *key, const float *value,
                   float *query, float *score) {
    floats top[2] = {broadcast(-1e30f), broadcast(-1e30f)}, total[2] = {};
    int64_t aligned = begin / ROWS * ROWS;          // rows before `begin` and from `end` on are computed and not used
    for (int64_t t = aligned; t < end; t += ROWS) {
        floats out[ROWS][2] = {};
        multiply<ROWS>(D, key + t / T * features * T + t % T, 1, T, query, out);
        std::memcpy(score + (t - aligned) * QUERIES, out, sizeof(out));
        for (int64_t r = std::max<int64_t>(0, begin - t); r < std::min<int64_t>(ROWS, end - t); r++)
            for (int v = 0; v < 2; v++) top[v] = most(top[v], out[r][v]);
    }
    float *probability = score + (begin - aligned) * QUERIES;
    for (int64_t j = 0; j < end - begin; j++)
        for (int v = 0; v < 2; v++) {
            floats *p = (floats *)(probability + j * QUERIES + v * LANES);
            *p = exp2(*p - top[v]);
            total[v] += *p;
        }
    const floats reciprocal[2] = {1.0f / total[0], 1.0f / total[1]};
    int64_t d = 0;
    for (; d + ROWS <= D; d += ROWS)
        weigh<ROWS>(value + d * T, features, begin, end, probability, reciprocal, query + d * QUERIES);
    for (; d < D; d += 4)                           // D is a multiple of four
        weigh<4>(value + d * T, features, begin, end, probability, reciprocal, query + d * QUERIES);
}

// ---------------------------------------------------------------------------------------------------------------------
// The same on tile registers. They multiply numbers of 16 bits (bfloat16, the upper half of a float32) and add up in
// float32 (TDPBF16PS). So that little is lost, a number is taken as the sum of two of them, x = high + low but for
// 2^-17 |x|, and x y as high high + low high + high low.
//
//     A    16 rows of 32 numbers                         of keys a row is a token; of values, a feature
//     B    16 rows, each two numbers of 16 columns       of queries a column is a token; of probabilities, a query
//
// Tokens are taken by BLOCK, as they lie in tiles. Where a sequence begins or ends within, probabilities are 0; what
// the other tokens have is finite, for levels are levels also after the last token, so that 0 times it is 0. In which
// order a row's products are added depends on where it lies among others, and with it its last bits.

#if defined(TILES)
constexpr int BLOCK = 32;               // tokens; and features, of a step
struct Halves { A high, low; };
template <int COLUMNS> struct alignas(64) Columns { uint32_t high[SIDE][COLUMNS], low[SIDE][COLUMNS]; };

static inline ints upper_half(ints x) { return x & (ints)broadcast((int32_t)0xffff0000); }
// In an upper half, what is nearest to x; and to what is left of it.
static inline void split(floats x, ints &high, ints &low) {
    high = upper_half((ints)x + 0x8000), low = upper_half((ints)(x - (floats)high) + 0x8000);
}
// Two upper halves in one word, `below` below.
static inline ints together(ints below, ints above) {
    typedef uint32_t Unsigned __attribute__((vector_size(T), may_alias));
    return (ints)((Unsigned)below >> 16) | above;
}
static inline void split_pair(floats x, floats y, void *high, void *low) {
    ints x_high, x_low, y_high, y_low;
    split(x, x_high, x_low), split(y, y_high, y_low);
    *(ints *)high = together(x_high, y_high), *(ints *)low = together(x_low, y_low);
}

// words[i][j] -> words[j][i]: squares of SQUARE by SQUARE change places, then smaller ones within them.
template <int SQUARE> static inline void transpose(ints words[SIDE]) {
    static_assert(LANES == SIDE, "a square");
    struct Lanes {
        alignas(T) int32_t upper[SIDE] = {}, lower[SIDE] = {};      // of two vectors, one after the other
        constexpr Lanes() {
            for (int j = 0; j < SIDE; j++)
                upper[j] = j & SQUARE ? j - SQUARE + SIDE : j, lower[j] = j & SQUARE ? j + SIDE : j + SQUARE;
        }
    };
    static constexpr Lanes lanes;
    const ints upper = *(const ints *)lanes.upper, lower = *(const ints *)lanes.lower;
    for (int i = 0; i < SIDE; i++) {
        if (i & SQUARE) continue;
        ints a = words[i], b = words[i + SQUARE];
        words[i] = of_two(a, b, upper), words[i + SQUARE] = of_two(a, b, lower);
    }
    if constexpr (SQUARE > 1) transpose<SQUARE / 2>(words);
}

// 32 rows (at `a` and at `below`, `steps` of them) by 32 columns of B, whose rows are `row` words, those of the upper
// halves before those of what is left: registers 0 to 3.
static inline void two_by_two_floats(const Halves *a, const Halves *below, int64_t steps, const uint32_t *b,
                                     int64_t row) {
    auto multiply_all = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    };
    clear();
    for (int64_t step = 0; step < steps; step++, a++, below++, b += 2 * SIDE * row) {
        const uint32_t *low = b + SIDE * row;
        _tile_loadd(4, &a->low, STEP);
        _tile_loadd(5, &below->low, STEP);
        _tile_loadd(6, b, row * 4);
        _tile_loadd(7, b + SIDE, row * 4);
        multiply_all();
        _tile_loadd(4, &a->high, STEP);
        _tile_loadd(5, &below->high, STEP);
        multiply_all();
        _tile_loadd(6, low, row * 4);
        _tile_loadd(7, low + SIDE, row * 4);
        multiply_all();
    }
}

// What one head has of some tiles of tokens, D features in steps of BLOCK; the last one is filled up with zeros.
struct Head {
    int64_t D, steps, tiles;
    std::vector<Columns<T>> queries;            // (tiles, steps), already divided by sqrt(D) ln 2
    std::vector<Halves> keys, values;           // (tokens / 16, steps); (features / 16, tokens / 32)
    std::vector<Columns<BLOCK>> probabilities;  // a scratch
    std::vector<Line> scores;                   // another
};

template <class Number> static inline void grow(std::vector<Number> &vector, size_t needed) {
    if (vector.size() < needed) vector.resize(needed);
}

// y: float tiles of 3 D features, queries, keys and values.
static void lay_out(Head &to, const float *y) {
    alignas(T) static const float nothing[T] = {};
    const floats scale = broadcast(1.44269504f / std::sqrt((float)to.D));
    grow(to.queries, to.tiles * to.steps);
    grow(to.keys, to.tiles * 4 * to.steps);
    grow(to.values, to.tiles * 4 * to.steps);
    for (int64_t tile = 0; tile < to.tiles; tile++, y += 3 * to.D * T) {
        auto feature = [&](int64_t part, int64_t f, int v) {
            return ((const floats *)(f < to.D ? y + (part * to.D + f) * T : nothing))[v];
        };
        for (int64_t step = 0; step < to.steps; step++)
            for (int v = 0; v < 4; v++) {
                Columns<T> &query = to.queries[tile * to.steps + step];
                Halves &key = to.keys[(tile * 4 + v) * to.steps + step];
                ints high[SIDE], low[SIDE];
                for (int i = 0; i < SIDE; i++) {
                    int64_t f = step * BLOCK + 2 * i;
                    split_pair(feature(0, f, v) * scale, feature(0, f + 1, v) * scale,
                               &query.high[i][v * LANES], &query.low[i][v * LANES]);
                    split_pair(feature(1, f, v), feature(1, f + 1, v), &high[i], &low[i]);
                }
                transpose<SIDE / 2>(high), transpose<SIDE / 2>(low);
                std::memcpy(&key.high, high, sizeof(high)), std::memcpy(&key.low, low, sizeof(low));
            }
        for (int64_t f = 0; f < to.steps * BLOCK; f++)
            for (int v = 0; v < 4; v++) {
                typedef int16_t Short __attribute__((vector_size(T / 2), may_alias));
                Halves &value = to.values[(f / SIDE * to.tiles + tile) * 2 + v / 2];
                ints high, low;
                split(feature(2, f, v), high, low);
                ((Short *)value.high.row[f % SIDE])[v % 2] = __builtin_convertvector(high >> 16, Short);
                ((Short *)value.low.row[f % SIDE])[v % 2] = __builtin_convertvector(low >> 16, Short);
            }
    }
}

// Of those of the BLOCK queries from token `at` on that are tokens begin to last: attention to the tokens begin to end.
// context: float tiles of `features`, of which the first D are the head's; its tokens are those of the tiles.
static void attend_on_tiles(Head &head, int64_t at, int64_t begin, int64_t end, int64_t last, int64_t features,
                            float *context) {
    const int64_t lowest = begin / BLOCK, blocks = (end + BLOCK - 1) / BLOCK - lowest;
    grow(head.probabilities, blocks);
    grow(head.scores, (blocks + head.steps) * BLOCK * 2);
    floats(*score)[2] = (floats(*)[2])head.scores.data();               // (tokens) of two vectors of queries
    floats(*out)[2] = score + blocks * BLOCK;                           // (features)
    Columns<BLOCK> *probabilities = head.probabilities.data();
    const uint32_t *query = head.queries[at / T * head.steps].high[0] + at % T;
    for (int64_t block = 0; block < blocks; block++) {
        const Halves *key = &head.keys[2 * (lowest + block) * head.steps];
        two_by_two_floats(key, key + head.steps, head.steps, query, T);
        store_two_by_two((float *)score[block * BLOCK], BLOCK);
    }
    written();
    for (int64_t t = 0; t < blocks * BLOCK; t++)                        // nothing of what is no token of the sequence
        if (t < begin - lowest * BLOCK || t >= end - lowest * BLOCK) score[t][0] = score[t][1] = broadcast(-1e30f);
    floats top[2] = {score[0][0], score[0][1]}, total[2] = {};
    for (int64_t t = 1; t < blocks * BLOCK; t++)
        for (int v = 0; v < 2; v++) top[v] = most(top[v], score[t][v]);
    for (int64_t t = 0; t < blocks * BLOCK; t += 2)
        for (int v = 0; v < 2; v++) {
            floats p = exp2(score[t][v] - top[v]), next = exp2(score[t + 1][v] - top[v]);
            total[v] += p + next;
            Columns<BLOCK> &to = probabilities[t / BLOCK];
            split_pair(p, next, &to.high[t % BLOCK / 2][v * LANES], &to.low[t % BLOCK / 2][v * LANES]);
        }
    written();
    for (int64_t step = 0; step < head.steps; step++) {
        const Halves *value = &head.values[step * 2 * 2 * head.tiles + lowest];
        two_by_two_floats(value, value + 2 * head.tiles, blocks, probabilities->high[0], BLOCK);
        store_two_by_two((float *)out[step * BLOCK], BLOCK);
    }
    written();
    for (int v = 0; v < 2; v++) {
        const floats reciprocal = 1.0f / total[v];
        ints mine;
        for (int i = 0; i < LANES; i++) mine[i] = begin <= at + v * LANES + i && at + v * LANES + i < last ? -1 : 0;
        floats *place = (floats *)(context + at / T * features * T + at % T) + v;
        for (int64_t d = 0; d < head.D; d++, place += 4) *place = mine ? out[d][v] * reciprocal : *place;
    }
}

// All sequences of a head, whose queries, keys and values are y, as one_head has them.
static void all_on_tiles(const float *y, int64_t tokens, int64_t sequences, const int64_t *starts, int64_t D,
                         bool first_only, int64_t features, float *context) {
    thread_local Head head;                                         // grows to what is needed, and is kept
    head.D = D, head.steps = (D + BLOCK - 1) / BLOCK, head.tiles = tiles_of(tokens);
    lay_out(head, y);
    written();
    Registers registers;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t begin = starts[s], end = starts[s + 1], last = first_only ? begin + 1 : end;
        for (int64_t at = begin / BLOCK * BLOCK; at < last; at += BLOCK)
            attend_on_tiles(head, at, begin, end, last, features, context);
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Of every head, on vectors or on tile registers.

// One head, as `attention` below has it: queries, keys and values from levels, into a scratch that stays in cache, then
// attention. seconds[0] and [1] are what the two took.
template <class M>
static void one_head(const Weights &w, int64_t head, int64_t tokens, const uint8_t *q, int64_t sequences,
                     const int64_t *starts, int64_t heads, int64_t D, bool first_only, float *context,
                     double seconds[2]) {
    int64_t longest = 0, whole = tiles_of(tokens) * T;
    for (int64_t s = 0; s < sequences; s++) longest = std::max(longest, starts[s + 1] - starts[s]);
    thread_local std::vector<Line> scratch;                         // grows to what is needed, and is kept
    size_t needed = (3 * D * whole + (D + longest + 2 * ROWS) * QUERIES) / LANES;
    if (scratch.size() < needed) scratch.resize(needed);
    float *y = (float *)scratch.data(), *query = y + 3 * D * whole, *score = query + D * QUERIES;
    double begun = omp_get_wtime();
#if defined(TILES)
    if (on_tiles(w)) on_registers<M>(w, w, tokens, head * D, D, 3, heads * D, q, y, 3 * D * T, nullptr);
    else
#endif
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t row = 0, size; row < 3 * D; row += size) {
            size = std::min<int64_t>(OUTPUTS, D - row % D);
            int64_t first = (row / D * heads + head) * D + row % D;
            on_tile<M>(w, nullptr, tokens, tile, first, first + size, q, y + (tile * 3 * D + row) * T, nullptr);
        }
    double halfway = omp_get_wtime();
    float scale = 1.44269504f / std::sqrt((float)D);
#if defined(TILES)
    if (on_tiles(w)) all_on_tiles(y, tokens, sequences, starts, D, first_only, heads * D, context + head * D * T);
    else
#endif
    for (int64_t s = 0; s < sequences; s++) {
        int64_t end = first_only ? starts[s] + 1 : starts[s + 1];
        for (int64_t begin = starts[s]; begin < end; begin += QUERIES) {
            int64_t count = std::min<int64_t>(QUERIES, end - begin);
            std::memset(query, 0, D * QUERIES * sizeof(float));
            each_run(3 * D, 0, D, begin, count,
                     [=](int64_t tile, int64_t to, size_t size) { std::memcpy(query + to, y + tile, size); });
            for (int64_t i = 0; i < D * QUERIES; i++) query[i] *= scale;
            attend(starts[s], starts[s + 1], D, 3 * D, y + D * T, y + 2 * D * T, query, score);
            each_run(heads * D, head * D, D, begin, count,
                     [=](int64_t tile, int64_t from, size_t size) { std::memcpy(context + tile, query + from, size); });
        }
    }
    seconds[0] = halfway - begun, seconds[1] = omp_get_wtime() - halfway;
}

// What threads have spent on each of some parts; and the time that passed meanwhile, handed out in proportion to that:
// so waiting for the last thread counts.
static inline void add(const double *seconds, double *spent, int parts) {
    for (int part = 0; part < parts; part++)
#pragma omp atomic
        spent[part] += seconds[part];
}
static inline void share(double passed, const double *spent, double *seconds, int parts) {
    double sum = 0.0;
    for (int part = 0; part < parts; part++) sum += spent[part];
    for (int part = 0; part < parts && sum > 0.0; part++) seconds[part] += passed * spent[part] / sum;
}

// context: float tiles of heads * D features. Sequence s is the tokens starts[s] to starts[s + 1] of q; w has the
// queries, then the keys, then the values of every head. first_only: of each sequence only the first token is a query,
// and the context of the others is not set. seconds[0] and [1] grow by the time of products and attention.
extern "C" void attention(const Weights *w, int64_t tokens, const uint8_t *q, int64_t sequences, const int64_t *starts,
                          int64_t heads, int64_t D, int32_t first_only, float *context, double *seconds) {
    auto *on = w->portable ? one_head<Portable> : one_head<Machine>;
    double spent[2] = {}, begun = omp_get_wtime();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; head++) {
        double each[2];
        on(*w, head, tokens, q, sequences, starts, heads, D, first_only, context, each);
        add(each, spent, 2);
    }
    share(omp_get_wtime() - begun, spent, seconds, 2);
}
