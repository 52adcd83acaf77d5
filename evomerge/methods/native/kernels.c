/* The elementwise kernels, fused: each operand is read once, in its own number format, and the result is
 * written once. They do the same separate float32 multiplications, additions and comparisons in the same order
 * as the torch operations in `evomerge/methods`, so the bits are the same; compile without contraction into
 * fused multiply-adds (-ffp-contract=off).
 *
 * Work goes block by block through arrays on the stack that stay in the first-level cache.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 256 /* 1 KiB a row: what a merge needs stays in the first-level cache */

/* Called once a block; as copies in every kernel they would only make the compiler slow. */
#define NOINLINE static __attribute__((noinline))

/* Called with constants, so that each combination gets loops of its own. */
#define INLINE static inline __attribute__((always_inline))

enum dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum sparsity { DENSE = 0, TRIM = 1, MASK = 2, BAND = 3 };
enum elect { BY_SUM = 0, BY_COUNT = 1, BY_MAX = 2 };
enum merge { MEAN = 0, WEIGHTED = 1, SUM = 2, MAX = 3 };

typedef struct {
    const void *data;   /* first element */
    int32_t dtype;      /* enum dtype */
    int32_t sparsity;   /* enum sparsity */
    float coefficient;  /* of this operand's term */
    float low;          /* TRIM: entries with |x| <= low become 0; BAND: those with |x| < low or |x| > high */
    uint32_t key0;      /* MASK: key words of hash_v1 */
    uint32_t key1;
    uint64_t limit;     /* MASK: entries whose hash is at least this are multiplied by 0 */
    float weight;       /* its share of a weighted mean's divisor */
    float high;
} operand;

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t rest = (uint32_t)(h & 0x7fff) << 13;
    uint32_t exponent = rest & 0x0f800000;
    uint32_t bits = rest + 0x38000000u;
    float value;
    if (exponent == 0x0f800000) bits += 0x38000000u;
    if (exponent == 0) {
        bits = (rest & 0x007fffff) + 0x38800000u;
        uint32_t magic = 0x38800000u;
        float a, b;
        memcpy(&a, &bits, 4);
        memcpy(&b, &magic, 4);
        a -= b;
        memcpy(&bits, &a, 4);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits & 0x80000000u;
    bits ^= sign;
    uint16_t half;
    if (bits >= 0x47800000u) {
        half = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000u) {
        uint32_t magic = 0x3f000000u;
        float a, b;
        memcpy(&a, &bits, 4);
        memcpy(&b, &magic, 4);
        a += b;
        memcpy(&bits, &a, 4);
        half = (uint16_t)(bits - magic);
    } else {
        uint32_t odd = (bits >> 13) & 1;
        bits += 0xc8000fffu + odd;
        half = (uint16_t)(bits >> 13);
    }
    return half | (uint16_t)(sign >> 16);
}

NOINLINE void widen(const void *restrict data, int32_t dtype, int64_t start, int64_t n, float *restrict out) {
    if (dtype == BF16) {
        const uint16_t *restrict source = (const uint16_t *)data + start;
        uint32_t *restrict bits = (uint32_t *)out;
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)source[i] << 16;
    } else if (dtype == F32) {
        memcpy(out, (const float *)data + start, (size_t)n * 4);
    } else {
        const uint16_t *restrict source = (const uint16_t *)data + start;
        for (int64_t i = 0; i < n; i++) out[i] = half_to_float(source[i]);
    }
}

/* Rounds to nearest, ties to even. Returns whether a value is NaN or infinite after rounding. */
int evomerge_narrow(const float *restrict source, int64_t n, int32_t dtype, void *restrict out) {
    const uint32_t *restrict bits = (const uint32_t *)source;
    uint32_t worst = 0;
    if (dtype == BF16) {
        uint16_t *restrict target = out;
        for (int64_t i = 0; i < n; i++) {
            uint32_t b = bits[i];
            uint32_t nan = (b & 0x7fffffffu) > 0x7f800000u;
            uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
            rounded = nan ? 0x7fc0u : rounded;
            target[i] = (uint16_t)rounded;
            uint32_t magnitude = rounded & 0x7fffu;
            worst = magnitude > worst ? magnitude : worst;
        }
        return worst >= 0x7f80u;
    }
    if (dtype == F32) {
        uint32_t *restrict target = out;
        for (int64_t i = 0; i < n; i++) {
            target[i] = bits[i];
            uint32_t magnitude = bits[i] & 0x7fffffffu;
            worst = magnitude > worst ? magnitude : worst;
        }
        return worst >= 0x7f800000u;
    }
    uint16_t *restrict target = out;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = float_to_half(source[i]);
        target[i] = h;
        uint32_t magnitude = h & 0x7fffu;
        worst = magnitude > worst ? magnitude : worst;
    }
    return worst >= 0x7c00u;
}

