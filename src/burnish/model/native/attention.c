/* Causal softmax attention inside each document of a packed row, forward and backward.

   A segment is what is attended together: its keys are columns of the row (`columns[key_bounds[s]] ...`), in the
   order of their positions, and its queries are the last `query_lengths[s]` of them. A document by itself is a
   segment with as many queries as keys; documents that share their beginning have more keys than queries.

   The algorithm is FlashAttention's (Dao et al., 2022, arXiv:2205.14135; the backward of section 3.1 and
   appendix B), with 32 queries against all their keys at once in the forward: scores, normalisers and all sums
   in fp32, what goes into products in bf16. In the backward, keys are rows and queries are columns, so that
   nothing as large as the scores has ever to be transposed:

       P^T = exp(K Q^T - lse)     dV += P^T dO     dS^T = P^T (V dO^T - delta)     dK += dS^T Q
       dQ^T = K^T dS^T

   A unit of work is a segment and a key head, with all query heads that share it: each unit writes its own
   numbers, in the same order of additions whoever computes it. */

#include <math.h>
#include <stdlib.h>

#include "bf16.h"

enum { CHUNK = 128 }; /* queries that the backward takes at once */

typedef struct {
    const bf16 *at;
    int64_t head, token; /* numbers from one head, one token to the next */
} States;

typedef struct {
    States query, key, value, out, out_gradient; /* the last two in the backward only */
    int64_t tokens, heads, key_heads, width;     /* width: a multiple of 16 */
    int64_t num_segments;
    const int32_t *key_bounds, *columns, *query_lengths;
    int64_t window; /* tokens that a token sees; 0 for all before it */
    float scale;
    int32_t shared; /* keys belong to several segments: their gradients are added up in fp32 */
    bf16 *result;   /* [tokens, heads, width]: the output, or in the backward the queries' gradient */
    float *lse;     /* [heads, tokens]: log-sum-exp of the scores, written by the forward */
    bf16 *key_gradient, *value_gradient; /* [tokens, key_heads, width] */
    float *key_sums, *value_sums;        /* the same in fp32, zeros at first, where keys are shared */
} Attention;

typedef struct {
    int64_t keys, queries, offset; /* the first query's place among the keys */
    int64_t wide;                  /* width in whole blocks */
    const int32_t *key_columns, *query_columns;
} Segment;

static Segment segment_of(const Attention *job, int64_t number) {
    Segment s;
    s.key_columns = job->columns + job->key_bounds[number];
    s.keys = job->key_bounds[number + 1] - job->key_bounds[number];
    s.queries = job->query_lengths[number];
    s.offset = s.keys - s.queries;
    s.query_columns = s.key_columns + s.offset;
    s.wide = blocks_of(job->width) * BLOCK;
    return s;
}

/* ---- what is seen ---- */

/* Blocks of keys [*from, *to) that some of the 32 queries from `first` on see. */
static void seen_blocks(const Attention *job, const Segment *s, int64_t first, int64_t *from, int64_t *to) {
    int64_t low = s->offset + first - job->window + 1, high = s->offset + first + BLOCK;
    *from = job->window && low > 0 ? low / BLOCK : 0;
    *to = blocks_of(high < s->keys ? high : s->keys);
}

/* ---- laying out rows for products; what lies beyond the segment or the width is zero ---- */

static const bf16 *row_at(const States *x, int64_t head, int32_t column) {
    return x->at + head * x->head + column * x->token;
}

/* 16 numbers of a row, from `at` on. */
static inline __m256i sixteen(const bf16 *row, int64_t at, int64_t width) {
    return row != NULL && at < width ? _mm256_loadu_si256((const __m256i *)(row + at)) : _mm256_setzero_si256();
}

static const bf16 *row_or_null(const States *x, int64_t head, const int32_t *columns, int64_t i, int64_t size) {
    return i < size ? row_at(x, head, columns[i]) : NULL;
}

