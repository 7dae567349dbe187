/* Kernels of the local engine for CPUs: attention to segments of context, normalization, rotation, activation, sampling.
 *
 * `lmpipe.engines.kernels.library` compiles this file at first use for the processor at hand; the functions of
 * `lmpipe.engines.kernels` describe the arguments. Vectors are written in the extensions of GCC and Clang, so the same
 * code runs on every processor. A tensor is float32, or bfloat16 where its `bf16` argument is set; sums are float32.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#define HAS_PAIRS 1 /* the processor multiplies pairs of bfloat16 */
#else
#define HAS_PAIRS 0
#endif

#if defined(__AVX512F__)
#define LANES 16 /* numbers in a vector register */
#define WIDE 4   /* vectors of a row that are multiplied together; ROWS * WIDE sums fit into the registers */
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#define WIDE 4
#endif
#define ROWS 6  /* query rows that are multiplied together, so that each loaded key is used as often */
#define TILE 64 /* keys whose scores are computed together; they and their values fit into the first-level cache */
#define MAX_SIZE 256 /* of a head */
#define CHUNK 192    /* query rows that share a transposed tile of keys */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t pair __attribute__((may_alias)); /* two adjacent bfloat16 */

INLINE floats load(const float *p) { return *(const floats *)p; }
INLINE void store(float *p, floats x) { *(floats *)p = x; }

INLINE floats load_bf16(const uint16_t *p) {
    words wide = __builtin_convertvector(*(const halves *)p, words) << 16;
    return (floats)wide;
}

INLINE void store_bf16(uint16_t *p, floats x) { /* rounds to nearest, ties to even */
    words bits = (words)x, rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    words is_nan = (words)(x != x);
    *(halves *)p = __builtin_convertvector(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16, halves);
}

