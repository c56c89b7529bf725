// Sparse INT8 BERT on a CPU: the functions behind the engine `native` of infer_cpu.py, which compiles this file on
// first use and calls it through a plain C interface. OpenMP threads, torch's own.
//
// Activations lie in tiles of T tokens, tokens innermost, T being the bytes of a vector register (64 with AVX-512
// VNNI, 32 with AVX2, 16 elsewhere). So every loop over tokens is a vector loop, and no sum is ever taken across a
// vector. A buffer of n tokens and F features is ceil(n / T) tiles, each of them
//
//     float   x[F][T]             one row per feature: four vectors
//     words   q[F / 4][T][4]      uint8 levels; four consecutive features of one token are one 32-bit word
//     rows    q[F][T]             uint8 levels; a vector per feature, its tokens in the order that `interleave` undoes
//
//         words, T = 4:    token 0   token 1   token 2   token 3
//         features 0-3    |0 1 2 3| |0 1 2 3| |0 1 2 3| |0 1 2 3|    <- one load; then one `dot` multiplies it by a
//         features 4-7    |4 5 6 7| |4 5 6 7| |4 5 6 7| |4 5 6 7|       weight block and adds to a sum per token
//
// A weight block is four int8 in a 32-bit word. Which four, infer_cpu.py chooses for every layer, by what costs least:
//
//     WORDS      four consecutive inputs of one output (1x4 blocks): a block meets a row of `words`
//     STRIPES    four inputs of four consecutive outputs (4x1 blocks, 4x4 blocks, dense layers): four `rows` are
//                interleaved into words once, and meet four blocks, one per output
//     SCATTERED  any four inputs of one output (unstructured): four `rows` are interleaved for that output alone
//
// The bound. A CPU that loads and multiplies one vector a cycle (AMD Zen 4: 64 bytes) takes, for a block and T tokens,
// four loads of tokens and one of the block: 5 cycles for 4 T multiplications and additions, 102 operations a cycle
// with T = 64. STRIPES loads a quarter of that and is bound by its multiplications, 128 operations a cycle. SCATTERED
// adds eight shuffles to four multiplications: some 70.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(PORTABLE)
constexpr int T = 16;
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int T = 64;
#define VECTOR(name) _mm512_##name
typedef __m512i vector;
#elif defined(__AVX2__)
constexpr int T = 32;
#define VECTOR(name) _mm256_##name
typedef __m256i vector;
#else
constexpr int T = 16;
#endif
constexpr int LANES = T / 4;            // numbers of 32 bits in a vector; four vectors are a tile's tokens

typedef int32_t ints __attribute__((vector_size(T), may_alias));
typedef float floats __attribute__((vector_size(T), may_alias));
typedef uint8_t bytes __attribute__((vector_size(T), may_alias));

static inline ints broadcast(int32_t x) { return x - ints{}; }
static inline floats broadcast(float x) { return x - floats{}; }
#if defined(VECTOR)                     // of a choice between two GCC makes two instructions
static inline floats least(floats a, floats b) { return (floats)VECTOR(min_ps)(a, b); }
static inline floats most(floats a, floats b) { return (floats)VECTOR(max_ps)(a, b); }
#else
static inline floats least(floats a, floats b) { return a < b ? a : b; }
static inline floats most(floats a, floats b) { return a > b ? a : b; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What differs from CPU to CPU: three functions, and the same three in plain C++, for where the others are wrong.
//     dot(sum, x, w)       sum[t] + (x[t][0] - OFFSET) w[0] + ... + (x[t][3] - OFFSET) w[3]: x uint8, w int8, sum int32
//     interleave(q, x)     a vector of each of four `rows` -> their T words, in the order of the tokens
//     narrow(x)            T int32 of 0 to 255, in the order of the tokens -> one of the `rows`

struct Portable {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        for (int byte = 0; byte < 4; byte++) sum += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
        return sum;
    }
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        for (int token = 0; token < T; token++)
            for (int i = 0; i < 4; i++) ((uint8_t *)x)[4 * token + i] = ((const uint8_t *)q[i])[token];
    }
    static inline bytes narrow(const ints x[4]) {
        bytes row;
        for (int token = 0; token < T; token++) row[token] = (uint8_t)x[token / LANES][token % LANES];
        return row;
    }
};

