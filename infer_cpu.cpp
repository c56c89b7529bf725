// Sparse INT8 BERT on a CPU. Compiled and called by infer_cpu.py; plain C interface, OpenMP threads (torch's own).
//
// Activations lie in tiles of T tokens, tokens innermost, so that every loop over tokens is a vector loop and nothing is
// ever reduced across a vector. A buffer of n tokens and F features is ceil(n / T) tiles, each of them
//
//     float   x[F][T]             one row per feature
//     words   q[F / 4][T][4]      uint8; four consecutive features of one token are one 32-bit word
//     bytes   q[F][T]             uint8; tokens in the order that `interleave` undoes
//
//         words, T = 4:    token 0   token 1   token 2   token 3
//         features 0-3    |0 1 2 3| |0 1 2 3| |0 1 2 3| |0 1 2 3|      <- one load, then one dot instruction
//         features 4-7    |4 5 6 7| |4 5 6 7| |4 5 6 7| |4 5 6 7|         multiplies it by one weight block
//
// A weight block is four int8 in a 32-bit word, and which four differs by the pattern:
//
//     1x4             four consecutive inputs of one output: exactly a row of `words`; nothing to rearrange
//     4x1             four consecutive outputs of one input: four inputs that survive together are interleaved from
//                     `bytes` once, and multiplied by four blocks, one per output
//     unstructured    any four surviving inputs of one output, interleaved for that output alone
//
// The bound of a 1x4 layer: per block and 16 tokens (AVX-512) one 64-byte load and one dot instruction, plus one
// broadcast per block; a core that does two loads a cycle needs (T/16 + 1) / 2 cycles for 4 T multiply-adds.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef int32_t ints __attribute__((vector_size(64), aligned(64)));         // 16 tokens
typedef float floats __attribute__((vector_size(64), aligned(64)));
constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int T = 64;           // 4 accumulators of 16 tokens
#else
constexpr int T = 32;
#endif
constexpr int VECTORS = T / LANES;