INLINE floats load_as(const void *p, int64_t i, int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE void store_as(void *p, int64_t i, floats x, int bf16) {
    if (bf16) store_bf16((uint16_t *)p + i, x);
    else store((float *)p + i, x);
}

INLINE float scalar_as(const void *p, int64_t i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* e^x up to 87, to 2 units in the last place; 0 below -87, NaN for NaN */
INLINE floats exp_of(floats x) {
    words tiny = (words)(x < -87.0f);
    floats n = x * 1.44269504f, shifted = n + 12582912.0f; /* 1.5 * 2^23 rounds to an integer */
    floats whole = shifted - 12582912.0f;
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    words power = ((words)shifted - 0x4B400000 + 127) << 23;
    return (floats)((words)(p * (floats)power) & ~tiny);
}

INLINE floats larger(floats x, floats y) {
    ints more = x > y;
    return (floats)(((ints)x & more) | ((ints)y & ~more));
}

#define FOLD(name, combined)                                       \
    INLINE float name(floats x) {                                  \
        float a[LANES];                                            \
        store(a, x);                                               \
        for (int half = LANES / 2; half; half /= 2)                \
            for (int i = 0; i < half; i++) a[i] = combined;        \
        return a[0];                                               \
    }
FOLD(sum_of, a[i] + a[i + half])
FOLD(largest_of, a[i] > a[i + half] ? a[i] : a[i + half])

/* c (rows × width vectors) = or += a (rows × depth) · b (depth × width vectors) */
INLINE void product(const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row, float *c, int64_t c_row, int depth,
                    int accumulate, int rows, int width) {
    floats sums[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) sums[r][w] = accumulate ? load(c + r * c_row + w * LANES) : (floats){0};
    for (int d = 0; d < depth; d++) {
        floats right[WIDE]; /* loaded first, so that each number of a is loaded once */
        for (int w = 0; w < width; w++) right[w] = load(b + d * b_row + w * LANES);
        for (int r = 0; r < rows; r++) {
            const floats left = a[r * a_row + d * a_col] - (floats){0};
            for (int w = 0; w < width; w++) sums[r][w] += left * right[w];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) store(c + r * c_row + w * LANES, sums[r][w]);
}

/* The same with bfloat16: a in pairs of adjacent numbers, b in pairs of numbers from adjacent rows. */
#ifdef __AVX512BF16__
INLINE void product_of_pairs(const pair *a, int64_t a_row, int64_t a_col, const pair *b, int64_t b_row, float *c, int64_t c_row,
                             int depth, int accumulate, int rows, int width) {
    floats sums[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) sums[r][w] = accumulate ? load(c + r * c_row + w * LANES) : (floats){0};
    for (int d = 0; d < depth; d++)
        for (int w = 0; w < width; w++) {
            __m512bh right = (__m512bh)_mm512_loadu_si512(b + d * b_row + w * LANES);
            for (int r = 0; r < rows; r++)
                sums[r][w] = (floats)_mm512_dpbf16_ps((__m512)sums[r][w],
                                                      (__m512bh)_mm512_set1_epi32((int)a[r * a_row + d * a_col]), right);
        }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) store(c + r * c_row + w * LANES, sums[r][w]);
}
#endif

#define PRODUCT_CASE(product, n)                                                                       \
    case n:                                                                                            \
        for (; w + WIDE <= vectors; w += WIDE)                                                         \
            product(a, a_row, a_col, b + w * LANES, b_row, c + w * LANES, c_row, depth, accumulate, n, WIDE); \
        for (; w < vectors; w++)                                                                       \
            product(a, a_row, a_col, b + w * LANES, b_row, c + w * LANES, c_row, depth, accumulate, n, 1);    \
        break;

#define MULTIPLY(name, product, number)                                                                        \
    static void name(const number *a, int64_t a_row, int64_t a_col, const number *b, int64_t b_row, float *c, int64_t c_row, \
                     int depth, int accumulate, int rows, int vectors) {                                       \
        int w = 0;                                                                                             \
        switch (rows) {                                                                                        \
            PRODUCT_CASE(product, 6)                                                                           \
            PRODUCT_CASE(product, 5)                                                                           \
            PRODUCT_CASE(product, 4)                                                                           \
            PRODUCT_CASE(product, 3)                                                                           \
            PRODUCT_CASE(product, 2)                                                                           \
            PRODUCT_CASE(product, 1)                                                                           \
        }                                                                                                      \
    }
MULTIPLY(multiply, product, float)
#ifdef __AVX512BF16__
MULTIPLY(multiply_pairs, product_of_pairs, pair)
#endif

typedef struct {
    float keys[MAX_SIZE * TILE], values[MAX_SIZE * TILE]; /* keys (size × TILE), values (TILE × size) */
    float q[CHUNK * MAX_SIZE], out[CHUNK * MAX_SIZE];
    float scores[ROWS * TILE];
    uint16_t weights[ROWS * TILE];
    float highest[CHUNK], total[CHUNK];
} Scratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static int has_key;

static void make_scratch_key(void) { has_key = !pthread_key_create(&scratch_key, free); }

/* Returns memory of this thread, which is kept for its next call and freed when it ends; NULL if there is none. */
static Scratch *scratch_of_thread(void) {
    pthread_once(&scratch_once, make_scratch_key);
    if (!has_key) return NULL;
    Scratch *scratch = pthread_getspecific(scratch_key);
    if (scratch) return scratch;
    scratch = aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
    if (scratch && pthread_setspecific(scratch_key, scratch)) {
        free(scratch);
        return NULL;
    }
    return scratch;
}

typedef struct {
    const void *q, *k, *v;
    void *out;
    float *lse;
    int64_t q_row, q_head, k_unit, k_group, k_token, k_size, v_unit, v_group, v_token, out_row, out_head, lse_row, lse_head;
    int64_t groups, heads, size;
    float scale;
    int bf16, merge;
} Tensors;

INLINE void prefetch(const void *p, int64_t from, int64_t row, int rows, int width, int bf16) {
    const int bytes = bf16 ? 2 : 4;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width * bytes; i += 64) __builtin_prefetch((const char *)p + (from + r * row) * bytes + i);
}

/* Copies a tile of keys as float32 with a key in each column, followed by zeros. */
static void copy_columns(const Tensors *t, int64_t from, int keys, int padded, float *columns) {
    if (t->k_token == 1) {
        for (int d = 0; d < t->size; d++, from += t->k_size) {
            int j = 0;
            for (; j + LANES <= keys; j += LANES) store(columns + d * TILE + j, load_as(t->k, from + j, t->bf16));
            for (; j < keys; j++) columns[d * TILE + j] = scalar_as(t->k, from + j, t->bf16);
        }
    } else {
        for (int j = 0; j < keys; j++, from += t->k_token)
            for (int d = 0; d < t->size; d += LANES) {
                floats key = load_as(t->k, from + d, t->bf16);
                for (int i = 0; i < LANES; i++) columns[(d + i) * TILE + j] = key[i];
            }
    }
    for (int j = keys; j < padded; j++)
        for (int d = 0; d < t->size; d++) columns[d * TILE + j] = 0;
}

INLINE void store_pairs(pair *to, const uint16_t *low, const uint16_t *high) {
    words x = __builtin_convertvector(*(const halves *)low, words);
    if (high) x |= __builtin_convertvector(*(const halves *)high, words) << 16;
    *(words *)to = x;
}

/* Copies a tile of bfloat16 keys with a key in each column and two adjacent numbers of it together, then zeros. */
static void pair_columns(const Tensors *t, int64_t from, int keys, int padded, pair *columns) {
    const uint16_t *k = (const uint16_t *)t->k + from;
    for (int d = 0; d < t->size; d += 2) {
        pair *column = columns + d / 2 * TILE;
        const uint16_t *low = k + d * t->k_size, *high = low + t->k_size;
        int j = 0;
        if (t->k_token == 1)
            for (; j + LANES <= keys; j += LANES) store_pairs(column + j, low + j, high + j);
        for (; j < keys; j++) column[j] = low[j * t->k_token] | (uint32_t)high[j * t->k_token] << 16;
        for (; j < padded; j++) column[j] = 0;
    }
}

/* Copies a tile of bfloat16 values with the numbers of two adjacent tokens together. */
static void pair_rows(const Tensors *t, int64_t from, int keys, pair *rows) {
    const uint16_t *v = (const uint16_t *)t->v + from;
    for (int j = 0; j < keys; j += 2, rows += t->size)
        for (int w = 0; w < t->size; w += LANES) {
            const uint16_t *low = v + j * t->v_token + w;
            store_pairs(rows + w, low, j + 1 < keys ? low + t->v_token : NULL);
        }
}

/* One chunk of the query rows of one segment, for one key head. Row n of the chunk is head n % heads of an entry. */
static void attend_chunk(const Tensors *t, Scratch *s, const int64_t *rows, const int32_t *first, const int32_t *stop,
                         int64_t place, int64_t group, int64_t begin, int count) {
    const int size = (int)t->size, vectors = size / LANES, pairs = HAS_PAIRS && t->bf16;
    int lowest = INT32_MAX, last = 0;
    for (int n = 0; n < count; n++) {
        int64_t entry = (begin + n) / t->heads, head = group * t->heads + (begin + n) % t->heads;
        int64_t from = rows[entry] * t->q_row + head * t->q_head, to = rows[entry] * t->out_row + head * t->out_head;
        float before = t->merge ? t->lse[rows[entry] * t->lse_row + head * t->lse_head] : -INFINITY;
        s->highest[n] = before;
        s->total[n] = before == -INFINITY ? 0.0f : 1.0f;
        for (int w = 0; w < size; w += LANES) {
            if (pairs) memcpy((uint16_t *)s->q + n * size + w, (const uint16_t *)t->q + from + w, 2 * LANES);
            else store(s->q + n * size + w, load_as(t->q, from + w, t->bf16) * t->scale);
            store(s->out + n * size + w, before == -INFINITY ? (floats){0} : load_as(t->out, to + w, t->bf16));
        }
        if (first[entry] < lowest) lowest = first[entry];
        if (stop[entry] > last) last = stop[entry];
    }
    for (int tile = lowest; tile < last; tile += TILE) {
        const int keys = last - tile < TILE ? last - tile : TILE, padded = (keys + LANES - 1) / LANES * LANES;
        const int64_t k_base = place * t->k_unit + group * t->k_group + tile * t->k_token;
        const int64_t v_base = place * t->v_unit + group * t->v_group + tile * t->v_token;
        if (count <= 2 * ROWS) { /* so little work that waiting for memory would dominate it */
            const int64_t next = tile + TILE < last ? k_base + TILE * t->k_token : place * t->k_unit + (group + 1) * t->k_group;
            prefetch(t->v, v_base, t->v_token, keys, size, t->bf16);
            if (t->k_token == 1) prefetch(t->k, next, t->k_size, size, keys, t->bf16);
            else prefetch(t->k, next, t->k_token, keys, size, t->bf16);
        }
        const float *columns = (const float *)t->k + k_base;
        int64_t k_row = t->k_size;
        if (pairs) {
            pair_columns(t, k_base, keys, padded, (pair *)s->keys);
        } else if (t->bf16 || t->k_token != 1 || keys < TILE) {
            copy_columns(t, k_base, keys, padded, s->keys);
            columns = s->keys, k_row = TILE;
        }
        const float *values = (const float *)t->v + v_base;
        int64_t v_row = t->v_token;
        if (pairs) {
            pair_rows(t, v_base, keys, (pair *)s->values);
        } else if (t->bf16) {
            for (int j = 0; j < keys; j++)
                for (int w = 0; w < size; w += LANES)
                    store(s->values + j * size + w, load_as(t->v, v_base + j * t->v_token + w, 1));
            values = s->values, v_row = size;
        }
        for (int block = 0; block < count; block += ROWS) {
            const int height = count - block < ROWS ? count - block : ROWS;
#if HAS_PAIRS
            if (pairs) {
                multiply_pairs((pair *)s->q + block * size / 2, size / 2, 1, (pair *)s->keys, TILE, s->scores, TILE,
                               size / 2, 0, height, padded / LANES);
                for (int i = 0; i < height * TILE; i += LANES) store(s->scores + i, load(s->scores + i) * t->scale);
            } else
#endif
                multiply(s->q + block * size, size, 1, columns, k_row, s->scores, TILE, size, 0, height, padded / LANES);
            for (int r = 0; r < height; r++) {
                float *scores = s->scores + r * TILE;
                const int64_t entry = (begin + block + r) / t->heads;
                const int low = first[entry] - tile, high = stop[entry] - tile;
                if (low > 0 || high < padded)
                    for (int j = 0; j < padded; j++)
                        if (j < low || j >= high) scores[j] = -INFINITY;
                floats most = load(scores);
                for (int w = LANES; w < padded; w += LANES) most = larger(load(scores + w), most);
                const float before = s->highest[block + r], found = largest_of(most);
                const float highest = found > before ? found : before;
                if (highest == -INFINITY) { /* no key of this tile counts, or all scores that do are NaN */
                    for (int j = 0; j < padded; j++)
                        if (scores[j] != scores[j]) s->total[block + r] = NAN;
                    memset(scores, 0, sizeof(float) * padded);
                    continue;
                }
                const float shrink = highest == before ? 1.0f : expf(before - highest);
                floats sum = {0};
                for (int w = 0; w < padded; w += LANES) {
                    floats weight = exp_of(load(scores + w) - highest);
                    sum += weight;
                    store(scores + w, weight);
                }
                s->total[block + r] = s->total[block + r] * shrink + sum_of(sum);
                s->highest[block + r] = highest;
                if (shrink != 1.0f)
                    for (int w = 0; w < size; w += LANES) {
                        float *out = s->out + (block + r) * size + w;
                        store(out, load(out) * shrink);
                    }
            }
#if HAS_PAIRS
            if (pairs) {
                for (int i = 0; i < height * TILE; i += LANES) store_bf16(s->weights + i, load(s->scores + i));
                multiply_pairs((pair *)s->weights, TILE / 2, 1, (pair *)s->values, size, s->out + block * size, size,
                               (keys + 1) / 2, 1, height, vectors);
            } else
#endif
                multiply(s->scores, TILE, 1, values, v_row, s->out + block * size, size, keys, 1, height, vectors);
        }
    }
    for (int n = 0; n < count; n++) {
        int64_t entry = (begin + n) / t->heads, head = group * t->heads + (begin + n) % t->heads;
        const float total = s->total[n], share = total == 0 ? 0.0f : 1.0f / total; /* NaN stays NaN */
        for (int w = 0; w < size; w += LANES)
            store_as(t->out, rows[entry] * t->out_row + head * t->out_head + w, load(s->out + n * size + w) * share,
                     t->bf16);
        t->lse[rows[entry] * t->lse_row + head * t->lse_head] = total == 0 ? -INFINITY : s->highest[n] + logf(total);
    }
}

/* A segment is three numbers: its first entry, its number of entries, and its place in the keys and values, which are
 * `k_unit` and `v_unit` apart. Returns 1 if there is no memory. */
int attention(const void *q, const void *k, const void *v, void *out, float *lse, const int64_t *strides,
              const int64_t *segments, int64_t count, const int64_t *rows, const int32_t *first, const int32_t *stop,
              int64_t groups, int64_t heads, int64_t size, float scale, int bf16, int merge) {
    const int64_t *n = strides;
    Tensors t = {q,    k,    v,    out,  lse,  n[0],  n[1],   n[2],  n[3], n[4],  n[5], n[6],
                 n[7], n[8], n[9], n[10], n[11], n[12], groups, heads, size, scale, bf16, merge};
    int64_t pieces = 0;
    for (int64_t n = 0; n < count; n++) pieces += (segments[3 * n + 1] * heads + CHUNK - 1) / CHUNK;
    int64_t (*of)[3] = malloc(sizeof(int64_t[3]) * (pieces ? pieces : 1));
    if (!of) return 1;
    int64_t piece = 0;
    for (int64_t n = 0; n < count; n++)
        for (int64_t begin = 0; begin < segments[3 * n + 1] * heads; begin += CHUNK) {
            int64_t left = segments[3 * n + 1] * heads - begin;
            of[piece][0] = n, of[piece][1] = begin, of[piece][2] = left < CHUNK ? left : CHUNK, piece++;
        }
    int failed = 0;
#pragma omp parallel if (pieces * groups > 1)
    {
        Scratch *scratch = scratch_of_thread();
        if (!scratch)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < pieces * groups; n++) {
            if (!scratch) continue;
            const int64_t *p = of[n / groups], *segment = segments + 3 * p[0];
            attend_chunk(&t, scratch, rows + segment[0], first + segment[0], stop + segment[0], segment[2], n % groups,
                         p[1], (int)p[2]);
        }
    }
    free(of);
    return failed;
}