#if defined(VECTOR)
struct Shuffles {                       // within 128 bits each: what `interleave` mixes, `narrow` sorts
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        vector a = (vector)*q[0], b = (vector)*q[1], c = (vector)*q[2], d = (vector)*q[3];
        vector ab = VECTOR(unpacklo_epi8(a, b)), cd = VECTOR(unpacklo_epi8(c, d));
        x[0] = (ints)VECTOR(unpacklo_epi16(ab, cd)), x[1] = (ints)VECTOR(unpackhi_epi16(ab, cd));
        ab = VECTOR(unpackhi_epi8(a, b)), cd = VECTOR(unpackhi_epi8(c, d));
        x[2] = (ints)VECTOR(unpacklo_epi16(ab, cd)), x[3] = (ints)VECTOR(unpackhi_epi16(ab, cd));
    }
    static inline bytes narrow(const ints x[4]) {
        vector low = VECTOR(packs_epi32((vector)x[0], (vector)x[1]));
        vector high = VECTOR(packs_epi32((vector)x[2], (vector)x[3]));
        return (bytes)VECTOR(packus_epi16(low, high));
    }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(PORTABLE)
static const char *const NAME = "AVX-512 VNNI";
struct Machine : Shuffles {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    }
};
#elif defined(__AVX2__) && !defined(PORTABLE)
struct Machine : Shuffles {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        __m256i s = (__m256i)sum, a = (__m256i)x, b = (__m256i)w;
#if defined(__AVXVNNI__)
        return (ints)_mm256_dpbusd_avx_epi32(s, a, b);
#elif ACTIVATION_BITS < 8       // the sum of two products fits into 16 bits
        return (ints)_mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#else                           // it does not: even and odd bytes apart, as 16 bits
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
        return (ints)_mm256_add_epi32(s, _mm256_add_epi32(even, odd));
#endif
    }
};
#if defined(__AVXVNNI__)
static const char *const NAME = "AVX-VNNI";
#else
static const char *const NAME = "AVX2";
#endif
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(PORTABLE)
struct Machine {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)w);
    }
#else                           // signed by signed only
    static constexpr int OFFSET = 128;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)veorq_u8((uint8x16_t)x, vdupq_n_u8(128)), (int8x16_t)w);
    }
#endif
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        uint8x16x2_t ab = vzipq_u8((uint8x16_t)*q[0], (uint8x16_t)*q[1]);
        uint8x16x2_t cd = vzipq_u8((uint8x16_t)*q[2], (uint8x16_t)*q[3]);
        for (int half = 0; half < 2; half++) {
            uint16x8x2_t words = vzipq_u16((uint16x8_t)ab.val[half], (uint16x8_t)cd.val[half]);
            x[2 * half] = (ints)words.val[0], x[2 * half + 1] = (ints)words.val[1];
        }
    }
    static inline bytes narrow(const ints x[4]) {
        int16x8_t low = vcombine_s16(vmovn_s32((int32x4_t)x[0]), vmovn_s32((int32x4_t)x[1]));
        int16x8_t high = vcombine_s16(vmovn_s32((int32x4_t)x[2]), vmovn_s32((int32x4_t)x[3]));
        return (bytes)vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    }
};
#if defined(__ARM_FEATURE_MATMUL_INT8)
static const char *const NAME = "ARM i8mm";
#else
static const char *const NAME = "ARM dot product";
#endif
#else
typedef Portable Machine;
static const char *const NAME = "plain C++";
#endif

// ---------------------------------------------------------------------------------------------------------------------
// A layer as infer_cpu.py packs it. `outputs` and `inputs` are multiples of four.

enum Form { WORDS, STRIPES, SCATTERED };

struct Weights {
    int64_t outputs, inputs, chunks;    // the inputs are taken in `chunks` ranges: one range of a tile stays in cache
    int32_t form, portable;             // portable: use the plain C++
    const int32_t *starts;              // (chunks * rows + 1,): first block of a row in a range; a row is an output, or
                                        // for STRIPES four outputs, whose blocks come in fours
    const uint16_t *columns;            // SCATTERED: the four inputs of each block; STRIPES: of each four blocks
    const void *blocks;                 // int32, four int8 each; WORDS: uint64, these above the place of the block's
                                        // row in a tile, in bytes
    const int32_t *sums;                // (outputs,) sum of the output's weights
    const float *scales, *bias;         // (outputs,) of the product, input scale included
    float reciprocal;                   // 1 / scale of the input
    int32_t zero_point, highest;        // of the input's levels
};

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
    if (next.form == WORDS) {
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

// The outputs first to last of one tile: into y, float32, which begins at output `first`; or with y null through GELU
// into the `levels` of `next`, which begin at output 0. The two Weights are copies, so that the compiler knows that no
// store changes them.
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
            } else if (y) {
                for (int o = 0; o < 4; o++)
                    for (int v = 0; v < N; v++)
                        *(floats *)(y + (output - first + o) * T + v * LANES) = scaled(w, output + o, s[o][v]);
            } else {
                ints value[4][4];
                if (N < 4) std::memset(value, 0, sizeof(value));
                for (int o = 0; o < 4; o++)
                    for (int v = 0; v < N; v++) value[o][v] = level(gelu(scaled(w, output + o, s[o][v])), next);
                store_levels<M>(levels, output, value, next);
            }
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

