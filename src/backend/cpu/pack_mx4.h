/* backend/cpu/pack_mx4.h: a panel of MXFP4, for the instruction set of the file that includes it. That defines
 * PACK_MX4, VEC_BYTES of its vectors of 32-bit lanes, a lane being a row, and after the types
 * mx4_words(b, w): w[i][q] = word i behind the exponents, of rows q * LANES .. and mx4_narrow(v, out): 16 bits a lane.
 */

typedef int32_t vec __attribute__((vector_size(VEC_BYTES), may_alias));
typedef uint32_t uvec __attribute__((vector_size(VEC_BYTES), may_alias));
enum { LANES = VEC_BYTES / 4, PARTS = CPU_PANEL / LANES };

static inline void mx4_words(const blocks *b, vec (*w)[PARTS]);
static inline void mx4_narrow(vec v, uint8_t *out);

/* Common exponents and shifts of two blocks that have the words w[0..3] and w[4..7] and the exponents e, of rows
 * q * LANES and on. none[h]: rows that have nothing left in block h. */
static inline vec mx4_heads(vec (*w)[PARTS], const int32_t (*e)[CPU_PANEL], int q, vec *none) {
    vec ex[2];
    UNROLL for (int h = 0; h < 2; h++, w += 4) {
        memcpy(&ex[h], e[h] + q * LANES, sizeof ex[h]);
        /* nothing there, or below the smallest normal float */
        none[h] = (((w[0][q] | w[1][q] | w[2][q] | w[3][q]) & 0x77777777) == 0) | (ex[h] < 2);
    }
    /* more than 15 apart: the smaller is below the rounding of the larger */
    none[0] |= ~none[1] & (ex[1] - ex[0] > 15);
    none[1] |= ~none[0] & (ex[0] - ex[1] > 15);
    vec other = (none[1] & 2) | (~none[1] & ex[1]);
    ex[0] = (none[0] & other) | (~none[0] & ex[0]);
    ex[1] = (none[1] & ex[0]) | (~none[1] & ex[1]);
    vec less = ex[0] < ex[1], base = (less & ex[0]) | (~less & ex[1]);
    return base << 8 | (ex[1] - base) << 4 | (ex[0] - base);
}

/* Two groups of 4 columns as the low and high nibbles of a vector, from the low or the high nibbles of their bytes. */
static inline void mx4_pair(uint8_t *p, uvec a, uvec b, bool high) {
    a = high ? (a >> 4 & 0x0f0f0f0f) | (b & 0xf0f0f0f0) : (a & 0x0f0f0f0f) | (b & 0x0f0f0f0f) << 4;
    memcpy(p, &a, sizeof a);
}

PACK_MX4(blocks b, int64_t n_col, uint8_t *panel) {
    int64_t n64 = cpu_n64(n_col);
    uint8_t *head = panel, *p = panel + cpu_mx4_head(n64);
    const uint8_t *next = next_panel(&b);
    int32_t e[2][CPU_PANEL];
    vec wide = {0};
    for (int64_t i = 0; i < n64; i++, head += 32, p += 512) {
        vec w[8][PARTS];
        FETCH(next + i * 544, 544);
        UNROLL for (int h = 0; h < 2; h++, next_block(&b)) {
            if (i * 64 + h * 32 >= n_col)
                b = first_blocks(NULL, 0, 0, 0);
            UNROLL for (int r = 0; r < CPU_PANEL; r++) e[h][r] = b.at[r][0];
            mx4_words(&b, w + 4 * h);
        }
        UNROLL for (int q = 0; q < PARTS; q++) {
            vec none[2], v = mx4_heads(w, e, q, none);
            wide |= v & 0xcc; /* a shift above 3 */
            mx4_narrow(v, head + q * LANES * 2);
            UNROLL for (int j = 0; j < 8; j++) {
                vec(*at)[PARTS] = w + j / 4 * 4 + j % 2 * 2;
                mx4_pair(p + j * 64 + q * VEC_BYTES, (uvec)(at[0][q] & ~none[j / 4]), (uvec)(at[1][q] & ~none[j / 4]),
                         j % 4 >= 2);
            }
        }
    }
    memset(head, 0, (size_t)(panel + cpu_mx4_head(n64) - head));
    for (int r = 0; r < LANES; r++)
        *head |= wide[r] != 0;
}