/* residual += delta (if any); out = residual / rms(residual) * weight */
void add_rms_norm(float *residual, const void *delta, int64_t delta_row, int delta_bf16, const float *weight, float eps,
                  void *out, int out_bf16, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        float *x = residual + r * size;
        floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            floats value = load(x + i);
            if (delta) {
                value += load_as(delta, r * delta_row + i, delta_bf16);
                store(x + i, value);
            }
            squares += value * value;
        }
        const float scale = 1.0f / sqrtf(sum_of(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            store_as(out, r * size + i, load(x + i) * scale * load(weight + i), out_bf16);
    }
}

/* Rotates the first `heads` heads of each row in place; cosines and sines have `size` values a row. */
void rotate(void *x, int64_t row, int bf16, const float *cosines, const float *sines, int64_t rows, int64_t heads,
            int64_t size) {
#pragma omp parallel for if (rows * heads * size > 32768)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < size / 2; i += LANES) {
                const int64_t low = r * row + h * size + i, high = low + size / 2, c = r * size + i;
                floats a = load_as(x, low, bf16), b = load_as(x, high, bf16);
                store_as(x, low, a * load(cosines + c) - b * load(sines + c), bf16);
                store_as(x, high, b * load(cosines + c + size / 2) + a * load(sines + c + size / 2), bf16);
            }
}

