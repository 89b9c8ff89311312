/* bf16 numbers and their matrix products on x86-64: AMX where the processor has it, AVX-512 BF16 else.

   Compiled for the machine it runs on (build.py), which has at least AVX-512 F, BW, VL, DQ and BF16.

   A right-hand side B [depth x columns] lies in tiles of 32 x 16 numbers, in the order that both instruction
   sets read: 16 rows of 16 pairs, a pair being two numbers of one column, one below the other.

       B[0][0] B[1][0]  B[0][1] B[1][1]  ...  B[0][15] B[1][15]
       B[2][0] B[3][0]  ...
*/

#ifndef BURNISH_BF16_H
#define BURNISH_BF16_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { BLOCK = 32, LANES = 16, TILE = 512 }; /* rows and columns of a product, numbers of a register, of a tile */

static inline int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }

/* The lanes of a register whose numbers, from `base` on, lie in [low, high). */
static inline __mmask16 lanes_between(int64_t base, int64_t low, int64_t high) {
    int64_t above = high - base, below = low - base;
    uint32_t upto = above >= LANES ? 0xffffu : above <= 0 ? 0u : (1u << above) - 1;
    uint32_t from = below <= 0 ? 0xffffu : below >= LANES ? 0u : 0xffffu << below;
    return (__mmask16)(upto & from);
}

static inline __m512 widened(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

static inline __m256i narrowed(__m512 wide) { return (__m256i)_mm512_cvtneps_pbh(wide); }

static inline void store_bf16(bf16 *to, __m512 wide) { _mm256_storeu_si256((__m256i *)to, narrowed(wide)); }

/* Two registers of bf16, pair by pair: what a tile's row is. */
static inline __m512i paired(__m256i upper, __m256i lower) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(upper), _mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16));
}

/* exp in fp32 to 2 units in the last place; the polynomial is that of Cephes' expf (Moshier, 1989).
   Below -87 it is about 1e-38; NaN stays NaN. */
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* in this order: the second operand's NaN is kept */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* 16 x 16 numbers of 32 bits, rows and columns exchanged. */
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Before and after a thread's products. Elsewhere (oneDNN) tiles are configured for other shapes. */
static inline void products_begin(void) {
#ifdef BURNISH_AMX
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.bytes[tile] = 64;
        shapes.rows[tile] = 16;
    }
    _tile_loadconfig(&shapes);
#endif
}

static inline void products_end(void) {
#ifdef BURNISH_AMX
    _tile_release();
#endif
}

/* C [32 x 32, fp32] = or += A [32 x 32 depth] B [32 depth x 32].

   a, a_row: A by rows, and how many numbers a row is from the next.
   b, b_down, b_right: B in tiles; how many numbers a tile is from that below and from that beside it. */
#ifdef BURNISH_AMX
static inline void product(const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_down, int64_t b_right,
                           int64_t depth, float *c, int64_t c_row, int add) {
    if (add) {
        _tile_loadd(0, c, 4 * c_row);
        _tile_loadd(1, c + LANES, 4 * c_row);
        _tile_loadd(2, c + 16 * c_row, 4 * c_row);
        _tile_loadd(3, c + 16 * c_row + LANES, 4 * c_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k++) {
        _tile_loadd(4, a + k * BLOCK, 2 * a_row);
        _tile_loadd(6, b + k * b_down, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + k * b_down + b_right, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + k * BLOCK + 16 * a_row, 2 * a_row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * c_row);
    _tile_stored(1, c + LANES, 4 * c_row);
    _tile_stored(2, c + 16 * c_row, 4 * c_row);
    _tile_stored(3, c + 16 * c_row + LANES, 4 * c_row);
}
#else
static inline void product(const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_down, int64_t b_right,
                           int64_t depth, float *c, int64_t c_row, int add) {
    enum { ROWS = 8 }; /* with two registers of columns, 16 sums: as many as keep two units busy */
    for (int first = 0; first < BLOCK; first += ROWS) {
        const bf16 *rows = a + first * a_row;
        float *sums = c + first * c_row;
        __m512 left[ROWS], right[ROWS];
        for (int r = 0; r < ROWS; r++) {
            left[r] = add ? _mm512_loadu_ps(sums + r * c_row) : _mm512_setzero_ps();
            right[r] = add ? _mm512_loadu_ps(sums + r * c_row + LANES) : _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < depth; k++)
            for (int pair = 0; pair < 16; pair++) {
                const bf16 *tile = b + k * b_down + pair * BLOCK;
                __m512bh b_left = (__m512bh)_mm512_loadu_si512(tile);
                __m512bh b_right_half = (__m512bh)_mm512_loadu_si512(tile + b_right);
                for (int r = 0; r < ROWS; r++) {
                    int32_t both;
                    memcpy(&both, rows + r * a_row + k * BLOCK + 2 * pair, sizeof both);
                    __m512bh all = (__m512bh)_mm512_set1_epi32(both);
                    left[r] = _mm512_dpbf16_ps(left[r], all, b_left);
                    right[r] = _mm512_dpbf16_ps(right[r], all, b_right_half);
                }
            }
        for (int r = 0; r < ROWS; r++) {
            _mm512_storeu_ps(sums + r * c_row, left[r]);
            _mm512_storeu_ps(sums + r * c_row + LANES, right[r]);
        }
    }
}
#endif

#endif
