/* The loss of rows of logits and its gradient, in their place: each row is read once from memory. */

#include <math.h>
#include <stdlib.h>

#include "bf16.h"

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