/* out = silu(gate) * up */
void silu_mul(const void *gate, int64_t gate_row, const void *up, int64_t up_row, void *out, int bf16, int64_t rows,
              int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES) {
            floats x = load_as(gate, r * gate_row + i, bf16), y = load_as(up, r * up_row + i, bf16);
            floats bounded = larger(x, (floats){0} - 87.0f);
            store_as(out, r * size + i, x / (1.0f + exp_of(-bounded)) * y, bf16);
        }
}

/* Writes row r of x, (rows × groups × size), to cache[r, :, positions[r], :]. */
void append(const void *x, int64_t row, int64_t group, void *cache, int64_t slot, int64_t cache_group, int64_t token,
            int64_t unit, const int64_t *positions, int64_t rows, int64_t groups, int64_t size, int64_t bytes) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const char *from = (const char *)x + (r * row + g * group) * bytes;
            char *to = (char *)cache + (r * slot + g * cache_group + positions[r] * token) * bytes;
            if (unit == 1) memcpy(to, from, size * bytes);
            else if (bytes == 4)
                for (int64_t i = 0; i < size; i++) ((uint32_t *)to)[i * unit] = ((const uint32_t *)from)[i];
            else
                for (int64_t i = 0; i < size; i++) ((uint16_t *)to)[i * unit] = ((const uint16_t *)from)[i];
        }
}