template <class M>
static void linear_on(const Weights &w, int64_t tokens, const uint8_t *q, float *y, uint8_t *levels,
                      const Weights *next) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Between the linear layers

struct Table { const int8_t *values; const float *scales, *plain; };        // int8 rows, or plain float32 ones

// y, float tiles: the sum of `count` embeddings, table i at rows[i * stride + token]. By STRIP features at a time, so
// that what is written stays in the first cache.
static void embed(int64_t count, const Table *tables, const int64_t *rows, int64_t stride, int64_t tokens,
                  int64_t features, float *y) {
    constexpr int64_t STRIP = 64;
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t strip = 0; strip < features; strip += STRIP)
            for (int64_t token = tile * T; token < std::min(tokens, (tile + 1) * T); token++) {
                int64_t size = std::min(STRIP, features - strip);
                float sum[STRIP] = {};
                for (int64_t i = 0; i < count; i++) {
                    int64_t row = rows[i * stride + token], at = row * features + strip;
                    if (tables[i].plain)
                        for (int64_t f = 0; f < size; f++) sum[f] += tables[i].plain[at + f];
                    else
                        for (int64_t f = 0; f < size; f++) sum[f] += tables[i].values[at + f] * tables[i].scales[row];
                }
                for (int64_t f = 0; f < size; f++) y[(tile * features + strip + f) * T + token % T] = sum[f];
            }
}

template <class M> static void quantize_on(int64_t tokens, const float *x, uint8_t *q, const Weights next) {
    int64_t features = next.inputs;
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t f = 0; f < features; f += 4) {
            ints value[4][4] = {};
            for (int i = 0; i < 4; i++)
                for (int v = 0; v < used_vectors(tokens, tile); v++)
                    value[i][v] = level(*(const floats *)(x + (tile * features + f + i) * T + v * LANES), next);
            store_levels<M>(q + tile * features * T, f, value, next);
        }
}

// Float tiles -> the levels that `next` reads.
extern "C" void quantize(int64_t tokens, const float *x, uint8_t *q, const Weights *next) {
    auto *on = next->portable ? quantize_on<Portable> : quantize_on<Machine>;
    on(tokens, x, q, *next);
}

struct Norm { const float *gain, *bias; float epsilon; };

template <class M, int N>
static void layer_norm_of_tile(int64_t features, const float *x, const float *residual, const Norm norm, float *y,
                               uint8_t *q, const Weights *next) {
    floats sum[N] = {}, squares[N] = {}, rate[N];
    for (int64_t f = 0; f < features; f++)
        for (int v = 0; v < N; v++) {
            int64_t at = f * T + v * LANES;
            floats value = *(const floats *)(x + at);
            if (residual) value += *(const floats *)(residual + at);
            *(floats *)(y + at) = value;
            sum[v] += value;
        }
    for (int v = 0; v < N; v++) sum[v] /= (float)features;          // the mean
    for (int64_t f = 0; f < features; f++)
        for (int v = 0; v < N; v++) {
            floats d = *(const floats *)(y + f * T + v * LANES) - sum[v];
            squares[v] += d * d;
        }
    for (int v = 0; v < N; v++)
        for (int i = 0; i < LANES; i++) rate[v][i] = 1.0f / std::sqrt(squares[v][i] / (float)features + norm.epsilon);
    for (int64_t f = 0; f < features; f += 4) {
        ints value[4][4];
        if (N < 4) std::memset(value, 0, sizeof(value));
        for (int i = 0; i < 4; i++)
            for (int v = 0; v < N; v++) {
                floats *at = (floats *)(y + (f + i) * T + v * LANES);
                *at = (*at - sum[v]) * rate[v] * norm.gain[f + i] + norm.bias[f + i];
                if (next) value[i][v] = level(*at, *next);
            }
        if (next) store_levels<M>(q, f, value, *next);
    }
}