static inline uint32_t hash_v1(uint32_t x, uint32_t key0, uint32_t key1) {
    x ^= key0;
    x ^= x >> 17;
    x *= 0xed5ad4bbu;
    x ^= key1;
    x ^= x >> 11;
    x *= 0xac4c1b51u;
    x ^= x >> 15;
    x *= 0x31848babu;
    x ^= x >> 14;
    return x;
}

/* Makes deltas sparse in place; `low` is the element index of the first one, modulo 2^32. */
NOINLINE void sparsify(const operand *o, uint32_t first, int64_t n, float *restrict delta) {
    if (o->sparsity == TRIM) {
        float low = o->low;
        for (int64_t i = 0; i < n; i++) delta[i] = (delta[i] >= -low) & (delta[i] <= low) ? 0.0f : delta[i];
    } else if (o->sparsity == MASK && o->limit < (1ull << 32)) {
        uint32_t limit = (uint32_t)o->limit, key0 = o->key0, key1 = o->key1;
        for (int64_t i = 0; i < n; i++) {
            uint32_t hash = hash_v1(first + (uint32_t)i, key0, key1);
            delta[i] *= hash < limit ? 1.0f : 0.0f;
        }
    } else if (o->sparsity == BAND) {
        float low = o->low, high = o->high;
        for (int64_t i = 0; i < n; i++) {
            float magnitude = fabsf(delta[i]);
            delta[i] *= (magnitude >= low) & (magnitude <= high) ? 1.0f : 0.0f;
        }
    }
}

/* Multiplies by a factor if it is not 1, rounds and stores. Returns whether a value is not finite. */
NOINLINE int finish(float *restrict sum, int64_t n, float factor, int32_t dtype, void *out, int64_t start) {
    if (factor != 1.0f)
        for (int64_t i = 0; i < n; i++) sum[i] = sum[i] * factor;
    return evomerge_narrow(sum, n, dtype, (char *)out + start * (dtype == F32 ? 4 : 2));
}

/* out = sum of c_k x_k, operands in order. */
int evomerge_combine(const operand *operands, int32_t count, int64_t n, float factor, int32_t dtype, void *out) {
    float x[BLOCK], sum[BLOCK];
    int bad = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        if (count == 0) memset(sum, 0, sizeof sum);
        for (int32_t k = 0; k < count; k++) {
            float c = operands[k].coefficient;
            widen(operands[k].data, operands[k].dtype, start, m, x);
            if (k == 0) {
                for (int64_t i = 0; i < m; i++) sum[i] = x[i] * c;
            } else {
                for (int64_t i = 0; i < m; i++) {
                    float term = x[i] * c;
                    sum[i] = sum[i] + term;
                }
            }
        }
        bad |= finish(sum, m, factor, dtype, out, start);
    }
    return bad;
}

/* out = x_0 + sum of c_k sparse(x_k - x_0); operand 0 is the base. */
int evomerge_deltas(const operand *operands, int32_t count, uint32_t first, int64_t n, float factor,
                    int32_t dtype, void *out) {
    float base[BLOCK], x[BLOCK], sum[BLOCK];
    int bad = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        widen(operands[0].data, operands[0].dtype, start, m, base);
        for (int32_t k = 1; k < count; k++) {
            float c = operands[k].coefficient;
            widen(operands[k].data, operands[k].dtype, start, m, x);
            for (int64_t i = 0; i < m; i++) x[i] = x[i] - base[i];
            sparsify(&operands[k], first + (uint32_t)start, m, x);
            if (k == 1) {
                for (int64_t i = 0; i < m; i++) sum[i] = x[i] * c;
            } else {
                for (int64_t i = 0; i < m; i++) {
                    float term = x[i] * c;
                    sum[i] = sum[i] + term;
                }
            }
        }
        for (int64_t i = 0; i < m; i++) sum[i] = sum[i] + base[i];
        bad |= finish(sum, m, factor, dtype, out, start);
    }
    return bad;
}