/* The largest number of each row and its index; a NaN counts as the largest, as in PyTorch. */
void argmax(const float *x, int64_t row, float *highest, int64_t *index, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * row;
        floats most = (floats){0} - INFINITY, odd = {0};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            floats value = load(from + i);
            most = larger(value, most);
            odd += value - value; /* NaN if the value is NaN or infinite */
        }
        float best = largest_of(most);
        int strange = sum_of(odd) != 0.0f;
        for (; i < size; i++) {
            best = from[i] > best ? from[i] : best;
            strange |= !(from[i] - from[i] == 0.0f);
        }
        int64_t found = -1;
        if (strange)
            for (i = 0; i < size && found < 0; i++)
                if (from[i] != from[i]) found = i;
        for (i = 0; i < size && found < 0; i++)
            if (from[i] == best) found = i;
        index[r] = found, highest[r] = from[found];
    }
}

#define DRAWN 512 /* numbers whose weights are added together; a multiple of LANES */

/* e^((x - highest) / temperature) of up to DRAWN numbers; returns their sum */
static float weights_of(const float *x, int64_t count, float highest, float temperature, float *weights) {
    floats sum = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats weight = exp_of((load(x + i) - highest) / temperature);
        store(weights + i, weight);
        sum += weight;
    }
    float total = sum_of(sum);
    for (; i < count; i++) {
        weights[i] = expf((x[i] - highest) / temperature);
        total += weights[i];
    }
    return total;
}

