// Products on tile registers (Intel AMX), where a CPU has them: third of six files.
//
// A register is 16 rows of 64 bytes. One instruction (TDPBSUD) multiplies two of them and adds to a third:
//
//     C[o][t] += sum over 64 inputs i of A[o][i] B[i][t]         16,384 multiplications in 16 cycles
//
//     A    int8     16 outputs, rows of 64 inputs                weights
//     B    uint8    16 rows, each four inputs of 16 tokens       as `words` lie, a quarter of their width
//     C    int32    16 outputs, rows of 16 tokens                sums, as they lie in a float tile
//
// That is eight times what vectors do (Intel's optimization manual, on AMX), and a zero inside of A costs what any weight
// costs. So what the zeros save are bytes: of A is kept what lives, and 64 bits per row that say where. `expand` sets
// it out in a near cache (32 outputs of 768 inputs: 24 KB), once for all tokens at hand. Blocks of 16x4 save
// multiplications too: four inputs that none of the 16 outputs reads are a row of B that is left out. The others are
// copied together from `words` first (`gather`).
#pragma once
#include "vectors.h"
#if defined(__linux__)
#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(EMULATED) || (defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VBMI2__) \
                          && !defined(PORTABLE))
#define TILES
constexpr int SIDE = 16;                // outputs of A, tokens of B, rows of a register
constexpr int STEP = 64;                // inputs of A and B
constexpr int ROW = 4 * T;              // bytes of a row of `words`
static_assert(T == 4 * SIDE, "a tile of tokens is four registers wide");
struct alignas(64) A { int8_t row[SIDE][STEP]; };        // aligned: a row is one line of the cache

// A row of A: the survivors, where `alive` has its bits. Reads 64 of them, whether or not they are all meant.
static inline void expand(uint64_t alive, const int8_t *survivors, int8_t *row) {
#if defined(__AVX512VBMI2__)
    _mm512_storeu_si512(row, _mm512_maskz_expand_epi8(alive, _mm512_loadu_si512(survivors)));
#else
    for (int i = 0; i < STEP; i++) row[i] = alive >> i & 1 ? *survivors++ : 0;
#endif
}

// `steps` of A. What comes after them in memory is wanted soon, and is fetched.
static inline void expand_all(const uint64_t *alive, const int8_t *survivor, int64_t steps, A *a) {
    constexpr int FURTHER = 4096;                                   // bytes
    for (int64_t step = 0; step < steps; step++, alive += SIDE, a++) {
        for (int line = 0; line < 2; line++) __builtin_prefetch((const char *)alive + FURTHER + line * 64, 0, 2);
        for (int line = 0; line < 4; line++) __builtin_prefetch(survivor + FURTHER + line * 64, 0, 2);
        for (int row = 0; row < SIDE; row++) {
            expand(alive[row], survivor, a->row[row]);
            survivor += __builtin_popcountll(alive[row]);
        }
    }
}

// What the compiler has not written yet, it writes now: it does not know that loading a register reads memory.
static inline void written() { asm volatile("" ::: "memory"); }

// B of so many steps for T tokens, [steps * SIDE][ROW], from the rows `columns` of `words`.
static inline void gather(const uint8_t *q, const uint16_t *columns, int64_t steps, uint8_t *b) {
    written();                          // nor that what was in b has been read by now
    for (int64_t row = 0; row < steps * SIDE; row++) std::memcpy(b + row * ROW, q + columns[row] * (int64_t)ROW, ROW);
    written();
}

// The registers of the calling thread, as long as this lives: all eight 16 x 64.
struct Registers {
    Registers() {
        alignas(64) static const struct {
            uint8_t palette = 1, reserved[15] = {};
            uint16_t bytes[16] = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP};
            uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
        } shape;
        asm volatile("" ::"m"(shape));
        _tile_loadconfig(&shape);
    }
    ~Registers() { _tile_release(); }
};

static inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// 32 outputs (A at `a` and at `below`, `steps` of them) by 32 tokens: registers 0 to 3. `meanwhile`, called at each step,
// is what vectors do while these multiply.
template <class Meanwhile>
static inline void two_by_two(const A *a, const A *below, int64_t steps, const uint8_t *b, Meanwhile meanwhile) {
    for (int64_t step = 0; step < steps; step++, a++, below++, b += SIDE * ROW) {
        _tile_loadd(4, a, STEP);
        _tile_loadd(6, b, ROW);
        _tile_loadd(5, below, STEP);
        _tile_loadd(7, b + STEP, ROW);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        meanwhile();
    }
}
// [2 SIDE] rows, of which 32 tokens.
template <class Number> static inline void store_two_by_two(Number *sums, int64_t row = T) {
    _tile_stored(0, sums, row * 4);
    _tile_stored(1, sums + SIDE, row * 4);
    _tile_stored(2, sums + SIDE * row, row * 4);
    _tile_stored(3, sums + SIDE * row + SIDE, row * 4);
}

// 16 outputs by 64 tokens.
template <class Meanwhile>
static inline void one_by_four(const A *a, int64_t steps, const uint8_t *b, Meanwhile meanwhile) {
    for (int64_t step = 0; step < steps; step++, a++, b += SIDE * ROW) {
        _tile_loadd(4, a, STEP);
        _tile_loadd(5, b, ROW);
        _tile_loadd(6, b + STEP, ROW);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(7, b + 2 * STEP, ROW);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(5, b + 3 * STEP, ROW);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 4, 5);
        meanwhile();
    }
}
static inline void store_one_by_four(int32_t *sums) {           // [SIDE][T]
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + SIDE, ROW);
    _tile_stored(2, sums + 2 * SIDE, ROW);
    _tile_stored(3, sums + 3 * SIDE, ROW);
}
#endif

// Tile registers are the system's to grant, to a process once: 0, or the number of its error; -1 where there are none.
extern "C" int32_t request_tiles() {
#if defined(EMULATED)
    return 0;
#elif defined(TILES) && defined(__linux__)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;             // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) ? errno : 0;
#else
    return -1;
#endif
}