/* What the entries q_k = c_k sparse(x_k - x_0) of a block add up to, by sign (positive, negative). Comparisons are
 * written so that a NaN goes through to the result, where it is noticed.
 */
typedef struct {
    float sum[2][BLOCK], most[2][BLOCK], count[2][BLOCK], weight[2][BLOCK], lead[BLOCK], base[BLOCK];
} tally;

/* Tallies a block of all operands but the base, which is operand 0. */
INLINE void count_block(const operand *operands, int32_t count, int elect, int merge, uint32_t first,
                        int64_t start, int64_t n, tally *restrict t) {
    float q[BLOCK];
    int by_sum = merge != MAX || elect == BY_SUM;
    int by_count = merge == MEAN || elect == BY_COUNT;
    if (by_sum) memset(t->sum, 0, sizeof t->sum);
    if (by_count) memset(t->count, 0, sizeof t->count);
    if (merge == WEIGHTED) memset(t->weight, 0, sizeof t->weight);
    if (merge == MAX) memset(t->most, 0, sizeof t->most);
    widen(operands[0].data, operands[0].dtype, start, n, t->base);
    for (int32_t k = 1; k < count; k++) {
        float c = operands[k].coefficient, w = operands[k].weight;
        widen(operands[k].data, operands[k].dtype, start, n, q);
        for (int64_t i = 0; i < n; i++) q[i] = q[i] - t->base[i];
        sparsify(&operands[k], first + (uint32_t)start, n, q);
        for (int64_t i = 0; i < n; i++) q[i] = q[i] * c;
        if (elect == BY_MAX && k == 1) memcpy(t->lead, q, (size_t)n * 4);
        for (int64_t i = 0; i < n; i++) {
            float x = q[i];
            if (by_sum) {
                t->sum[0][i] = t->sum[0][i] + (x <= 0.0f ? 0.0f : x);
                t->sum[1][i] = t->sum[1][i] + (x >= 0.0f ? 0.0f : x);
            }
            if (by_count) {
                t->count[0][i] = t->count[0][i] + (x > 0.0f ? 1.0f : 0.0f);
                t->count[1][i] = t->count[1][i] + (x < 0.0f ? 1.0f : 0.0f);
            }
            if (merge == WEIGHTED) {
                t->weight[0][i] = t->weight[0][i] + (x > 0.0f ? w : 0.0f);
                t->weight[1][i] = t->weight[1][i] + (x < 0.0f ? w : 0.0f);
            }
            if (merge == MAX) {
                float up = t->most[0][i], down = t->most[1][i];
                t->most[0][i] = (x > up) | (x != x) ? x : up;
                t->most[1][i] = (x < down) | (x != x) ? x : down;
            }
            if (elect == BY_MAX) {
                float lead = t->lead[i];
                t->lead[i] = (fabsf(lead) >= fabsf(x)) | (lead != lead) ? lead : x;
            }
        }
    }
}

static inline float sign_of(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

INLINE float elected(const tally *t, int elect, int64_t i) {
    if (elect == BY_MAX) return sign_of(t->lead[i]);
    if (elect == BY_COUNT) return sign_of(t->count[0][i] - t->count[1][i]);
    return sign_of(t->sum[0][i] + t->sum[1][i]);
}

INLINE int64_t votes(const operand *operands, int32_t count, int elect, uint32_t first, int64_t n) {
    tally t;
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        count_block(operands, count, elect, SUM, first, start, m, &t);
        int32_t signs[BLOCK], part = 0;
        for (int64_t i = 0; i < m; i++) signs[i] = (int32_t)elected(&t, elect, i);
        for (int64_t i = 0; i < m; i++) part += signs[i];
        total += part;
    }
    return total;
}