/* The first index of each row at which the cumulative weights exceed a share of all weights; see weights_of. */
void draw(const float *x, int64_t row, const float *highest, const float *temperatures, const double *shares, int64_t *index,
          int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * row;
        float weights[DRAWN];
        double total = 0, before = 0;
        for (int64_t i = 0; i < size; i += DRAWN)
            total += weights_of(from + i, size - i < DRAWN ? size - i : DRAWN, highest[r], temperatures[r], weights);
        double point = shares[r] * total;
        int64_t found = -1;
        for (int64_t i = 0; i < size && found < 0; i += DRAWN) {
            int64_t count = size - i < DRAWN ? size - i : DRAWN;
            double after = before + weights_of(from + i, count, highest[r], temperatures[r], weights);
            if (!(after > point)) {
                before = after;
                continue;
            }
            int64_t likely = count - 1; /* rounding may end the sum just below the point: then the last with a weight */
            for (int64_t j = 0; j < count && found < 0; j++) {
                before += weights[j];
                if (weights[j] > 0) likely = j;
                if (before > point) found = i + j;
            }
            if (found < 0) found = i + likely;
        }
        index[r] = found < 0 ? size - 1 : found; /* of NaN */
    }
}

/* ---- gradients ---- */

#define BLOCK 48 /* query rows whose gradients are computed together */

typedef struct {
    float keys[TILE * MAX_SIZE], key_columns[TILE * MAX_SIZE], value_columns[TILE * MAX_SIZE];
    float key_gradients[TILE * MAX_SIZE], value_gradients[TILE * MAX_SIZE];
    float q[BLOCK * MAX_SIZE], gradients[BLOCK * MAX_SIZE], q_gradients[BLOCK * MAX_SIZE];
    float weights[BLOCK * TILE], slopes[BLOCK * TILE];
} BackwardScratch;
_Static_assert(sizeof(BackwardScratch) <= sizeof(Scratch), "both use the memory of scratch_of_thread");

