// Sixteen values at a time on AVX-512 with VNNI and BF16: what the kernels are written in.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define UNROLL _Pragma("GCC unroll 6")  // no loop over registers has more steps

namespace {

using Floats = __m512;
using Mask = __mmask16;
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));  // values in bfloat16

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Ints ints(int32_t x) { return (Ints)_mm512_set1_epi32(x); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline Halves load(const uint16_t* p, Mask m) { return (Halves)_mm256_maskz_loadu_epi16(m, p); }
inline Ints load(const int32_t* p, Mask m) { return (Ints)_mm512_maskz_loadu_epi32(m, p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Floats v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
inline void store(uint16_t* p, Halves v, Mask m) { _mm256_mask_storeu_epi16(p, m, (__m256i)v); }
// the lower byte of each
inline void store(uint8_t* p, Ints v, Mask m) { _mm512_mask_cvtepi32_storeu_epi8(p, m, (__m512i)v); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
// b where one of both is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Ints max(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline Ints min(Ints a, Ints b) { return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline Floats abs(Floats v) { return _mm512_abs_ps(v); }
inline Mask below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask nan(Floats v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
inline Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
inline float highest(Floats v) { return _mm512_reduce_max_ps(v); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }

// to the nearest, to the even one of two
inline Floats round(Floats v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Ints to_ints(Floats v) { return (Ints)_mm512_cvtps_epi32(v); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps((__m512i)v); }
inline Halves to_halves(Floats v) { return (Halves)_mm512_cvtneps_pbh(v); }
inline Ints widened(Halves v) { return (Ints)_mm512_cvtepu16_epi32((__m256i)v); }
inline Floats of_bits(Ints v) { return _mm512_castsi512_ps((__m512i)v); }
// p * 2^n, n a whole number; 0 where that is minus infinity
inline Floats scaled(Floats p, Floats n) { return _mm512_scalef_ps(p, n); }

// acc plus, in each, the products of four bytes without sign in x with four that have one in w
inline Ints dot(Ints acc, Ints x, Ints w) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
}
// acc plus, in each, the products of two values in bfloat16, the second first
inline Floats dot(Floats acc, Ints x, Ints w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)(__m512i)x, (__m512bh)(__m512i)w);
}

}  // namespace