/* The sum of all elected signs. */
int64_t evomerge_votes(const operand *operands, int32_t count, int32_t elect, uint32_t first, int64_t n) {
    if (elect == BY_SUM) return votes(operands, count, BY_SUM, first, n);
    if (elect == BY_COUNT) return votes(operands, count, BY_COUNT, first, n);
    return votes(operands, count, BY_MAX, first, n);
}

INLINE int disjoint(const operand *operands, int32_t count, int elect, int merge, float scale, float tie,
                    uint32_t first, int64_t n, float factor, int32_t dtype, void *out) {
    float sum[BLOCK], signs[BLOCK];
    tally t;
    int32_t bad = 0, tied = 0, equal[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        count_block(operands, count, elect, merge, first, start, m, &t);
        for (int64_t i = 0; i < m; i++) signs[i] = elected(&t, elect, i);
        if (elect != BY_MAX) {
            const float *restrict in_favour = elect == BY_COUNT ? t.count[0] : t.sum[0];
            for (int64_t i = 0; i < m; i++) {
                float none = signs[i] == 0.0f ? 1.0f : 0.0f, some = in_favour[i] > 0.0f ? 1.0f : 0.0f;
                equal[i] = (int32_t)(none * some);
                signs[i] = signs[i] + none * some * tie;
            }
            for (int64_t i = 0; i < m; i++) tied |= equal[i];
        }
        for (int64_t i = 0; i < m; i++) {
            float sign = signs[i];
            float positive = merge == MAX ? t.most[0][i] : t.sum[0][i];
            float negative = merge == MAX ? t.most[1][i] : t.sum[1][i];
            float entries = sign > 0.0f ? positive : negative;
            if (merge == MEAN) {
                float more = t.count[0][i], less = t.count[1][i];
                float number = sign > 0.0f ? more : less;
                entries = entries / (number > 1.0f ? number : 1.0f);
            } else if (merge == WEIGHTED) {
                float more = t.weight[0][i], less = t.weight[1][i];
                float divisor = sign > 0.0f ? more : less;
                entries = entries / (divisor == 0.0f ? 1.0f : divisor);
            }
            float merged = entries * (sign == 0.0f ? 0.0f : 1.0f) + 0.0f;
            merged = merged * scale;
            sum[i] = merged + t.base[i];
        }
        bad |= finish(sum, m, factor, dtype, out, start);
    }
    return bad | tied << 1;
}

/* out = x_0 + scale * (the merge of the entries that have the elected sign; `tie` where neither sign wins).
 * Returns bit 0: a value is not finite; bit 1: an element was tied.
 */
int evomerge_disjoint(const operand *operands, int32_t count, int32_t elect, int32_t merge, float scale, float tie,
                      uint32_t first, int64_t n, float factor, int32_t dtype, void *out) {
#define CASE(E, M) \
    if (elect == E && merge == M) \
        return disjoint(operands, count, E, M, scale, tie, first, n, factor, dtype, out);
    CASE(BY_SUM, MEAN)
    CASE(BY_SUM, WEIGHTED)
    CASE(BY_SUM, SUM)
    CASE(BY_SUM, MAX)
    CASE(BY_COUNT, MEAN)
    CASE(BY_COUNT, WEIGHTED)
    CASE(BY_COUNT, SUM)
    CASE(BY_COUNT, MAX)
    CASE(BY_MAX, MEAN)
    CASE(BY_MAX, WEIGHTED)
    CASE(BY_MAX, SUM)
    CASE(BY_MAX, MAX)
#undef CASE
    return 1;
}

#ifdef __AVX512F__
INLINE __m512d double_of(const uint16_t *bfloats) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)bfloats));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}

/* What evomerge_gram does with `steps` for two bfloat16 vectors, as far as whole sets of 8 go; returns how far. */
INLINE int64_t gram_of_two(const uint16_t *restrict x, const uint16_t *restrict y, int64_t n, int64_t lane,
                           int64_t lanes, double *restrict sums) {
    int64_t start = 0;
    while (n - start >= 8 && lanes - lane >= 8) {
        int64_t m = n - start < lanes - lane ? n - start : lanes - lane;
        double *xx = sums + lane, *xd = xx + lanes, *dd = xd + lanes;
        m -= m % 8;
        for (int64_t i = 0; i < m; i += 8) {
            __m512d a = double_of(x + start + i), d = _mm512_sub_pd(double_of(y + start + i), a);
            _mm512_storeu_pd(xx + i, _mm512_add_pd(_mm512_loadu_pd(xx + i), _mm512_mul_pd(a, a)));
            _mm512_storeu_pd(xd + i, _mm512_add_pd(_mm512_loadu_pd(xd + i), _mm512_mul_pd(a, d)));
            _mm512_storeu_pd(dd + i, _mm512_add_pd(_mm512_loadu_pd(dd + i), _mm512_mul_pd(d, d)));
        }
        start += m;
        lane = (lane + m) % lanes;
    }
    return start;
}
#endif