/* c (rows × vectors) += a (rows × depth) · b (depth × vectors), for any number of rows */
static void multiply_rows(const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row, float *c,
                          int64_t c_row, int depth, int accumulate, int rows, int vectors) {
    for (int r = 0; r < rows; r += ROWS)
        multiply(a + r * a_row, a_row, a_col, b, b_row, c + r * c_row, c_row, depth, accumulate,
                 rows - r < ROWS ? rows - r : ROWS, vectors);
}

/* The gradients of one segment, for one key head: `d` is (tokens × numbers), as q, k and v of a token side by side. */
static void segment_gradients(const Tensors *t, BackwardScratch *s, const void *out_gradient, const float *deltas,
                              float *d, int64_t d_row, const int64_t *rows, const int32_t *first, const int32_t *stop,
                              int64_t place, int64_t group, int64_t entries) {
    const int size = (int)t->size, vectors = size / LANES, heads = (int)t->heads;
    const int64_t q_numbers = t->groups * heads * size, kv_numbers = t->groups * size, count = entries * heads;
    int lowest = INT32_MAX, last = 0;
    for (int64_t n = 0; n < entries; n++) {
        if (first[n] < lowest) lowest = first[n];
        if (stop[n] > last) last = stop[n];
    }
    for (int tile = lowest; tile < last; tile += TILE) {
        const int keys = last - tile < TILE ? last - tile : TILE, padded = (keys + LANES - 1) / LANES * LANES;
        const int64_t k_from = place * t->k_unit + group * t->k_group + tile * t->k_token;
        const int64_t v_from = place * t->v_unit + group * t->v_group + tile * t->v_token;
        Tensors values = *t; /* the columns of values are copied like those of keys */
        values.k = t->v, values.k_token = t->v_token, values.k_size = 1;
        copy_columns(t, k_from, keys, padded, s->key_columns);
        copy_columns(&values, v_from, keys, padded, s->value_columns);
        for (int j = 0; j < padded; j++)
            for (int w = 0; w < size; w += LANES)
                store(s->keys + j * size + w,
                      j < keys ? load_as(t->k, k_from + j * t->k_token + w, t->bf16) : (floats){0});
        memset(s->key_gradients, 0, sizeof(float) * padded * size);
        memset(s->value_gradients, 0, sizeof(float) * padded * size);
        for (int64_t begin = 0; begin < count; begin += BLOCK) {
            const int height = count - begin < BLOCK ? (int)(count - begin) : BLOCK;
            int used = 0;
            for (int n = 0; n < height; n++) {
                const int64_t entry = (begin + n) / heads, head = group * heads + (begin + n) % heads;
                used |= first[entry] < tile + keys && stop[entry] > tile;
                for (int w = 0; w < size; w += LANES) {
                    store(s->q + n * size + w,
                          load_as(t->q, rows[entry] * t->q_row + head * t->q_head + w, t->bf16) * t->scale);
                    store(s->gradients + n * size + w,
                          load_as(out_gradient, rows[entry] * t->out_row + head * t->out_head + w, t->bf16));
                }
            }
            if (!used) continue;
            multiply_rows(s->q, size, 1, s->key_columns, TILE, s->weights, TILE, size, 0, height, padded / LANES);
            multiply_rows(s->gradients, size, 1, s->value_columns, TILE, s->slopes, TILE, size, 0, height,
                          padded / LANES);
            for (int n = 0; n < height; n++) {
                const int64_t entry = (begin + n) / heads, head = group * heads + (begin + n) % heads;
                const int low = first[entry] - tile, high = stop[entry] - tile;
                const float lse = t->lse[rows[entry] * t->lse_row + head * t->lse_head];
                const float delta = deltas[rows[entry] * t->lse_row + head * t->lse_head];
                float *weights = s->weights + n * TILE, *slopes = s->slopes + n * TILE;
                for (int w = 0; w < padded; w += LANES) {
                    floats weight = exp_of(load(weights + w) - lse);
                    store(weights + w, weight);
                    store(slopes + w, weight * (load(slopes + w) - delta));
                }
                if (low > 0 || high < padded)
                    for (int j = 0; j < padded; j++)
                        if (j < low || j >= high) weights[j] = slopes[j] = 0;
            }
            multiply_rows(s->weights, 1, TILE, s->gradients, size, s->value_gradients, size, height, 1, keys, vectors);
            multiply_rows(s->slopes, 1, TILE, s->q, size, s->key_gradients, size, height, 1, keys, vectors);
            multiply_rows(s->slopes, TILE, 1, s->keys, size, s->q_gradients, size, keys, 0, height, vectors);
            for (int n = 0; n < height; n++) {
                const int64_t entry = (begin + n) / heads, head = group * heads + (begin + n) % heads;
                float *to = d + rows[entry] * d_row + head * size;
                for (int w = 0; w < size; w += LANES)
                    store(to + w, load(to + w) + load(s->q_gradients + n * size + w) * t->scale);
            }
        }
        for (int j = 0; j < keys; j++) {
            float *to = d + (place + tile + j) * d_row + q_numbers + group * size;
            for (int w = 0; w < size; w += LANES) {
                store(to + w, load(to + w) + load(s->key_gradients + j * size + w));
                store(to + kv_numbers + w, load(to + kv_numbers + w) + load(s->value_gradients + j * size + w));
            }
        }
    }
}

