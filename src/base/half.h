/* base/half.h: scalar conversions between float and the 16-bit formats, and E8M0 scales. All round to
 * nearest even. Vector code converts in registers and never calls these in a loop. */
#ifndef ORCD_BASE_HALF_H
#define ORCD_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float f32_from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float f32_from_bf16(uint16_t h) { return f32_from_bits((uint32_t)h << 16); }

static inline uint16_t bf16_from_f32(float f) {
    uint32_t u = f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) /* keep NaN a NaN */
        return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f32_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
    if (exp == 31)
        return f32_from_bits(sign | 0x7f800000u | man << 13);
    if (exp == 0) {
        float tiny = (float)man * 0x1p-24f;
        return f32_from_bits(sign | f32_bits(tiny));
    }
    return f32_from_bits(sign | (exp + 112) << 23 | man << 13);
}

static inline uint16_t f16_from_f32(float f) {
    uint32_t u = f32_bits(f), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (mag >= 0x477ff000u) /* rounds to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* subnormal half: let the float adder round */
        float magic = f32_from_bits(mag) + 0.5f;
        return (uint16_t)(sign | (f32_bits(magic) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
}

/* E8M0 (OCP MX 1.0): 2^(e-127); 255 is NaN. */
static inline float f32_from_e8m0(uint8_t e) {
    if (e == 255)
        return f32_from_bits(0x7fc00000u);
    return e ? f32_from_bits((uint32_t)e << 23) : 0x1p-127f;
}

#endif