/* By rows: a product's left side [32 blocks x wide]. */
static void lay_rows(const States *x, int64_t head, const int32_t *columns, int64_t size, int64_t first,
                     int64_t blocks, int64_t width, int64_t wide, bf16 *to) {
    for (int64_t i = 0; i < blocks * BLOCK; i++) {
        const bf16 *row = row_or_null(x, head, columns, first + i, size);
        for (int64_t at = 0; at < wide; at += LANES)
            _mm256_storeu_si256((__m256i *)(to + i * wide + at), sixteen(row, at, width));
    }
}

/* In tiles, summed over rows: tile (row / 32, column / 16). */
static void lay_tiles(const States *x, int64_t head, const int32_t *columns, int64_t size, int64_t width,
                      int64_t wide, bf16 *to) {
    for (int64_t i = 0; i < blocks_of(size) * BLOCK; i += 2) {
        const bf16 *upper = row_or_null(x, head, columns, i, size);
        const bf16 *lower = row_or_null(x, head, columns, i + 1, size);
        bf16 *tiles = to + i / BLOCK * (wide / LANES) * TILE + i % BLOCK / 2 * BLOCK;
        for (int64_t at = 0; at < wide; at += LANES)
            _mm512_storeu_si512(tiles + at / LANES * TILE, paired(sixteen(upper, at, width), sixteen(lower, at, width)));
    }
}

/* Pairs of neighbours of 16 rows, transposed: pair p of the block `at` of all 16 rows in register p. */
static void transposed_pairs(const States *x, int64_t head, const int32_t *columns, int64_t size, int64_t first,
                             int64_t at, int64_t width, __m512i pairs[16]) {
    for (int64_t i = 0; i < LANES; i++) {
        const bf16 *row = row_or_null(x, head, columns, first + i, size);
        __m512i left = _mm512_castsi256_si512(sixteen(row, at, width));
        pairs[i] = _mm512_inserti64x4(left, sixteen(row, at + LANES, width), 1);
    }
    transpose16(pairs);
}

/* In tiles, summed over columns, that is X^T: tile (row / 16, column / 32). */
static void lay_transposed_tiles(const States *x, int64_t head, const int32_t *columns, int64_t size,
                                 int64_t width, int64_t wide, bf16 *to) {
    __m512i pairs[16];
    for (int64_t first = 0; first < blocks_of(size) * BLOCK; first += LANES)
        for (int64_t at = 0; at < wide; at += BLOCK, to += TILE) {
            transposed_pairs(x, head, columns, size, first, at, width, pairs);
            for (int p = 0; p < 16; p++)
                _mm512_storeu_si512(to + p * BLOCK, pairs[p]);
        }
}

/* By rows, transposed: [wide x whole blocks of rows]. */
static void lay_transposed_rows(const States *x, int64_t head, const int32_t *columns, int64_t size,
                                int64_t width, int64_t wide, bf16 *to) {
    int64_t all = blocks_of(size) * BLOCK;
    __m512i pairs[16];
    for (int64_t first = 0; first < all; first += LANES)
        for (int64_t at = 0; at < wide; at += BLOCK) {
            transposed_pairs(x, head, columns, size, first, at, width, pairs);
            for (int p = 0; p < 16; p++) {
                bf16 *row = to + (at + 2 * p) * all + first;
                _mm256_storeu_si256((__m256i *)row, _mm512_cvtepi32_epi16(pairs[p]));
                _mm256_storeu_si256((__m256i *)(row + all), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs[p], 16)));
            }
        }
}

/* ---- memory of a unit of work ---- */

/* A thread's memory, grown to the largest unit it was given; NULL where there is no more. */
typedef struct {
    char *at;
    size_t bytes, used;
} Arena;

static int arena_reserve(Arena *arena, size_t bytes) {
    arena->used = 0;
    if (bytes <= arena->bytes)
        return 1;
    free(arena->at);
    arena->bytes = (bytes + 63) / 64 * 64;
    arena->at = aligned_alloc(64, arena->bytes);
    if (arena->at == NULL)
        arena->bytes = 0;
    return arena->at != NULL;
}

static void *arena_take(Arena *arena, int64_t numbers, size_t each) {
    void *taken = arena->at + arena->used;
    arena->used += ((size_t)numbers * each + 63) / 64 * 64;
    return taken;
}

enum { PIECES = 24, PIECE_ROUNDING = PIECES * 64 }; /* at most so many pieces are taken from an arena */