static inline ints broadcast(int32_t x) { return x - ints{}; }
static inline floats broadcast(float x) { return x - floats{}; }
static inline floats to_floats(ints x) { return __builtin_convertvector(x, floats); }
static inline ints to_ints(floats x) { return __builtin_convertvector(x, ints); }
static inline ints bits(floats x) { return (ints)x; }
template <class V> static inline V least(V a, V b) { return a < b ? a : b; }
template <class V> static inline V most(V a, V b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// The two instructions that differ from CPU to CPU.
//     dot(sum, x, w)       sum[t] + x[t][0] w[0] + ... + x[t][3] w[3] for 16 tokens: x uint8, w int8, sum int32
//     interleave(q, x)     four rows of `bytes` -> their T words

#if defined(__AVX512VNNI__)
static inline ints dot(ints sum, ints x, ints w) { return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }
#elif defined(__AVX2__)
static inline __m256i dot(__m256i sum, __m256i x, __m256i w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, x, w);
#else       // adds two products in 16 bits: exact for x below 128
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
}
static inline ints dot(ints sum, ints x, ints w) {
    auto *s = (__m256i *)&sum, *a = (__m256i *)&x, *b = (__m256i *)&w;
    for (int half = 0; half < 2; half++) s[half] = dot(s[half], a[half], b[half]);
    return sum;
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
static inline ints dot(ints sum, ints x, ints w) {
    auto *s = (int32x4_t *)&sum; auto *a = (uint8x16_t *)&x; auto *b = (int8x16_t *)&w;
    for (int part = 0; part < 4; part++) s[part] = vusdotq_s32(s[part], a[part], b[part]);
    return sum;
}
#else
static inline ints dot(ints sum, ints x, ints w) {
    for (int byte = 0; byte < 4; byte++) sum += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
    return sum;
}
#endif

#if defined(__AVX512BW__)
static inline void interleave(const uint8_t *const q[4], ints x[VECTORS]) {
    __m512i a = _mm512_load_si512(q[0]), b = _mm512_load_si512(q[1]), c = _mm512_load_si512(q[2]), d = _mm512_load_si512(q[3]);
    __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    x[0] = (ints)_mm512_unpacklo_epi16(ab, cd); x[1] = (ints)_mm512_unpackhi_epi16(ab, cd);
    x[2] = (ints)_mm512_unpacklo_epi16(AB, CD); x[3] = (ints)_mm512_unpackhi_epi16(AB, CD);
}
static inline int place(int token) { return token % 4 + 16 * (token / 4 % 4) + 4 * (token / 16); }
#elif defined(__AVX2__)
static inline void interleave(const uint8_t *const q[4], ints x[VECTORS]) {
    auto load = [&](int i) { return _mm256_load_si256((const __m256i *)q[i]); };
    __m256i a = load(0), b = load(1), c = load(2), d = load(3);
    __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
    __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
    auto *y = (__m256i *)x;
    y[0] = _mm256_unpacklo_epi16(ab, cd); y[1] = _mm256_unpackhi_epi16(ab, cd);
    y[2] = _mm256_unpacklo_epi16(AB, CD); y[3] = _mm256_unpackhi_epi16(AB, CD);
}
static inline int place(int token) { return token % 4 + 16 * (token / 4 % 2) + 4 * (token / 8); }
#else
static inline void interleave(const uint8_t *const q[4], ints x[VECTORS]) {
    auto *y = (uint8_t *)x;
    for (int token = 0; token < T; token++)
        for (int i = 0; i < 4; i++) y[4 * token + i] = q[i][token];
}
static inline int place(int token) { return token; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic on 16 tokens

struct Grid { float reciprocal; int32_t zero_point, highest; };         // of uint8 activations

// Nearest level, half to even: adding 1.5 * 2^23 leaves no bits for the fraction.
static inline ints level(floats x, Grid g) {
    const floats magic = broadcast(12582912.0f);
    floats low = broadcast((float)-g.zero_point), high = broadcast((float)(g.highest - g.zero_point));
    x = least(most(x * g.reciprocal, low), high);
    return bits(x + magic) - bits(magic) + g.zero_point;
}

// 2^x for x <= 0, relative error 2e-7: 2^whole by its exponent bits, 2^fraction by a polynomial on [-1/2, 1/2]
static inline floats exp2(floats x) {
    const floats magic = broadcast(12582912.0f);
    x = most(x, broadcast(-126.0f));
    floats whole = (x + magic) - magic, f = x - whole;
    floats p = broadcast(1.54035304e-4f);
    p = p * f + 1.33335581e-3f; p = p * f + 9.61812911e-3f; p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f; p = p * f + 6.93147181e-1f; p = p * f + 1.0f;
    return (floats)(bits(p) + (to_ints(whole) << 23));
}

// x Phi(x) with erf of Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
static inline floats gelu(floats x) {
    floats z = (floats)(bits(x) & 0x7fffffff) * 0.70710678f;
    floats t = 1.0f / (1.0f + 0.3275911f * z);
    floats tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    tail = 0.5f * tail * exp2(z * z * -1.44269504f);                     // 1 - Phi(|x|)
    return x > broadcast(0.0f) ? x - x * tail : x * tail;
}

static inline void store_level(uint8_t *q, int feature, int vector, ints value, bool words) {       // one feature, 16 tokens
    if (words)
        for (int i = 0; i < LANES; i++) q[(feature / 4 * T + vector * LANES + i) * 4 + feature % 4] = (uint8_t)value[i];
    else
        for (int i = 0; i < LANES; i++) q[feature * T + place(vector * LANES + i)] = (uint8_t)value[i];
}

// Four consecutive features of 16 tokens into either layout.
static inline void store_levels(uint8_t *q, int feature, int vector, const ints v[4], bool words) {
    if (words)
        *(ints *)(q + (feature / 4 * T + vector * LANES) * 4) = v[0] | v[1] << 8 | v[2] << 16 | v[3] << 24;
    else
        for (int i = 0; i < 4; i++) store_level(q, feature + i, vector, v[i], false);
}

static inline int used_vectors(int64_t tokens, int64_t tile) {          // the last tile may be partly empty
    return (int)std::min<int64_t>(VECTORS, (tokens - tile * T + LANES - 1) / LANES);
}

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers

extern "C" struct Weights {         // of one layer, packed by infer_cpu.py
    int64_t outputs, inputs;
    int32_t pattern;                // 0: 1x4    1: 4x1    2: unstructured
    const int32_t *starts;          // 1x4, unstructured (outputs + 1,): first block of each output; 4x1: of each four outputs
    const uint16_t *columns;        // 1x4: input / 4 of each block; else four inputs of each block (for 4x1: of each four blocks)
    const int32_t *blocks;          // four int8 each
    const int32_t *sums;            // (outputs,) sum of the output's weights times the zero point
    const float *scales, *bias;     // (outputs,) of the product, input scale included
};

// Sums of four consecutive outputs, N vectors of tokens.
template <int N> static inline void product(const Weights &w, int64_t output, const uint8_t *q, ints sum[4][VECTORS]) {
    if (w.pattern == 0) {
        for (int row = 0; row < 4; row++) {
            ints s[N] = {};
            for (int32_t b = w.starts[output + row]; b < w.starts[output + row + 1]; b++) {
                const ints *x = (const ints *)(q + (int64_t)w.columns[b] * T * 4), weight = broadcast(w.blocks[b]);
                for (int v = 0; v < N; v++) s[v] = dot(s[v], x[v], weight);
            }
            for (int v = 0; v < N; v++) sum[row][v] = s[v];
        }
    } else if (w.pattern == 1) {
        ints s[4][N] = {};
        for (int32_t b = w.starts[output / 4]; b < w.starts[output / 4 + 1]; b++) {
            const uint16_t *c = w.columns + 4 * b;
            const uint8_t *rows[4] = {q + c[0] * T, q + c[1] * T, q + c[2] * T, q + c[3] * T};
            ints x[VECTORS];
            interleave(rows, x);
            for (int row = 0; row < 4; row++)
                for (int v = 0; v < N; v++) s[row][v] = dot(s[row][v], x[v], broadcast(w.blocks[4 * b + row]));
        }
        for (int row = 0; row < 4; row++)
            for (int v = 0; v < N; v++) sum[row][v] = s[row][v];
    } else {
        for (int row = 0; row < 4; row++) {
            ints s[N] = {};
            for (int32_t b = w.starts[output + row]; b < w.starts[output + row + 1]; b++) {
                const uint16_t *c = w.columns + 4 * b;
                const uint8_t *rows[4] = {q + c[0] * T, q + c[1] * T, q + c[2] * T, q + c[3] * T};
                ints x[VECTORS], weight = broadcast(w.blocks[b]);
                interleave(rows, x);
                for (int v = 0; v < N; v++) s[v] = dot(s[v], x[v], weight);
            }
            for (int v = 0; v < N; v++) sum[row][v] = s[v];
        }
    }
}

// Four outputs of one tile: product, scale, bias, then either float32 or GELU and the next layer's levels.
template <int N> static inline void four_outputs(const Weights &w, int64_t output, const uint8_t *q, float *y, uint8_t *next,
                                                 Grid grid, bool words) {
    ints sum[4][VECTORS];
    product<N>(w, output, q, sum);
    for (int v = 0; v < N; v++) {
        ints value[4];
        for (int row = 0; row < 4; row++) {
            int64_t o = output + row;
            floats x = to_floats(sum[row][v] - w.sums[o]) * w.scales[o] + w.bias[o];
            if (y) *(floats *)(y + o * T + v * LANES) = x;
            else value[row] = level(gelu(x), grid);
        }
        if (!y) store_levels(next, (int)output, v, value, words);
    }
}

extern "C" void linear(const Weights *w, int64_t tokens, const uint8_t *q, float *y, uint8_t *next, float reciprocal,
                       int32_t zero_point, int32_t highest, int32_t words) {
    Grid grid = {reciprocal, zero_point, highest};
    int64_t tiles = (tokens + T - 1) / T, chunk = 32, chunks = (w->outputs + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t part = 0; part < chunks; part++) {
            const uint8_t *x = q + tile * w->inputs * T;
            float *out = y ? y + tile * w->outputs * T : nullptr;
            uint8_t *after = next ? next + tile * w->outputs * T : nullptr;
            for (int64_t o = part * chunk; o < std::min(w->outputs, (part + 1) * chunk); o += 4) switch (used_vectors(tokens, tile)) {
                case 1: four_outputs<1>(*w, o, x, out, after, grid, words); break;
                case 2: four_outputs<2>(*w, o, x, out, after, grid, words); break;
                case 3: four_outputs<VECTORS < 3 ? VECTORS : 3>(*w, o, x, out, after, grid, words); break;
                default: four_outputs<VECTORS>(*w, o, x, out, after, grid, words);
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Between the linear layers

// float (tokens, features), row by row -> tiles
extern "C" void to_tiles(int64_t tokens, int64_t features, const float *x, float *y) {
#pragma omp parallel for
    for (int64_t tile = 0; tile < (tokens + T - 1) / T; tile++)
        for (int64_t f = 0; f < features; f++)
            for (int64_t t = 0; t < T; t++)
                y[(tile * features + f) * T + t] = tile * T + t < tokens ? x[(tile * T + t) * features + f] : 0.0f;
}

// tiles of float -> tiles of levels
extern "C" void quantize(int64_t tokens, int64_t features, const float *x, uint8_t *q, float reciprocal, int32_t zero_point,
                         int32_t highest, int32_t words) {
    Grid grid = {reciprocal, zero_point, highest};
#pragma omp parallel for
    for (int64_t tile = 0; tile < (tokens + T - 1) / T; tile++)
        for (int64_t f = 0; f < features; f += 4)
            for (int v = 0; v < used_vectors(tokens, tile); v++) {
                ints value[4];
                for (int i = 0; i < 4; i++) value[i] = level(*(const floats *)(x + (tile * features + f + i) * T + v * LANES), grid);
                store_levels(q + tile * features * T, (int)f, v, value, words);
            }
}

// y = LayerNorm(x + residual) in float32, and its levels for the next layer. residual may be null; y may be x.
extern "C" void layer_norm(int64_t tokens, int64_t features, const float *x, const float *residual, const float *gain,
                           const float *bias, float epsilon, float *y, uint8_t *q, float reciprocal, int32_t zero_point,
                           int32_t highest, int32_t words) {
    Grid grid = {reciprocal, zero_point, highest};
#pragma omp parallel for
    for (int64_t group = 0; group < (tokens + LANES - 1) / LANES; group++) {
        int64_t tile = group / VECTORS, offset = tile * features * T + group % VECTORS * LANES;
        floats sum = {}, squares = {};
        for (int64_t f = 0; f < features; f++) {
            floats value = *(const floats *)(x + offset + f * T);
            if (residual) value += *(const floats *)(residual + offset + f * T);
            *(floats *)(y + offset + f * T) = value;
            sum += value;
        }
        floats mean = sum / (float)features;
        for (int64_t f = 0; f < features; f++) {
            floats d = *(floats *)(y + offset + f * T) - mean;
            squares += d * d;
        }
        floats rate;
        for (int i = 0; i < LANES; i++) rate[i] = 1.0f / std::sqrt(squares[i] / (float)features + epsilon);
        for (int64_t f = 0; f < features; f += 4) {
            ints value[4];
            for (int i = 0; i < 4; i++) {
                floats *place = (floats *)(y + offset + (f + i) * T);
                *place = (*place - mean) * rate * gain[f + i] + bias[f + i];
                value[i] = level(*place, grid);
            }
            store_levels(q + tile * features * T, (int)f, (int)(group % VECTORS), value, words);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: softmax(Q^T K / sqrt(D)) V for every sequence and head. Sequences lie one after another without padding.

constexpr int QUERIES = 2 * LANES;

// One head of one sequence out of tiles: x[D][length], rows `stride` apart
static void gather(const float *tiles, int64_t features, int64_t begin, int64_t length, int64_t first, int64_t D, float *x, int64_t stride) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t t = 0; t < length;) {
            int64_t token = begin + t, run = std::min(length - t, T - token % T);
            std::memcpy(x + d * stride + t, tiles + (token / T * features + first + d) * T + token % T, run * sizeof(float));
            t += run;
        }
}

template <int R> static inline void multiply(int64_t depth, const float *rows, int64_t row_stride, int64_t step, const float *columns,
                                             floats out[R][2]) {        // out[r] = sum_k rows[r, k] * columns[k]
    floats sum[R][2] = {};
    for (int64_t k = 0; k < depth; k++) {
        const floats *c = (const floats *)(columns + k * QUERIES);
        for (int r = 0; r < R; r++) {
            floats value = broadcast(rows[r * row_stride + k * step]);
            sum[r][0] += value * c[0]; sum[r][1] += value * c[1];
        }
    }
    for (int r = 0; r < R; r++) { out[r][0] = sum[r][0]; out[r][1] = sum[r][1]; }
}

// qkv: tiles of 3 H features. starts: (sequences + 1,) tokens. q: levels of the H features of the context.
// scratch: per thread, floats_of_scratch(longest, D) floats.
extern "C" int64_t floats_of_scratch(int64_t longest, int64_t D) {
    int64_t padded = (longest + QUERIES - 1) / QUERIES * QUERIES;
    return 2 * D * padded + D * QUERIES + padded * QUERIES + 16;
}

#include <omp.h>
extern "C" void attention(int64_t sequences, const int64_t *starts, int64_t heads, int64_t D, const float *qkv, uint8_t *q,
                          float *scratch, int64_t scratch_floats, float reciprocal, int32_t zero_point, int32_t highest, int32_t words) {
    Grid grid = {reciprocal, zero_point, highest};
    int64_t H = heads * D;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t begin = starts[s], n = starts[s + 1] - begin, padded = (n + QUERIES - 1) / QUERIES * QUERIES;
            float *key = scratch + omp_get_thread_num() * scratch_floats, *value = key + D * padded;
            float *query = value + D * padded, *score = query + D * QUERIES;
            gather(qkv, 3 * H, begin, n, H + head * D, D, key, padded);
            gather(qkv, 3 * H, begin, n, 2 * H + head * D, D, value, padded);
            float scale = 1.44269504f / std::sqrt((float)D);
            for (int64_t first = 0; first < n; first += QUERIES) {
                int64_t count = std::min<int64_t>(QUERIES, n - first);
                gather(qkv, 3 * H, begin + first, count, head * D, D, query, QUERIES);
                for (int64_t d = 0; d < D; d++)
                    for (int64_t i = 0; i < QUERIES; i++) query[d * QUERIES + i] = i < count ? query[d * QUERIES + i] * scale : 0.0f;
                floats top[2] = {broadcast(-1e30f), broadcast(-1e30f)}, total[2] = {};
                for (int64_t j = 0; j < n; j += 4) {                   // rows beyond n are computed and not used
                    floats out[4][2];
                    multiply<4>(D, key + j, 1, padded, query, out);
                    for (int64_t r = 0; r < std::min<int64_t>(4, n - j); r++)
                        for (int v = 0; v < 2; v++) {
                            *(floats *)(score + (j + r) * QUERIES + v * LANES) = out[r][v];
                            top[v] = most(top[v], out[r][v]);
                        }
                }
                for (int64_t j = 0; j < n; j++)
                    for (int v = 0; v < 2; v++) {
                        floats *p = (floats *)(score + j * QUERIES + v * LANES);
                        *p = exp2(*p - top[v]);
                        total[v] += *p;
                    }
                for (int64_t d = 0; d < D; d += 4) {
                    floats out[4][2];
                    multiply<4>(n, value + d * padded, padded, 1, score, out);
                    for (int64_t i = 0; i < count; i++) {
                        int64_t token = begin + first + i, feature = head * D + d;
                        uint8_t *tile = q + token / T * H * T;
                        (void)tile; (void)feature;
                    }
                    for (int v = 0; v < 2; v++) {
                        ints levels[4];
                        for (int r = 0; r < 4; r++) levels[r] = level(out[r][v] / total[v], grid);
                        ints word = levels[0] | levels[1] << 8 | levels[2] << 16 | levels[3] << 24;
                        for (int64_t i = 0; i < LANES && v * LANES + i < count; i++) {
                            int64_t token = begin + first + v * LANES + i, feature = head * D + d;
                            uint8_t *tile = q + token / T * H * T;
                            if (words) std::memcpy(tile + (feature / 4 * T + token % T) * 4, (const int32_t *)&word + i, 4);
                            else for (int r = 0; r < 4; r++) tile[(feature + r) * T + place((int)(token % T))] = (uint8_t)levels[r][i];
                        }
                    }
                }
            }
        }
}

extern "C" int32_t tokens_of_tile() { return T; }
