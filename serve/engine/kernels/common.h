// What every kernel shares: one vector type for all instruction sets, fused multiply-add, bf16, and 2^x.
//
// Kernels are written once, in the vector extensions of gcc and clang; WIDTH floats are one register. A chain of
// operations on one number is spelled out in order (fma, never left to the compiler), so a result does not depend on
// how many rows were computed beside it. Between instruction sets results may differ in the last bits.
//
// Exported functions are marked API, take plain pointers and sizes, allocate nothing and keep nothing.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)  // unverified: has not run on such a processor
#include <arm_neon.h>
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t bf16;
typedef bf16 vh __attribute__((vector_size(WIDTH * 2)));

INLINE vf splat(float x) { return x - (vf){0}; }  // x - 0 is x, whatever x is: it compiles to a broadcast
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }

INLINE vf load(const float *from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vf x) { memcpy(to, &x, sizeof x); }

INLINE vf fma_(vf a, vf b, vf c) {  // a * b + c, rounded once where the machine can
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf max_(vf a, vf b) {  // b where one is no number
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi greater = a > b;
    return (vf)(((vi)a & greater) | ((vi)b & ~greater));
#endif
}

INLINE vf min_(vf a, vf b) {  // b where one is no number
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    vi less = a < b;
    return (vf)(((vi)a & less) | ((vi)b & ~less));
#endif
}

// ---- bf16: the upper half of a float ----

INLINE float from_bf16(bf16 h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE bf16 to_bf16(float x) {  // to the nearest, ties to even, as torch does
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vf load_bf16(const bf16 *from) {
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
    vh half;
    memcpy(&half, from, sizeof half);
    return (vf)(__builtin_convertvector(half, vi) << 16);
#endif
}

INLINE void store_bf16(bf16 *to, vf x) {
    vi bits = (vi)x;
    vi rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    vi nan = x != x;
    rounded = (rounded & ~nan) | (nan & 0x7fc0);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    vh half = __builtin_convertvector(rounded, vh);
    memcpy(to, &half, sizeof half);
#endif
}

// Either type, chosen by a constant: the branch is gone after inlining. `at` counts numbers, not bytes.
INLINE vf load_any(const void *from, ptrdiff_t at, int is_bf16) {
    return is_bf16 ? load_bf16((const bf16 *)from + at) : load((const float *)from + at);
}

INLINE float read_any(const void *from, ptrdiff_t at, int is_bf16) {
    return is_bf16 ? from_bf16(((const bf16 *)from)[at]) : ((const float *)from)[at];
}

INLINE void store_any(void *to, ptrdiff_t at, vf x, int is_bf16) {
    if (is_bf16)
        store_bf16((bf16 *)to + at, x);
    else
        store((float *)to + at, x);
}

INLINE void write_any(void *to, ptrdiff_t at, float x, int is_bf16) {
    if (is_bf16)
        ((bf16 *)to)[at] = to_bf16(x);
    else
        ((float *)to)[at] = x;
}

// ---- across the lanes of a register, in an order that never changes ----

INLINE float sum_lanes(vf x) {
    float lanes[WIDTH];
    store(lanes, x);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float max_lanes(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[WIDTH];
    store(lanes, x);
    for (int i = 1; i < WIDTH; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
#endif
}

// 2^x, within 2e-7 of the true value: 0 from -127 down, 2^127 from 127 up, exactly 1 at 0; no number stays none.
// x = n + f with n whole and |f| <= 1/2; 2^f is a polynomial (minimax, 1.6e-8), 2^n is added to the exponent.
INLINE vf exp2_(vf x) {
    vf bounded = min_(splat(127.0f), max_(splat(-127.0f), x));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded x in the low bits
    vf shifted = bounded + magic;
    vf f = bounded - (shifted - magic);
    vf p = splat(1.53533620e-4f);
    p = fma_(p, f, splat(1.33988750e-3f));
    p = fma_(p, f, splat(9.61843692e-3f));
    p = fma_(p, f, splat(5.55033237e-2f));
    p = fma_(p, f, splat(2.40226477e-1f));
    p = fma_(p, f, splat(6.93147182e-1f));
    p = fma_(p, f, splat(1.0f));
    return (vf)((vi)p + ((vi)shifted << 23));  // of the magic number's own bits none survives the shift
}