/* ---- forward ---- */

/* Scores of 32 queries to shares, not yet normalised; their log-sum-exp, and one over their sums. */
static void shares_of_scores(const Attention *job, const Segment *s, int64_t first, int64_t from, int64_t to,
                             const float *scores, int64_t row, bf16 *shares, float *lse, float *over_sum) {
    int64_t base = from * BLOCK, size = (to - from) * BLOCK;
    __m512 scale = _mm512_set1_ps(job->scale);
    for (int64_t r = 0; r < BLOCK; r++) {
        const float *own = scores + r * row;
        bf16 *to_shares = shares + r * row;
        int64_t last = s->offset + first + r;
        if (first + r >= s->queries) {
            memset(to_shares, 0, (size_t)size * sizeof(bf16));
            continue;
        }
        int64_t low = job->window && last - job->window + 1 > 0 ? last - job->window + 1 - base : 0;
        int64_t high = last + 1 - base;
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < high; at += LANES)
            most = _mm512_mask_max_ps(most, lanes_between(at, low, high), most, _mm512_loadu_ps(own + at));
        float largest = _mm512_reduce_max_ps(most) * job->scale;
        __m512 top = _mm512_set1_ps(largest);
        for (int64_t at = 0; at < size; at += LANES) {
            __m512 share = _mm512_setzero_ps();
            __mmask16 lanes = lanes_between(at, low, high);
            if (lanes) {
                share = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(own + at), scale, top));
                share = _mm512_maskz_mov_ps(lanes, share);
                sum = _mm512_add_ps(sum, share);
            }
            store_bf16(to_shares + at, share);
        }
        float total = _mm512_reduce_add_ps(sum);
        lse[s->query_columns[first + r]] = largest + logf(total);
        over_sum[r] = 1.0f / total;
    }
}

static void forward_unit(const Attention *job, const Segment *s, int64_t key_head, Arena *arena) {
    int64_t all = blocks_of(s->keys) * BLOCK, wide = s->wide, deep = wide / BLOCK, across = wide / LANES;
    bf16 *keys = arena_take(arena, all * wide, sizeof(bf16)), *values = arena_take(arena, all * wide, sizeof(bf16));
    bf16 *queries = arena_take(arena, BLOCK * wide, sizeof(bf16));
    bf16 *shares = arena_take(arena, BLOCK * all, sizeof(bf16));
    float *scores = arena_take(arena, BLOCK * all, sizeof(float));
    float *sums = arena_take(arena, BLOCK * BLOCK, sizeof(float)), over_sum[BLOCK];
    int64_t group = job->heads / job->key_heads;
    lay_transposed_tiles(&job->key, key_head, s->key_columns, s->keys, job->width, wide, keys);
    lay_tiles(&job->value, key_head, s->key_columns, s->keys, job->width, wide, values);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
        for (int64_t first = 0; first < s->queries; first += BLOCK) {
            int64_t from, to;
            seen_blocks(job, s, first, &from, &to);
            lay_rows(&job->query, head, s->query_columns, s->queries, first, 1, job->width, wide, queries);
            for (int64_t block = from; block < to; block++)
                product(queries, wide, keys + block * 2 * deep * TILE, TILE, deep * TILE, deep,
                        scores + (block - from) * BLOCK, all, 0);
            shares_of_scores(job, s, first, from, to, scores, all, shares, job->lse + head * job->tokens, over_sum);
            for (int64_t at = 0; at < wide; at += BLOCK) {
                product(shares, all, values + (from * across + at / LANES) * TILE, across * TILE, TILE, to - from,
                        sums, BLOCK, 0);
                for (int64_t r = 0; r < BLOCK && first + r < s->queries; r++) {
                    bf16 *out = job->result + (s->query_columns[first + r] * job->heads + head) * job->width + at;
                    __m512 factor = _mm512_set1_ps(over_sum[r]);
                    for (int64_t half = 0; half < BLOCK && at + half < job->width; half += LANES)
                        store_bf16(out + half, _mm512_mul_ps(_mm512_loadu_ps(sums + r * BLOCK + half), factor));
                }
            }
        }
}

