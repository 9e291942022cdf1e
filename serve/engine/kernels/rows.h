// Rows of a matrix of any width, norms and activations: what elementwise.c, linear.c and int8.c share.

#pragma once

#include <math.h>

#include "common.h"

// Below so many numbers a kernel stays on one thread: waking another takes a microsecond or two.
#define WORTH_A_THREAD 32768

#define LINE 64           // bytes of a cache line
#define NEAR (256 << 10)  // bytes of weights up to which the next ones fit a near cache beside them

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vf abs_(vf x) { return (vf)((vi)x & 0x7fffffff); }

// n <= WIDTH numbers; the lanes beyond them are 0, and are not read or written.
INLINE vf load_some(const void *from, ptrdiff_t at, int64_t n, int is_bf16) {
    if (n >= WIDTH) return load_any(from, at, is_bf16);
    float lanes[WIDTH] = {0};
    for (int i = 0; i < n; i++) lanes[i] = read_any(from, at + i, is_bf16);
    return load(lanes);
}

INLINE void store_some(void *to, ptrdiff_t at, int64_t n, vf x, int is_bf16) {
    if (n >= WIDTH) {
        store_any(to, at, x, is_bf16);
        return;
    }
    float lanes[WIDTH];
    store(lanes, x);
    for (int i = 0; i < n; i++) write_any(to, at + i, lanes[i], is_bf16);
}

// ---- norms: (x - mean) * scale * weight + bias ----

typedef struct {
    float mean, scale;
} Moments;

// RMSNorm has mean 0 and scale 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467); LayerNorm the mean and 1 / sqrt(var + eps)
// (arXiv 1607.06450).
INLINE Moments moments(const void *x, int64_t width, float eps, int centred, int is_bf16) {
    float mean = 0;
    if (centred) {
        vf sum = splat(0);
        for (int64_t i = 0; i < width; i += WIDTH) sum += load_some(x, i, width - i, is_bf16);
        mean = sum_lanes(sum) / width;
    }
    vf squares = splat(0);
    for (int64_t i = 0; i < width; i += WIDTH) {
        vf value = load_some(x, i, width - i, is_bf16);
        if (centred) {
            float lanes[WIDTH] = {0};
            for (int64_t j = 0; j < smaller(WIDTH, width - i); j++) lanes[j] = mean;
            value -= load(lanes);
        }
        squares = fma_(value, value, squares);
    }
    return (Moments){mean, 1 / sqrtf(sum_lanes(squares) / width + eps)};
}

INLINE vf normed(vf x, Moments m, const float *weight, const float *bias, int64_t at, int64_t n) {
    vf y = (x - m.mean) * m.scale * load_some(weight, at, n, 0);
    return bias ? y + load_some(bias, at, n, 0) : y;
}

// ---- activations ----

#define LOG2_E 1.44269504f

INLINE vf silu(vf x) { return x / (1.0f + exp2_(x * -LOG2_E)); }

// x / (1 + e^-2u) is 0.5 x (1 + tanh u)
INLINE vf gelu_tanh(vf x) {
    vf u = 0.7978845608f * fma_(x * x * x, splat(0.044715f), x);
    return x / (1.0f + exp2_(u * (-2 * LOG2_E)));
}

// 0.5 x (1 + erf(x / sqrt 2)); erf within 1.5e-7 (Abramowitz and Stegun, 7.1.26)
INLINE vf gelu(vf x) {
    vf z = abs_(x) * 0.7071067812f;
    vf t = 1.0f / fma_(z, splat(0.3275911f), splat(1));
    vf p = splat(1.061405429f);
    p = fma_(p, t, splat(-1.453152027f));
    p = fma_(p, t, splat(1.421413741f));
    p = fma_(p, t, splat(-0.284496736f));
    p = fma_(p, t, splat(0.254829592f));
    vf tail = 0.5f * x * (p * t * exp2_(z * z * -LOG2_E));  // what lies beyond |x|
    vi negative = x < 0.0f;
    return (vf)(((vi)tail & negative) | ((vi)(x - tail) & ~negative));
}

INLINE vf squared_relu(vf x) {
    vi negative = x < 0.0f;
    return (vf)((vi)(x * x) & ~negative);
}
