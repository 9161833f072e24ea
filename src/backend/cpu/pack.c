#include <string.h>

#include "backend/cpu/internal.h"
#include "base/half.h"

cpu_fmt cpu_fmt_of(q_type t, int64_t n_col) {
    switch (t) {
    case Q_F16:
        return CPU_F16;
    case Q_BF16:
        return CPU_BF16;
    case Q_Q8_0:
    case Q_Q4_0: /* both are an f16 scale and integers of at most 8 bits per 32 */
    case Q_Q5_0:
        return CPU_I8;
    case Q_MXFP4:
        return CPU_MX4;
    case Q_Q4_K:
        return n_col % 256 ? CPU_F32 : CPU_Q4K;
    case Q_Q6_K:
        return n_col % 256 ? CPU_F32 : CPU_Q6K;
    default:
        return CPU_F32;
    }
}

static uint16_t load16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void pack_floats(const q_traits *src, const uint8_t *row, int r, int64_t n_col, float *v, float *panel) {
    src->unpack(row, v, (size_t)n_col);
    for (int64_t k = 0; k < n_col; k++)
        panel[k * 16 + r] = v[k];
}

static void pack_half(const uint8_t *row, int r, int64_t n_col, uint16_t *panel) {
    for (int64_t k = 0; k < n_col; k++)
        panel[k * 16 + r] = load16(row + k * 2);
}

static void pack_bf16(const uint8_t *row, int r, int64_t n_col, uint16_t *panel) {
    for (int64_t k = 0; k < n_col; k++)
        panel[k / 2 * 32 + r * 2 + k % 2] = load16(row + k * 2);
}

/* The 32 integers and the scale of a block of the types that fit CPU_I8 without loss. */
static uint16_t block_ints(q_type t, const uint8_t *b, int8_t *v) {
    if (t == Q_Q8_0) {
        memcpy(v, b + 2, 32);
        return load16(b);
    }
    for (int i = 0; i < 16; i++) {
        int lo = 0, hi = 0;
        if (t == Q_Q5_0) {
            uint32_t high = (uint32_t)load16(b + 2) | (uint32_t)load16(b + 4) << 16;
            lo = (int)((b[6 + i] & 15) | (high >> i & 1) << 4) - 16;
            hi = (int)(b[6 + i] >> 4 | (high >> (i + 16) & 1) << 4) - 16;
        } else {
            lo = (b[2 + i] & 15) - 8;
            hi = (b[2 + i] >> 4) - 8;
        }
        v[i] = (int8_t)lo;
        v[i + 16] = (int8_t)hi;
    }
    return load16(b);
}

static void pack_i8(const q_traits *src, const uint8_t *row, int r, int64_t n_col, uint8_t *panel) {
    for (int64_t b = 0; b < n_col / 32; b++) {
        int8_t v[32];
        uint8_t *p = panel + b / 2 * 1088;
        uint16_t scale = block_ints(src->type, row + (size_t)b * src->block_bytes, v);
        memcpy(p + b % 2 * 32 + r * 2, &scale, 2);
        p += 64 + b % 2 * 512 + r * 4;
        for (int g = 0; g < 8; g++) {
            uint32_t four;
            memcpy(&four, v + g * 4, 4);
            four ^= 0x80808080u;
            memcpy(p + g * 64, &four, 4);
        }
    }
}

/* Nibbles of a block of 32 columns, low half first as GGUF's MXFP4 has them (byte i: columns i and i + 16) or two
 * halves of 32 columns in one run of 32 bytes as Q4_K has them: nib[32] in column order. */
static void put_nibbles(const uint8_t *nib, int r, uint8_t *p) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 4; i++)
            p[j * 64 + r * 4 + i] = (uint8_t)(nib[j * 8 + i] | nib[j * 8 + 4 + i] << 4);
}

static void pack_mx4(const uint8_t *row, int r, int64_t n_col, uint8_t *panel) {
    int64_t n64 = cpu_n64(n_col), n32 = n_col / 32;
    for (int64_t b = 0; b < n64; b++) {
        const uint8_t *src[2] = {row + b * 34, b * 2 + 1 < n32 ? row + b * 34 + 17 : NULL};
        int e[2] = {0, 0};
        for (int h = 0; h < 2; h++) {
            bool zero = true;
            for (int i = 1; src[h] && i < 17; i++)
                zero &= (src[h][i] & 0x77) == 0;
            if (zero || src[h][0] < 2) /* nothing there, or below the smallest normal float */
                src[h] = NULL;
            else
                e[h] = src[h][0];
        }
        if (!src[0])
            e[0] = src[1] ? e[1] : 2;
        if (!src[1])
            e[1] = e[0];
        int base = e[0] < e[1] ? e[0] : e[1], top = e[0] < e[1] ? e[1] : e[0];
        for (int h = 0; h < 2; h++) /* more than 15 apart: the smaller is below the rounding of the larger */
            if (top - e[h] > 15) {
                src[h] = NULL;
                e[h] = base = top;
            }
        uint16_t head = (uint16_t)(base << 8 | (e[1] - base) << 4 | (e[0] - base));
        memcpy(panel + b * 32 + r * 2, &head, 2);
        if (top - base > 3)
            panel[n64 * 32] = 1;
        for (int h = 0; h < 2; h++) {
            uint8_t nib[32] = {0};
            for (int i = 0; src[h] && i < 16; i++) {
                nib[i] = src[h][1 + i] & 15;
                nib[i + 16] = src[h][1 + i] >> 4;
            }
            put_nibbles(nib, r, panel + cpu_mx4_head(n64) + b * 512 + h * 256);
        }
    }
}