static size_t forward_bytes(const Segment *s) {
    size_t all = (size_t)blocks_of(s->keys) * BLOCK, wide = (size_t)s->wide;
    return 2 * all * wide * 2 + BLOCK * wide * 2 + BLOCK * all * 6 + BLOCK * BLOCK * 4 + PIECE_ROUNDING;
}

/* ---- backward ---- */

typedef struct {
    bf16 *keys, *keys_down, *values;                 /* by rows, transposed by rows, by rows */
    bf16 *queries, *queries_down, *outs, *outs_down; /* tiles summed over queries; over the width */
    float *key_sums, *value_sums, *lse, *delta;
    bf16 *shares, *slopes, *slope_tiles; /* P^T and dS^T of 32 keys by rows; dS^T of all keys in tiles */
    float *scores, *dots, *down;         /* a product's result each */
} Backward;

/* delta = sum(out * its gradient), and the log-sum-exps, of a head's queries. */
static void lay_statistics(const Attention *job, const Segment *s, int64_t head, Backward *b) {
    for (int64_t i = 0; i < blocks_of(s->queries) * BLOCK; i++) {
        b->lse[i] = b->delta[i] = 0.0f;
        if (i >= s->queries)
            continue;
        const bf16 *out = row_at(&job->out, head, s->query_columns[i]);
        const bf16 *gradient = row_at(&job->out_gradient, head, s->query_columns[i]);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < job->width; at += LANES)
            sum = _mm512_fmadd_ps(widened(sixteen(out, at, job->width)), widened(sixteen(gradient, at, job->width)), sum);
        b->delta[i] = _mm512_reduce_add_ps(sum);
        b->lse[i] = job->lse[head * job->tokens + s->query_columns[i]];
    }
}

/* Shares and slopes of 32 keys and 32 queries, from products K Q^T and V dO^T. `row`: of shares and slopes. */
static void slopes_of_scores(const Attention *job, const Segment *s, int64_t key, int64_t query, Backward *b,
                             bf16 *shares, bf16 *slopes, int64_t row, bf16 *tiles) {
    __m512 scale = _mm512_set1_ps(job->scale);
    for (int64_t half = 0; half < BLOCK; half += LANES) {
        __m512 lse = _mm512_loadu_ps(b->lse + query + half), delta = _mm512_loadu_ps(b->delta + query + half);
        int64_t base = s->offset + query + half;
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m256i both[2];
            for (int i = 0; i < 2; i++) {
                int64_t at = (r + i) * BLOCK + half, own = key + r + i;
                /* Queries from the key on, as far as the window and the segment reach. */
                int64_t high = job->window && own + job->window < s->keys ? own + job->window : s->keys;
                __mmask16 lanes = own < s->keys ? lanes_between(base, own, high) : 0;
                __m512 share = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(b->scores + at), scale, lse));
                share = _mm512_maskz_mov_ps(lanes, share);
                __m512 slope = _mm512_mul_ps(share, _mm512_sub_ps(_mm512_loadu_ps(b->dots + at), delta));
                both[i] = narrowed(_mm512_mul_ps(slope, scale));
                store_bf16(shares + (r + i) * row + half, share);
                _mm256_storeu_si256((__m256i *)(slopes + (r + i) * row + half), both[i]);
            }
            _mm512_storeu_si512(tiles + half / LANES * TILE + r / 2 * BLOCK, paired(both[0], both[1]));
        }
    }
}

/* dQ of 32 queries from the slopes of the keys in blocks [from, to). */
static void query_gradient(const Attention *job, const Segment *s, int64_t head, int64_t first, int64_t from,
                           int64_t to, const bf16 *tiles, Backward *b) {
    int64_t all = blocks_of(s->keys) * BLOCK, across = CHUNK / LANES;
    __m512i rows[16];
    for (int64_t at = 0; at < s->wide; at += BLOCK) {
        product(b->keys_down + at * all + from * BLOCK, all, tiles + from * across * TILE, across * TILE, TILE,
                to - from, b->down, BLOCK, 0);
        for (int64_t part = at; part < at + BLOCK && part < job->width; part += LANES)
            for (int64_t half = 0; half < BLOCK; half += LANES) {
                for (int r = 0; r < 16; r++)
                    rows[r] = _mm512_loadu_si512(b->down + (part - at + r) * BLOCK + half);
                transpose16(rows);
                for (int64_t i = first + half; i < first + half + LANES && i < s->queries; i++)
                    store_bf16(job->result + (s->query_columns[i] * job->heads + head) * job->width + part,
                               _mm512_castsi512_ps(rows[i - first - half]));
            }
    }
}