/* Adds the products of vectors to lanes: element i of the chunk belongs to lane (lane + i) mod lanes.
 * `origin` is subtracted from all vectors (or is NULL), in float64; with `steps` vector 0 is subtracted from the
 * others. sums is (pairs, lanes), pairs (i, j) with i <= j in row order.
 */
void evomerge_gram(const operand *vectors, int32_t count, const operand *origin, int32_t steps, int64_t n,
                   int64_t lane, int64_t lanes, double *restrict sums) {
    enum { STEP = 256, MOST = 16 };
    static __thread double rows[MOST][STEP];
    float x[STEP], base[STEP];
    int64_t start = 0;
#ifdef __AVX512F__
    if (count == 2 && steps && !origin && vectors[0].dtype == BF16 && vectors[1].dtype == BF16) {
        start = gram_of_two(vectors[0].data, vectors[1].data, n, lane, lanes, sums);
        lane = (lane + start) % lanes;
    }
#endif
    while (start < n) {
        int64_t m = n - start < STEP ? n - start : STEP;
        if (m > lanes - lane) m = lanes - lane;
        if (origin) widen(origin->data, origin->dtype, start, m, base);
        for (int32_t k = 0; k < count; k++) {
            double *restrict row = rows[k];
            widen(vectors[k].data, vectors[k].dtype, start, m, x);
            if (origin) {
                for (int64_t i = 0; i < m; i++) row[i] = (double)x[i] - (double)base[i];
            } else if (steps && k > 0) {
                for (int64_t i = 0; i < m; i++) row[i] = (double)x[i] - rows[0][i];
            } else {
                for (int64_t i = 0; i < m; i++) row[i] = (double)x[i];
            }
        }
        double *restrict sum = sums + lane;
        for (int32_t a = 0; a < count; a++)
            for (int32_t b = a; b < count; b++, sum += lanes) {
                const double *restrict u = rows[a], *restrict v = rows[b];
                for (int64_t i = 0; i < m; i++) {
                    double product = u[i] * v[i];
                    sum[i] = sum[i] + product;
                }
            }
        start += m;
        lane = (lane + m) % lanes;
    }
}

/* Adds |x - base| to lanes as evomerge_gram does, and |sparse(x - base)| to further ones behind them. */
void evomerge_absolute(const operand *vector, const operand *base, uint32_t first, int64_t n, int64_t lane,
                       int64_t lanes, double *restrict sums) {
    float x[BLOCK], origin[BLOCK];
    for (int64_t start = 0; start < n;) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        if (m > lanes - lane) m = lanes - lane;
        widen(vector->data, vector->dtype, start, m, x);
        widen(base->data, base->dtype, start, m, origin);
        for (int64_t i = 0; i < m; i++) x[i] = x[i] - origin[i];
        double *restrict whole = sums + lane, *restrict kept = sums + lanes + lane;
        for (int64_t i = 0; i < m; i++) whole[i] = whole[i] + (double)fabsf(x[i]);
        sparsify(vector, first + (uint32_t)start, m, x);
        for (int64_t i = 0; i < m; i++) kept[i] = kept[i] + (double)fabsf(x[i]);
        start += m;
        lane = (lane + m) % lanes;
    }
}

/* Where one order statistic is looked for: low <= middle <= high, none negative. */
typedef struct {
    float low, middle, high;
    int64_t above, at_high, at_middle, at_low; /* how many are larger than high, and equal to each of the three */
    float *inside;                             /* those between low and high, without those equal to middle */
    int64_t room, found;                       /* of `inside`, which has space for 16 more than `room` */
} bracket;