template <class M>
static void layer_norm_on(int64_t tokens, int64_t features, const float *x, const float *residual, const Norm &norm,
                          float *y, uint8_t *q, const Weights *next) {
    typedef decltype(&layer_norm_of_tile<M, 4>) Function;
    static const Function chosen[4] = {layer_norm_of_tile<M, 1>, layer_norm_of_tile<M, 2>, layer_norm_of_tile<M, 3>,
                                       layer_norm_of_tile<M, 4>};
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++) {
        int64_t at = tile * features * T;
        chosen[used_vectors(tokens, tile) - 1](features, x + at, residual ? residual + at : nullptr, norm, y + at,
                                               next ? q + at : nullptr, next);
    }
}

// y = LayerNorm(x + residual) over the features of every token, float tiles; and its levels for `next`, unless that is
// null. residual may be null, y may be x or residual. features: a multiple of four.
extern "C" void layer_norm(int64_t tokens, int64_t features, const float *x, const float *residual, const Norm *norm,
                           float *y, uint8_t *q, const Weights *next) {
    auto *on = next && next->portable ? layer_norm_on<Portable> : layer_norm_on<Machine>;
    on(tokens, features, x, residual, *norm, y, q, next);
}

// y: float tiles of the `count` tokens of x at `places`.
static void select_tokens(int64_t count, const int64_t *places, int64_t features, const float *x, float *y) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t f = 0; f < features; f++)
            y[(i / T * features + f) * T + i % T] = x[(places[i] / T * features + f) * T + places[i] % T];
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: softmax(Q K^T / sqrt(D)) V of every sequence and head. Sequences lie one after another without padding.

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
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t row = 0, size; row < 3 * D; row += size) {     // query, key, value
            size = std::min<int64_t>(OUTPUTS, D - row % D);
            int64_t first = (row / D * heads + head) * D + row % D;
            on_tile<M>(w, nullptr, tokens, tile, first, first + size, q, y + (tile * 3 * D + row) * T, nullptr);
        }
    double halfway = omp_get_wtime();
    float scale = 1.44269504f / std::sqrt((float)D);
    for (int64_t s = 0; s < sequences; s++) {
        int64_t queries = first_only ? 1 : starts[s + 1] - starts[s];
        for (int64_t begin = 0; begin < queries; begin += QUERIES) {
            int64_t count = std::min<int64_t>(QUERIES, queries - begin), place = first_only ? s : starts[s] + begin;
            std::memset(query, 0, D * QUERIES * sizeof(float));
            each_run(3 * D, 0, D, starts[s] + begin, count,
                     [=](int64_t tile, int64_t to, size_t size) { std::memcpy(query + to, y + tile, size); });
            for (int64_t i = 0; i < D * QUERIES; i++) query[i] *= scale;
            attend(starts[s], starts[s + 1], D, 3 * D, y + D * T, y + 2 * D * T, query, score);
            each_run(heads * D, head * D, D, place, count,
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
// queries, then the keys, then the values of every head. first_only: of each sequence's queries only the first is used,
// and the context has one token for each. seconds[0] and [1] grow by the time of products and attention.
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

// ---------------------------------------------------------------------------------------------------------------------
// The encoder: embeddings and all layers

struct Layer {
    const Weights *query_key_value, *attention_output, *intermediate, *output;
    Norm attention_norm, output_norm;
};
struct Encoder {
    int64_t hidden, heads, tables, layers;
    const Table *table;
    Norm norm;                          // of the embeddings
    const Layer *layer;
    int32_t first_only;                 // of a sequence only the first token's result is wanted
};
enum Part { PRODUCTS, ATTENTION, ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT, EMBEDDINGS, QUANTIZE, LAYER_NORM, PARTS };

// Sequences are taken in groups of at most so many tokens, or of one longer sequence: what a step reads and writes then
// fits the second cache (BERT-Base: less than 1 MB).
constexpr int64_t GROUP = 128;

struct Clock {
    double *seconds, begun = omp_get_wtime();
    void stop(Part part) {
        double now = omp_get_wtime();
        seconds[part] += now - begun, begun = now;
    }
};

// `sequences` sequences, of which `starts` begins with the first; ids[table * stride + token]. The result is rows of
// hidden floats, one per token, or per sequence.
static void encode_group(const Encoder &e, int64_t sequences, const int64_t *starts, const int64_t *ids, int64_t stride,
                         float *result, double seconds[PARTS]) {
    int64_t tokens = starts[sequences] - starts[0], hidden = e.hidden, inner = e.layer[0].intermediate->outputs;
    std::vector<int64_t> within(starts, starts + sequences + 1);
    for (int64_t &start : within) start -= starts[0];
    thread_local std::vector<Line> scratch;
    size_t whole = tiles_of(tokens) * T;
    if (scratch.size() < whole / T * (13 * hidden + inner)) scratch.resize(whole / T * (13 * hidden + inner));
    float *x = (float *)scratch.data(), *y = x + whole * hidden, *context = y + whole * hidden;
    uint8_t *q = (uint8_t *)(context + whole * hidden), *wide = q + whole * hidden;
    Clock clock{seconds};
    embed(e.tables, e.table, ids + starts[0], stride, tokens, hidden, x);
    clock.stop(EMBEDDINGS);
    layer_norm(tokens, hidden, x, nullptr, &e.norm, x, q, e.layer[0].query_key_value);
    clock.stop(LAYER_NORM);
    for (int64_t number = 0; number < e.layers; number++) {
        const Layer &layer = e.layer[number];
        bool last = number == e.layers - 1, first_only = last && e.first_only;
        attention(layer.query_key_value, tokens, q, sequences, within.data(), e.heads, hidden / e.heads, first_only,
                  context, seconds + PRODUCTS);
        clock.begun = omp_get_wtime();
        if (first_only) {
            select_tokens(sequences, within.data(), hidden, x, y);
            std::swap(x, y);
            tokens = sequences;
        }
        quantize(tokens, context, q, layer.attention_output);
        clock.stop(QUANTIZE);
        linear(layer.attention_output, tokens, q, y, nullptr, nullptr);
        clock.stop(ATTENTION_OUTPUT);
        layer_norm(tokens, hidden, y, x, &layer.attention_norm, x, q, layer.intermediate);
        clock.stop(LAYER_NORM);
        linear(layer.intermediate, tokens, q, nullptr, wide, layer.output);
        clock.stop(INTERMEDIATE);
        linear(layer.output, tokens, wide, y, nullptr, nullptr);
        clock.stop(OUTPUT);
        layer_norm(tokens, hidden, y, x, &layer.output_norm, x, q,
                   last ? nullptr : e.layer[number + 1].query_key_value);
        clock.stop(LAYER_NORM);
    }
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t f = 0; f < hidden; f++) result[token * hidden + f] = x[(token / T * hidden + f) * T + token % T];
}

// Sequence s is the tokens starts[s] to starts[s + 1] of ids (tables, starts[sequences]). result: float32 rows of
// hidden, one per token, or with first_only per sequence. times[PARTS], or null, grows by the seconds of each part.
// Many groups are shared among the threads whole; of few, each product is.
extern "C" void encode(const Encoder *e, int64_t sequences, const int64_t *starts, const int64_t *ids, int32_t threads,
                       float *result, double *times) {
    omp_set_num_threads(threads);
    std::vector<int64_t> groups = {0};                              // first sequence of each, and the end
    for (int64_t s = 1; s <= sequences; s++)
        if (s == sequences || starts[s + 1] - starts[groups.back()] > GROUP) groups.push_back(s);
    int64_t count = groups.size() - 1;
    double spent[PARTS] = {}, begun = omp_get_wtime();
    auto one = [&](int64_t g) {
        double seconds[PARTS] = {};
        int64_t first = groups[g];
        encode_group(*e, groups[g + 1] - first, starts + first, ids, starts[sequences],
                     result + (e->first_only ? first : starts[first]) * e->hidden, seconds);
        add(seconds, spent, PARTS);
    };
    if (count >= 2 * threads) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t g = 0; g < count; g++) one(g);
    } else                              // not an `if` of OpenMP's: it would start new threads for every inner loop
        for (int64_t g = 0; g < count; g++) one(g);
    if (times) share(omp_get_wtime() - begun, spent, times, PARTS);
}

extern "C" int32_t tokens_of_tile() { return T; }
extern "C" const char *instructions() { return NAME; }
extern "C" void set_threads(int32_t count) { omp_set_num_threads(count); }       // of the calling thread