/* A head's queries from `chunk` on, against all their keys. */
static void backward_chunk(const Attention *job, const Segment *s, int64_t head, int64_t chunk, Backward *b) {
    int64_t wide = s->wide, deep = wide / BLOCK, across = wide / LANES, tiles_across = CHUNK / LANES;
    int64_t end = chunk + CHUNK < s->queries ? chunk + CHUNK : s->queries, low, high, ignored;
    seen_blocks(job, s, chunk, &low, &ignored);
    seen_blocks(job, s, (end - 1) / BLOCK * BLOCK, &ignored, &high);
    for (int64_t block = low; block < high; block++) {
        int64_t begin = -1, stop = -1, key = block * BLOCK; /* the queries that see some of these keys */
        for (int64_t query = chunk; query < end; query += BLOCK) {
            int64_t from, to;
            seen_blocks(job, s, query, &from, &to);
            if (block < from || block >= to)
                continue;
            begin = begin < 0 ? query : begin;
            stop = query + BLOCK;
            product(b->keys + key * wide, wide, b->queries_down + query / LANES * deep * TILE, TILE, deep * TILE,
                    deep, b->scores, BLOCK, 0);
            product(b->values + key * wide, wide, b->outs_down + query / LANES * deep * TILE, TILE, deep * TILE,
                    deep, b->dots, BLOCK, 0);
            slopes_of_scores(job, s, key, query, b, b->shares + query - chunk, b->slopes + query - chunk, CHUNK,
                             b->slope_tiles + (block * tiles_across + (query - chunk) / LANES) * TILE);
        }
        if (begin < 0)
            continue;
        int64_t depth = (stop - begin) / BLOCK;
        for (int64_t at = 0; at < wide; at += BLOCK) {
            int64_t tile = (begin / BLOCK * across + at / LANES) * TILE;
            product(b->shares + begin - chunk, CHUNK, b->outs + tile, across * TILE, TILE, depth,
                    b->value_sums + key * wide + at, wide, 1);
            product(b->slopes + begin - chunk, CHUNK, b->queries + tile, across * TILE, TILE, depth,
                    b->key_sums + key * wide + at, wide, 1);
        }
    }
    for (int64_t query = chunk; query < end; query += BLOCK) {
        int64_t from, to;
        seen_blocks(job, s, query, &from, &to);
        query_gradient(job, s, head, query, from, to, b->slope_tiles + (query - chunk) / LANES * TILE, b);
    }
}

static void add_or_store(const Attention *job, const Segment *s, int64_t key_head, const float *own, bf16 *alone,
                         float *sums) {
    for (int64_t i = 0; i < s->keys; i++) {
        int64_t row = (s->key_columns[i] * job->key_heads + key_head) * job->width;
        for (int64_t at = 0; at < job->width; at += LANES) {
            __m512 gradient = _mm512_loadu_ps(own + i * s->wide + at);
            if (job->shared)
                _mm512_storeu_ps(sums + row + at, _mm512_add_ps(_mm512_loadu_ps(sums + row + at), gradient));
            else
                store_bf16(alone + row + at, gradient);
        }
    }
}