/* Files m numbers |x - origin| under a bracket; 16 are read at a time, what is behind the last one must be NaN. */
INLINE void file(float *restrict x, const float *restrict origin, int64_t m, bracket *restrict b) {
    float low = b->low, middle = b->middle, high = b->high;
    float *restrict inside = b->inside + b->found;
    int64_t found = 0;
#ifdef __AVX512F__
    __m512 lowest = _mm512_set1_ps(low), center = _mm512_set1_ps(middle), highest = _mm512_set1_ps(high);
    __m512i one = _mm512_set1_epi32(1), counts[4] = {_mm512_setzero_si512()};
    for (int k = 1; k < 4; k++) counts[k] = counts[0];
    for (int64_t i = 0; i < m; i += 16) {
        __m512 value = _mm512_abs_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(origin + i)));
        __mmask16 between = _mm512_cmp_ps_mask(value, lowest, _CMP_GT_OQ);
        between = _mm512_mask_cmp_ps_mask(between, value, highest, _CMP_LT_OQ);
        between = _mm512_mask_cmp_ps_mask(between, value, center, _CMP_NEQ_UQ);
        /* No branch: whether some are between can hardly be predicted. */
        _mm512_storeu_ps(inside + found, _mm512_maskz_compress_ps(between, value));
        found += __builtin_popcount(between);
        counts[0] = _mm512_mask_add_epi32(counts[0], _mm512_cmp_ps_mask(value, highest, _CMP_GT_OQ), counts[0], one);
        counts[1] = _mm512_mask_add_epi32(counts[1], _mm512_cmp_ps_mask(value, highest, _CMP_EQ_OQ), counts[1], one);
        counts[2] = _mm512_mask_add_epi32(counts[2], _mm512_cmp_ps_mask(value, center, _CMP_EQ_OQ), counts[2], one);
        counts[3] = _mm512_mask_add_epi32(counts[3], _mm512_cmp_ps_mask(value, lowest, _CMP_EQ_OQ), counts[3], one);
    }
    int64_t above = _mm512_reduce_add_epi32(counts[0]), at_high = _mm512_reduce_add_epi32(counts[1]);
    int64_t at_middle = _mm512_reduce_add_epi32(counts[2]), at_low = _mm512_reduce_add_epi32(counts[3]);
#else
    int32_t above = 0, at_high = 0, at_middle = 0, at_low = 0;
    for (int64_t i = 0; i < m; i++) x[i] = fabsf(x[i] - origin[i]);
    for (int64_t i = 0; i < m; i++) {
        above += x[i] > high;
        at_high += x[i] == high;
        at_middle += x[i] == middle;
        at_low += x[i] == low;
    }
    for (int64_t i = 0; i < m; i += 16) {
        int32_t any = 0;
        for (int64_t j = i; j < i + 16; j++) any |= (x[j] > low) & (x[j] < high) & (x[j] != middle);
        if (!any) continue;
        for (int64_t j = i; j < i + 16; j++) {
            inside[found] = x[j];
            found += (x[j] > low) & (x[j] < high) & (x[j] != middle);
        }
    }
#endif
    b->above += above;
    b->at_high += at_high;
    b->at_middle += at_middle;
    b->at_low += at_low;
    b->found += found;
}

/* Files |x_k - base| under a bracket for each vector; `found` becomes -1 if there is no room for what is inside. */
void evomerge_brackets(const operand *base, const operand *vectors, bracket *brackets, int32_t count, int64_t n) {
    float x[BLOCK + 16], origin[BLOCK + 16] = {0};
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        widen(base->data, base->dtype, start, m, origin);
        for (int32_t k = 0; k < count; k++) {
            if (brackets[k].found + m > brackets[k].room) brackets[k].found = -1;
            if (brackets[k].found < 0) continue;
            widen(vectors[k].data, vectors[k].dtype, start, m, x);
            for (int64_t i = m; i < m + 16; i++) x[i] = NAN;
            file(x, origin, m, &brackets[k]);
        }
    }
}

/* Returns entry `at` of n > 0 numbers in ascending order, from 0 on. They lie in [low, high], are not negative, and
 * are overwritten. Radix selection by 12 bits at a time of what distinguishes low from high.
 */