/* d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles */
static void pack_q4k(const uint8_t *row, int r, int64_t n_col, uint8_t *panel) {
    for (int64_t s = 0; s < n_col / 256; s++, row += 144, panel += 2368) {
        memcpy(panel + r * 2, row, 2);
        memcpy(panel + 32 + r * 2, row + 2, 2);
        const uint8_t *q = row + 4;
        for (int b = 0; b < 8; b++) {
            int sc = b < 4 ? q[b] & 63 : (q[b + 4] & 15) | q[b - 4] >> 6 << 4;
            int mn = b < 4 ? q[b + 4] & 63 : q[b + 4] >> 4 | q[b] >> 6 << 4;
            panel[64 + b * 16 + r] = (uint8_t)sc;
            panel[192 + b * 16 + r] = (uint8_t)mn;
            uint8_t nib[32];
            for (int i = 0; i < 32; i++)
                nib[i] = b % 2 ? row[16 + b / 2 * 32 + i] >> 4 : row[16 + b / 2 * 32 + i] & 15;
            put_nibbles(nib, r, panel + 320 + b * 256);
        }
    }
}

/* 128 bytes of low nibbles, 64 of high bits, 16 scales, d */
static void pack_q6k(const uint8_t *row, int r, int64_t n_col, uint8_t *panel) {
    for (int64_t s = 0; s < n_col / 256; s++, row += 210, panel += 3392) {
        memcpy(panel + r * 2, row + 208, 2);
        for (int b = 0; b < 16; b++)
            panel[64 + b * 16 + r] = row[192 + b];
        for (int b = 0; b < 8; b++) { /* block b of 32 columns: quarter b % 4 of half b / 4 */
            const uint8_t *low = row + b / 4 * 64 + b % 2 * 32, *high = row + 128 + b / 4 * 32;
            uint8_t nib[32];
            for (int i = 0; i < 32; i++)
                nib[i] = b % 4 < 2 ? low[i] & 15 : low[i] >> 4;
            put_nibbles(nib, r, panel + 320 + b * 256);
            for (int i = 0; i < 32; i++) {
                int two = high[i] >> (b % 4 * 2) & 3, g = i / 4;
                panel[320 + 2048 + b * 128 + g / 4 * 64 + r * 4 + i % 4] |= (uint8_t)(two << (g % 4 * 2));
            }
        }
    }
}

void cpu_pack(cpu_fmt f, const q_traits *src, const uint8_t *rows, size_t row_bytes, int n_row, int64_t n_col,
              float *scratch, uint8_t *panel) {
    memset(panel, 0, cpu_panel_bytes(f, n_col));
    if (f == CPU_I8 && n_row < CPU_PANEL) /* a stored byte is weight + 128, though the scale is zero anyway */
        for (int64_t b = 0; b < cpu_n64(n_col); b++)
            memset(panel + b * 1088 + 64, 0x80, 1024);
    if (f == CPU_MX4) /* exponent 2 everywhere: a scale that is a normal float */
        for (int64_t i = 0; i < cpu_n64(n_col) * 16; i++)
            panel[i * 2 + 1] = 2;
    for (int r = 0; r < n_row; r++, rows += row_bytes) {
        switch (f) {
        case CPU_F32:
            pack_floats(src, rows, r, n_col, scratch, (float *)panel);
            break;
        case CPU_F16:
            pack_half(rows, r, n_col, (uint16_t *)panel);
            break;
        case CPU_BF16:
            pack_bf16(rows, r, n_col, (uint16_t *)panel);
            break;
        case CPU_I8:
            pack_i8(src, rows, r, n_col, panel);
            break;
        case CPU_MX4:
            pack_mx4(rows, r, n_col, panel);
            break;
        case CPU_Q4K:
            pack_q4k(rows, r, n_col, panel);
            break;
        default:
            pack_q6k(rows, r, n_col, panel);
            break;
        }
    }
}