/* Adds the gradients of q, k and v to d; `deltas` is the sum of output times gradient of each token and head. */
int attention_backward(const void *q, const void *k, const void *v, const void *out_gradient, const float *lse,
                       const float *deltas, float *d, int64_t d_row, const int64_t *strides, const int64_t *segments,
                       int64_t count, const int64_t *rows, const int32_t *first, const int32_t *stop, int64_t groups,
                       int64_t heads, int64_t size, float scale, int bf16) {
    const int64_t *n = strides;
    Tensors t = {q,    k,    v,    NULL, (float *)lse, n[0],  n[1],   n[2],  n[3], n[4],  n[5], n[6],
                 n[7], n[8], n[9], n[10], n[11], n[12], groups, heads, size, scale, bf16, 0};
    int failed = 0;
#pragma omp parallel if (count * groups > 1)
    {
        BackwardScratch *scratch = (BackwardScratch *)scratch_of_thread();
        if (!scratch)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * groups; i++) {
            if (!scratch) continue;
            const int64_t *segment = segments + 3 * (i / groups);
            segment_gradients(&t, scratch, out_gradient, deltas, d, d_row, rows + segment[0], first + segment[0],
                              stop + segment[0], segment[2], i % groups, segment[1]);
        }
    }
    return failed;
}

/* Adds the gradient of the input of add_rms_norm to `gradient`, given that of its output; copies the sum to `delta`. */
void rms_norm_backward(const float *residual, const float *weight, float eps, const void *out_gradient, int bf16,
                       float *gradient, void *delta, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = residual + r * size;
        floats squares = {0}, products = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            floats value = load(x + i), slope = load_as(out_gradient, r * size + i, bf16) * load(weight + i);
            squares += value * value;
            products += value * slope;
        }
        const float scale = 1.0f / sqrtf(sum_of(squares) / size + eps);
        const float common = sum_of(products) / size * scale * scale * scale;
        for (int64_t i = 0; i < size; i += LANES) {
            floats slope = load_as(out_gradient, r * size + i, bf16) * load(weight + i);
            floats total = load(gradient + r * size + i) + slope * scale - load(x + i) * common;
            store(gradient + r * size + i, total);
            if (delta) store_as(delta, r * size + i, total, bf16);
        }
    }
}

/* The gradients of gate and up, side by side in rows of 2 * size numbers, as gate and up are. */
void silu_mul_backward(const void *gate_up, const void *out_gradient, void *gradients, int bf16, int64_t rows,
                       int64_t size) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t gate = 2 * r * size + i, up = gate + size;
            floats x = load_as(gate_up, gate, bf16), y = load_as(gate_up, up, bf16);
            floats slope = load_as(out_gradient, r * size + i, bf16);
            floats bounded = (floats)(((ints)x & (x > -87.0f)) | ((ints)(x - x - 87.0f) & ~(x > -87.0f)));
            floats sigmoid = 1.0f / (1.0f + exp_of(-bounded));
            store_as(gradients, gate, slope * y * sigmoid * (1.0f + x * (1.0f - sigmoid)), bf16);
            store_as(gradients, up, slope * x * sigmoid, bf16);
        }
}
