// What lies between the products and the attention of a block: norms, rotation, activations. Inputs and outputs are
// fp32 or bf16 (`is_bf16`), arithmetic is fp32, rounded once at the end.

#include "rows.h"
#include "team.h"

// ---- norm: x [rows, width] -> out [rows, width]; `centred` is LayerNorm, else RMSNorm; bias may be NULL ----

INLINE void norm_rows(const void *x, void *out, const float *weight, const float *bias, int64_t rows, int64_t width,
                      float eps, int centred, int is_bf16) {
    const int64_t bytes = width * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) if (rows * width > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = (const char *)x + row * bytes;
        void *to = (char *)out + row * bytes;
        Moments m = moments(from, width, eps, centred, is_bf16);
        for (int64_t i = 0; i < width; i += WIDTH)
            store_some(to, i, width - i, normed(load_some(from, i, width - i, is_bf16), m, weight, bias, i, width - i),
                       is_bf16);
    }
}

API void heed_norm(const void *x, void *out, const float *weight, const float *bias, int64_t rows, int64_t width,
                   float eps, int64_t centred, int64_t is_bf16) {
    if (centred && is_bf16) norm_rows(x, out, weight, bias, rows, width, eps, 1, 1);
    else if (centred) norm_rows(x, out, weight, bias, rows, width, eps, 1, 0);
    else if (is_bf16) norm_rows(x, out, weight, bias, rows, width, eps, 0, 1);
    else norm_rows(x, out, weight, bias, rows, width, eps, 0, 0);
}

// ---- rotate: the first q_heads + k_heads heads of each row [stride], in place ----
//
// Each head is RMS-normed first where there are weights [dim] (q_norm for the queries, k_norm for the keys), then each
// pair (x_i, x_{i + dim/2}) turns by the row's angle in table [rows, 2, dim] (cosines; sines, negative in the first
// half), where there is a table.

INLINE void rotate_rows(void *x, const float *table, const float *q_norm, const float *k_norm, int64_t rows,
                        int64_t stride, int64_t q_heads, int64_t k_heads, int64_t dim, float eps, int is_bf16) {
    const int64_t heads = q_heads + k_heads, half = dim / 2;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *cos = table + row * 2 * dim, *sin = cos + dim;
        for (int64_t head = 0; head < heads; head++) {
            void *at = (char *)x + (row * stride + head * dim) * (is_bf16 ? 2 : 4);
            const float *weight = head < q_heads ? q_norm : k_norm;
            Moments m = {0, 1};
            if (weight) m = moments(at, dim, eps, 0, is_bf16);
            if (!table) {
                for (int64_t i = 0; i < dim; i += WIDTH)
                    store_some(at, i, dim - i, normed(load_some(at, i, dim - i, is_bf16), m, weight, NULL, i, dim - i),
                               is_bf16);
                continue;
            }
            for (int64_t i = 0; i < half; i += WIDTH) {
                const int64_t n = half - i;
                vf a = load_some(at, i, n, is_bf16), b = load_some(at, half + i, n, is_bf16);
                if (weight) a = normed(a, m, weight, NULL, i, n), b = normed(b, m, weight, NULL, half + i, n);
                vf turned = fma_(b, load_some(sin, i, n, 0), a * load_some(cos, i, n, 0));
                store_some(at, half + i, n, fma_(a, load_some(sin, half + i, n, 0), b * load_some(cos, half + i, n, 0)),
                           is_bf16);
                store_some(at, i, n, turned, is_bf16);
            }
        }
    }
}

void rotate_by_team(void *x, const float *table, const float *q_norm, const float *k_norm, int64_t rows, int64_t stride,
                    int64_t q_heads, int64_t k_heads, int64_t dim, float eps, int is_bf16) {
    if (is_bf16) rotate_rows(x, table, q_norm, k_norm, rows, stride, q_heads, k_heads, dim, eps, 1);
    else rotate_rows(x, table, q_norm, k_norm, rows, stride, q_heads, k_heads, dim, eps, 0);
}

API void heed_rotate(void *x, const float *table, const float *q_norm, const float *k_norm, int64_t rows,
                     int64_t stride, int64_t q_heads, int64_t k_heads, int64_t dim, float eps, int64_t is_bf16) {
#pragma omp parallel if (rows * (q_heads + k_heads) * dim > WORTH_A_THREAD)
    rotate_by_team(x, table, q_norm, k_norm, rows, stride, q_heads, k_heads, dim, eps, is_bf16 != 0);
}

// ---- activate: out [rows, inner] = f(x [rows, inner]); silu(gate) * up is part of the product before it ----

enum { GELU = 1, GELU_TANH, RELU2 };  // places in lm.config.ACTIVATIONS

INLINE void activate_rows(const void *x, void *out, int64_t rows, int64_t inner, int kind, int is_bf16) {
    const int64_t bytes = inner * (is_bf16 ? 2 : 4);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = (const char *)x + row * bytes;
        void *to = (char *)out + row * bytes;
        for (int64_t i = 0; i < inner; i += WIDTH) {
            const int64_t n = inner - i;
            vf y = load_some(from, i, n, is_bf16);
            if (kind == GELU) y = gelu(y);
            else if (kind == GELU_TANH) y = gelu_tanh(y);
            else y = squared_relu(y);
            store_some(to, i, n, y, is_bf16);
        }
    }
}

void activate_by_team(const void *x, void *out, int64_t rows, int64_t inner, int kind, int is_bf16) {
#define CASE(KIND)                                                       \
    case KIND:                                                           \
        if (is_bf16) activate_rows(x, out, rows, inner, KIND, 1);        \
        else activate_rows(x, out, rows, inner, KIND, 0);                \
        break;
    switch (kind) { CASE(GELU) CASE(GELU_TANH) CASE(RELU2) }
#undef CASE
}

API void heed_activate(const void *x, void *out, int64_t rows, int64_t inner, int64_t kind, int64_t is_bf16) {
#pragma omp parallel if (rows * inner > WORTH_A_THREAD / 2)
    activate_by_team(x, out, rows, inner, (int)kind, is_bf16 != 0);
}

// ---- softcap: x = cap tanh(x / cap), fp32, in place ----

API void heed_softcap(float *x, int64_t count, float cap) {
#pragma omp parallel for schedule(static) if (count > WORTH_A_THREAD)
    for (int64_t i = 0; i < count; i += WIDTH) {
        vf y = load_some(x, i, count - i, 0);
        store_some(x, i, count - i, cap - 2 * cap / (1.0f + exp2_(y * (2 * LOG2_E / cap))), 0);
    }
}