float evomerge_nth(uint32_t *restrict x, int64_t n, int64_t at, float low, float high) {
    static __thread uint32_t counts[2][1 << 12];
    uint32_t first, last;
    memcpy(&first, &low, 4);
    memcpy(&last, &high, 4);
    for (;;) {
        uint32_t span = last - first, bin = 0;
        int shift = 0;
        while (span >> shift >= 1 << 12) shift++;
        memset(counts, 0, sizeof counts);
        int64_t i = 0;
        /* Two tables: equal neighbours do not wait for each other. */
        for (; i + 1 < n; i += 2) {
            counts[0][(x[i] - first) >> shift]++;
            counts[1][(x[i + 1] - first) >> shift]++;
        }
        if (i < n) counts[0][(x[i] - first) >> shift]++;
        for (; at >= (int64_t)counts[0][bin] + counts[1][bin]; bin++) at -= (int64_t)counts[0][bin] + counts[1][bin];
        first += bin << shift;
        if (shift == 0) break;
        last = first + ((1u << shift) - 1);
        int64_t kept = 0;
        for (int64_t j = 0; j < n; j++) {
            uint32_t value = x[j];
            x[kept] = value;
            kept += (value >= first) & (value <= last);
        }
        n = kept;
    }
    float found;
    memcpy(&found, &first, 4);
    return found;
}

/* Counts bits shift ... shift + 15 of |x - base| among the elements whose higher bits are `prefix`. */
void evomerge_digits(const operand *vector, const operand *base, int64_t n, uint32_t prefix, int32_t shift,
                     int64_t *restrict counts) {
    float x[BLOCK], origin[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        widen(vector->data, vector->dtype, start, m, x);
        if (base) {
            widen(base->data, base->dtype, start, m, origin);
            for (int64_t i = 0; i < m; i++) x[i] = x[i] - origin[i];
        }
        uint32_t bits[BLOCK];
        memcpy(bits, x, (size_t)m * 4);
        if (shift == 16) {
            for (int64_t i = 0; i < m; i++) counts[(bits[i] & 0x7fffffffu) >> 16]++;
        } else {
            for (int64_t i = 0; i < m; i++)
                if ((bits[i] & 0x7fffffffu) >> 16 == prefix) counts[bits[i] & 0xffffu]++;
        }
    }
}

/* Writes each entry's place in the ascending order of its row, from 0 to 1; equal entries share the average.
 * x is (rows, d) and not negative, d > 1; scratch has space for 2 d numbers.
 *
 * Radix sort of (bit pattern, index) pairs, by digits of 11 bits in long rows and of 8 in short ones.
 */
void evomerge_places(const float *restrict x, int64_t rows, int64_t d, uint64_t *restrict scratch,
                     double *restrict out) {
    static __thread uint32_t counts[4][2048];
    int width = d < 1024 ? 8 : 11, digits = d < 1024 ? 4 : 3;
    uint32_t mask = (1u << width) - 1;
    for (int64_t row = 0; row < rows; row++, x += d, out += d) {
        uint64_t *from = scratch, *to = scratch + d;
        for (int p = 0; p < digits; p++) memset(counts[p], 0, sizeof(uint32_t) << width);
        for (int64_t i = 0; i < d; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            from[i] = (uint64_t)bits << 32 | (uint64_t)i;
            for (int p = 0; p < digits; p++) counts[p][bits >> (p * width) & mask]++;
        }
        for (int p = 0; p < digits; p++) {
            uint32_t before = 0;
            for (uint32_t digit = 0; digit <= mask; digit++) {
                uint32_t number = counts[p][digit];
                counts[p][digit] = before;
                before += number;
            }
            for (int64_t i = 0; i < d; i++) to[counts[p][from[i] >> (32 + p * width) & mask]++] = from[i];
            uint64_t *swap = from;
            from = to;
            to = swap;
        }
        for (int64_t first = 0; first < d;) {
            int64_t last = first;
            while (last + 1 < d && from[last + 1] >> 32 == from[first] >> 32) last++;
            double place = (double)(first + last) / (double)(2 * (d - 1));
            for (int64_t i = first; i <= last; i++) out[from[i] & 0xffffffffu] = place;
            first = last + 1;
        }
    }
}
