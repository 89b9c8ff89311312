/* The loss of a head's logits and its gradient, in their place: tokens first, or vocabulary first. */

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "bf16.h"

/* Tokens first: a row is read once from memory and kept as exponentials in the cache. */

static float sum_exponentials(const bf16 *row, int64_t size, float *kept, float *largest) {
    __m512 most[4], sums[4];
    for (int i = 0; i < 4; i++) {
        most[i] = _mm512_set1_ps(-INFINITY);
        sums[i] = _mm512_setzero_ps();
    }
    int64_t whole = size / (4 * LANES) * (4 * LANES);
    for (int64_t at = 0; at < whole; at += 4 * LANES)
        for (int i = 0; i < 4; i++)
            most[i] = _mm512_max_ps(most[i], widened(_mm256_loadu_si256((const __m256i *)(row + at + i * LANES))));
    for (int64_t at = whole; at < size; at += LANES) {
        __mmask16 lanes = lanes_between(at, 0, size);
        most[0] = _mm512_mask_max_ps(most[0], lanes, most[0], widened(_mm256_maskz_loadu_epi16(lanes, row + at)));
    }
    for (int i = 1; i < 4; i++)
        most[0] = _mm512_max_ps(most[0], most[i]);
    *largest = _mm512_reduce_max_ps(most[0]);
    __m512 top = _mm512_set1_ps(*largest);
    for (int64_t at = 0; at < whole; at += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            __m512 logit = widened(_mm256_loadu_si256((const __m256i *)(row + at + i * LANES)));
            __m512 own = exp16(_mm512_sub_ps(logit, top));
            sums[i] = _mm512_add_ps(sums[i], own);
            _mm512_storeu_ps(kept + at + i * LANES, own);
        }
    for (int64_t at = whole; at < size; at += LANES) {
        __mmask16 lanes = lanes_between(at, 0, size);
        __m512 own = exp16(_mm512_sub_ps(widened(_mm256_maskz_loadu_epi16(lanes, row + at)), top));
        sums[0] = _mm512_mask_add_ps(sums[0], lanes, sums[0], own);
        _mm512_mask_storeu_ps(kept + at, lanes, own);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

/* For each row of logits: nll = log(sum(exp(row))) - row[target]; with `gradient`, the row becomes
   softmax(row) - one_hot(target). Returns 0, or 1 for want of memory. */
int burnish_softmax_rows(bf16 *logits, int64_t rows, int64_t row_stride, int64_t size, const int64_t *targets,
                         float *nll, int gradient) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *kept = aligned_alloc(64, (size_t)(size + LANES) / LANES * 64);
        failed = kept == NULL;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            if (kept == NULL)
                continue;
            bf16 *row = logits + r * row_stride;
            uint32_t bits = (uint32_t)row[targets[r]] << 16;
            float own, largest, sum = sum_exponentials(row, size, kept, &largest);
            memcpy(&own, &bits, sizeof own);
            nll[r] = logf(sum) - (own - largest);
            if (!gradient)
                continue;
            __m512 share = _mm512_set1_ps(1.0f / sum);
            int64_t at = 0;
            for (; at + LANES <= size; at += LANES)
                store_bf16(row + at, _mm512_mul_ps(_mm512_load_ps(kept + at), share));
            if (at < size)
                _mm256_mask_storeu_epi16(row + at, lanes_between(at, 0, size),
                                         narrowed(_mm512_mul_ps(_mm512_load_ps(kept + at), share)));
            float slope = expm1f(-nll[r]); /* softmax - 1, exact where the share is near 1 */
            __m128i one = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(slope));
            row[targets[r]] = (bf16)_mm_extract_epi16(one, 0);
        }
        free(kept);
    }
    return failed;
}

/* Vocabulary first: with AMX, matrix products with that side out run twice as fast. Sixteen tokens are a register,
   so that nothing is summed across lanes. A block of words fits into the cache between its two passes, for the
   largest logit and for the sum; blocks are merged in their order, whatever the number of threads. */

enum {
    WORDS = 128, /* of a block: 256 KiB of 1,024 tokens */
    AT_ONCE = 8  /* words that a token's largest logit and sum stay in registers for */
};

