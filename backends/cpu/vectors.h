// What the kernels share: loads and stores of 16 values, exponentials, activations, codes.

#pragma once

#include <immintrin.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int ROWS = 6;         // pixels (or queries) of a register tile
constexpr int VECTORS = 4;      // vectors of 16 outputs of a register tile
constexpr int WIDE = 64;        // outputs of a register tile: the width of a weight panel
constexpr float LOG2E = 1.4426950408889634f;

inline __mmask16 first(int64_t n) {
    return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(n, 0)) - 1);
}

inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }

inline __m512 load(const at::BFloat16* p, __mmask16 m) {
    const __m256i half = _mm256_maskz_loadu_epi16(m, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(float* p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }

inline void store(at::BFloat16* p, __m512 v, __mmask16 m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}

// 2^x, relative error below 2e-7 where the result is a normal number.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-140.f));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.53401609e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33998830e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61850994e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55032893e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226467e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147206e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// 2^x, relative error below 1e-4: enough for what is rounded to bfloat16.
inline __m512 rough_exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(5.51147376e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.42606344e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93271458e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.99928660e-1f));
    return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 v) {
    const __m512 e = exp2(_mm512_mul_ps(v, _mm512_set1_ps(-LOG2E)));
    return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// GELU by its tanh formula, which is v * sigmoid(2 u)
inline __m512 gelu_tanh(__m512 v) {
    const __m512 cube = _mm512_mul_ps(v, _mm512_mul_ps(v, v));
    const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), v);
    const __m512 e = exp2(_mm512_mul_ps(u, _mm512_set1_ps(-2 * 0.7978845608f * LOG2E)));
    return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// GELU by erf; Abramowitz and Stegun 7.1.26, absolute error of erf below 2e-7
inline __m512 gelu(__m512 v) {
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_mul_ps(_mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f)), t);
    const __m512 e = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2E)));
    const __m512 erf = _mm512_fnmadd_ps(p, e, one);  // of |v|
    const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 signed_erf = _mm512_mask_sub_ps(erf, negative, _mm512_setzero_ps(), erf);
    return _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, signed_erf));
}

enum class Activation { none, silu, gelu, gelu_tanh };

inline __m512 activate(__m512 v, Activation which) {
    switch (which) {
        case Activation::silu: return silu(v);
        case Activation::gelu: return gelu(v);
        case Activation::gelu_tanh: return gelu_tanh(v);
        default: return v;
    }
}

// round(v * inverse) + zero, kept in [0, levels], as bytes
inline void store_codes(
    uint8_t* p, __m512 v, __m512 inverse, __m512i zero, __m512i levels, __mmask16 m) {
    // 2^30 bounds what the conversion can hold; both are far outside of the grid
    v = _mm512_mul_ps(v, inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1073741824.f)), _mm512_set1_ps(1073741824.f));
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), zero);
    q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), levels);
    _mm512_mask_cvtepi32_storeu_epi8(p, m, q);
}

}  // namespace