static void backward_unit(const Attention *job, const Segment *s, int64_t key_head, Arena *arena) {
    int64_t all = blocks_of(s->keys) * BLOCK, own = blocks_of(s->queries) * BLOCK, wide = s->wide;
    int64_t group = job->heads / job->key_heads, width = job->width;
    Backward b;
    bf16 **by_key[] = {&b.keys, &b.keys_down, &b.values};
    bf16 **by_query[] = {&b.queries, &b.queries_down, &b.outs, &b.outs_down};
    for (int i = 0; i < 3; i++)
        *by_key[i] = arena_take(arena, all * wide, sizeof(bf16));
    for (int i = 0; i < 4; i++)
        *by_query[i] = arena_take(arena, own * wide, sizeof(bf16));
    b.key_sums = arena_take(arena, all * wide, sizeof(float));
    b.value_sums = arena_take(arena, all * wide, sizeof(float));
    b.lse = arena_take(arena, own, sizeof(float));
    b.delta = arena_take(arena, own, sizeof(float));
    b.shares = arena_take(arena, BLOCK * CHUNK, sizeof(bf16));
    b.slopes = arena_take(arena, BLOCK * CHUNK, sizeof(bf16));
    b.slope_tiles = arena_take(arena, all * CHUNK, sizeof(bf16));
    b.scores = arena_take(arena, BLOCK * BLOCK, sizeof(float));
    b.dots = arena_take(arena, BLOCK * BLOCK, sizeof(float));
    b.down = arena_take(arena, BLOCK * BLOCK, sizeof(float));

    lay_rows(&job->key, key_head, s->key_columns, s->keys, 0, all / BLOCK, width, wide, b.keys);
    lay_rows(&job->value, key_head, s->key_columns, s->keys, 0, all / BLOCK, width, wide, b.values);
    lay_transposed_rows(&job->key, key_head, s->key_columns, s->keys, width, wide, b.keys_down);
    memset(b.key_sums, 0, (size_t)(all * wide) * sizeof(float));
    memset(b.value_sums, 0, (size_t)(all * wide) * sizeof(float));
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
        lay_tiles(&job->query, head, s->query_columns, s->queries, width, wide, b.queries);
        lay_transposed_tiles(&job->query, head, s->query_columns, s->queries, width, wide, b.queries_down);
        lay_tiles(&job->out_gradient, head, s->query_columns, s->queries, width, wide, b.outs);
        lay_transposed_tiles(&job->out_gradient, head, s->query_columns, s->queries, width, wide, b.outs_down);
        lay_statistics(job, s, head, &b);
        for (int64_t chunk = 0; chunk < s->queries; chunk += CHUNK)
            backward_chunk(job, s, head, chunk, &b);
    }
    add_or_store(job, s, key_head, b.key_sums, job->key_gradient, job->key_sums);
    add_or_store(job, s, key_head, b.value_sums, job->value_gradient, job->value_sums);
}

static size_t backward_bytes(const Segment *s) {
    size_t all = (size_t)blocks_of(s->keys) * BLOCK, own = (size_t)blocks_of(s->queries) * BLOCK;
    size_t wide = (size_t)s->wide;
    return 3 * all * wide * 2 + 4 * own * wide * 2 + 2 * all * wide * 4 + 2 * own * 4 + 2 * BLOCK * CHUNK * 2 +
           all * CHUNK * 2 + 3 * BLOCK * BLOCK * 4 + PIECE_ROUNDING;
}

/* ---- all units ---- */

static int unit(const Attention *job, int64_t segment, int64_t key_head, int backward, Arena *arena) {
    Segment s = segment_of(job, segment);
    if (s.queries == 0)
        return 0;
    if (!arena_reserve(arena, backward ? backward_bytes(&s) : forward_bytes(&s)))
        return 1;
    (backward ? backward_unit : forward_unit)(job, &s, key_head, arena);
    return 0;
}

static int all_units(const Attention *job, int backward) {
    int failed = 0;
    /* Segments that add to the same keys follow each other; then only heads are side by side. */
    int64_t together = backward && job->shared ? job->num_segments : 1;
    int64_t num_units = job->num_segments / together * job->key_heads;
#pragma omp parallel reduction(| : failed)
    {
        Arena arena = {NULL, 0, 0};
        products_begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < num_units; number++)
            for (int64_t i = 0; i < together; i++)
                failed |= unit(job, number / job->key_heads * together + i, number % job->key_heads, backward, &arena);
        products_end();
        free(arena.at);
    }
    return failed;
}

/* Both return 0, or 1 for want of memory. */
int burnish_attention_forward(const Attention *job) { return all_units(job, 0); }
int burnish_attention_backward(const Attention *job) { return all_units(job, 1); }