static inline __m512 logits_at(const bf16 *row, int64_t at, __mmask16 lanes) {
    return widened(_mm256_maskz_loadu_epi16(lanes, row + at));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Inlined into two loops, of which one knows `words`: AT_ONCE. */
static inline __attribute__((always_inline)) void look(const bf16 *logits, int64_t words, int64_t stride,
                                                        int64_t tokens, float *largest) {
    for (int64_t at = 0; at < tokens; at += LANES) {
        __mmask16 lanes = lanes_between(at, 0, tokens);
        __m512 most = _mm512_loadu_ps(largest + at);
        for (int64_t w = 0; w < words; w++)
            most = _mm512_max_ps(most, logits_at(logits + w * stride, at, lanes));
        _mm512_storeu_ps(largest + at, most);
    }
}

static inline __attribute__((always_inline)) void add(const bf16 *logits, int64_t words, int64_t stride,
                                                      int64_t tokens, const float *largest, float *sums) {
    for (int64_t at = 0; at < tokens; at += LANES) {
        __mmask16 lanes = lanes_between(at, 0, tokens);
        __m512 most = _mm512_loadu_ps(largest + at), sum = _mm512_loadu_ps(sums + at);
        for (int64_t w = 0; w < words; w++)
            sum = _mm512_add_ps(sum, exp16(_mm512_sub_ps(logits_at(logits + w * stride, at, lanes), most)));
        _mm512_storeu_ps(sums + at, sum);
    }
}

/* Each token's largest logit among some words, and the sum of exp(logit - largest). */
static void sum_block(const bf16 *logits, int64_t words, int64_t stride, int64_t tokens, float *largest, float *sums) {
    for (int64_t at = 0; at < tokens; at += LANES) {
        /* Not -inf: words that cannot be produced may fill a block. */
        _mm512_storeu_ps(largest + at, _mm512_set1_ps(-FLT_MAX));
        _mm512_storeu_ps(sums + at, _mm512_setzero_ps());
    }
    int64_t whole = words / AT_ONCE * AT_ONCE;
    for (int64_t w = 0; w < whole; w += AT_ONCE)
        look(logits + w * stride, AT_ONCE, stride, tokens, largest);
    look(logits + whole * stride, words - whole, stride, tokens, largest);
    for (int64_t w = 0; w < whole; w += AT_ONCE)
        add(logits + w * stride, AT_ONCE, stride, tokens, largest, sums);
    add(logits + whole * stride, words - whole, stride, tokens, largest, sums);
}

/* Word by word: a load of the word after the next would wait for this one's store where tokens are 1,024, the
   addresses being a multiple of 4 KiB apart. */
static void share_block(bf16 *logits, int64_t words, int64_t stride, int64_t tokens, const float *largest,
                        const float *shares) {
    int64_t whole = tokens / LANES * LANES;
    for (int64_t w = 0; w < words; w++) {
        bf16 *row = logits + w * stride;
        for (int64_t at = 0; at < whole; at += LANES) {
            __m512 logit = widened(_mm256_loadu_si256((const __m256i *)(row + at)));
            __m512 own = exp16(_mm512_sub_ps(logit, _mm512_loadu_ps(largest + at)));
            store_bf16(row + at, _mm512_mul_ps(own, _mm512_loadu_ps(shares + at)));
        }
        if (whole < tokens) {
            __mmask16 lanes = lanes_between(whole, 0, tokens);
            __m512 own = exp16(_mm512_sub_ps(logits_at(row, whole, lanes), _mm512_loadu_ps(largest + whole)));
            own = _mm512_mul_ps(own, _mm512_loadu_ps(shares + whole));
            _mm256_mask_storeu_epi16(row + whole, lanes, narrowed(own));
        }
    }
}

/* All blocks' numbers into the first one's place. */
static void merge_blocks(float *largest, float *sums, int64_t blocks, int64_t width, int64_t at) {
    __m512 most = _mm512_loadu_ps(largest + at), sum = _mm512_setzero_ps();
    for (int64_t b = 1; b < blocks; b++)
        most = _mm512_max_ps(most, _mm512_loadu_ps(largest + b * width + at));
    for (int64_t b = 0; b < blocks; b++) {
        __m512 factor = exp16(_mm512_sub_ps(_mm512_loadu_ps(largest + b * width + at), most));
        sum = _mm512_fmadd_ps(factor, _mm512_loadu_ps(sums + b * width + at), sum);
    }
    _mm512_storeu_ps(largest + at, most);
    _mm512_storeu_ps(sums + at, sum);
}

/* The same for columns of logits. */
int burnish_softmax_columns(bf16 *logits, int64_t words, int64_t stride, int64_t tokens, const int64_t *targets,
                            float *nll, int gradient) {
    int64_t blocks = (words + WORDS - 1) / WORDS, width = (tokens + LANES - 1) / LANES * LANES;
    float *largest = aligned_alloc(64, (size_t)(2 * blocks * width) * sizeof(float));
    if (largest == NULL)
        return 1;
    float *sums = largest + blocks * width;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            sum_block(logits + b * WORDS * stride, least(WORDS, words - b * WORDS), stride, tokens,
                      largest + b * width, sums + b * width);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < width; at += LANES)
            merge_blocks(largest, sums, blocks, width, at);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            uint32_t bits = (uint32_t)logits[targets[t] * stride + t] << 16;
            float own;
            memcpy(&own, &bits, sizeof own);
            nll[t] = logf(sums[t]) - (own - largest[t]);
            sums[t] = 1.0f / sums[t];
        }
        if (gradient) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++)
                share_block(logits + b * WORDS * stride, least(WORDS, words - b * WORDS), stride, tokens, largest, sums);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++) {
                float slope = expm1f(-nll[t]); /* softmax - 1, exact where the share is near 1 */
                __m128i one = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(slope));
                logits[targets[t] * stride + t] = (bf16)_mm_extract_epi16(one, 0);
            }
        }
    }
    free(largest);
    return 0;
}
